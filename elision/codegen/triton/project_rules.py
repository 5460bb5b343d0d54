"""Which projections are one launch (`elision.codegen.triton.project`): queries, keys and values of one ``x``, of which nothing
but an append reads keys and values. Where anything is of another form, the launches of each op remain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from elision.codegen.refusal import NotNative
from elision.codegen.triton.attention_rules import fixed_sizes, lists, nodes, readable
from elision.codegen.triton.configs import heads, power
from elision.codegen.triton.launches import Arg, Launches, axis, cache, count, integer, plain, real, size, weight
from elision.ir.ops.program import origin
from elision.ir.states import KV, Int, Ring
from elision.ir.types import DTYPES
from elision.ir.value import Graph, Value


@dataclass(frozen=True)
class Part:
    """Queries, keys or values: rows of a weight from ``first`` on, as heads, with what is done to them."""

    linear: Value
    first: int
    norm: Value | None
    rope: Value | None
    inside: tuple[Value, ...]  # what is computed on the way, the result first

    @property
    def x(self) -> Value:
        return self.linear.args[0]

    @property
    def bias(self) -> Value | None:
        return self.linear.args[2] if len(self.linear.args) > 2 else None


@dataclass(frozen=True)
class Projection:
    """What one launch does: an append, and the parts that it and the attention after it read."""

    q: Part
    k: Part
    v: Part
    whole: bool  # programs have whole heads


def projections(graph: Graph) -> dict[Value, Projection]:
    """By append. All that can be refused is refused here."""
    users = graph.users()
    found = {}
    for value in graph.values:
        if value.op == "append":
            try:
                if (made := _projection(graph, users, value)) is not None:
                    found[value] = made
            except NotNative:
                continue
    return found


def inside(found: dict[Value, Projection]) -> set[Value]:
    """What has no launch of its own."""
    return {v for each in found.values() for part in (each.q, each.k, each.v) for v in part.inside}


def _projection(graph: Graph, users: dict[Value, list[Value]], append: Value) -> Projection | None:
    reads = {v.args[0] for v in users[append] if v.op == "attend" and v.args[1] is append}
    if len(reads) != 1 or (rows := _part(reads.pop())) is None:
        return None
    q, k, v = rows, _part(append.args[1]), _part(append.args[2])
    if k is None or v is None or v.norm is not None or v.rope is not None:
        return None
    own = {x for part in (q, k, v) for x in part.inside}
    order = graph.values.index(append)
    late = all(graph.values.index(u) > order for u in users[q.inside[0]])
    alone = all(u in own or u is append for x in own - {q.inside[0]} for u in users[x])
    if not late or not alone or own & set(graph.outputs) or not q.x is k.x is v.x:
        return None
    alike = _alike(q, k, v) and _turned_alike(q, k) and _stored(append)
    return Projection(q, k, v, _whole(append, q)) if alike else None


def _part(value: Value) -> Part | None:
    """Heads from a product, perhaps normalised and turned."""
    found, rope, norm = [value], None, None
    if value.op == "rope":
        rope, value = value, value.args[0]
        found.append(value)
    if value.op == "norm":
        norm, value = value, value.args[0]
        found.append(value)
    if value.op != "view" or len(value.tensor.features) != 2:
        return None
    value = value.args[0]
    found.append(value)
    first = 0
    if value.op == "slice":  # of a product for all
        first, value = value.attr("start"), value.args[0]
        found.append(value)
    if value.op != "linear" or value.attrs:
        return None
    return Part(value, first, norm, rope, tuple(found))


def _alike(*parts: Part) -> bool:
    """Whether the weights lie alike, so that a program takes those of its head."""
    made = [weight(p.linear.args[1]) for p in parts]
    forms = {(*((p.type if p else None) for p in planes), form.text) for planes, form in made}
    biases = {p.bias and plain(p.bias).type for p in parts}
    return len(forms) == 1 and len(biases) == 1


def _turned_alike(q: Part, k: Part) -> bool:
    """Whether queries and keys are normalised and turned in the same way."""
    if (q.norm is None) != (k.norm is None) or (q.rope is None) != (k.rope is None):
        return False
    if q.norm is not None and k.norm is not None:
        gains = [n.args[1:] for n in (q.norm, k.norm)]
        one = all(len(g) <= 1 and all(len(x.tensor.axes) == 1 for x in g) for g in gains)
        types = {tuple(plain(x).type for x in g) for g in gains}
        known = {n for n, _ in q.norm.attrs} <= {"kind", "eps", "offset", "cast"}
        if not one or len(types) != 1 or not known or q.norm.attrs != k.norm.attrs or q.norm.attr("kind") != "rms":
            return False
    if q.rope is not None and k.rope is not None:
        known = {n for n, _ in q.rope.attrs} <= {"style", "scale"}
        plain(q.rope.args[1])
        return known and q.rope.args[1] is k.rope.args[1] and q.rope.attrs == k.rope.attrs
    return True


def _stored(append: Value) -> bool:
    """Whether programs can store to the cache."""
    state, before, k = append.type, append.args[0], append.args[1]
    assert isinstance(state, KV)
    readable(state)
    main = state.main[-1]
    codes = (isinstance(e, Int) and (e.bits != 8 or e.axis != "channel" or e.zero) for e in (main.k, main.v))
    tokens = k.tensor.tokens
    drafted = tokens is not None and tokens.drafted
    fits = state.dim == state.vdim and state.dim % 2 == 0 and len(state.main) == 1 and not (drafted and state.scores is not None)
    return not any(codes) and fits and origin(before).op == "input" and not state.present.partial


def _whole(append: Value, q: Part) -> bool:
    """Whether a program needs all of a head: for its norm, for scales of its channels, or where not all channels turn."""
    state = append.type
    assert isinstance(state, KV)
    partly = q.rope is not None and 2 * q.rope.args[1].tensor.width != state.dim
    codes = any(isinstance(e, Int) for e in (state.main[-1].k, state.main[-1].v))
    return q.norm is not None or codes or partly or power(state.dim) != state.dim


def project(to: Launches, append: Value, found: Projection) -> None:
    """The launch. `projections` has seen that it can be."""
    plan, state, parts = to.plan, append.type, (found.q, found.k, found.v)
    assert isinstance(state, KV)
    source, gain, norm = found.q.x, None, dict[str, Any]()
    if source in plan.tables:
        source, gain, norm = source.args[0], plain(source.args[1]), dict(source.attrs)
    x, k = to.whole(source), source.tensor.width
    plan.follow(append, append.args[0])
    name, tokens, q = plan.state(append), plan.axis(append.args[1]), found.q.inside[0]
    drafted, slots, sizes = plan.drafted(tokens), state.main[-1].slots, fixed_sizes(state)
    out = to.new(q)
    args: dict[str, Arg | None] = {"q": to.tensor(q)[0], "x": x, "g": gain, "eps": real(float(norm.get("eps", 0.0)))}
    for part, letter in zip(parts, "qkv", strict=True):
        planes, form = weight(part.linear.args[1])
        args |= {f"{plane}{letter}": a for plane, a in zip("wdm", planes, strict=True)}
        args[f"b{letter}"] = plain(part.bias) if part.bias is not None else None
    head_norm, rope = found.q.norm, found.q.rope
    gains = [p.norm.args[1] if p.norm is not None and len(p.norm.args) > 1 else None for p in parts[:2]]
    args |= {f"g{letter}": plain(g) if g is not None else None for g, letter in zip(gains, "qk", strict=True)}
    args |= {
        "head_eps": real(float(head_norm.attr("eps"))) if head_norm is not None else None,
        "freq": plain(rope.args[1]) if rope is not None else None,
        "factor": real(float(rope.attr("scale", 1.0))) if rope is not None else None, "tokens": count(tokens),
        "row": axis(tokens, "row"), "pos": axis(tokens, "pos"), "node": axis(tokens, "node") if drafted else None,
        "start": axis(tokens, "start"),
        **{n: cache(name, state, f"draft_{n}" if drafted else n) for n in ("k", "v", "k_scale", "v_scale")},
        **{n: cache(name, state, n) if drafted else None for n in ("node_pos", "node_live")},
        "entry_pos": cache(name, state, "pos"), "length": cache(name, state, "len_k"),
        "written": cache(name, state, "count") if isinstance(slots, Ring) else None, "blocks": size(name, "blocks"),
        "entries": size(name, "entries"), "sinks": integer(slots.sinks if isinstance(slots, Ring) else 0),
        "turns": size(name, "turns"),
    }  # fmt: skip
    many, dim = q.tensor.sizes[0], state.dim
    codes, itemsize = k // form.codes, DTYPES[source.tensor.dtype].itemsize
    tile = heads(to.shape, (many + 2 * state.heads) * dim, dim, found.whole, codes, form.codes, itemsize)
    fixed = dict(
        K=k, FORMAT=form.text, NORM=gain is not None, OFFSET=float(norm.get("offset", 0.0)), HEADS=many, H=state.heads, D=dim,
        LISTS=lists(state), FIRST_Q=found.q.first, FIRST_K=found.k.first, FIRST_V=found.v.first,
        BIAS=found.q.bias is not None, HEAD_NORM=head_norm is not None, HEAD_GAIN=gains[0] is not None,
        HEAD_OFFSET=float(head_norm.attr("offset", 0.0)) if head_norm is not None else 0.0,
        EARLY=head_norm is not None and head_norm.attr("cast", "late") == "early",
        R=rope.args[1].tensor.width if rope is not None else 0, STYLE=rope.attr("style") if rope is not None else "half",
        FORM_K=sizes["FORM_K"], FORM_V=sizes["FORM_V"], DRAFTED=drafted, RING=isinstance(slots, Ring), NODES=nodes(state),
        BM=tile.m, BN=tile.n, BK=tile.k,
    )  # fmt: skip
    grid = ((many + 2 * state.heads) * -(-dim // tile.n), ("tokens", tokens, tile.m))
    to.launch("project", grid, args, fixed, writes=[out.buffer, name], warps=tile.warps, stages=tile.stages)
