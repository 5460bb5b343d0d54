"""The rows of `pick`, and of attention over what it picks."""

from __future__ import annotations

from elision.codegen.cpu import chosen as made
from elision.codegen.cpu import pages as parts
from elision.codegen.cpu.cache_rows import form
from elision.codegen.cpu.flash import CHUNK, Site, together
from elision.codegen.cpu.kernels import Kernels
from elision.codegen.cpu.tile import TILE, WORDS
from elision.codegen.planner import Planner, Ref
from elision.codegen.refusal import floats, need
from elision.ir.layout import LANES
from elision.ir.mask import Mask
from elision.ir.states import KV, Float
from elision.ir.value import Value


def chosen(plan: Planner, value: Value) -> None:
    """Raises NotNative for an attention over pages that no kernel reads."""
    pages = dict(zip(value.attr("extras") or (), value.args[2:], strict=True)).get("pages")
    if pages is not None:
        _fits(value)
        need(not plan.many and pages.op == "pick" and value.attr("mask") == Mask(), "pages of a prompt, or not of all before")


def _fits(value: Value) -> None:
    page = value.attr("page")
    fits = (page == 1 or page % LANES == 0) and value.attr("open") % LANES == 0
    need(fits, f"pages of {page}; kernels read blocks of {LANES} entries, or single ones")


def pick(kernels: Kernels, level: str, plan: Planner, value: Value) -> None:
    from elision.codegen.cpu.attention_rules import plain_forms

    q, cached = value.args
    floats(q)
    state, n, page, open, room = cached.type, *(value.attr(name) for name in ("n", "page", "open", "room"))
    assert isinstance(state, KV)
    kinds = plain_forms(state)
    _fits(value)
    need(not plan.many and (page > 1) == (state.summary is not None), "pages of a prompt, or of a cache without summaries")
    queries, outer, _ = plan.view(plan.ref(q))
    drafted = q.tensor.tokens is not None and q.tensor.tokens.drafted
    site = Site(state.heads, outer // state.heads, state.dim, state.vdim, kinds, drafted, True, together(level))
    enc = state.main[0].k if isinstance(state.main[0].k, Float) else Float()
    summary = str(form(enc, state.dim)) if state.summary is not None else ""
    axis, wide = plan.axis(q), parts.wide_pages(room, page)
    found = plan.buffer(axis, state.heads * wide * 4, private=False)
    words, scores = plan.buffer(-1, TILE * WORDS * 8, private=True), plan.buffer(-1, TILE * CHUNK * LANES * 4, private=True)
    sided = plan.buffer(-1, TILE * 2 * state.dim * 4, private=True)
    name = kernels.add(
        ("bounds", site, page, open, room, summary), lambda n: parts.bounds(n, site, page, open, room, summary)
    )  # fmt: skip
    plan.row(
        name, ("axis", axis), *queries, ("state", plan.state(cached)), ("tensor", found, 0, 4), ("tensor", words, 0, 8),
        ("tensor", scores, 0, 4), ("tensor", sided, 0, 4), writes=[found, words, scores, sided],
    )  # fmt: skip
    first, out = value.attr("first", 0), plan.new(value, private=False)
    key = ("best", site, page, open, room, n, first)
    name = kernels.add(key, lambda name: parts.best(name, site, page, open, room, n, first))
    bound = plan.tensor(Ref(found, 0, (1,), (1,)))
    plan.row(
        name, ("axis", axis), ("state", plan.state(cached)), bound, plan.tensor(out, 8), writes=[found, out.buffer]
    )  # fmt: skip


def attend(kernels: Kernels, plan: Planner, value: Value, site: Site, pages: Value, part: int, scratch: int) -> None:
    """The partial sums of attention over ``pages``."""
    chosen(plan, value)
    need(all(isinstance(form, str) for form in site.forms), "entries by list in codes that share scales")
    q, cached = value.args[:2]
    page, open, room, n = value.attr("page"), value.attr("open"), pages.attr("room"), pages.attr("n")
    queries, *_ = plan.view(plan.ref(q))
    tiles = plan.buffer(-1, made.tiles_bytes(site), private=True)
    numbers = plan.buffer(-1, made.list_words(page, n) * 8, private=True)
    key = ("attend_pages", site, page, open, room, n)
    name = kernels.add(key, lambda name: made.attend(name, site, page, open, room, n))
    plan.row(
        name, ("axis", plan.axis(value)), *queries, ("state", plan.state(cached)), ("tensor", part, 0, 4),
        ("tensor", scratch, 0, 4), ("tensor", tiles, 0, 4), plan.tensor(plan.ref(pages), 8), ("tensor", numbers, 0, 8),
        ("float", float(value.attr("scale"))), writes=[part, scratch, tiles, numbers],
    )  # fmt: skip
