"""Kernels of a mixture of experts: pairs of token and choice listed by expert, and the two products over such lists.

Every expert's panels are read once, as one stream, for all tokens that were sent to it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from elision.codegen.cpu.decode import VP
from elision.codegen.cpu.emit import Fn, Val, vector
from elision.codegen.cpu.expression import evaluate
from elision.codegen.cpu.kernel import Kernel
from elision.codegen.cpu.listed import Inputs, Listed
from elision.ir.packing import PANEL, panel_bytes, panels


@dataclass(frozen=True)
class Experts:
    """What is fixed in the code of the products: ``count`` experts, ``choices`` per token, channels, f and its ``parts``, the
    formats of both weights (f32, or an encoding)."""

    count: int
    choices: int
    width: int
    inner: int
    out: int
    expr: str
    parts: int
    halves: bool
    weighted: str
    biased: bool
    formats: tuple[str, str] = ("f32", "f32")

    @property
    def inputs_up(self) -> tuple[int, int] | None:
        """What `up` needs beside its operands (`elision.codegen.cpu.listed.Inputs.operands`); ``inputs_down`` likewise."""
        return Inputs.operands(self.formats[0], self.width, self.parts if self.halves else 1, 1)

    @property
    def inputs_down(self) -> tuple[int, int] | None:
        return Inputs.operands(self.formats[1], self.inner, 1, self.choices)


def dispatch(name: str, experts: int, k: int) -> Kernel:
    """Pairs ``token * k + choice`` in the order of their experts (``order``); expert e's are ``starts[e] .. starts[e + 1] - 1``.
    A counting sort; every thread keeps its own."""
    kernel = Kernel(name)
    fn = kernel.fn
    axis, index, order, starts = kernel.axis(), kernel.tensor("index"), kernel.tensor("order"), kernel.tensor("starts")
    zero = fn.const(0, "i64")
    with fn.loop(0, experts + 2) as loop:
        fn.store(zero, starts.base, loop.index)

    def each(body: Callable[[Val, Val], None]) -> None:
        with fn.loop(0, axis.count) as tokens:
            chosen = index.token(tokens.index, "i64")
            with fn.loop(0, k) as choices:
                body(fn.load(chosen, "i64", choices.index), tokens.index * k + choices.index)

    def count(expert: Val, pair: Val) -> None:
        fn.store(fn.load(starts.base, "i64", expert + 2) + 1, starts.base, expert + 2)

    def place(expert: Val, pair: Val) -> None:
        at = fn.load(starts.base, "i64", expert + 1)
        fn.store(pair, order.base, at)
        fn.store(at + 1, starts.base, expert + 1)

    each(count)
    with fn.loop(1, experts + 2) as loop:
        fn.store(fn.load(starts.base, "i64", loop.index) + fn.load(starts.base, "i64", loop.index - 1), starts.base, loop.index)
    each(place)
    return kernel


def up(name: str, site: Experts) -> Kernel:
    """``h[pair] = f(up[e] x[token])``, for the panels of this thread."""
    kernel = Kernel(name)
    fn = kernel.fn
    axis = kernel.axis()
    x, gates, order, starts, h = (kernel.tensor(n) for n in ("x", "gates", "order", "starts", "h"))
    weight, bias = kernel.weight("up"), kernel.weight("bias") if site.biased else None
    wide = site.inner * site.parts
    size, per_expert = panel_bytes(f"panel:{site.formats[0]}", site.width), panels(wide)
    own = PANEL if site.halves else PANEL // site.parts  # results that one panel gives
    step = site.inner // PANEL  # panels from one part to the next
    low, high = kernel.part(fn.const(site.inner // own, "i64"))
    rows = Listed(x, order.base, site.choices, 0)
    inputs = Inputs(kernel, site.formats[0], site.width, rows, order.base, site.choices, apart=False)
    inputs.prepare(axis.count * site.choices)
    with fn.loop(low, high) as loop, fn.loop(0, site.count) as experts:
        columns = loop.index * own
        here = [
            fn.at(weight, (experts.index * per_expert + loop.index + i * step) * size)
            for i in range(site.parts if site.halves else 1)
        ]
        shifts = [experts.index * wide + loop.index * PANEL + i * site.inner for i in range(len(here))]

        def write(at: Val, found: list[list[Val]]) -> None:
            for t in range(len(found[0])):
                token, choice = rows.pair(at + t)
                values = [part[t] for part in found]
                if site.weighted == "input":
                    gate = fn.splat(fn.load(gates.token(token), "f32", choice), PANEL)
                    values = [v * gate for v in values]
                if bias is not None:
                    values = [v + fn.load(bias, VP, shift, "f32") for v, shift in zip(values, shifts, strict=True)]
                result = evaluate(fn, site.expr, values if site.halves else _apart(fn, values[0]))
                fn.store(result, fn.at(h.token(token), choice * site.inner, "f32"), columns, "f32")

        begin, end = (fn.load(starts.base, "i64", experts.index + i) for i in range(2))
        inputs.times(here, begin, end, write)
    return kernel


def _apart(fn: Fn, panel: Val) -> list[Val]:
    """The channels of a panel whose two parts are interleaved."""
    orders = (", ".join(str(2 * i + part) for i in range(PANEL // 2)) for part in range(2))
    half = vector("f32", PANEL // 2)
    return [fn.emit(f"vector.shuffle {panel.name}, {panel.name} [{order}] : {VP}, {VP}", half) for order in orders]


def down(name: str, site: Experts) -> Kernel:
    """``out[token] = sum of gate * down[e] h[pair]`` over its choices, for the panels of this thread."""
    kernel = Kernel(name)
    fn = kernel.fn
    axis = kernel.axis()
    h, gates, order, starts, out = (kernel.tensor(n) for n in ("h", "gates", "order", "starts", "out"))
    weight, bias = kernel.weight("down"), kernel.weight("bias") if site.biased else None
    size, per_expert = panel_bytes(f"panel:{site.formats[1]}", site.inner), panels(site.out)
    low, high = kernel.part(fn.const(per_expert, "i64"))
    rows = Listed(h, order.base, site.choices, site.inner)
    inputs = Inputs(kernel, site.formats[1], site.inner, rows, order.base, site.choices, apart=True)
    inputs.prepare(axis.count * site.choices)
    with fn.loop(low, high) as loop:
        columns = loop.index * PANEL
        with fn.loop(0, axis.count) as tokens:
            fn.store(fn.const(0.0, VP), out.token(tokens.index), columns, "f32")
        with fn.loop(0, site.count) as experts:
            panel = fn.at(weight, (experts.index * per_expert + loop.index) * size)

            def write(at: Val, found: list[list[Val]]) -> None:
                for t, value in enumerate(found[0]):
                    token, choice = rows.pair(at + t)
                    place = out.token(token)
                    if bias is not None:
                        value = value + fn.load(bias, VP, experts.index * site.out + columns, "f32")
                    if site.weighted == "output":
                        value = value * fn.splat(fn.load(gates.token(token), "f32", choice), PANEL)
                    fn.store(fn.load(place, VP, columns, "f32") + value, place, columns, "f32")

            begin, end = (fn.load(starts.base, "i64", experts.index + i) for i in range(2))
            inputs.times([panel], begin, end, write)
    return kernel
