"""What token methods for prompts of decoders share: later layers see, and keep in their caches, only part of the prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from elision.errors import BadInput
from elision.ir.program import Program
from elision.ir.states import KV, Present
from elision.ir.types import Tensor
from elision.ir.value import Builder, Graph, Value, rewrite
from elision.ir.walk import sites
from elision.passes.kv.caches import Cached


@dataclass(frozen=True)
class Choice:
    """How tokens are chosen: those that the ``last`` ones of the prompt look at; these and the ``first`` ones stay."""

    last: int = 1
    first: int = 1


def prune_prompts(program: Program, name: str, keep: Mapping[int, float], choice: Choice) -> None:
    """Before layer ``l`` only a share ``keep[l]`` of the prompt stays, by what attention before that layer gave it. Tokens keep
    their positions; caches of later layers hold what is left; new tokens are in all of them. Raises BadInput for a program
    without prompts, a share that grows, or a layer that no attention comes before."""
    if not {"prefill", "step"} <= set(program.entries):
        raise BadInput(f"{name}: {program.name} has no prompt that is read before decoding (is it an encoder?)")
    shares = [keep[layer] for layer in sorted(keep)]
    if any(not 0 < share <= 1 for share in shares) or shares != sorted(shares, reverse=True):
        raise BadInput(f"{name}: shares {shares} by layer; expected numbers above 0, at most 1, that do not grow")
    if choice.last < 1 or choice.first < 1:
        raise BadInput(f"{name}: last={choice.last}, first={choice.first}; expected at least one token of each")
    most = max(program.layers, default=-1)
    if unknown := [layer for layer in keep if not 0 < layer <= most]:
        raise BadInput(f"{name}: before layer {unknown[0]}; expected a layer from 1 to {most}, the last of {program.name}")
    cuts = {layer: keep[layer] for i, layer in enumerate(sorted(keep)) if keep[layer] < ([1.0, *shares][i])}
    if cuts:
        _Pruned(program, name, cuts, choice).all()


def layer_of(call: Value) -> int:
    return int(call.attr("label").partition(".")[0])


@dataclass
class _Pruned:
    program: Program
    name: str
    cuts: dict[int, float]
    choice: Choice
    chosen: list[Value] = field(default_factory=list)  # selections so far, each of the axis before
    score: Value | None = None

    def all(self) -> None:
        program, graph = self.program, self.program.entries["prefill"]
        calls = graph.calls()
        self.before = {layer: next(v for v in calls if layer_of(v) >= layer) for layer in self.cuts}
        looked = {}
        for layer, call in self.before.items():
            there = [v for v in calls[: calls.index(call)] if _scores(program.templates[v.attr("target")])]
            if not there:
                raise BadInput(f"{self.name}: no attention to its own cache comes before layer {layer} of {program.name}")
            looked[layer] = there[-1]
        self._retype(graph)
        graph = program.entries["prefill"]
        now = dict(zip(calls, graph.calls(), strict=True))
        self.before = {layer: now[v] for layer, v in self.before.items()}
        self.sites = {now[v] for v in looked.values()}
        self.variants = {v.attr("target"): self._variant(program.templates[v.attr("target")]) for v in self.sites}
        program.templates.update({g.name: g for g in self.variants.values()})
        program.entries["prefill"] = rewrite(graph, self._rule, program.targets)
        program.drop_unused()

    def _retype(self, graph: Graph) -> None:
        """Caches of later layers hold part of the prompt."""
        types: dict[str, KV] = {}
        for site in sites(self.program, graph):
            if site.value.op == "append" and site.top.op == "call":
                (name, type), above = site.state(site.value.args[0]), [c for c in self.cuts if c <= layer_of(site.top)]
                if above and isinstance(type, KV):
                    types[name] = replace(type, keyed_by="explicit", present=Present("subset", f"kept{max(above)}"))
        Cached(self.program, self.name).take(types)

    def _rule(self, b: Builder, v: Value, args: tuple[Value, ...]) -> Value | tuple[Value, ...] | None:
        for layer in [layer for layer, call in self.before.items() if call is v]:
            self._choose(b, layer)
        given = self._together(b, args)
        if v in self.sites:
            found = b.add_with("call", given, {**dict(v.attrs), "target": self.variants[v.attr("target")].name}, None)
            *results, self.score = b.items(found)
            return tuple(results)
        return None if given == args else b.add_with(v.op, given, dict(v.attrs), None, v.op)

    def _choose(self, b: Builder, layer: int) -> None:
        assert self.score is not None
        (score,) = self._together(b, (self.score,))
        stays = b.add("foremost", score, keep=self.cuts[layer], first=self.choice.first, last=self.choice.last, name="stays")
        self.chosen.append(b.add("which", stays, axis=f"kept{layer}", name="kept"))

    def _together(self, b: Builder, args: tuple[Value, ...]) -> tuple[Value, ...]:
        """The operands on the newest axis of the prompt."""
        found = []
        for a in args:
            for kept in self.chosen:
                assert kept.tensor.tokens is not None
                if isinstance(a.type, Tensor) and a.tensor.tokens == kept.tensor.tokens.parent and a is not kept:
                    a = b.add("restrict", a, kept)
            found.append(a)
        return tuple(found)

    def _variant(self, target: Graph) -> Graph:
        """The template with the attention that tokens receive as its last result."""
        seen: list[Value] = []
        keys: list[Value] = []

        def rule(b: Builder, v: Value, args: tuple[Value, ...]) -> Value | None:
            if v.op == "append":
                keys.append(args[1])
            if v.op == "attend":
                q, _, *extra = args
                attrs = {k: a for k, a in v.attrs if k in ("mask", "scale", "softcap", "extras")}
                attrs["last"] = self.choice.last
                seen.append(b.add_with("received", (q, keys[0], *extra), attrs, None, "received"))
            return None

        names = (f"{target.name}_seen{i or ''}" for i in range(len(self.program.targets) + 1))
        free = next(n for n in names if n not in self.program.targets)
        return rewrite(replace(target, name=free), rule, more=lambda: seen)


def _scores(graph: Graph) -> bool:
    """Whether a block attends once, to a cache that it appends to."""
    ops = [v.op for v in graph.values]
    return ops.count("append") == ops.count("attend") == 1
