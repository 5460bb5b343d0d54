"""SkipDecode: the further a text goes on, the fewer layers its tokens run through."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from elision.errors import BadInput
from elision.ir.cost import StepCost
from elision.ir.program import Program, round_of
from elision.ir.value import Builder, Value
from elision.passes.base import Pass, register
from elision.passes.layers.depth import caches_of, declare, decodes, gains, step_bytes, step_seconds, without
from elision.passes.layers.skip_layers import leave_out
from elision.passes.timing import Clock, Timed


@register
@dataclass(frozen=True)
class SkipDecode(Timed):
    """Depth by position (SkipDecode, Del Corro et al. 2023).

    The rewrite in one sentence: a generated token at position t runs the first ``warm`` layers and the last n_t - warm, where n_t
    falls in ``stages`` equal steps from ``most`` to ``least`` over the first ``length`` positions, each a step entry of its own.
    Sets are nested, so that a layer has the keys of all that its tokens look at and nothing is computed for layers passed by.
    Prompts run ``most`` layers. The model's own forward treats all of its tokens as generated.

    ``speedup``: how many times faster ``length`` tokens are decoded, head and host included (the paper: 2 to 5, in layers, of
    models trained for it). ``most``, ``least``: layers; 0 follows from the speed-up by the times of steps with all layers and
    with half of them, after few tokens and after ``length``: as many as there are, and as few as it takes (no fewer than warm +
    1: then ``most`` falls). Identity setting: speedup=1.
    """

    speedup: float = 1.0
    length: int = 1024
    stages: int = 8
    warm: int = 1
    most: int = 0
    least: int = 0

    name: ClassVar[str] = "skipdecode"
    family: ClassVar[str] = "layers"
    changes: ClassVar[str] = "depth"
    version: ClassVar[int] = 2

    @classmethod
    def example(cls, program: Program) -> SkipDecode:
        return cls(most=len(program.layers), least=max(1, len(program.layers) - 1))

    def timed(self, program: Program, clock: Clock) -> Pass:
        if self.most and self.least or self.speedup == 1 or len(program.layers) < 2:
            return self
        decodes(program, self.name)
        last = min(self.length, int(program.meta["positions"]) // 2)
        most, least = self._ends(program, step_seconds(program, clock, (last // 16, last)))
        return replace(self, most=most, least=least)

    def apply(self, program: Program) -> None:
        decodes(program, self.name)
        layers, (most, least) = list(program.layers), self._ends(program, step_bytes(program))
        if not 1 <= self.warm <= least <= most <= len(layers) or not 2 <= self.stages <= self.length:
            raise BadInput(
                f"{self.text()}: from {most} to {least} of {len(layers)} layers; expected 1 <= warm <= least <= most, and two "
                "or more stages over a length of as many positions"
            )
        never = len(layers) - most
        leave_out(program, layers[self.warm :][:never], "", self.name)
        ends: dict[int, int] = {}  # by how many layers are left out, where that ends
        for i, depth in enumerate(self._depths(most, least), 1):
            ends[len(layers) - depth] = round(self.length * i / self.stages)
        left = [layers[self.warm + never : self.warm + n] for n in ends]
        until = {layer: end for end, now, then in zip(ends.values(), left, left[1:], strict=False) for layer in {*then} - {*now}}
        if not until:
            return
        declare(program, {name for layer in until for name in caches_of(program, layer)}, "nested", self.name)
        names = ["step"]
        for i, gone in enumerate(left[1:], 1):
            names.append(f"step_{i}")
            program.entries[names[-1]] = without(program, program.entries["step"], gone, names[-1])
        _gate(program, until)
        run = {"targets": tuple(names), "until": tuple(ends.values())[:-1]}
        program.round = round_of(program, run=("staged", run))

    def _ends(self, program: Program, step: StepCost) -> tuple[int, int]:
        """How many layers run at first, and at last: what comes nearest to the speed-up."""
        if self.most and self.least:
            return self.most, self.least
        count, middle = len(program.layers), self.length / 2
        gains(program, self.speedup, self.name, step, middle)
        most, fewest = self.most or count, self.least or min(self.warm + 1, self.most or count)
        ends = [(most, n) for n in ((fewest,) if self.least else range(most, fewest - 1, -1))]
        ends += [(n, fewest) for n in (() if self.most else range(count - 1, fewest - 1, -1))]
        return min(ends, key=lambda each: abs(step(count, middle) / self._mean(step, *each) / self.speedup - 1))

    def _depths(self, most: int, least: int) -> list[int]:
        """How many layers run, stage by stage."""
        return [most - round((most - least) * i / max(self.stages - 1, 1)) for i in range(self.stages)]

    def _mean(self, step: StepCost, most: int, least: int) -> float:
        """What a step costs on average."""
        depths = self._depths(most, least)
        return sum(step(n, self.length * (i + 0.5) / self.stages) for i, n in enumerate(depths)) / len(depths)


def _gate(program: Program, until: dict[int, int]) -> None:
    """In the model's own forward, a layer runs on the tokens before a position only."""

    def rule(b: Builder, v: Value, args: tuple[Value, ...]) -> Value | tuple[Value, ...] | None:
        number = str(v.attr("label") or "").partition(".")[0] if v.op == "call" else ""
        if not number.isdigit() or int(number) not in until:
            return None
        h = args[0]
        sel = b.add("before", h, until=until[int(number)], axis=f"before{number}_{v.attr('target')}")
        few = b.add("restrict", h, sel, name="h")
        rest = [b.add("empty", few, type=a.type) if a.is_state else a for a in args[1:]]
        found = b.add_with("call", (few, *rest), dict(v.attrs), None)
        results = b.items(found) if isinstance(found.type, tuple) else [found]
        lifted = b.add("lift", results[0], h, sel, name="h")
        return (lifted, *results[1:]) if isinstance(found.type, tuple) else lifted

    program.rewrite(rule, "score")
