"""How native code wants weights in memory: panels of rows, so that one vector lane is one output.

A packing is named and invertible; a weight is resident in one form only. A panel is 16 outputs, rows beyond N are zero, and a
thread reads its panels as one sequential stream.

``panel:f32``: a weight ``f32[N, K]`` as ``[N / 16][K][16]``.

``panel:<encoding>``, such as ``panel:Q4_1`` or ``panel:int8(group=32)``: the stored rows of an encoded weight, every bit kept and
none added. ``BF16`` and ``F16``: ``[N / 16][K][16]``. The others: ``[N / 16][K / block]`` blocks, each the heads of 16 outputs
and then runs of weights that share a scale, all without gaps (d, m, s, t, q as in `elision.ir.blocks`; numbers in brackets are
bytes unless typed):

    format                    heads                            weights of a run   a run
    Q8_0, int8(group=n)       d f16[16]                        n                  codes
    int8(group=row)           d f16[16]                        K                  codes
    Q4_1, int4(group=n)       d f16[16], m f16[16]             n                  nibbles
    Q4_0                      d f16[16]                        32                 nibbles
    Q5_0                      d f16[16]                        32                 high, nibbles
    Q5_1                      d f16[16], m f16[16]             32                 high, nibbles
    Q4_K                      d f16[16], m f16[16], [12][16]   32                 nibbles
    Q5_K                      d f16[16], m f16[16], [12][16]   32                 high, nibbles
    Q6_K                      d f16[16], s i8[16 runs][16]     16                 high, nibbles

    codes      i8[run / 4][16][4]: byte (i, o, j) is the code of input 4 i + j of output o, so 32 bytes are four consecutive
               inputs of eight outputs
    nibbles    [run / 8][16][4]: byte (i, o, j) has the code of input 8 i + j in its low, of input 8 i + 4 + j in its high nibble
    high       [16][4]: the byte (o, j) has the bits above the nibble of the inputs 4 i + j of the run, input j lowest: one bit
               for each of the 8 inputs of a run of 32, two for each of the 4 of a run of 16
    [12][16]   the byte (r, o), r < 8: s of run r low, t high nibble (four bits each); the byte (8 + i, o): from the lowest bits
               on the two high bits of s and of t of run 2 i, then of s and of t of run 2 i + 1

Groups of int8 are multiples of 4 there, those of int4 of 8; other rows have no panels.
"""

from __future__ import annotations

from math import prod

import torch

from elision.errors import BadInput
from elision.ir.block_layout import BlockLayout
from elision.ir.panels import PANEL, from_panels, panel_layout, to_panels
from elision.ir.weights import Blocks, WeightEncoding, weight_encoding

__all__ = ["PANEL", "pack", "packing_of", "panel_bytes", "panels", "unpack"]

_FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16}


def panels(rows: int) -> int:
    """Panels that ``rows`` outputs need."""
    return -(-rows // PANEL)


def packing_of(encoding: WeightEncoding | None, k: int) -> str | None:
    """The packing in panels of float32 or encoded weights with rows of ``k``; None if there is none."""
    if encoding is None:
        return "panel:f32"
    plain = isinstance(encoding, Blocks) and encoding.format in _FLOATS
    return f"panel:{encoding}" if plain or panel_layout(encoding, k) is not None else None


def panel_bytes(packing: str, k: int) -> int:
    """Bytes of one panel over ``k`` inputs."""
    encoding = _encoding(packing)
    return PANEL * (4 * k if encoding is None else encoding.row_bytes(k))


def packed_bytes(packing: str, shape: tuple[int, ...]) -> int:
    """Bytes of a weight ``[.., N, K]`` in a packing. Raises BadInput for an unknown packing or a weight of one axis."""
    if len(shape) < 2:
        raise BadInput(f"{packing}: a weight of shape {list(shape)}; expected [.., N, K]")
    *lead, n, k = shape
    return prod(lead) * panels(n) * panel_bytes(packing, k)


def pack(weight: torch.Tensor, packing: str) -> torch.Tensor:
    """The bytes (uint8) of a weight ``f32[.., N, K]``, or of stored rows ``u8[.., N, row bytes]`` of an encoded one, in a
    packing; leading axes (experts) stay outermost."""
    encoding = _encoding(packing)
    *lead, n, size = weight.shape
    weight = weight.float() if encoding is None else weight
    if n % PANEL:
        padded = weight.new_zeros((*lead, panels(n) * PANEL, size))
        padded[..., :n, :] = weight
        weight = padded
    if isinstance(encoding, Blocks) and encoding.format in _FLOATS:
        weight = weight.contiguous().view(_FLOATS[encoding.format])
    elif encoding is not None:
        return to_panels(_layout(encoding, _width(encoding, size)), weight).flatten()
    by_panel = torch.unflatten(weight, -2, (-1, PANEL)).transpose(-1, -2)
    return by_panel.contiguous().view(-1).view(torch.uint8)


def unpack(data: torch.Tensor, packing: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The weight of ``shape [.., N, K]`` again: its numbers, or its stored rows."""
    encoding = _encoding(packing)
    *lead, n, k = shape
    if encoding is None or isinstance(encoding, Blocks) and encoding.format in _FLOATS:
        dtype = torch.float32 if encoding is None else _FLOATS[str(encoding)]
        by_panel = data.view(dtype).view(*lead, panels(n), k, PANEL).transpose(-1, -2)
        rows = by_panel.reshape(*lead, -1, k)[..., :n, :].clone(memory_format=torch.contiguous_format)
        return rows if encoding is None else rows.view(torch.uint8)
    layout = _layout(encoding, k)
    return from_panels(layout, data.view(*lead, panels(n), -1), k // layout.elements)[..., :n, :].contiguous()


def _encoding(packing: str) -> WeightEncoding | None:
    kind, _, format = packing.partition(":")
    if kind != "panel":
        raise BadInput(f"unknown packing {packing!r}; expected panel:f32 or panel:<encoding of weights>")
    return None if format == "f32" else weight_encoding(format)


def _layout(encoding: WeightEncoding, k: int) -> BlockLayout:
    found = panel_layout(encoding, k)
    if found is None:
        raise BadInput(f"rows of {k} weights in {encoding} have no panels; expected groups of whole quads, or blocks of GGUF")
    return found


def _width(encoding: WeightEncoding, row_bytes: int) -> int:
    """The weights of a stored row."""
    if encoding == weight_encoding("int8(group=row)"):
        return row_bytes - 2
    block = encoding.block(0)
    return row_bytes // block.nbytes * block.elements
