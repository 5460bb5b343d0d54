"""Processors: what this one can do, and which feature level code is made for."""

from __future__ import annotations

import functools
import platform

from elision.errors import BadInput
from elision.llvm import library, text

#: Feature levels, best first: what a processor needs beyond the level below (x86-64 psABI, section 3.1.1), in LLVM's names.
#: Integer products gain most from VNNI, so it makes a level of its own.
LEVELS = {
    "x86-64-v4+avx512vnni": ("avx512vnni",),
    "x86-64-v4": ("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"),
    "x86-64-v3": ("avx", "avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe", "xsave"),
    "x86-64-v2": ("cx16", "popcnt", "sahf", "sse3", "sse4.1", "sse4.2", "ssse3"),
    "aarch64": ("neon",),
}


@functools.cache
def host_features() -> frozenset[str]:
    """What this processor can do, in LLVM's names."""
    found = text(library().LLVMGetHostCPUFeatures())
    return frozenset(f[1:] for f in found.split(",") if f.startswith("+"))


def needs(level: str) -> tuple[str, ...]:
    """The features of a level and those below it, sorted. Raises BadInput for an unknown level."""
    if level not in LEVELS:
        raise BadInput(f"unknown feature level {level!r}; expected one of {', '.join(LEVELS)}")
    below = [name for name in list(LEVELS)[list(LEVELS).index(level) :] if name.startswith(level.split("-v")[0])]
    return tuple(sorted(f for name in below for f in LEVELS[name]))


def host_level() -> str:
    """The best level of this processor. Raises BadInput if it has none."""
    for level in LEVELS:
        if host_features().issuperset(needs(level)):
            return level
    raise BadInput(f"this processor ({platform.machine()}) is below {', '.join(LEVELS)}: use target='reference'")


def target(level: str) -> tuple[bytes, bytes]:
    """A level as LLVM takes it: the name of a processor, and features beside it."""
    name, _, feature = level.partition("+")
    return b"generic" if name == "aarch64" else name.encode(), f"+{feature}".encode() if feature else b""


def machine() -> str:
    """The kind of processor and the system that code is made for."""
    kind = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
    return f"{kind} {platform.system()}"
