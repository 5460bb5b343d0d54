"""TidalDecode: a few layers choose the tokens that all layers after them read (Yang et al. 2024)."""

from __future__ import annotations

from collections import ChainMap
from dataclasses import dataclass, field, replace
from typing import ClassVar

from elision.errors import BadInput
from elision.ir.layout import LANES
from elision.ir.ops.program import origin
from elision.ir.program import Program, Tick, state_inputs
from elision.ir.states import KV
from elision.ir.types import Axis, Tensor
from elision.ir.value import Builder, Graph, Value, rewrite
from elision.ir.walk import sites
from elision.passes.base import Pass, register
from elision.passes.kv.caches import Cached, sizes
from elision.passes.kv.reading import readable


@register
@dataclass(frozen=True)
class TidalDecode(Pass):
    """Layers after the first of ``layers`` read ``budget`` entries of the cache, which the nearest of these before them chose.

    The rewrite in one sentence: a layer of ``layers`` attends to everything, and gives the ``budget`` entries with the largest
    products with its queries (of each key head, by the largest over its query heads), and the layers up to the next of
    ``layers`` attend to those, head by head. The entries since the last multiple of 16 are read besides (the paper: the new token
    alone), so that drafted tokens, which each choose for themselves, choose among the same entries as tokens that are decoded one
    by one. The prompt, and layers before the first of ``layers``, attend to everything; nothing is evicted. Layers with a window
    of their own stay as they are. Published defaults: layer 2 and one more, chosen by retrieval (13, or 9, of 32); budgets of 64
    to 512, mostly 256. Identity setting: a ``budget`` of at least the context. Tokens decoded so far are not run again to correct
    their keys and values (the paper's option). Native code reads the blocks of 16 keys that hold a chosen one, and of values just
    the chosen ones.
    """

    budget: int = 256
    layers: tuple[int, ...] = (2, 13)

    name: ClassVar[str] = "tidal-decode"
    family: ClassVar[str] = "kv"
    changes: ClassVar[str] = "cache"

    @classmethod
    def example(cls, program: Program) -> TidalDecode:
        return cls(layers=(next(iter(program.layers), 0),))

    def apply(self, program: Program) -> None:
        sizes(self.name, budget=self.budget)
        caches = readable(program, self.name)
        states = Cached(program, self.name).states
        missing = sorted(set(self.layers) - set(caches.values()))
        if missing or not self.layers:
            known = ", ".join(map(str, sorted(set(caches.values()))))
            what = f"layer {missing[0]} cannot choose" if missing else "no layers that choose"
            raise BadInput(f"{self.name}: {what}; give layers= some that attend to all tokens before: {known}")
        for site in (s for s in sites(program, program.entries["step"]) if s.value.op == "attend"):
            number, (name, _) = site.frame.label.partition(".")[0], site.state(site.value.args[1])
            if name not in caches and number in map(str, caches.values()):
                raise BadInput(f"{self.name}: layer {number} divides its heads among two caches; apply one of the two methods")
        if len({states[name].heads for name in caches}) > 1:
            raise BadInput(f"{self.name}: layers of {program.name} have different numbers of key heads")
        if max(caches.values()) <= min(self.layers):
            raise BadInput(f"{self.name}: no layer comes after layer {min(self.layers)}, so none would read less; give layers=")
        work = _Reuse(program, caches, frozenset(self.layers), self.budget)
        program.entries["step"] = work.entry(program.entries["step"])
        program.templates.update(work.made)
        clock = Builder("sixteen", program.targets)
        program.ticks = (*program.ticks, Tick(LANES, clock.build(clock.input("rows", Tensor((Axis("b"),), "i64")))))
        program.drop_unused()


@dataclass
class _Reuse:
    """`step` in which the layers ``choosing`` give what the others after them read. ``caches``: by name, the layer."""

    program: Program
    caches: dict[str, int]
    choosing: frozenset[int]
    budget: int
    made: dict[str, Graph] = field(default_factory=dict)
    names: dict[tuple[str, bool], str] = field(default_factory=dict)

    def entry(self, graph: Graph) -> Graph:
        layers = {v: self.caches[n] for n, v in state_inputs(graph).items() if n in self.caches}
        pages: Value | None = None

        def rule(b: Builder, v: Value, args: tuple[Value, ...]) -> Value | tuple[Value, ...] | None:
            nonlocal pages
            layer = next((layers[origin(a)] for a in v.args if isinstance(a.type, KV) and origin(a) in layers), None)
            if v.op != "call" or layer is None or (layer not in self.choosing and pages is None):
                return None
            chooses = layer in self.choosing
            operands = args if chooses else (*args, pages)
            attrs = {**dict(v.attrs), "target": self._template(v.attr("target"), chooses)}
            found = b.add_with("call", operands, attrs, None)  # type: ignore[arg-type]
            if not chooses:
                return found
            *results, pages = b.items(found)
            return tuple(results)

        return rewrite(graph, rule, ChainMap(self.made, dict(self.program.targets)))

    def _template(self, name: str, chooses: bool) -> str:
        if (name, chooses) not in self.names:
            taken = {**self.program.targets, **self.made}
            word = "chooses" if chooses else "reads"
            new = next(n for i in range(1, len(taken) + 2) if (n := f"{name}_{word}{i}") not in taken)
            self.made[new] = replace(self._changed(self.program.templates[name], chooses), name=new)
            self.names[name, chooses] = new
        return self.names[name, chooses]

    def _changed(self, graph: Graph, chooses: bool) -> Graph:
        """The template with the entries that are read as its last result, or as its last operand."""
        made: list[Value] = []
        room = int(self.program.meta["positions"])

        def rule(b: Builder, v: Value, args: tuple[Value, ...]) -> Value | None:
            if v.op != "attend":
                return None
            q, cache, *extra = args
            if chooses:
                made.append(b.add("pick", q, cache, n=self.budget, page=1, open=LANES, room=room, name="pages"))
                return None
            assert isinstance(cache.type, KV)
            axis = q.tensor.tokens
            assert axis is not None
            pages = b.input("pages", Tensor((axis, cache.type.heads, self.budget), "i64"))
            attrs = {**dict(v.attrs), "extras": (*v.attr("extras", ()), "pages"), "page": 1, "open": LANES}
            return b.add_with("attend", (q, cache, *extra, pages), attrs, None, "o")

        return rewrite(graph, rule, more=lambda: made)
