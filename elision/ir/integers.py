"""From weights to integer codes with fp16 scales (the formats are described in `elision.ir.weights`)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from elision.errors import BadInput
from elision.ir.blocks import BlockFormat

#: Weights that are encoded at a time: what is computed between stays in a cache.
CHUNK = 1 << 18


def by_group(weight: torch.Tensor, block: BlockFormat, encode: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Rows ``u8[.., row bytes]`` of ``weight [.., width]``, block by block. Raises BadInput for what has no such form."""
    width = block.row_bytes(weight.shape[-1])
    groups = finite(weight.float(), block.name).reshape(-1, block.elements)
    parts = torch.split(groups, max(1, CHUNK // block.elements))
    return torch.cat([encode(part) for part in parts]).reshape(*weight.shape[:-1], width)


def finite(weight: torch.Tensor, name: str) -> torch.Tensor:
    """The weight itself. Raises BadInput where it is infinite or not a number."""
    if not bool(weight.isfinite().all()):
        raise BadInput(f"{name} cannot hold numbers that are not finite or too large; look for the fault in the weights")
    return weight


def encode_int8(w: torch.Tensor) -> torch.Tensor:
    """Groups ``f32[n, size]`` to blocks ``u8[n, 2 + size]``."""
    scale = half_at_least(w.abs().amax(1, keepdim=True) / 127)
    return pack_int8(scale, nearest(w, scale).clamp_(-127, 127))


def pack_int8(scale: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Blocks ``u8[n, 2 + size]`` of fp16 numbers ``scale [n, 1]`` and codes ``[n, size]``."""
    return torch.cat((_bytes(scale), codes.to(torch.int8).view(torch.uint8)), 1)


def encode_int4(w: torch.Tensor) -> torch.Tensor:
    """Groups ``f32[n, size]`` to blocks ``u8[n, 4 + size / 2]``."""
    low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
    minimum = -half_at_least(-low)
    scale = half_at_least((high - minimum) / 15)
    codes = nearest(w - minimum, scale).clamp_(0, 15)
    inexact = (codes * scale + minimum != w).any(1)
    if bool(inexact.any()):
        _find_exact(w, inexact, scale, minimum, codes)
    return pack_int4(scale, minimum, codes)


def pack_int4(scale: torch.Tensor, minimum: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Blocks ``u8[n, 4 + size / 2]`` of fp16 numbers ``scale`` and ``minimum [n, 1]`` and codes ``[n, size]``."""
    nibbles = codes.to(torch.uint8).view(len(codes), 2, -1)
    return torch.cat((_bytes(scale), _bytes(minimum), nibbles[:, 0] | nibbles[:, 1] << 4), 1)


def _find_exact(w: torch.Tensor, open: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor, codes: torch.Tensor) -> None:
    """For groups that hold ``d * q + m`` with fp16 d and m already, but not the codes 0 and 15, put these d, m and q in place.

    The lowest and the highest number of such a group have some codes a < b, which give d and m; all pairs are tried.
    """
    few = w[open].sort(1).values.diff(dim=1).ne(0).sum(1) < 16  # more different numbers cannot be sixteen codes
    left = open.nonzero().flatten()[few]
    for span in range(15, 0, -1):
        for a in range(16 - span):
            if not len(left):
                return
            group = w[left]
            low, high = group.amin(1, keepdim=True), group.amax(1, keepdim=True)
            d = ((high - low) / span).half().float()
            m = (low - d * a).half().float()
            q = nearest(group - m, d).clamp_(0, 15)
            found = (q * d + m == group).all(1)
            done = left[found]
            scale[done], minimum[done], codes[done] = d[found], m[found], q[found]
            left = left[~found]


#: A group whose numbers are all smaller has the scale of this one: nothing divides by zero.
LEAST = 1e-30


def rounded(x: torch.Tensor, group: int) -> torch.Tensor:
    """``x [.., width]`` after a round trip through int8: every ``group`` channels have the scale ``max|x| / 127`` (at least
    ``LEAST / 127``) and the codes ``x * (127 / max|x|)``, rounded to nearest, ties to even. In float32."""
    runs = torch.unflatten(x.float(), -1, (-1, group))
    most = runs.abs().amax(-1, keepdim=True).clamp_min(LEAST)
    codes = torch.round(runs * (torch.full_like(most, 127) / most))  # a number / a tensor would round twice
    return (codes * (most / 127)).flatten(-2).to(x.dtype)


def half_at_least(x: torch.Tensor) -> torch.Tensor:
    """The smallest fp16 number that is not less than each ``x``, widened. Raises BadInput where there is none."""
    found = x.half()
    up = torch.nextafter(found, torch.full_like(found, torch.inf))
    found = finite(torch.where(found.float() < x, up, found), "fp16 scales")
    return found.float()


def nearest(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """round(x / scale), ties to even; 0 where the scale is 0."""
    return torch.where(scale > 0, torch.round(x / torch.where(scale > 0, scale, 1)), 0)


def _bytes(number: torch.Tensor) -> torch.Tensor:
    """fp16 numbers ``[n, 1]`` as bytes ``u8[n, 2]``."""
    return number.half().view(torch.uint8)
