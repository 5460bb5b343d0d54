"""Which pages of a cache a token reads (`elision.ir.pages`): a bound for every page, then the best of them.

Bounds are products: of the summaries, whose lanes are pages, with the query's positive part beside its negative part; without
summaries of the keys themselves, whose lanes are pages of one entry.
"""

from __future__ import annotations

from dataclasses import replace

from elision.codegen.cpu.cache_rows import BYTES
from elision.codegen.cpu.emit import Fn, Val
from elision.codegen.cpu.flash import CHUNK, VF, VI, Site, both, scores_tile
from elision.codegen.cpu.kernel import Axis, Kernel, State
from elision.codegen.cpu.rows import channels
from elision.codegen.cpu.tile import QUERY, TILE, WORDS
from elision.ir.layout import LANES


def closed(fn: Fn, axis: Axis, state: State, token: Val, open: int, room: int, drafted: bool) -> Val:
    """The entries that are closed for a token (`elision.ir.pages.closed`), at most ``room``."""
    found = fn.load(axis.array("pos"), "i64", token)
    if drafted:  # others are not counted into the length yet
        row = fn.load(axis.array("row"), "i64", token)
        found = fn.minimum(found, fn.load(state.address("len_k"), "i64", row))
    return fn.minimum(found, room) // open * open


def bounds(name: str, site: Site, page: int, open: int, room: int, summary: str) -> tuple[Kernel, list[Fn]]:
    """``out[token][head][page]``: the bound of every closed page. Threads share the pages. ``summary``: the form of the
    summaries' numbers, or nothing."""
    looked = replace(site, dim=2 * site.dim, forms=(summary, site.forms[1])) if summary else site
    sizes = [min(TILE, site.group - i) for i in range(0, site.group, TILE)]
    inner = {size: scores_tile(f"{name}_tile{size}", looked, size) for size in set(sizes)}
    kernel = Kernel(name)
    fn = kernel.fn
    axis, q, state, out = kernel.axis(), kernel.view("q"), kernel.state("S"), kernel.tensor("out")
    words, scores, sided = (kernel.tensor(n).base for n in ("words", "scores", "sided"))
    wide, one = wide_pages(room, page), fn.const(1.0, "f32")
    with fn.loop(0, axis.count) as tokens, fn.loop(0, site.heads) as heads:
        token, head = tokens.index, heads.index
        count = closed(fn, axis, state, token, open, room, site.drafted) // page
        low, high = kernel.part((count + (LANES - 1)) // LANES)
        row = fn.load(axis.array("row"), "i64", token)
        at = (row * site.heads + head) * state.number("pages" if summary else "blocks") * LANES
        keys = fn.at(state.address("summary" if summary else "k"), at * (looked.dim * BYTES[looked.forms[0]]))
        more = [fn.at(state.address("k_scale"), at, "f32")] if "k" in looked.scaled else []
        target = fn.at(out.token(token), head * wide, "f32")
        for done, size in zip(range(0, site.group, TILE), sizes, strict=True):
            for j in range(size):
                query = q.place(token, head * site.group + (done + j))
                if summary:
                    query = _sided(fn, query, fn.at(sided, j * looked.dim, "f32"), site.dim)
                fn.store(query, words, j * WORDS + QUERY, "i64")
            with fn.loop(low, high, CHUNK) as chunks:
                stop = fn.minimum(chunks.index + CHUNK, high)
                fn.call(inner[size].name, words, scores, keys, chunks.index, stop, one, *more)
                with fn.loop(chunks.index, stop) as blocks:
                    here = fn.at(scores, (blocks.index - chunks.index) * LANES, "f32")
                    found = [fn.load(here, VF, j * CHUNK * LANES, "f32") for j in range(size)]
                    if done:
                        found.append(fn.load(target, VF, blocks.index * LANES, "f32"))
                    most = found[0]
                    for x in found[1:]:
                        most = fn.maximum(most, x)
                    fn.store(most + 0.0, target, blocks.index * LANES, "f32")  # one zero, not two
    return kernel, list(inner.values())


def wide_pages(room: int, page: int) -> int:
    """Floats of the bounds of a head: whole vectors."""
    return -(-(room // page) // LANES) * LANES


def _sided(fn: Fn, query: Val, target: Val, dim: int) -> Val:
    """A query's positive part, and after it the negative one."""

    def write(c: Val | int, type: str) -> None:
        x = fn.load(query, type, c, "f32")
        fn.store(fn.maximum(x, 0.0), target, c, "f32")
        fn.store(fn.minimum(x, 0.0), fn.at(target, dim, "f32"), c, "f32")

    channels(fn, dim, write)
    return target


def best(name: str, site: Site, page: int, open: int, room: int, n: int, first: int) -> Kernel:
    """The ``n`` pages with the largest bounds, the ``first`` ones in any case: ascending, then -1. Threads share the heads of all
    tokens. Bounds become numbers of 32 bits in the same order, of which the n-th largest is found bit by bit."""
    kernel = Kernel(name)
    fn = kernel.fn
    axis, state, bound, out = kernel.axis(), kernel.state("S"), kernel.tensor("bound"), kernel.tensor("pages")
    wide, none, iota = wide_pages(room, page), fn.const(-1, "i64"), fn.const(list(range(LANES)), VI)
    zero, ones, sign = fn.const(0, VI), fn.const(-1, VI), fn.const(-(1 << 31), VI)
    low, high = kernel.part(axis.count * site.heads)
    with fn.loop(low, high) as pairs:
        token, head = pairs.index // site.heads, pairs.index % site.heads
        count = closed(fn, axis, state, token, open, room, site.drafted) // page
        x = fn.at(bound.token(token), head * wide, "f32")
        found = fn.at(out.token(token, "i64"), head * n, "i64")
        few = fn.compare(count, "sle", n)
        with fn.when(few), fn.loop(0, n) as loop:
            fn.store(fn.select(fn.compare(loop.index, "slt", count), loop.index, none), found, loop.index)
        with fn.when(fn.compare(count, "sgt", n)):
            blocks = (count + (LANES - 1)) // LANES
            with fn.loop(0, blocks) as loop:
                index = fn.splat(fn.i32(loop.index * LANES), LANES) + iota
                bits = fn.load(x, VI, loop.index * LANES, "i32")
                order = fn.select(fn.compare(bits, "slt", 0), bits ^ ones, bits ^ sign)
                order = fn.select(fn.compare(index, "slt", first), ones, order)
                there = fn.compare(index, "slt", fn.splat(fn.i32(count), LANES))
                fn.store(fn.select(there, order, zero), x, loop.index * LANES, "i32")

            def counted(predicate: str, than: Val, blocks: Val = blocks, x: Val = x) -> Val:
                """How many numbers compare so with one."""
                wanted = fn.splat(than, LANES)
                with fn.loop(0, blocks, 1, [zero]) as loop:
                    holds = fn.compare(fn.load(x, VI, loop.index * LANES, "i32"), predicate, wanted)
                    loop.give(fn.select(holds, loop.carried[0] + 1, loop.carried[0]))
                return fn.sum(loop.results[0])

            with fn.loop(0, 32, 1, [fn.const(0, "i32"), blocks]) as loop:  # nothing is left to do once n are as large
                least, rest = loop.carried
                more = least | (fn.const(1, "i32") << fn.i32(31 - loop.index))
                there = counted("uge", more, rest)
                done = fn.compare(there, "eq", n)
                loop.give(
                    fn.select(fn.compare(there, "sge", n), more, least), fn.select(done, fn.const(0, "i64"), rest)
                )  # fmt: skip
            least = loop.results[0]
            level = fn.const(n, "i32") - counted("ugt", least)  # of those that are just as large
            with fn.loop(0, blocks, 1, [fn.const(0, "i64"), level]) as each:
                numbers, edge = fn.load(x, VI, each.index * LANES, "i32"), fn.splat(least, LANES)
                equal, large = (_bits(fn, fn.compare(numbers, how, edge)) for how in ("eq", "uge"))
                count = fn.cast(fn.math("ctpop", large), "arith.extui", "i64")
                with fn.loop(0, count, 1, [large, *each.carried]) as loop:
                    left, cursor, spare = loop.carried
                    lane = fn.math("cttz", left)
                    same = fn.compare((equal >> lane) & 1, "ne", 0)
                    full = both(fn, same, fn.compare(spare, "sle", 0))
                    with fn.when(fn.compare(fn.cast(full, "arith.extui", "i32"), "eq", 0)):
                        fn.store(each.index * LANES + fn.cast(lane, "arith.extui", "i64"), found, cursor)
                    cursor = fn.select(full, cursor, cursor + 1)
                    loop.give(left & (left - 1), cursor, fn.select(same, spare - 1, spare))
                each.give(*loop.results[1:])
    return kernel


def _bits(fn: Fn, mask: Val) -> Val:
    """The lanes of a mask as bits."""
    return fn.cast(fn.cast(mask, "llvm.bitcast", "i16"), "arith.extui", "i32")
