"""Scores of cache entries (`elision.ir.scores`): a second, light look at the keys for a prompt. A thread has part of the entries
of every sequence."""

from __future__ import annotations

from collections.abc import Callable

from elision.codegen.cpu import vector_math as vm
from elision.codegen.cpu.cache_rows import BYTES
from elision.codegen.cpu.emit import Fn, Val
from elision.codegen.cpu.flash import CHUNK, VF, VI, Site, both, scores_tile
from elision.codegen.cpu.gumbel import Noise
from elision.codegen.cpu.kernel import Kernel
from elision.codegen.cpu.tile import PAD, QUERY, TILE, WORDS
from elision.ir.layout import LANES
from elision.ir.schedule import SEQUENCES

Weight = Callable[[Val, Val], Val]  #: Of logits relative to the largest one, and positions.


def observe(name: str, site: Site, array: str = "score", noisy: bool = False, total: bool = False) -> tuple[Kernel, list[Fn]]:
    """`observe` of committed tokens by a causal mask. The largest score and the sum of weights of each query are in the partial
    sums ``part`` of `elision.codegen.cpu.attend`. ``last``: only queries among the last so many tokens of the prompt count (0:
    all). ``noisy``: by the softmax of `Gumbel`, whose sums of weights, ``totals``, the same kernel leaves before with
    ``total``, a part for each thread. ``array``: which of the numbers beside an entry (`Scores.arrays`)."""
    inner = {tile: scores_tile(f"{name}_tile{tile}", site, tile) for tile in site.tiles}
    kernel = Kernel(name)
    fn = kernel.fn
    axis, q, state = kernel.axis(), kernel.view("q"), kernel.state("S")
    part = kernel.tensor("part")
    scores, words = kernel.tensor("scores"), kernel.tensor("words")
    scale, decay, last = kernel.real("scale"), kernel.real("decay"), kernel.integer("last")
    slopes = kernel.weight("slopes") if site.slopes else None
    sinks = kernel.weight("sinks") if site.sinks else None
    noise = Noise.of(kernel) if noisy else None
    totals = kernel.tensor("totals") if total else None
    sums = kernel.parts("totals") if noisy and not total else None
    k_size = BYTES[site.forms[0]]
    starts, wide = axis.array("start"), padded(state.number("entries"))

    def norm(token: Val, query: Val) -> tuple[Val, Val]:
        """The largest score of a query and what a weight relative to it is multiplied by."""
        here = fn.at(part.token(token), query * (site.vdim + PAD), "f32")
        top, whole = fn.load(here, "f32", site.vdim), fn.load(here, "f32", site.vdim + 1)
        if sums is not None:
            base, apart, stride = sums
            here = fn.at(base, (token * stride + query) * 4)
            with fn.loop(0, kernel.threads, 1, [fn.const(0.0, "f32")]) as loop:
                loop.give(loop.carried[0] + fn.load(fn.at(here, loop.index * apart), "f32"))
            whole = loop.results[0]
        if sinks is not None:
            whole = whole + vm.exp(fn, fn.load(sinks, "f32", query) - top)
        return top, 1.0 / fn.maximum(whole, 1e-30)

    with fn.loop(0, fn.load(kernel.ctx, "i64", SEQUENCES)) as rows:
        row = rows.index
        begin, end = fn.load(starts, "i64", row), fn.load(starts, "i64", row + 1)
        until = fn.select(fn.compare(last, "sgt", 0), end, begin)  # tokens of an axis need not be neighbours in the prompt
        with fn.loop(begin, until, 1, [begin]) as early:
            behind = fn.compare(fn.load(axis.array("ahead"), "i64", early.index), "sge", last)
            early.give(fn.select(behind, early.index + 1, early.carried[0]))
        first = early.results[0]
        count = (end - first) * site.group
        with fn.when(fn.compare(end, "sgt", begin)), fn.loop(0, site.heads) as heads:
            head = row * site.heads + heads.index
            line = head if site.apart else row
            length = fn.load(state.address("len_k"), "i64", line)
            limit = length + (end - begin)
            low, high = kernel.part((limit + (LANES - 1)) // LANES)
            positions = fn.at(state.address("pos"), line * state.number("entries"), "i32")
            at = head * state.number("blocks") * LANES
            keys = fn.at(state.address("k"), at * (site.dim * k_size))
            key_scales = [fn.at(state.address("k_scale"), at, "f32")] if "k" in site.scaled else []
            score = fn.at(state.address(array), head * wide, "f32")
            if totals is not None:
                with fn.loop(0, count) as loop:
                    token, query = first + loop.index // site.group, heads.index * site.group + loop.index % site.group
                    fn.store(fn.const(0.0, "f32"), totals.token(token), query)
            with fn.loop(low, high, CHUNK) as chunks:
                stop = fn.minimum(chunks.index + CHUNK, high)
                if totals is None:
                    with fn.loop(chunks.index, stop) as blocks:  # entries of this call begin at 0
                        old, place = fn.load(score, VF, blocks.index * LANES, "f32"), blocks.index * LANES
                        fn.store(fn.select(below(fn, blocks.index, length), old, fn.const(0.0, VF)), score, place, "f32")
                unseen = (chunks.index * LANES - length) - (first - begin)  # queries that come before all of these entries
                begins = fn.maximum(unseen, 0) * site.group // TILE * TILE
                with fn.loop(begins, count, TILE) as tiles:
                    left = count - tiles.index
                    with fn.loop(0, TILE) as loop:
                        i = fn.minimum(tiles.index + loop.index, count - 1)
                        token, query = first + i // site.group, heads.index * site.group + i % site.group
                        fn.store(q.place(token, query), words.base, loop.index * WORDS + QUERY, "i64")
                    less: Val | int = 0
                    for many, helper in inner.items():
                        fits = fn.compare(left, "sgt", less)
                        if many < TILE:
                            fits = both(fn, fits, fn.compare(left, "sle", many))
                        with fn.when(fits):
                            fn.call(helper.name, words.base, scores.base, keys, chunks.index, stop, scale, *key_scales)
                        less = many
                    with fn.loop(0, fn.minimum(left, TILE)) as loop:
                        i = tiles.index + loop.index
                        token, query = first + i // site.group, heads.index * site.group + i % site.group
                        line = fn.at(scores.base, loop.index * (CHUNK * LANES), "f32")
                        at_pos = fn.load(axis.array("pos"), "i64", token)
                        where = fn.splat(fn.i32(at_pos), LANES)
                        top, share = (fn.splat(x, LANES) for x in norm(token, query))
                        weight = weighing(noise, query, at_pos)
                        kept = fn.splat(fn.select(fn.compare(i % site.group, "eq", 0), decay, fn.const(1.0, "f32")), LANES)
                        with fn.loop(chunks.index, stop, 1, [] if totals is None else [fn.const(0.0, VF)]) as blocks:
                            place = blocks.index * LANES
                            pos = fn.load(positions, VI, place, "i32")
                            x = fn.load(line, VF, (blocks.index - chunks.index) * LANES, "f32")
                            if site.softcap:
                                x = vm.tanh(fn, x * (1 / site.softcap)) * site.softcap
                            if slopes is not None:
                                slope = fn.splat(fn.load(slopes, "f32", query), LANES)
                                x = fn.fma(fn.cast(pos - where, "arith.sitofp", VF), slope, x)
                            seen = both(fn, below(fn, blocks.index, limit), fn.compare(pos, "sle", where))
                            x = x - top
                            p = weight(x, pos)
                            p = fn.select(seen, p if totals is not None else p * share, fn.const(0.0, VF))
                            if totals is None:
                                fn.store(fn.fma(fn.load(score, VF, place, "f32"), kept, p), score, place, "f32")
                            else:
                                blocks.give(blocks.carried[0] + p)
                        if totals is not None:
                            so_far = fn.load(totals.token(token), "f32", query)
                            fn.store(so_far + fn.sum(blocks.results[0]), totals.token(token), query)
            if totals is not None and noise is not None:
                fn.store(fn.load(axis.array("pos"), "i64", end - 1) + 1, state.address("prompt"), row)
    return kernel, list(inner.values())


def padded(count: Val) -> Val:
    """Whole vectors."""
    return (count + (LANES - 1)) // LANES * LANES


def weighing(noise: Noise | None, query: Val, where: Val, prompt: Val | None = None) -> Weight:
    """The weights of a query at a position, after a prompt of so many tokens (None: in it)."""
    if noise is None:
        return lambda x, pos: vm.exp(x.fn, x)
    key, cold = noise.key(query, where), 1.0 / noise.start if prompt is None else noise.temperature(where, prompt)
    return lambda x, pos: noise.weight(x, key, pos, cold)


def below(fn: Fn, block: Val, limit: Val) -> Val:
    """Which entries of a block there are."""
    iota = fn.const(list(range(LANES)), VI)
    return fn.compare(fn.splat(fn.i32(block * LANES), LANES) + iota, "slt", fn.splat(fn.i32(limit), LANES))
