"""Matrix products of tiles."""

from __future__ import annotations

import triton
import triton.language as tl

from elision.codegen.triton.interpreted import INTERPRETED


@triton.jit
def dot(a, b):
    """``a [M, K] @ b [K, N]`` with float32 sums; float32 is multiplied as such, half precision on tensor cores. Triton's
    interpreter keeps bfloat16 as its bits and would multiply these, so there both are widened first, which changes no product."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision="ieee")
