"""How kernels are cut into programs: a small table instead of searching at first use.

Chosen by what the hardware asks for, not measured: enough programs for 132 processors, reads of 16 bytes by a thread, tiles
that leave registers and shared memory (64 KB on gfx942) for more than one program.
"""

from __future__ import annotations

from dataclasses import dataclass

from elision.ir.launch import SHAPES

__all__ = ["SHAPES", "Tile", "attention", "gemv", "heads", "power", "product"]


@dataclass(frozen=True)
class Tile:
    """Tokens or rows ``m``, outputs or entries ``n``, inputs ``k`` of a program; its warps, and loads in flight. Of attention
    ``k`` is how many programs share the entries of a sequence."""

    m: int
    n: int
    k: int = 0
    warps: int = 4
    stages: int = 3


#: Products by the class of shapes, for activations of 2 bytes.
_PRODUCTS = {"few": Tile(16, 32, 128), "some": Tile(64, 64, 64), "many": Tile(128, 128, 64, 8)}
#: With weights that are decoded, which takes registers: larger ones spill.
_DECODED = {"few": Tile(16, 32, 128), "some": Tile(64, 64, 32), "many": Tile(128, 64, 32, 8)}


def power(n: int) -> int:
    """The least power of two that is not less."""
    return 1 << max(n - 1, 0).bit_length()


def gemv(outputs: int, codes: int) -> Tile:
    """Few outputs: smaller programs, so that there are enough of them."""
    return Tile(1, 4 if outputs <= 2048 else 8, min(512, power(codes)))


def product(shape: str, codes: int, itemsize: int, decoded: bool = False) -> Tile:
    """float32 is multiplied outside of tensor cores: smaller tiles."""
    tile = (_DECODED if decoded else _PRODUCTS)[shape]
    if itemsize > 2:
        tile = Tile(min(tile.m, 64), min(tile.n, 32), 32, 4, 2)
    return Tile(tile.m, tile.n, max(16, min(tile.k, power(codes))), tile.warps, tile.stages)


def heads(shape: str, outputs: int, dim: int, whole: bool, codes: int, halves: int, itemsize: int) -> Tile:
    """The projection of heads of ``dim`` channels, from weights of which ``halves`` are in a byte. ``whole``: a program has all
    channels of a head, so there are few programs, which have much in flight each."""
    tile = gemv(outputs, codes) if shape == "one" else product(shape, codes, itemsize)
    if not whole and tile.n <= dim:
        return tile
    n = max(16, power(dim))
    k = (128 if shape == "one" else 64) // halves * 2 // max(2, itemsize)
    warps = 4 if n <= 64 else 16 if shape == "one" else 8
    return Tile(tile.m, n, max(16, min(k, power(codes))), warps, tile.stages)


def attention(shape: str, group: int, single: bool, dim: int, itemsize: int, coded: bool = False) -> Tile:
    """The tile of queries and entries; ``k``: how many programs share the entries of a sequence. ``group``: query heads of a
    cache head, padded; ``single``: a sequence has one token; ``coded``: entries are codes that take some decoding."""
    most = 64 if dim <= 64 else 32  # sums stay in registers
    rows = max(16, group, 0 if single else min(power(SHAPES[shape] or 64) * group, most))
    entries = 64 if dim <= (64 if coded else 128) else 32
    if itemsize > 2:
        rows, entries = max(group, min(rows, 32)), 32
    splits = {"one": 32, "few": 16, "some": 4, "many": 1}[shape]
    return Tile(rows, entries, splits, warps=4, stages=2)
