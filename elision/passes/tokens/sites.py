"""What token methods for encoders share: attention that shows its keys and weighs tokens that stand for several, and results on
the tokens that there were at first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from elision.errors import BadInput
from elision.ir.mask import Mask
from elision.ir.program import Program
from elision.ir.states import KV
from elision.ir.types import Tensor
from elision.ir.value import Builder, Env, Graph, Value, copy_value, rewrite

PADDED = 4  # channels that carry the size of a token: kernels take the channels of keys four at a time


@dataclass
class Shown:
    """What the attention half of a layer shows: queries and keys ``[t, heads, dim]``, its scale, and the sizes of the tokens."""

    layer: int
    h: Value
    q: Value
    k: Value
    scale: float
    size: Value | None


@dataclass
class Reduced:
    """Fewer tokens: the stream, and for every token of the axis before, which of the new ones it is now part of."""

    h: Value
    size: Value | None
    joined: Value


#: Reduces the tokens after the attention half of a layer, or leaves them (None).
Reduce = Callable[[Builder, Shown], Reduced | None]


def reduce_tokens(program: Program, name: str, reduce: Reduce) -> None:
    """Ask ``reduce`` after the attention half of every layer; later layers run on the tokens that it leaves, and what follows the
    last layer on the stream put back in the order of the tokens that there were. Raises BadInput for a program whose tokens
    cannot be reduced so."""
    if program.meta.get("causal", True) or set(program.entries) != {"score"}:
        raise BadInput(f"{name}: {program.name} is no encoder; tokens that are merged would carry later ones back in a decoder")
    graph = program.entries["score"]
    calls = graph.calls()
    if any(v.op == "clusters" for v in graph.values):
        known = f"another method reduces the tokens of {program.name} already, and knows which stand for how many"
        raise BadInput(f"{name}: {known}; apply one of them")
    if not any(_attention(program.templates[v.attr("target")]) for v in calls):
        raise BadInput(f"{name}: {program.name} has no layer with attention that was found as a block")
    _Rewrite(program, name, reduce, calls).all(graph)


def merged(b: Builder, shown: Shown, assign: Value, weight: Value, axis: str) -> Reduced:
    """The tokens joined as ``assign`` says, each as its mean by ``weight [t]``; sizes add up."""
    kept = b.add("clusters", assign, axis=axis, name="kept")
    size = shown.size if shown.size is not None else b.add("ones", shown.h, dtype=shown.h.tensor.dtype, name="size")
    h = b.add("merge", shown.h, assign, weight, kept, name="h")
    return Reduced(h, b.add("collect", size, assign, kept, name="size"), b.add("joined", assign, kept, name="joined"))


@dataclass
class _Rewrite:
    program: Program
    name: str
    reduce: Reduce
    calls: list[Value]
    size: Value | None = None
    joined: Value | None = None
    variants: dict[Any, Graph] = field(default_factory=dict)

    def all(self, graph: Graph) -> None:
        program = self.program
        for call in self.calls:
            if others := [a for a in call.args[1:] if isinstance(a.type, Tensor) and a.tensor.tokens is not None]:
                what = f"a layer of {program.name} reads other values of its tokens than the stream"
                raise BadInput(f"{self.name}: {what} ({graph.names.get(others[0], others[0].op)})")
        program.entries["score"] = rewrite(graph, self._rule, _Growing(program))
        program.drop_unused()

    def _rule(self, b: Builder, v: Value, args: tuple[Value, ...]) -> Value | tuple[Value, ...] | None:
        if v.op != "call":
            return None
        target = self.program.templates[v.attr("target")]
        found: Value
        if not _attention(target):
            found = copy_value(b, v, args)
        else:
            found = self._attend(b, v, args, target)
        return self._restored(b, found) if v is self.calls[-1] else found

    def _attend(self, b: Builder, v: Value, args: tuple[Value, ...], target: Graph) -> Value:
        env = dict(v.attr("env") or ())
        variant, scale = self._variant(target, env, self.size is not None)
        sized = (*args, self.size) if self.size is not None else args
        call = b.add_with("call", sized, {**dict(v.attrs), "target": variant.name}, None)
        h, q, k = b.items(call)
        done = self.reduce(b, Shown(int(v.attr("label").partition(".")[0]), b.named(h, "h"), q, k, scale, self.size))
        if done is None:
            return h
        self.size = done.size
        self.joined = done.joined if self.joined is None else b.add("gather", done.joined, self.joined, name="joined")
        return done.h

    def _restored(self, b: Builder, h: Value) -> Value:
        """The stream on the axis that it had before tokens were reduced."""
        return h if self.joined is None else b.add("gather", h, self.joined, name="h")

    def _variant(self, target: Graph, env: Mapping[str, Any], sized: bool) -> tuple[Graph, float]:
        """The template with queries and keys as further results and, if ``sized``, the sizes of tokens as its last operand."""
        site = next(v for v in target.values if v.op == "attend")
        scale, mask = (env[a.name] if isinstance(a, Env) else a for a in (site.attr("scale"), site.attr("mask")))
        if not isinstance(mask, Mask) or mask.kind != "full" or site.attr("softcap") or site.attr("extras"):
            raise BadInput(f"{self.name}: {self.program.name} has attention of another kind than full softmax attention")
        key = (target.name, sized, scale)
        if key not in self.variants:
            made = _shown(target, sized, scale, f"{target.name}_{'sized' if sized else 'shown'}{len(self.variants) or ''}")
            self.variants[key] = self.program.templates[made.name] = made
        return self.variants[key], scale


class _Growing(Mapping[str, Graph]):
    """The templates and entries of a program, those that are still added to it as well."""

    def __init__(self, program: Program) -> None:
        self._program = program

    def __getitem__(self, name: str) -> Graph:
        return self._program.targets[name]

    def __iter__(self) -> Any:
        return iter(self._program.targets)

    def __len__(self) -> int:
        return len(self._program.targets)


def _attention(graph: Graph) -> bool:
    """Whether a block attends to its own tokens, once."""
    return [v.op for v in graph.values].count("fresh") == [v.op for v in graph.values].count("attend") == 1


def _shown(target: Graph, sized: bool, scale: float, name: str) -> Graph:
    """Proportional attention adds log(size) to the logits of a key: here by channels that are 1 in queries and log(size) / scale
    in keys, so that kernels need to know nothing of it."""
    seen: list[Value] = []
    bias: list[Value] = []

    def wider(b: Builder, x: Value, more: str) -> Value:
        heads = x.tensor.axes[1]
        part = b.add("map", bias[0], expr=more)
        return b.add("concat", x, b.add("expand", part, shape=(heads, PADDED)))  # type: ignore[no-any-return]

    def rule(b: Builder, v: Value, args: tuple[Value, ...]) -> Value | None:
        if v.op == "fresh":
            k, kv = args[0], v.type
            assert isinstance(kv, KV)
            seen.append(k)
            if not sized:
                return None
            size = b.input("size", Tensor((k.tensor.axes[0],), k.tensor.dtype))
            bias.append(b.add("view", size, shape=(1, 1)))
            wide = wider(b, k, f"log(x0) * {1 / (PADDED * scale)!r}")
            return b.add("fresh", wide, args[1], type=replace(kv, dim=kv.dim + PADDED))  # type: ignore[no-any-return]
        if v.op == "attend":
            seen.insert(0, args[0])
            if sized:
                attrs = {**dict(v.attrs), "scale": scale}
                return b.add("attend", wider(b, args[0], "x0 * 0.0 + 1.0"), args[1], **attrs)  # type: ignore[no-any-return]
        return None

    return rewrite(replace(target, name=name), rule, more=lambda: seen)
