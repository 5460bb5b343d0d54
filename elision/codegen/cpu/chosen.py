"""Attention over chosen pages of a cache, the entries after the last one that could be chosen, and drafted tokens.

Every token and key head has pages of its own, so a tile holds queries of one token. The blocks that it reads, chosen ones first,
are shared out among threads; the last blocks, to which the call itself may append, are those of the last thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from elision.codegen.cpu.cache_rows import BYTES
from elision.codegen.cpu.emit import Fn, Val
from elision.codegen.cpu.flash import CHUNK, Site, flash, weigh
from elision.codegen.cpu.kernel import Kernel
from elision.codegen.cpu.listed_flash import listed_flash
from elision.codegen.cpu.pages import closed
from elision.codegen.cpu.tile import BITS, HIGH, LOW, PAD, POS, QUERY, SUM, TILE, bounds, clear, put, tile_words
from elision.ir.layout import LANES

LIST = 2 * CHUNK  # numbers of the blocks of a chunk, and of those that come after it


def list_words(page: int, n: int) -> int:
    """Words of the lists of blocks that ``n`` pages become: their numbers; of single entries also bits, and where they begin."""
    return LIST if page > 1 else 3 * (n + LIST)


def tiles_bytes(site: Site) -> int:
    """Bytes of the tiles of a token and key head."""
    return 8 * tile_words(site.vdim) * -(-site.group // TILE)


def attend(name: str, site: Site, page: int, open: int, room: int, n: int) -> tuple[Kernel, list[Fn]]:
    """As `elision.codegen.cpu.attend.attend` for few tokens and a causal mask, over ``n`` pages of ``page`` entries: whole
    blocks, or single entries."""
    listed = replace(site, drafted=False, listed=True, partly=0 if page > 1 else n + LIST)
    sizes = [min(TILE, site.group - i) for i in range(0, site.group, TILE)]
    helpers = {False: weigh(f"{name}_weigh", site), True: weigh(f"{name}_listed_weigh", listed)}
    flashes = {(False, s): flash(f"{name}_flash{s}", site, s, helpers[False].name) for s in set(sizes)}
    flashes |= {(True, s): listed_flash(f"{name}_listed_flash{s}", listed, s, helpers[True].name) for s in set(sizes)}
    kernel = Kernel(name)
    fn = kernel.fn
    axis, q, state = kernel.axis(), kernel.view("q"), kernel.state("S")
    part, scores, tiles = kernel.tensor("part"), kernel.tensor("scores").base, kernel.tensor("tiles").base
    pages, numbers, scale = kernel.tensor("pages"), kernel.tensor("numbers").base, kernel.real("scale")
    starts, zero, no = axis.array("start"), fn.const(0, "i64"), fn.const(0, "i1")
    size, per = site.vdim + PAD, page // LANES
    k_size, v_size = BYTES[site.forms[0]], BYTES[site.forms[1]]
    places = [(fn.at(tiles, i * tile_words(site.vdim), "i64"), i * TILE, s) for i, s in enumerate(sizes)]

    def visit(
        each: bool, k: Val, v: Val, pos: Val, low: Val, high: Val, limit: Val, scales: Sequence[Val], nodes: Val, *blocks: Val
    ) -> None:
        """All tiles over one chunk of blocks."""
        for tile, _, count in places:
            some = [] if each else [limit, low, nodes]
            fn.call(flashes[each, count].name, tile, scores, k, v, pos, low, high, *some, scale, *scales, *blocks)

    with fn.loop(0, axis.count) as tokens, fn.loop(0, site.heads) as heads:
        token, head = tokens.index, heads.index
        row, where = fn.load(axis.array("row"), "i64", token), fn.load(axis.array("pos"), "i64", token)
        begin, end = fn.load(starts, "i64", row), fn.load(starts, "i64", row + 1)
        length = fn.load(state.address("len_k"), "i64", row)
        if not site.drafted:
            length = length + (end - begin)
        low, high = bounds(fn, where, zero, zero, zero)
        for tile, done, count in places:
            for j in range(count):
                query = head * site.group + (done + j)
                target = fn.at(part.token(token), query * size, "f32")
                clear(fn, target, site.vdim)
                items = {QUERY: q.place(token, query), LOW: low, HIGH: high, POS: where, SUM: target}
                if site.drafted:
                    items[BITS] = fn.load(axis.array("anc"), "i64", token)
                put(fn, tile, fn.const(j, "i64"), items)

        past = closed(fn, axis, state, token, open, room, site.drafted)
        mine = fn.at(pages.token(token, "i64"), head * n, "i64")
        later = fn.at(pages.token(token, "i64"), fn.minimum(head + 1, site.heads - 1) * n, "i64")  # of the head after this one
        chosen = fn.minimum(past // page, n) * per if per else _blocks(fn, mine, fn.minimum(past, n), numbers, listed.partly)
        after = past // LANES
        blocks = chosen + ((length + (LANES - 1)) // LANES - after)
        first, last = kernel.part(blocks)
        line = row * site.heads + head
        at = line * state.number("blocks") * LANES
        k, v = fn.at(state.address("k"), at * (site.dim * k_size)), fn.at(state.address("v"), at * (site.vdim * v_size))
        pos = fn.at(state.address("pos"), row * state.number("entries"), "i32")
        scales = [fn.at(state.address(f"{what}_scale"), at, "f32") for what in site.scaled]
        stop = fn.minimum(last, chosen)
        with fn.loop(fn.minimum(first, chosen), stop, CHUNK) as chunks:
            here = fn.minimum(stop - chunks.index, CHUNK)
            if per:
                with fn.loop(0, LIST) as loop:  # what comes after the last one is where the next head begins
                    i = chunks.index + loop.index
                    over = fn.compare(i, "sge", stop)
                    i = fn.minimum(fn.select(over, i - stop + first, i), chosen - 1)
                    number = fn.load(fn.select(over, later, mine), "i64", i // per) * per + i % per
                    fn.store(fn.select(over, number + state.number("blocks"), number), numbers, loop.index)
                visit(True, k, v, pos, zero, here, length, scales, no, numbers)
            else:
                visit(True, k, v, pos, zero, here, length, scales, no, fn.at(numbers, chunks.index, "i64"), mine)
        until = after + (fn.maximum(last, chosen) - chosen)
        with fn.loop(after + (fn.maximum(first, chosen) - chosen), until, CHUNK) as chunks:
            visit(False, k, v, pos, chunks.index, fn.minimum(chunks.index + CHUNK, until), length, scales, no)
        if site.drafted:
            nodes = fn.load(axis.array("node"), "i64", end - 1) + 1
            idle = fn.compare(kernel.tid, "ne", kernel.threads - 1)
            until = fn.select(idle, zero, (nodes + (LANES - 1)) // LANES)
            at = line * state.number("draft_blocks") * LANES
            k = fn.at(state.address("draft_k"), at * (site.dim * k_size))
            v = fn.at(state.address("draft_v"), at * (site.vdim * v_size))
            pos = fn.at(state.address("node_pos"), row * state.number("nodes"), "i32")
            scales = [fn.at(state.address(f"draft_{what}_scale"), at, "f32") for what in site.scaled]
            with fn.loop(0, until, CHUNK) as chunks:
                high = fn.minimum(chunks.index + CHUNK, until)
                visit(False, k, v, pos, chunks.index, high, nodes, scales, fn.const(1, "i1"))
    return kernel, [*helpers.values(), *flashes.values()]


def _blocks(fn: Fn, entries: Val, count: Val, numbers: Val, apart: int) -> Val:
    """How many blocks the ascending ``entries`` are in; their numbers, `apart` words later the bits of the entries, and as much
    later where the entries of each begin in the list."""
    bits, begins, none = fn.at(numbers, apart, "i64"), fn.at(numbers, 2 * apart, "i64"), fn.const(-1, "i64")
    with fn.loop(0, count, 1, [none, none, fn.const(0, "i64")]) as loop:  # the last block, its number, its bits
        entry = fn.load(entries, "i64", loop.index)
        number, bit = entry // LANES, fn.const(1, "i64") << (entry % LANES)
        again = fn.compare(number, "eq", loop.carried[1])
        place = fn.select(again, loop.carried[0], loop.carried[0] + 1)
        seen = fn.select(again, loop.carried[2] | bit, bit)
        fn.store(number, numbers, place)
        fn.store(seen, bits, place)
        with fn.when(fn.compare(number, "ne", loop.carried[1])):
            fn.store(loop.index, begins, place)
        loop.give(place, number, seen)
    found = loop.results[0] + 1
    fn.store(count, begins, found)
    with fn.loop(0, LIST) as loop2:  # beyond the last one it once more
        fn.store(fn.maximum(loop.results[1], 0), numbers, found + loop2.index)
    return found
