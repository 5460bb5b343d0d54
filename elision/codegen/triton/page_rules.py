"""The launches of pages: summaries on the clock, and the choice of what a token reads."""

from __future__ import annotations

from typing import Any

from elision.codegen.refusal import need
from elision.codegen.triton.attention_rules import fixed_sizes, readable
from elision.codegen.triton.configs import power
from elision.codegen.triton.launches import ROWS, Arg, Launches, axis, cache, integer, piece, size
from elision.ir.states import KV
from elision.ir.value import Value


def _sizes(state: KV) -> dict[str, Any]:
    return {n: v for n, v in fixed_sizes(state).items() if n in ("H", "D", "DP", "FORM_K")}


def summarise(to: Launches, name: str, state: KV) -> None:
    """Pages of the sequences of axis 0."""
    readable(state)
    assert state.summary is not None
    page = state.summary.page
    given: dict[str, Arg | None] = {
        "done": cache(name, state, "summarised"), "start": axis(0, "start"), "length": cache(name, state, "len_k"),
    }  # fmt: skip
    args = given | {
        "summary": cache(name, state, "summary"), "k": cache(name, state, "k"), "k_scale": cache(name, state, "k_scale"),
        "k_low": cache(name, state, "k_low"), "blocks": size(name, "blocks"), "pages": size(name, "pages"),
    }  # fmt: skip
    fixed = _sizes(state) | dict(PAGE=page, PP=max(16, power(page)))
    to.launch("summarise", (("entries", name, page), ("rows", state.heads)), args, fixed, reads=[name], writes=[name], warps=1)
    to.launch("summarised", (("rows", 1, 32),), given | {"rows": ROWS}, dict(PAGE=page, BLOCK=32), writes=[name], warps=1)


def pick(to: Launches, value: Value) -> None:
    q, cached = value.args
    plan, state, n, page = to.plan, cached.type, value.attr("n"), value.attr("page")
    assert isinstance(state, KV)
    readable(state)
    need(len(state.main) == 1, "pages of two segments")
    need(state.summary is not None or page == 1, "pages of several entries without summaries")
    name, tokens = plan.state(cached), plan.axis(q)
    room = -(-value.attr("room") // page)
    queries, stride = to.tensor(q)
    bound = to.scratch(tokens, state.heads * room)
    common: dict[str, Arg | None] = {
        "bound": piece(bound), "row": axis(tokens, "row"), "pos": axis(tokens, "pos"), "start": axis(tokens, "start"),
        "length": cache(name, state, "len_k"), "room": integer(room),
    }  # fmt: skip
    sided = state.summary is not None
    pages = dict(PAGE=page, OPEN=value.attr("open"), PENDING=not plan.drafted(tokens))
    args = common | {
        "q": queries, "q_stride": stride, "k": cache(name, state, "summary" if sided else "k"),
        **{n: None if sided else cache(name, state, n) for n in ("k_scale", "k_low")},
        "slots": size(name, "pages" if sided else "capacity"),
    }  # fmt: skip
    fixed = _sizes(state) | pages | dict(G=q.tensor.sizes[0] // state.heads, SIDED=sided, BN=64)
    fixed["FORM_K"] = "" if sided else fixed["FORM_K"]
    grid = (("entries", name, page * 64), ("tokens", tokens, 1), state.heads)
    to.launch("bounds", grid, args, fixed, reads=[name], writes=[bound])
    out = to.new(value)
    args = common | {"picked": to.tensor(value)[0]}
    fixed = pages | dict(N=n, FIRST=value.attr("first", 0), H=state.heads, BN=min(1024, power(room)))
    to.launch("pick", (("tokens", tokens, 1), state.heads), args, fixed, reads=[bound], writes=[out.buffer])
