"""Tables that the verbs print."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from rich.table import Table

from elision.errors import BadInput
from elision.ir.cost import Row, floor, total
from elision.ir.cost import cost as cost_of
from elision.ir.coverage import PHASES
from elision.ir.op import Sizes
from elision.runtime.model import Model


def cost(model: Model, context: int | None, bandwidth: float, flops: float) -> Iterator[Table]:
    """One table per phase: FLOPs and bytes by kind of op, and the least time on a machine of that bandwidth (bytes/s) and rate
    (FLOP/s). ``context``: entries that a token attends to (default: 1024, or as many as the model has room for)."""
    if not (0 < bandwidth < math.inf and 0 < flops < math.inf):
        raise BadInput(f"--bandwidth {bandwidth / 1e9:g}, --flops {flops / 1e9:g}: expected numbers above 0")
    context = min(1024, model.max_context) if context is None else context
    if not 1 <= context <= model.max_context:
        raise BadInput(f"--context {context}: expected 1 to {model.max_context} (max_context)")
    program = model.program
    for entry in program.entries:
        tokens = min(PHASES[entry], context)
        rows = cost_of(program, entry, Sizes(tokens=tokens, rows=1, context=context))
        table = Table(
            "op", "count", "MFLOP", "weights MB", "states MB", "activations MB", "written MB",
            title=f"{entry}: {tokens} token{'s' if tokens > 1 else ''}, context {context}",
        )  # fmt: skip
        kinds: dict[str, list[Row]] = {}
        for row in rows:
            kinds.setdefault(row.op, []).append(row)
        for op, group in sorted(kinds.items(), key=lambda item: -total(item[1]).bytes):
            table.add_row(op, str(len(group)), *_numbers(total(group)))
        everything = total(rows)
        table.add_section()
        table.add_row("total", str(len(rows)), *_numbers(everything))
        seconds = floor(everything, bandwidth, flops)
        table.caption = f"floor {seconds * 1e3:.2f} ms at {bandwidth / 1e9:.0f} GB/s and {flops / 1e9:.0f} GFLOP/s"
        yield table


def _numbers(row: Row) -> list[str]:
    parts = (row.flops, row.weight_bytes, row.state_bytes, row.activation_bytes, row.write_bytes)
    return [f"{n / 1e6:.2f}" for n in parts]


def coverage(model: Model) -> Iterator[Table]:
    """What was raised, what stayed opaque and where, and the passes that cannot act on the program."""
    from elision.passes.available import unavailable

    found = model.coverage
    sites, opaque = found["sites"], found["opaque"]
    raised = sum(sites.values()) - sites.get("aten", 0)
    title = f"{model.program.name}: {raised} operators raised, {sum(opaque.values())} opaque"
    table = Table("op", "raised", "opaque", title=title)
    for op, count in sorted(sites.items(), key=lambda item: -item[1]):
        if op != "aten":
            table.add_row(op, str(count), "")
    for name, count in opaque.items():
        table.add_row(f"aten {name}", "", str(count))
    yield table
    table = Table("entry", "opaque", "FLOPs raised", "left to torch")
    for entry, count in found["entries"].items():
        names = ", ".join(f"{name} ({n})" for name, n in found["left"][entry].items())
        table.add_row(entry, str(count), f"{100 * found['flops'][entry]:.1f} %", names or "nothing")
    yield table
    table = Table("pass", "unavailable because")
    for text, reason in unavailable(model.program).items():
        table.add_row(text, reason)
    if sum(found["entries"].values()):
        table.add_row("any that selects tokens", "rule axis: an opaque operator may read neighbouring tokens")
    if table.rows:
        yield table


def passes(family: str | None) -> Table:
    """The registry: name, family, parameters with defaults, quality, and the first sentence of the docstring."""
    from elision.passes import REGISTRY

    families = sorted({cls.family for cls in REGISTRY.values()})
    if family is not None and family not in families:
        raise BadInput(f"unknown family {family!r}; the families are {', '.join(families)}")
    table = Table("pass", "family", "parameters", "quality", "what it does")
    for name, cls in sorted(REGISTRY.items(), key=lambda item: (item[1].family, item[0])):
        if family in (None, cls.family):
            fields = ", ".join(f"{f.name}={f.default!r}" for f in dataclasses.fields(cls))
            first = " ".join((cls.__doc__ or "").split()).split(". ")[0].rstrip(".")
            table.add_row(name, cls.family, fields, cls.quality, first)
    return table
