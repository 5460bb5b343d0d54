"""Triton's interpreter, under which kernels are tested without a GPU (``TRITON_INTERPRET=1`` before triton is imported)."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

#: Whether kernels are interpreted; they may read it.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def _mend() -> None:
    """Its scalars are arrays of one element, which numpy from 2.4 on refuses to turn into integers: bounds of loops would fail."""
    from triton.runtime import interpreter

    patch: Any = interpreter._patch_lang_tensor

    def mended(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = mended  # type: ignore[assignment]


if INTERPRETED.value:
    _mend()
