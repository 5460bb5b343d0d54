"""The GPUs that kernels are compiled for."""

from __future__ import annotations

import re
from typing import Any

from elision.errors import BadInput

#: What the tests compile for. Other chips of the same makers are accepted as far as Triton knows them.
TARGETS = ("cuda:sm_80", "cuda:sm_90", "hip:gfx942")
_FORM = re.compile(r"cuda:sm_(\d{2,3})|hip:(gfx\d{3,4}[a-z]?)")


def checked(target: str) -> str:
    """The target. Raises BadInput unless it has the form of one."""
    if not _FORM.fullmatch(target):
        raise BadInput(f"unknown target {target!r}; expected one such as {', '.join(TARGETS)}")
    return target


def triton_target(target: str) -> Any:
    """The target as Triton names it."""
    from triton.backends.compiler import GPUTarget

    found = _FORM.fullmatch(checked(target))
    assert found is not None
    return GPUTarget("cuda", int(found[1]), 32) if found[1] else GPUTarget("hip", found[2], 64)
