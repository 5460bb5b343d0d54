"""What a step in parts needs whose later parts run on what left once somebody looks there (`elision.ir.deferred`)."""

from __future__ import annotations

from collections.abc import Sequence

from elision.errors import IllegalProgram
from elision.ir.program import Program, state_inputs
from elision.ir.states import KV, Dense, Float, Present, Scratch, Segment
from elision.ir.value import Builder, Value, rewrite
from elision.passes.cache import SCRATCH
from elision.passes.layers.depth import caches_of
from elision.passes.layers.parts import blocks, cut, stream_after, stream_before


def deferring(program: Program, exits: Sequence[int], by: str) -> None:
    """Give ``step`` a state for each exit, after its caches, that holds the streams of tokens which left there, and add the
    entries ``late_..`` that run the layers from one exit to the next on committed tokens."""
    if program.ticks:
        raise IllegalProgram(
            "validity",
            "tokens join caches late, and what is on the clock moves or drops entries before they do",
            sides=f"{by}: fill=defer",
            because="what it chooses would depend on when they join",
            help="fill=propagate or mask, or leave out the method that evicts or packs",
        )
    prefill, step = program.entries["prefill"], program.entries["step"]
    stream = stream_after(step).tensor
    kind, half = Float(stream.dtype), stream.width // 2
    segments = (Segment(Dense(), kind, kind), Segment(Scratch(SCRATCH), kind, kind))
    type = KV(1, half, stream.width - half, segments, keyed_by="explicit", present=Present("masked"))
    names = [f"held_{i}" for i in range(1, len(exits) + 1)]
    program.states |= dict.fromkeys(names, type)
    for i, (start, end) in enumerate(zip(exits, [*exits[1:], None], strict=True), 1):
        result = stream_after(prefill) if end is None else stream_before(prefill, end)
        mine = [c for n in program.layers if start <= n and (end is None or n < end) for c in caches_of(program, n)]
        before, name = stream_before(prefill, start), f"late_{i}"
        program.entries[name] = cut(program, prefill, name, before, (result,), mine, by, names)
    made: list[Value] = []
    first = {stream_before(step, layer): i for i, layer in enumerate(exits, 1)}
    heads = {next(v for _, v in blocks(step) if v.args[0] is h): i for h, i in first.items()}

    def rule(b: Builder, v: Value, args: tuple[Value, ...]) -> None:
        if v in heads:
            name = names[heads[v] - 1]
            wide = b.add("view", args[0], shape=(1, stream.width))
            parts = [b.add("slice", wide, start=a, stop=z) for a, z in ((0, half), (half, stream.width))]
            made.append(b.add("append", b.input(name, type), *parts, name=name))

    program.entries["step"] = rewrite(step, rule, program.targets, more=lambda: made)
    assert list(state_inputs(prefill)) == list(state_inputs(program.entries["step"]))[: -len(exits)]
