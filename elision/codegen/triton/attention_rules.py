"""The launches of caches: append, attend, what entries received, and the commit of a round."""

from __future__ import annotations

from typing import Any

from elision.codegen.refusal import need
from elision.codegen.triton.configs import attention, power
from elision.codegen.triton.launches import ROWS, Arg, Launches, axis, cache, count, integer, piece, plain, real, size
from elision.ir.layout import LANES
from elision.ir.mask import Mask
from elision.ir.ops.program import origin
from elision.ir.states import KV, Budget, Dense, Encoding, Float, Int, Ring
from elision.ir.types import DTYPES
from elision.ir.value import Value


def readable(state: KV) -> None:
    """Raises NotNative for a cache that kernels cannot read."""
    main = state.main[-1]
    need(len(state.main) == 1 and not main.shared, "a cache of several segments")
    need(isinstance(main.slots, Dense | Budget | Ring), f"slots of the kind {main.slots}")
    for encoding, dim in ((main.k, state.dim), (main.v, state.vdim)):
        plain_bytes = isinstance(encoding, Int) and encoding.bits == 8 and encoding.axis == "channel" and not encoding.zero
        need(isinstance(encoding, Float) and encoding.dtype != "f64" or plain_bytes, f"entries stored as {encoding}")
        whole = not isinstance(encoding, Int) or encoding.group == dim or power(encoding.group) == encoding.group
        need(whole, "groups of channels that are no power of two")
    if state.scratch is not None:
        need(nodes(state) % LANES == 0 and power(nodes(state)) == nodes(state), f"{nodes(state)} drafted nodes")


def nodes(state: KV) -> int:
    return 0 if state.scratch is None else state.scratch.slots.n  # type: ignore[union-attr]


def lists(state: KV) -> int:
    """Lists of entries for a sequence: one for all heads, or one for each."""
    return state.heads if state.keep == "per_head" else 1


def group(encoding: Encoding) -> int:
    """Channels that share a scale, 0 for floats."""
    return encoding.group if isinstance(encoding, Int) else 0


def fixed_sizes(state: KV) -> dict[str, Any]:
    """The constants of a cache that its kernels share."""
    main = state.main[-1]
    return dict(
        H=state.heads, D=state.dim, DV=state.vdim, DP=max(16, power(state.dim)), DVP=max(16, power(state.vdim)),
        LISTS=lists(state), GROUP_K=group(main.k), GROUP_V=group(main.v),
    )  # fmt: skip


def planes_of(name: str, state: KV, prefix: str = "", as_: str = "") -> dict[str, Arg | None]:
    """Keys, values and their scales, in the segment that is appended to or (``draft_``) in Scratch."""
    return {f"{as_}{what}": cache(name, state, f"{prefix}{what}") for what in ("k", "v", "k_scale", "v_scale")}


def append(to: Launches, value: Value) -> None:
    """To the cache, or to Scratch; keys are turned on the way if nothing else reads them (`dense_rules.rope`)."""
    before, k, v = value.args
    plan, state = to.plan, value.type
    assert isinstance(state, KV)
    readable(state)
    need(origin(before).op == "input" and not state.present.partial, "a cache of the call's own, or of tokens that pass by")
    need(state.scores is None or k.tensor.tokens is None or not k.tensor.tokens.drafted, "scores of drafted tokens")
    turned = k if k in plan.tables else None
    freq = plain(turned.args[1]) if turned is not None else None
    keys, k_stride = to.tensor(k.args[0] if turned is not None else k)
    values, v_stride = to.tensor(v)
    plan.follow(value, before)
    name, tokens, drafted = plan.state(value), plan.axis(k), plan.drafted(plan.axis(k))
    slots = state.main[-1].slots
    ring = isinstance(slots, Ring)
    args: dict[str, Arg | None] = {
        "k_rows": keys, "k_stride": k_stride, "v_rows": values, "v_stride": v_stride, "freq": freq, "row": axis(tokens, "row"),
        "pos": axis(tokens, "pos"), "node": axis(tokens, "node") if drafted else None, "start": axis(tokens, "start"),
        "factor": real(float(turned.attr("scale", 1.0)) if turned is not None else 1.0),
        **planes_of(name, state, "draft_" if drafted else ""),
        **{f"{n}": cache(name, state, n) if drafted else None for n in ("node_pos", "node_live")},
        "entry_pos": cache(name, state, "pos"), "length": cache(name, state, "len_k"),
        "written": cache(name, state, "count") if ring else None, "blocks": size(name, "blocks"),
        "entries": size(name, "entries"),
        "sinks": integer(slots.sinks if isinstance(slots, Ring) else 0), "turns": size(name, "turns"),
    }  # fmt: skip
    fixed = fixed_sizes(state) | dict(
        R=turned.args[1].tensor.width if turned is not None else 0, STYLE=turned.attr("style") if turned is not None else "half",
        DRAFTED=drafted, RING=ring, NODES=nodes(state),
    )  # fmt: skip
    to.launch("append", (("tokens", tokens, 1), state.heads), args, fixed, writes=[name], warps=1)


def _mask(value: Value) -> Mask:
    mask = value.attr("mask")
    assert isinstance(mask, Mask)
    return mask


def attend(to: Launches, value: Value) -> None:
    q, cached = value.args[:2]
    plan, state, mask = to.plan, cached.type, _mask(value)
    assert isinstance(state, KV)
    readable(state)
    need(origin(cached).op == "input", "a cache of the call's own")
    named = dict(zip(value.attr("extras") or (), value.args[2:], strict=True))
    need(not value.attr("results"), "results beside the output")
    name, tokens, drafted = plan.state(cached), plan.axis(q), plan.drafted(plan.axis(q))
    observe = next((v for v in plan.graph.values if v.op == "observe" and v.args[1] is q), None)
    observed = observe is not None
    need(not (observed and drafted), "scores of drafted tokens")
    queries, stride = to.tensor(q)
    heads, _ = q.tensor.sizes
    per = heads // state.heads
    single = to.plan.graph.name.startswith("decode")
    single |= "pages" in named
    tile = attention(to.shape, power(per), single, state.dim, DTYPES[q.tensor.dtype].itemsize)
    asks = "pages" if "pages" in named else "one" if single else "several"
    tile = to.tile("attend", f"{asks} {per} {state.heads} {state.dim} {state.main[-1].k}", tile)
    splits = tile.k
    slots, padded, pages = state.main[-1].slots, power(per), named.get("pages")
    if pages is not None:  # a program has one token
        need(state.keyed_by == "position" and isinstance(slots, Dense), "pages of entries that move")
        padded = tile.m
    ring = isinstance(slots, Ring)
    sizes = fixed_sizes(state)
    part = to.scratch(tokens, splits * heads * (sizes["DVP"] + 2)) if splits > 1 else None
    lse = to.scratch(tokens, heads) if observed else None
    kept = None
    if observe is not None and observe.attr("decoding"):
        need(isinstance(slots, Budget) and not slots.open, "scores of a cache without a bound")
        kept = to.scratch(tokens, heads * slots.n)  # type: ignore[union-attr]
        to.kept[q] = kept
    out = to.new(value)
    sinks = plain(named["sinks"]) if "sinks" in named else None
    shared: dict[str, Arg | None] = {
        "out": to.tensor(value)[0], "lse": piece(lse) if lse is not None else None,
        "part": piece(part) if part is not None else None,
        "sinks": sinks, "tokens": count(tokens),
    }  # fmt: skip
    only = {"tokens"} if splits == 1 else {"out", "lse", "sinks"}
    none = {n: None for n in only if n != "tokens"}
    args: dict[str, Arg | None] = {
        **shared, **none, "kept": None if kept is None else piece(kept), "q": queries, "q_stride": stride,
        "pos": axis(tokens, "pos"),
        "anc": axis(tokens, "anc") if drafted else None, "start": axis(tokens, "start"),
        "slopes": plain(named["slopes"]) if "slopes" in named else None, **planes_of(name, state),
        "splits": Arg(("int", splits), "i32"),
        "entry_pos": cache(name, state, "pos"), "length": cache(name, state, "len_k"), "blocks": size(name, "blocks"),
        "entries": size(name, "entries"),
        **{f"draft_{k}": v if drafted else None for k, v in planes_of(name, state, "draft_").items()},
        **{n: cache(name, state, n) if drafted else None for n in ("node_pos", "node_live")},
        "scale": real(float(value.attr("scale"))), "softcap": real(float(value.attr("softcap") or 0.0)),
        "size": integer(mask.size), "first_seen": integer(mask.sinks),
        "ring": integer(slots.window if isinstance(slots, Ring) else 0),
        "ring_sinks": integer(slots.sinks if isinstance(slots, Ring) else 0),
        "pages": None if pages is None else to.whole(pages),
    }  # fmt: skip
    ordered = state.keyed_by == "position" and state.present.kind == "all" and isinstance(slots, Dense)
    fixed = sizes | dict(
        G=per, GP=padded, MASK=mask.kind, SOFTCAP=bool(value.attr("softcap")), SLOPES="slopes" in named,
        LISTED=0 if pages is None else pages.tensor.width, PAGE=value.attr("page", 0), OPEN=value.attr("open", 0),
        SINKS=sinks is not None and splits == 1, RING=ring, DRAFTED=drafted, PENDING=not drafted, ORDERED=ordered,
        NODES=nodes(state) or LANES, PARTS=splits > 1, LSE=observed and splits == 1, KEPT=kept is not None, BM=tile.m, BN=tile.n,
    )  # fmt: skip
    grid: tuple[Any, ...] = (splits, ("longest", tokens, tile.m // padded), ("rows", state.heads))
    writes = [out.buffer if part is None else part, *([] if kept is None else [kept])]
    if lse is not None and part is None:
        writes.append(lse)
    to.launch("attend", grid, args, fixed, reads=[name], writes=writes, warps=tile.warps, stages=tile.stages)
    if part is not None:
        fixed = dict(HEADS=heads, DV=state.vdim, DVP=sizes["DVP"], SPLITS=splits, SINKS=sinks is not None, LSE=observed)
        grid = (("tokens", tokens, 1), heads)
        to.launch("combine", grid, shared, fixed, writes=[out.buffer, *([lse] if lse is not None else [])], warps=1)
    if lse is not None:
        plan.tables["attended", q] = plan.ref(value)
        to.lse[q] = lse


def observe(to: Launches, value: Value) -> None:
    """What entries received of a prompt's attention, from its log-sum-exp."""
    cached, q, *extra = value.args
    plan, state, mask = to.plan, cached.type, _mask(value)
    assert isinstance(state, KV) and state.scores is not None
    named = dict(zip(value.attr("extras") or (), extra, strict=True))
    need(
        q in to.lse and state.scores.gumbel is None and "sinks" not in named, "scores without the attention before them, or noisy"
    )
    readable(state)
    need(plan.axis(q) not in to.counted, "scores of a prompt that tokens have been left out of")
    plan.follow(value, cached)
    name, tokens = plan.state(value), plan.axis(q)
    queries, stride = to.tensor(q)
    per = q.tensor.sizes[0] // state.heads
    sizes = {k: v for k, v in fixed_sizes(state).items() if k not in ("DV", "DVP", "GROUP_V")}
    for array, decay in state.scores.arrays.items():
        need(decay > 0, "scores that forget at once")
        if value.attr("decoding"):
            _mass(to, name, state, array, decay, q)
            continue
        args: dict[str, Arg | None] = {
            "score": cache(name, state, array), "q": queries, "q_stride": stride, "pos": axis(tokens, "pos"),
            "start": axis(tokens, "start"), "ahead": axis(tokens, "ahead"), "lse": piece(to.lse[q]),
            "slopes": plain(named["slopes"]) if "slopes" in named else None, "k": cache(name, state, "k"),
            "k_scale": cache(name, state, "k_scale"), "entry_pos": cache(name, state, "pos"),
            "length": cache(name, state, "len_k"), "blocks": size(name, "blocks"), "entries": size(name, "entries"),
            "wide": size(name, "wide"), "scale": real(float(value.attr("scale"))),
            "softcap": real(float(value.attr("softcap") or 0.0)), "size": integer(mask.size), "first_seen": integer(mask.sinks),
            "decay": real(decay), "last": integer(value.attr("last", 0)),
        }  # fmt: skip
        fixed = sizes | dict(
            G=per, GP=power(per), MASK=mask.kind, SOFTCAP=bool(value.attr("softcap")), SLOPES="slopes" in named, PENDING=True,
            ADD=True, BM=max(32, power(per)), BN=64,
        )  # fmt: skip
        to.launch("key_scores", (("entries", name, 64), ("rows", state.heads)), args, fixed, reads=[name], writes=[name])


def _mass(to: Launches, name: str, state: KV, array: str, decay: float, q: Value) -> None:
    """What entries received of decoded tokens, from the logits that attention left."""
    args: dict[str, Arg | None] = {
        "score": cache(name, state, array), "kept": piece(to.kept[q]), "lse": piece(to.lse[q]),
        "start": axis(to.plan.axis(q), "start"), "length": cache(name, state, "len_k"), "entries": size(name, "entries"),
        "wide": size(name, "wide"), "decay": real(decay),
    }  # fmt: skip
    fixed = dict(H=state.heads, G=q.tensor.sizes[0] // state.heads, LISTS=lists(state), PENDING=True, ADD=True, BN=128)
    to.launch("mass", (("entries", name, 128), ("rows", state.heads)), args, fixed, writes=[name])


def advance_all(to: Launches) -> None:
    """Committed tokens are counted once everything has been read."""
    plan, done = to.plan, set()
    for value in plan.graph.values:
        if value.op == "append" and origin(value).op == "input" and not plan.drafted(plan.axis(value.args[1])):
            state = value.type
            assert isinstance(state, KV)
            if (name := plan.state(value)) not in done:
                done.add(name)
                advance(to, name, state, axis(plan.axis(value.args[1]), "start"), False)


def advance(to: Launches, name: str, state: KV, start: Arg, counts: bool) -> None:
    ring = isinstance(state.main[-1].slots, Ring)
    args: dict[str, Arg | None] = {
        "length": cache(name, state, "len_k"), "other": cache(name, state, "len_v"),
        "written": cache(name, state, "count") if ring else None, "start": start, "rows": ROWS, "slots": size(name, "slots"),
    }  # fmt: skip
    fixed = dict(LISTS=lists(state), RING=ring, COUNTS=counts, BLOCK=32)
    to.launch("advance", (("rows", lists(state), 32),), args, fixed, writes=[name], warps=1)
