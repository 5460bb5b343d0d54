"""What native code refuses, so that the host computes it."""

from __future__ import annotations

from elision.ir.value import Value


class NotNative(Exception):
    """This value has no kernel: the host runs its op. The text says why."""


def need(condition: bool, why: str) -> None:
    """Raise NotNative with ``why`` unless the condition holds."""
    if not condition:
        raise NotNative(why)


def floats(*values: Value) -> None:
    """Raise NotNative unless all values are plain float32."""
    need(all(v.tensor.dtype == "f32" and v.tensor.encoding is None for v in values), "operands that are not float32")


def knows(value: Value, names: frozenset[str]) -> None:
    """Raise NotNative if a value has attributes beyond these: a kernel must not leave out what an op was told."""
    unknown = sorted({name for name, _ in value.attrs} - names)
    need(not unknown, f"{value.op} with {', '.join(unknown)}")
