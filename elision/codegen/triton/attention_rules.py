"""The launches of caches: append, attend, and how many entries there are."""

from __future__ import annotations

from typing import Any

from elision.codegen.refusal import need
from elision.codegen.triton.configs import attention, power
from elision.codegen.triton.forms import beside, form
from elision.codegen.triton.launches import ROWS, Arg, Launches, axis, cache, count, integer, piece, plain, real, size
from elision.ir.encoding import code_width
from elision.ir.layout import LANES
from elision.ir.mask import Mask
from elision.ir.ops.program import origin
from elision.ir.states import KV, Budget, Dense, Float, Int, Ring
from elision.ir.types import DTYPES
from elision.ir.value import Value


def readable(state: KV) -> None:
    """Raises NotNative for a cache that kernels cannot read."""
    main = state.main[-1]
    need(len(state.main) <= 2 and not any(s.shared for s in state.main), "a cache of several segments")
    need(isinstance(main.slots, Dense | Budget | Ring), f"slots of the kind {main.slots}")
    for encoding, dim in ((main.k, state.dim), (main.v, state.vdim)):
        floats = isinstance(encoding, Float) and encoding.dtype != "f64"
        need(floats or isinstance(encoding, Int) and encoding.axis == "channel", f"entries stored as {encoding}")
        whole = not isinstance(encoding, Int) or encoding.group == dim or power(encoding.group) == encoding.group
        need(whole, "groups of channels that are no power of two")
    if len(state.main) == 2:
        older = state.main[0]
        need(isinstance(older.slots, Dense) and isinstance(main.slots, Budget) and lists(state) == 1, "segments of several lists")
        need(isinstance(main.k, Float) and isinstance(main.v, Float) and state.scores is None, "a tail of codes, or with scores")
        for encoding, along in ((older.k, "token"), (older.v, "channel")):
            minima = isinstance(encoding, Int) and encoding.axis == along and encoding.zero
            need(minima, f"older entries stored as {encoding}")
            size = encoding.group  # type: ignore[union-attr]
            need(power(size) == size and size >= LANES or along == "channel", f"groups of {size} rows")
            need(power(size) == size or size == state.vdim or along == "token", "groups of channels that are no power of two")
    if state.scratch is not None:
        need(nodes(state) % LANES == 0 and power(nodes(state)) == nodes(state), f"{nodes(state)} drafted nodes")


def nodes(state: KV) -> int:
    return 0 if state.scratch is None else state.scratch.slots.n  # type: ignore[union-attr]


def lists(state: KV) -> int:
    """Lists of entries for a sequence: one for all heads, or one for each."""
    return state.heads if state.keep == "per_head" else 1


def older(name: str, state: KV) -> dict[str, Arg | None]:
    """The segment before the one that is appended to, if there is one."""
    there = len(state.main) > 1
    planes = {f"older_{n}": cache(name, state, f"older_{n}") if there else None for n in planes_of(name, state)}
    sizes = {f"older_{n}": size(name, f"older_{n}") if there else None for n in ("blocks", "groups")}
    return {**planes, **sizes, "older": cache(name, state, "older_len_k") if there else None}


def fixed_sizes(state: KV) -> dict[str, Any]:
    """The constants of a cache that its kernels share."""
    main = state.main[-1]
    return dict(
        H=state.heads, D=state.dim, DV=state.vdim, DP=max(16, power(state.dim)), DVP=max(16, power(state.vdim)),
        LISTS=lists(state), FORM_K=form(main.k), FORM_V=form(main.v),
    )  # fmt: skip


def moves(state: KV) -> dict[str, Any]:
    """The constants of `move`, but where the slots are."""
    main = state.main[-1]
    encodings = ((main.k, state.dim), (main.v, state.vdim))
    (w, wv), (groups, groups_v) = ([code_width(e, d) for e, d in encodings], [beside(form(e), d) for e, d in encodings])
    return dict(
        H=state.heads, LISTS=lists(state), W=w, WV=wv, WP=max(16, power(w)), WVP=max(16, power(wv)), GROUPS_K=groups,
        GROUPS_V=groups_v, GP=power(max(groups, groups_v, 1)),
    )  # fmt: skip


_PLANES = ("k", "v", "k_scale", "v_scale", "k_low", "v_low")


def planes_of(name: str, state: KV, prefix: str = "", as_: str = "") -> dict[str, Arg | None]:
    """Keys, values, their scales and minima, in the segment that is appended to or (``draft_``) in Scratch."""
    return {f"{as_}{what}": cache(name, state, f"{prefix}{what}") for what in _PLANES}


def append(to: Launches, value: Value) -> None:
    """To the cache, or to Scratch; keys are turned on the way if nothing else reads them (`dense_rules.rope`)."""
    before, k, v = value.args
    plan, state = to.plan, value.type
    assert isinstance(state, KV)
    readable(state)
    need(origin(before).op == "input" and not state.present.partial, "a cache of the call's own, or of tokens that pass by")
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
        "older": older(name, state)["older"] if not drafted else None,
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
    queries, stride = to.tensor(q)
    heads, _ = q.tensor.sizes
    per = heads // state.heads
    single = to.plan.graph.name.startswith("decode")
    single |= "pages" in named
    coded = any(isinstance(e, Int) and (e.bits < 8 or e.zero) for s in state.main for e in (s.k, s.v))
    tile = attention(to.shape, power(per), single, state.dim, DTYPES[q.tensor.dtype].itemsize, coded)
    stored = " ".join(str(e) for s in state.main for e in (s.k, s.v))
    asks = "pages" if "pages" in named else "one" if single else "several"
    tile = to.tile("attend", f"{asks} {q.tensor.dtype} {per} {state.heads} {state.dim} {stored}", tile)
    splits = tile.k
    slots, padded, pages = state.main[-1].slots, power(per), named.get("pages")
    if pages is not None:  # a program has one token
        need(state.keyed_by == "position" and isinstance(slots, Dense), "pages of entries that move")
        padded = tile.m
    ring = isinstance(slots, Ring)
    sizes = fixed_sizes(state)
    part = to.scratch(tokens, splits * heads * (sizes["DVP"] + 2)) if splits > 1 else None
    waits = state.scores.depth if state.scores is not None and observed and drafted else 0
    lse = to.scratch(tokens, heads) if observed and not waits else None
    kept = None
    if observe is not None and observe.attr("decoding"):
        need(isinstance(slots, Budget) and not slots.open, "scores of a cache without a bound")
        kept = to.scratch(tokens, heads * slots.n)  # type: ignore[union-attr]
        to.kept[q] = kept
    out = to.new(value)
    need(bool(waits) or not (observed and drafted), "scores of drafted tokens that nothing keeps")
    sinks = plain(named["sinks"]) if "sinks" in named else None
    shared: dict[str, Arg | None] = {
        "out": to.tensor(value)[0],
        "lse": piece(lse) if lse is not None else cache(name, state, "waiting_norm") if waits else None,
        "part": piece(part) if part is not None else None,
        "sinks": sinks, "tokens": count(tokens), "node": axis(tokens, "node") if waits else None,
    }  # fmt: skip
    none = {n: None for n in ("out", "lse", "sinks") if splits > 1}
    args: dict[str, Arg | None] = {
        **shared, **none, "kept": cache(name, state, "waiting") if waits else None if kept is None else piece(kept),
        "kept_nodes": cache(name, state, "waiting_nodes") if waits else None,
        "kept_stride": size(name, "wide" if waits else "entries"), "q": queries, "q_stride": stride, "pos": axis(tokens, "pos"),
        "anc": axis(tokens, "anc") if drafted else None, "start": axis(tokens, "start"),
        "slopes": plain(named["slopes"]) if "slopes" in named else None, **planes_of(name, state),
        "splits": Arg(("int", splits), "i32"),
        "entry_pos": cache(name, state, "pos"), "length": cache(name, state, "len_k"), "blocks": size(name, "blocks"),
        "entries": size(name, "entries"),
        **older(name, state),
        **{f"draft_{k}": v if drafted else None for k, v in planes_of(name, state, "draft_").items()},
        **{n: cache(name, state, n) if drafted else None for n in ("node_pos", "node_live")},
        "scale": real(float(value.attr("scale"))), "softcap": real(float(value.attr("softcap") or 0.0)),
        "size": integer(mask.size), "first_seen": integer(mask.sinks),
        "ring": integer(slots.window if isinstance(slots, Ring) else 0),
        "ring_sinks": integer(slots.sinks if isinstance(slots, Ring) else 0),
        "pages": None if pages is None else to.whole(pages),
    }  # fmt: skip
    older_forms = [form(e) for e in (state.main[0].k, state.main[0].v)] if len(state.main) > 1 else ["", ""]
    ordered = state.keyed_by == "position" and state.present.kind == "all" and isinstance(state.main[0].slots, Dense)
    fixed = sizes | dict(
        G=per, GP=padded, MASK=mask.kind, SOFTCAP=bool(value.attr("softcap")), SLOPES="slopes" in named,
        LISTED=0 if pages is None else pages.tensor.width, PAGE=value.attr("page", 0), OPEN=value.attr("open", 0),
        SINKS=sinks is not None and splits == 1, RING=ring, DRAFTED=drafted, PENDING=not drafted, ORDERED=ordered,
        NODES=nodes(state) or LANES, PARTS=splits > 1, LSE=observed and splits == 1, WAITING=waits,
        KEPT=bool(kept is not None or waits), BM=tile.m, BN=tile.n, OLDER_K=older_forms[0], OLDER_V=older_forms[1],
    )  # fmt: skip
    grid: tuple[Any, ...] = (splits, ("longest", tokens, tile.m // padded), ("rows", state.heads))
    writes: list[int | str] = [out.buffer if part is None else part, *([] if kept is None else [kept])]
    if lse is not None and part is None:
        writes.append(lse)
    if waits:
        writes.append(name)
    to.launch("attend", grid, args, fixed, reads=[name], writes=writes, warps=tile.warps, stages=tile.stages)
    if part is not None:
        fixed = dict(
            HEADS=heads, DV=state.vdim, DVP=sizes["DVP"], SPLITS=splits, SINKS=sinks is not None, LSE=observed, WAITING=waits,
        )  # fmt: skip
        grid = (("tokens", tokens, 1), heads)
        shared["row"] = axis(tokens, "row") if waits else None
        writes = [out.buffer] if lse is None else [out.buffer, lse]
        writes += [name] if waits else []
        to.launch("combine", grid, shared, fixed, writes=writes, warps=1)
    if lse is not None:
        to.lse[q] = lse


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
