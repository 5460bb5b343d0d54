"""Rows of an embedding table that lies in panels of integer codes."""

from __future__ import annotations

from elision.codegen.cpu.emit import Val
from elision.codegen.cpu.kernel import Kernel
from elision.ir.code_panels import Codes, panel_bytes
from elision.ir.packing import PANEL
from elision.ir.weights import GROUP


def embed_codes(name: str, codes: Codes, width: int) -> Kernel:
    """As `elision.codegen.cpu.rows.embed`: the weights of each token's row are decoded."""
    kernel = Kernel(name)
    fn = kernel.fn
    axis, ids, out, table = kernel.axis(), kernel.tensor("ids"), kernel.tensor("out"), kernel.weight("table")
    with kernel.tokens(axis) as t:
        row, place = fn.load(ids.token(t, "i64"), "i64"), out.token(t)
        panel, lane = fn.at(table, row // PANEL * panel_bytes(codes, width)), row % PANEL

        def half(base: Val, field: int) -> Val:
            return fn.cast(fn.load(fn.at(base, lane + field * PANEL, "f16"), "f16"), "arith.extf", "f32")

        with fn.loop(0, width // GROUP) as groups:
            start = fn.at(panel, groups.index * codes.group_bytes)
            header = start if codes.per_group else panel
            scale = half(header, 0)
            low = half(header, 1) if codes.minimum else None
            quads = fn.at(fn.at(start, codes.header), lane * 4)
            with fn.loop(0, GROUP) as loop:
                quad, inside = loop.index // 4, loop.index % 4
                if codes.bits == 8:
                    code = fn.cast(fn.load(quads, "i8", quad * (4 * PANEL) + inside), "arith.extsi", "i32")
                else:
                    byte = fn.cast(fn.load(quads, "i8", quad // 2 * (4 * PANEL) + inside), "arith.extui", "i32")
                    code = (byte >> fn.i32(quad % 2 * 4)) & 15
                value = fn.cast(code - codes.offset, "arith.sitofp", "f32") * scale
                fn.store(value if low is None else value + low, place, groups.index * GROUP + loop.index)
    return kernel
