"""KV caching is a pass: models are traced without a cache, and `append`/`attend` on state are inserted here.

Every ``fresh(k, v)`` of a template becomes ``append(kv, k, v)`` on a new state operand. From the model's own forward (``score``)
come ``prefill`` (committed tokens, logits of each row's last token) and ``step`` (drafted tokens, all logits).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from elision.errors import BadInput
from elision.ir.op import infer_type
from elision.ir.program import Program, round_of
from elision.ir.states import KV, Dense, Encoding, Float, Int, Scratch, Segment
from elision.ir.types import FLOATS, Axis, parse_dtype
from elision.ir.value import Builder, Graph, Value, rewrite
from elision.passes.base import Pass, register

SCRATCH = 64  # nodes of a token tree: one word of ancestor bits


@register
@dataclass(frozen=True)
class InsertCache(Pass):
    """Give every causal attention site a key/value cache. ``dtype``: of the stored rows (default: that of the keys). ``int8``
    stores a key or value of a head as bytes with one float32 scale (`elision.ir.encoding`), which is approximate."""

    dtype: str = ""

    name: ClassVar[str] = "insert-cache"
    family: ClassVar[str] = "core"
    changes: ClassVar[str] = "entries"
    quality: ClassVar[str] = "exact"

    def apply(self, program: Program) -> None:
        if set(program.entries) != {"score"}:
            raise BadInput(f"insert-cache: expected a freshly raised program, got the entries {', '.join(program.entries)}")
        if not program.meta.get("causal", True):
            raise BadInput(f"insert-cache: {program.name} sees later tokens too (it is an encoder): nothing to keep")
        plain = program.entries["score"]
        caches = {name: _fresh_types(graph) for name, graph in program.templates.items()}
        if not any(caches.values()):
            raise BadInput("insert-cache: the model has no attention to cache")
        _refuse_mixing(program)
        program.templates = {n: _cached(g, [self.stored(t) for t in caches[n]]) for n, g in program.templates.items()}
        program.entries["score"] = _with_empty(plain, program.templates, caches)
        for entry in ("prefill", "step"):
            found, states = self._stateful(plain, entry, program, caches)
            program.entries[entry] = found
            program.states = dict(states)
        program.round = round_of(program)
        if self._dtype == "i8":
            program.quality = "approximate"

    @property
    def _dtype(self) -> str:
        return parse_dtype(self.dtype) if self.dtype else ""

    def stored(self, fresh: KV) -> KV:
        """The type of the cache for a site whose keys and values have the type ``fresh``."""
        k, v = self._encoding(fresh, fresh.dim), self._encoding(fresh, fresh.vdim)
        return replace(fresh, segments=(Segment(Dense(), k, v), Segment(Scratch(SCRATCH), k, v)))

    def _encoding(self, fresh: KV, dim: int) -> Encoding:
        """Of rows of ``dim`` channels."""
        if self._dtype == "i8":
            return Int(8, "channel", dim)
        if self._dtype and self._dtype not in FLOATS:
            raise BadInput(f"insert-cache: dtype={self.dtype!r}; expected a float dtype ({', '.join(FLOATS)}) or int8")
        return Float(self._dtype) if self._dtype else fresh.segments[0].k

    def _stateful(self, plain: Graph, entry: str, program: Program, caches: dict[str, list[KV]]) -> tuple[Graph, dict[str, KV]]:
        states: dict[str, KV] = {}
        written: list[Value] = []
        last_call = plain.calls()[-1]

        def rule(b: Builder, v: Value, args: tuple[Value, ...]) -> Value | tuple[Value, ...] | None:
            if v.op == "input" and entry == "step":
                axis = v.tensor.tokens
                assert axis is not None
                return b.input(v.attr("name"), v.tensor.with_axes(Axis(axis.name, draft=True)))
            if v.op != "call":
                return None
            owned = []
            for cache in caches[v.attr("target")]:
                name = f"kv_{len(states)}"
                states[name] = self.stored(cache)
                owned.append(b.input(name, states[name]))
            found = b.add_with("call", (*args, *owned), dict(v.attrs), None)
            results = b.items(found) if isinstance(found.type, tuple) else [found]
            for name, value in zip(list(states)[len(states) - len(owned) :], results[len(results) - len(owned) :], strict=True):
                written.append(b.named(value, name))
            results = results[: len(results) - len(owned)]
            results[0] = b.named(results[0], "h")
            if v is last_call and entry == "prefill":
                results[0] = _last_only(b, results[0])
            return results[0] if len(results) == 1 else tuple(results)

        first = replace(plain, name=entry, outputs=plain.outputs[:1])  # generation reads the logits only
        graph = rewrite(first, rule, program.targets, more=lambda: written)
        return (with_best(graph, 1, program) if entry == "step" else graph), states


def with_best(step: Graph, k: int, program: Program) -> Graph:
    """The entry ``step`` with the ``k`` most likely tokens of every node, ``best i64[t, k]``, as its second output."""
    logits, *states = [v for v in step.outputs if v.is_state or v is step.outputs[0]]
    types = infer_type("topk", (logits,), {"k": k}, program.targets)
    assert isinstance(types, tuple)
    top = Value("topk", (logits,), (("k", k),), types)
    best = Value("item", (top,), (("index", 1),), types[1])
    outputs, names = (logits, best, *states), {v: n for v, n in step.names.items() if n != "best"} | {best: "best"}
    graph = Graph(step.name, step.inputs, (*step.values, top, best), outputs, names)
    return rewrite(graph, lambda b, v, args: None, program.targets)


def _refuse_mixing(program: Program) -> None:
    """Opaque operators that may look at several tokens run over whole sequences only, not in chunks and steps."""
    opaque = [v for g in program.targets.values() for v in g.values if v.op == "aten"]
    if mixing := sorted({v.attr("function") for v in opaque if not v.attr("rowwise")}):
        raise BadInput(
            f"insert-cache: {program.name} cannot run token by token, since {', '.join(mixing)} may look at several tokens "
            "at once and has no rule"
        )


def _last_only(b: Builder, h: Value) -> Value:
    """Prefill needs the logits of each row's last token only: the stream is restricted before the head."""
    return b.add("restrict", h, b.add("last", h, axis="last", name="last"), name="h")  # type: ignore[no-any-return]


def _fresh_types(graph: Graph) -> list[KV]:
    return [v.type for v in graph.values if v.op == "fresh" and isinstance(v.type, KV)]


def _cached(graph: Graph, types: list[KV]) -> Graph:
    left = iter(types)
    written: list[Value] = []

    def rule(b: Builder, v: Value, args: tuple[Value, ...]) -> Value | None:
        if v.op != "fresh":
            return None
        state = b.input(f"kv{len(written) or ''}", next(left))
        written.append(b.add("append", state, *args, name="kv"))
        return written[-1]

    return rewrite(graph, rule, more=lambda: written)


def _with_empty(plain: Graph, templates: dict[str, Graph], caches: dict[str, list[KV]]) -> Graph:
    def rule(b: Builder, v: Value, args: tuple[Value, ...]) -> Value | tuple[Value, ...] | None:
        if v.op != "call":
            return None
        empty = [b.add("empty", args[0], type=t) for t in caches[v.attr("target")]]
        found = b.add_with("call", (*args, *empty), dict(v.attrs), None)
        results = b.items(found) if isinstance(found.type, tuple) else [found]
        results = results[: len(results) - len(empty)]
        results[0] = b.named(results[0], "h")
        return results[0] if len(results) == 1 else tuple(results)

    return rewrite(plain, rule, templates)
