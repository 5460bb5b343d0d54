"""The rows of attention: `append` and `attend` on a cache whose memory kernels can read."""

from __future__ import annotations

from elision.codegen.cpu import attend as made
from elision.codegen.cpu import cache, page_rules
from elision.codegen.cpu import observe as light
from elision.codegen.cpu.cache_rows import Form, form
from elision.codegen.cpu.credit import credited
from elision.codegen.cpu.flash import CHUNK, Site, together
from elision.codegen.cpu.grouped import Grouped
from elision.codegen.cpu.gumbel import Noise
from elision.codegen.cpu.kernels import Kernels
from elision.codegen.cpu.mended import Mended, floats_bytes
from elision.codegen.cpu.tile import PAD, TILE, WORDS
from elision.codegen.planner import Planner, Ref
from elision.codegen.refusal import NotNative, floats, need
from elision.errors import IllegalProgram
from elision.ir import schedule as abi
from elision.ir.layout import LANES
from elision.ir.mask import Mask
from elision.ir.ops.program import origin
from elision.ir.states import KV, Budget, Dense, Segment
from elision.ir.value import Value

Forms = tuple[Form, Form]


def forms(state: KV) -> Forms:
    """The forms of a cache's keys and values where it is appended to. Raises NotNative for a cache that kernels cannot read."""
    main = state.main[-1]
    need(len(state.main) <= 2 and not any(s.shared for s in state.main), "a cache of several segments")
    need(isinstance(main.slots, Dense | Budget), f"slots of the kind {main.slots}")
    need(state.vdim % (LANES // 2) == 0, f"values of {state.vdim} channels")
    older(state)
    found = _forms(state, main)
    need(not any(isinstance(f, Mended) for f in found), "rows that join one by one in blocks of codes")
    need(state.scores is None or not any(isinstance(f, Grouped) for f in found), "scores beside codes in groups")
    return found


def plain_forms(state: KV) -> tuple[str, str]:
    """The forms of a cache of one segment whose rows share nothing. Raises NotNative for any other."""
    k, v = forms(state)
    if not isinstance(k, str) or not isinstance(v, str) or older(state) is not None:
        raise NotNative("a cache of several segments, or codes in groups")
    return k, v


def older(state: KV) -> Forms | None:
    """The forms of a segment of older entries, if there is one. Raises NotNative as `forms` does."""
    if len(state.main) == 1:
        return None
    first = state.main[0]
    need(isinstance(first.slots, Dense) and state.keyed_by == "position", "a cache of several segments")
    found = _forms(state, first)
    need(len({f.block if isinstance(f, Mended) else 0 for f in found}) == 1, "keys and values in blocks of other lengths")
    return found


def _forms(state: KV, segment: Segment) -> Forms:
    return form(segment.k, state.dim), form(segment.v, state.vdim, keys=False)


def lists_of(state: KV) -> int:
    """Lists of entries for a sequence: one for all heads, or one for each."""
    return state.heads if state.keep == "per_head" else 1


def _read_natively(plan: Planner, state: Value) -> None:
    """Raises NotNative if something reads a cache that kernels would fill, but not with a kernel: the host counts on lengths that
    kernels bring up to date at the end."""
    for value in plan.graph.values:
        if value.op == "attend" and origin(value.args[1]) is origin(state):
            need(not value.attr("results"), "results beside the output")
            floats(value.args[0], *(x for name, x in operands(value).items() if name != "pages"))
            page_rules.chosen(plan, value)


def operands(value: Value) -> dict[str, Value]:
    """The further operands of an `attend` by name."""
    return dict(zip(value.attr("extras") or (), value.args[2:], strict=True))


def fresh(kernels: Kernels, plan: Planner, value: Value) -> None:
    """A cache of the call's own tokens."""
    _append(kernels, plan, value, *value.args)


def empty(kernels: Kernels, plan: Planner, value: Value) -> None:
    assert isinstance(value.type, KV)
    forms(value.type)
    _read_natively(plan, value)
    plan.cache(value)


def append(kernels: Kernels, plan: Planner, value: Value) -> None:
    before, k, v = value.args
    _append(kernels, plan, value, k, v, before)


def _append(kernels: Kernels, plan: Planner, value: Value, k: Value, v: Value, before: Value | None = None) -> None:
    """Append to the cache ``before``, or to one that lives for the call only."""
    floats(k, v)
    state = value.type
    assert isinstance(state, KV)
    kinds = forms(state)
    _read_natively(plan, value)
    axis = k.tensor.tokens
    assert axis is not None
    (keys, *_), (values, *_) = plan.view(plan.ref(k)), plan.view(plan.ref(v))
    key = ("append", state.heads, state.dim, state.vdim, kinds, axis.drafted, lists_of(state), older(state) is not None)
    name = kernels.add(key, lambda n: cache.append(n, *key[1:]))  # type: ignore[arg-type]
    if before is None:
        plan.cache(value)
    else:
        plan.follow(value, before)
    share = plan.share if plan.many else abi.LAST
    # Drafted rows are written and read by the last thread alone, so nobody waits for them.
    touched = [plan.state(value)] if plan.many else []
    operands = [("axis", plan.axis(k)), *keys, *values, ("state", plan.state(value)), ("int", share)]
    plan.row(name, *operands, writes=touched)


def attend(kernels: Kernels, level: str, plan: Planner, value: Value) -> None:
    q, cached = value.args[:2]
    named = operands(value)
    pages = named.pop("pages", None)
    floats(q, *named.values())
    state = cached.type
    assert isinstance(state, KV)
    kinds = forms(state)
    need(not value.attr("results"), "results beside the output")
    mask = value.attr("mask")
    assert isinstance(mask, Mask)
    queries, outer, _ = plan.view(plan.ref(q))
    drafted = q.tensor.tokens is not None and q.tensor.tokens.drafted
    own = origin(cached).op != "input"
    ordered = state.keyed_by == "position" and (not own or mask.kind in ("causal", "full"))
    site = Site(
        state.heads, outer // state.heads, state.dim, state.vdim, kinds, drafted,
        ordered, together(level), float(value.attr("softcap") or 0.0), "slopes" in named, "sinks" in named, own,
        mask.sinks, lists_of(state) > 1, not plan.many and any(v.op == "observe" and v.args[1] is q for v in plan.graph.values),
        not plan.many and not own and mask == Mask(), older(state),
    )  # fmt: skip
    axis = plan.axis(value)
    part = plan.buffer(axis, outer * (state.vdim + PAD) * 4, private=not plan.many, across=True)
    scratch = plan.buffer(-1, TILE * CHUNK * LANES * 4, private=True)
    if pages is None:
        name = kernels.add(("attend", site), lambda n: made.attend(n, site))
        tiles = plan.buffer(-1, made.batch_bytes(site), private=True)
        sizes = [("int", mask.size if mask.kind == kind else 0) for kind in ("window", "chunk")]
        more = [plan.packing(named["slopes"], "plain")] if "slopes" in named else []
        made_floats = []
        if site.before is not None and site.before.block:
            made_floats = [plan.buffer(-1, floats_bytes(site.before), private=True)]
            more.append(("tensor", made_floats[0], 0, 4))
        plan.row(
            name, ("axis", axis), *queries, ("state", plan.state(cached)), ("tensor", part, 0, 4), ("tensor", scratch, 0, 4),
            ("tensor", tiles, 0, 4), ("int", int(plan.many)), ("float", float(value.attr("scale"))), *sizes,
            ("int", int(mask.kind == "full")), *more,
            reads=[plan.state(cached)] if plan.many else [], writes=[part, scratch, tiles, *made_floats],
        )  # fmt: skip
    else:
        page_rules.attend(kernels, plan, value, site, pages, part, scratch)
    joined = kernels.add(("combine", site), lambda n: made.combine(n, site))
    plan.tables["attended", q, plan.state(cached)] = Ref(part, 0, (1,), (1,))
    out = plan.new(value)
    more = [plan.packing(named["sinks"], "plain")] if "sinks" in named else []
    more += [("state", plan.state(cached))] if site.observed else []
    plan.row(
        joined, ("axis", axis), plan.tensor(out), ("tensor", part, 0, 4), ("int", int(plan.many)), *more, ("int", plan.share),
        writes=[out.buffer],
    )  # fmt: skip


def observe(kernels: Kernels, level: str, plan: Planner, value: Value) -> None:
    """After the attention that it observes, which leaves the logits of tokens after the prompt. Raises IllegalProgram for what
    has no kernel: the host would find the cache without the tokens of the call, which native code counts last."""
    cached, q, *extra = value.args
    state, mask = cached.type, value.attr("mask")
    assert isinstance(state, KV) and state.scores is not None
    kinds = forms(state)  # else the host appends and attends too
    attended = plan.tables.get(("attended", q, plan.state(cached)))
    decay, last = state.scores.decay, value.attr("last", 0)
    if attended is None or mask != Mask() or (last and decay != 1):
        raise IllegalProgram(
            "demand", "observe has no kernel here", sides=f"{plan.graph.name}: observe by {mask}, last={last}, decay={decay}",
            because="kernels observe what causal attention before them saw", help="compile with target='reference'",
        )  # fmt: skip
    plan.follow(value, cached)
    if q.tensor.tokens is not None and q.tensor.tokens.drafted:
        return
    noise = Noise.operands(state.scores.gumbel)
    if value.attr("decoding", False):
        for array, each in state.scores.arrays.items():
            name = credited(kernels, state, array, direct=True)
            operands = [("axis", plan.axis(q)), ("state", plan.state(cached)), ("float", each), *noise]
            plan.row(name, *operands, reads=[plan.state(cached)])
        return
    named = dict(zip(value.attr("extras") or (), extra, strict=True))
    queries, outer, _ = plan.view(plan.ref(q))
    site = Site(
        state.heads, outer // state.heads, state.dim, state.vdim, kinds, False, False, together(level),
        float(value.attr("softcap") or 0.0), "slopes" in named, "sinks" in named, apart=lists_of(state) > 1,
    )  # fmt: skip
    scores = plan.buffer(-1, TILE * CHUNK * LANES * 4, private=True)
    words = plan.buffer(-1, TILE * WORDS * 8, private=True)
    more = [plan.packing(named[n], "plain") for n in ("slopes", "sinks") if n in named]
    touched, totals = [scores, words], plan.buffer(plan.axis(q), outer * 4, private=True, across=True) if noise else -1

    def row(array: str, decay: float, total: bool = False) -> None:
        key = ("observe", site, array, bool(noise), total)
        name = kernels.add(key, lambda n: light.observe(n, site, array, bool(noise), total))
        plan.row(
            name, ("axis", plan.axis(q)), *queries, ("state", plan.state(cached)), ("tensor", attended.buffer, 0, 4),
            ("tensor", scores, 0, 4), ("tensor", words, 0, 4), ("float", float(value.attr("scale"))), ("float", decay),
            ("int", last), *more, *noise, *([("tensor", totals, 0, 4)] if noise else []),
            reads=[plan.state(cached)], writes=[*touched, totals] if total else touched,
        )  # fmt: skip

    if noise:
        row("score", state.scores.decay, total=True)
    for array, each in state.scores.arrays.items():
        row(array, each)
