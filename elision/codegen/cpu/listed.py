"""Products of listed pairs, of token and expert, with the panels of that expert.

Encoded panels are decoded in registers for few pairs, and once, into memory that stays in the cache, for many.
"""

from __future__ import annotations

from collections.abc import Callable

from elision.codegen.cpu.decode import PLAIN, Decoder
from elision.codegen.cpu.emit import Fn, Val
from elision.codegen.cpu.kernel import Kernel, Rows
from elision.codegen.cpu.linear import decode_panel, decoding_dot, dot, input_sums, scratch_bytes
from elision.ir.packing import PANEL

TILES = (4, 2, 1)  # pairs of a register tile
MANY = 16  # pairs of an expert from which on its panels are decoded first


class Listed(Rows):
    """Rows by place in the list of pairs: those of the pair's token, or of the pair (``width`` channels each)."""

    def __init__(self, rows: Rows, order: Val, k: int, width: int) -> None:
        super().__init__(rows.fn, rows.base, rows.stride)
        self._order, self._k, self._width = order, k, width

    def pair(self, i: Val) -> tuple[Val, Val]:
        """Token and choice."""
        pair = self.fn.load(self._order, "i64", i)
        return pair // self._k, pair % self._k

    def token(self, i: Val, unit: str = "f32") -> Val:
        token, choice = self.pair(i)
        return self.fn.at(super().token(token, unit), choice * self._width, unit)


class Inputs:
    """Listed rows of ``k`` inputs to products with weights in ``format``. A kernel has operands for what encoded ones need
    (`operands`): sums of inputs, and memory for decoded panels."""

    def __init__(self, kernel: Kernel, format: str, k: int, rows: Listed, order: Val, choices: int, apart: bool) -> None:
        self._fn, self._format, self._k, self._rows = kernel.fn, format, k, rows
        self._decoder = None if format in PLAIN else Decoder(kernel.fn, format, k)
        if self._decoder is not None:
            self._sums, self._scratch = kernel.tensor("sums"), kernel.tensor("scratch").base
            self._listed = Listed(self._sums, order, choices, k // self._decoder.size if apart else 0)

    @staticmethod
    def operands(format: str, k: int, panels: int, rows: int) -> tuple[int, int] | None:
        """Bytes of the sums of a token, which has that many ``rows``, and of a thread's decoded ``panels``; None without."""
        if format in PLAIN:
            return None
        return 4 * rows * Decoder(Fn("", []), format, k).steps, panels * scratch_bytes([format], k)

    def prepare(self, pairs: Val) -> None:
        """Sum the inputs of ``pairs`` pairs, if the weights are shifted."""
        fn, d = self._fn, self._decoder
        if d is not None and d.shifted:
            with fn.loop(0, pairs) as loop:
                input_sums(fn, self._rows.token(loop.index), d.size, self._k // d.size, self._listed.token(loop.index))

    def times(self, panels: list[Val], begin: Val, end: Val, body: Callable[[Val, list[list[Val]]], None]) -> None:
        """``body(place, products[panel][pair])`` for the pairs at places ``begin .. end - 1``, a tile of them at a time."""
        fn, d, k = self._fn, self._decoder, self._k

        def plain(format: str, panels: list[Val], stream: bool) -> None:
            def products(at: Val, n: int) -> None:
                body(at, [dot(fn, format, p, self._rows, at, n, k, stream=stream) for p in panels])

            _tiles(fn, begin, end, products)

        def decoding(at: Val, n: int) -> None:
            assert d is not None
            points = [self._rows.token(at + t) for t in range(n)]
            totals = [self._listed.token(at + t) for t in range(n)] if d.shifted else []
            body(at, [decoding_dot(fn, d, p, points, totals) for p in panels])

        if d is None:
            plain(self._format, panels, True)
            return
        with fn.when(fn.compare(end - begin, "slt", MANY)):
            _tiles(fn, begin, end, decoding)
        with fn.when(fn.compare(end - begin, "sge", MANY)):
            places = [fn.at(self._scratch, i * PANEL * k, "f32") for i in range(len(panels))]
            for panel, place in zip(panels, places, strict=True):
                decode_panel(fn, d, panel, place)
            plain("f32", places, False)


def _tiles(fn: Fn, begin: Val, end: Val, body: Callable[[Val, int], None]) -> None:
    done = begin
    for tile in TILES:
        stop = end - (end - done) % tile if tile > 1 else end
        with fn.loop(done, stop, tile) as loop:
            body(loop.index, tile)
        done = stop
