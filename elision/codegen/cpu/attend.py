"""Attention over a cache: flash attention (Dao et al. 2022) with the positions of a sequence split among threads, or the queries.

A thread leaves, for every query and head, the sum of values, the largest score and the sum of weights; `combine` joins those
of all threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from elision.codegen.cpu import mended
from elision.codegen.cpu import vector_math as vm
from elision.codegen.cpu.cache_rows import row_bytes
from elision.codegen.cpu.credit import waiting
from elision.codegen.cpu.emit import Fn, Val
from elision.codegen.cpu.flash import CHUNK, Site, both, flash, weigh
from elision.codegen.cpu.kernel import Kernel, State
from elision.codegen.cpu.observe import padded
from elision.codegen.cpu.rows import channels
from elision.codegen.cpu.tile import (
    BITS,
    HIDDEN,
    HIGH,
    LEFT,
    LEFT_NODES,
    LOW,
    PAD,
    POS,
    QUERY,
    SIGHT,
    SLOPE,
    SPARE,
    SUM,
    TILE,
    bounds,
    clear,
    nothing,
    put,
    tile_words,
    widened,
)  # fmt: skip
from elision.ir.layout import LANES
from elision.ir.schedule import SEQUENCES

BATCH = 8  # tiles that pass over a chunk before the next one


def batch_bytes(site: Site) -> int:
    """Bytes of the tiles of a batch."""
    return BATCH * 8 * tile_words(site.vdim)


def attend(name: str, site: Site) -> tuple[Kernel, list[Fn]]:
    """The attention kernel of a site and the functions that it calls.

    ``by_queries`` 0: every thread takes part of the positions for all queries; 1: all positions for part of the queries.
    """
    flashes = {tile: flash(f"{name}_flash{tile}", site, tile, f"{name}_weigh") for tile in site.tiles}
    functions, older, before = [weigh(f"{name}_weigh", site), *flashes.values()], flashes, site.before
    if before is not None:
        older = {tile: flash(f"{name}_older{tile}", before.read, tile, f"{name}_weigh_older") for tile in site.tiles}
        functions += [weigh(f"{name}_weigh_older", before.read), *older.values(), *mended.functions(name, before)]
    kernel = Kernel(name)
    fn = kernel.fn
    axis, q, state = kernel.axis(), kernel.view("q"), kernel.state("S")
    part, scores, memory = kernel.tensor("part"), kernel.tensor("scores"), kernel.tensor("tiles")
    by_queries, scale = kernel.integer("by_queries"), kernel.real("scale")
    window, chunk, full = (kernel.integer(n) for n in ("window", "chunk", "full"))
    slopes = kernel.weight("slopes") if site.slopes else None
    floats = kernel.tensor("floats").base if before is not None and before.block else None
    sequences = fn.load(kernel.ctx, "i64", SEQUENCES)
    starts, zero = axis.array("start"), fn.const(0, "i64")
    split = fn.compare(by_queries, "eq", 0)
    step = fn.select(split, fn.const(1, "i64"), kernel.threads)
    size = site.vdim + PAD

    with fn.loop(0, sequences) as rows:
        row = rows.index
        begin, end = fn.load(starts, "i64", row), fn.load(starts, "i64", row + 1)
        count = (end - begin) * site.group
        tiles = (count + (TILE - 1)) // TILE
        with fn.when(fn.compare(end, "sgt", begin)), fn.loop(0, site.heads) as heads:
            head = row * site.heads + heads.index
            line = head if site.apart else row
            length = fn.load(state.address("len_k"), "i64", line)
            if not site.drafted:
                length = length + (end - begin)
            blocks = (length + (LANES - 1)) // LANES
            turn = (kernel.tid + head) % kernel.threads  # who has one tile more differs from head to head
            first = fn.select(split, zero, turn)

            def prepare(query0: Val, tile: Val) -> None:
                """The words of a tile; the partial sums of its queries are nothing yet."""
                with fn.loop(0, TILE, 1, nothing(fn)) as loop:
                    there = fn.compare(query0 + loop.index, "slt", count)
                    i = fn.minimum(query0 + loop.index, count - 1)  # beyond the last query it once more, for a sum nobody reads
                    token, query = begin + i // site.group, heads.index * site.group + i % site.group
                    target = fn.select(there, fn.at(part.token(token), query * size, "f32"), fn.at(tile, SPARE, "i64"))
                    clear(fn, target, site.vdim)
                    where = fn.load(axis.array("pos"), "i64", token)
                    low, high = bounds(fn, where, window, chunk, full)
                    items = {QUERY: q.place(token, query), LOW: low, HIGH: high, POS: where, SUM: target}
                    if site.drafted:
                        items[BITS] = fn.load(axis.array("anc"), "i64", token)
                    if slopes is not None:
                        items[SLOPE] = fn.cast(fn.load(slopes, "i32", query), "arith.extui", "i64")
                    if site.observed:
                        place = waiting(axis, state, row, token, site.drafted) * site.queries + query
                        kinds = ((LEFT, "waiting", "entries"), (LEFT_NODES, "waiting_nodes", "nodes"))
                        for word, name, width in kinds if site.drafted else kinds[:1]:
                            items[word] = fn.at(state.address(name), place * padded(state.number(width)), "f32")
                    put(fn, tile, loop.index, items)
                    if site.own:  # entries are told by their numbers, which are the tokens'
                        low, high = bounds(fn, token - begin, window, chunk, full)
                    loop.give(*widened(fn, loop.carried, low, high))
                for word, value in enumerate(loop.results, SIGHT):
                    fn.store(value, tile, word, "i64")

            with fn.loop(first, tiles, step * BATCH) as batches:
                stop = fn.minimum(batches.index + step * BATCH, tiles)

                @contextmanager
                def each() -> Iterator[tuple[Val, Val]]:
                    """The tiles of a batch: the first query, and the words."""
                    with fn.loop(batches.index, stop, step, [memory.base]) as loop:
                        yield loop.index * TILE, loop.carried[0]
                        loop.give(fn.at(loop.carried[0], tile_words(site.vdim), "i64"))

                with each() as (query0, tile):
                    prepare(query0, tile)

                def visit(
                    flashes: dict[int, Fn], of: Site, k: Val, v: Val, pos: Val, low: Val, high: Val, limit: Val,
                    beside: list[Val], start: Val | int = 0, drafted: bool = False,
                ) -> None:  # fmt: skip
                    """The tiles over blocks ``low .. high - 1``, a chunk at a time. ``start``: entries before the first one."""
                    with fn.loop(low, high, mended.chunk(of) or CHUNK) as chunks:
                        base: Val | int = 0
                        if floats is not None and of.block:  # the chunk is read as floats by themselves
                            base = chunks.index
                            k, v = mended.widen(fn, name, of, floats, k, v, beside, base, high)
                            pos, beside = fn.at(pos, base * LANES, "i32"), []
                        with each() as (query0, tile):
                            left = count - query0
                            begins, ends = chunks.index, fn.minimum(chunks.index + (mended.chunk(of) or CHUNK), high)
                            masked, nodes = begins, fn.const(int(drafted), "i1")
                            if site.behind and not drafted:
                                masked = fn.minimum(fn.maximum(limit // LANES, begins), ends)
                            elif site.ordered and not (site.first or drafted):
                                # blocks that no query sees, and those before ``masked`` that all see
                                sight = [fn.load(tile, "i64", SIGHT + i) - start for i in range(4)]
                                begins = fn.maximum(begins, fn.maximum(sight[0], 0) // LANES)
                                ends = fn.minimum(ends, sight[3] // LANES + 1)
                                masked = fn.minimum(ends, fn.minimum(sight[2] + 1, limit) // LANES)
                                inside = fn.compare(begins * LANES, "sge", sight[1])
                                masked = fn.select(inside, fn.maximum(masked, begins), begins)
                            there, less = fn.compare(begins, "slt", ends), 0
                            places = [begins - base, ends - base, limit - base * LANES, masked - base]
                            for many, inner in flashes.items():
                                fits = both(fn, there, fn.compare(left, "sgt", less))
                                if many < TILE:
                                    fits = both(fn, fits, fn.compare(left, "sle", many))
                                with fn.when(fits):
                                    fn.call(inner.name, tile, scores.base, k, v, pos, *places, nodes, scale, *beside)
                                less = many

                def share(high: Val, start: Val | int = 0, whole: int = 1) -> tuple[Val, Val]:
                    """This thread's part of so many blocks, ``whole`` ones of which stay together."""
                    low = zero
                    if site.ordered and not site.first:  # nothing before the first position that the first token sees
                        seen = bounds(fn, fn.load(axis.array("pos"), "i64", begin), window, chunk, full)[0] - start
                        low = fn.minimum(fn.maximum(seen, 0) // (LANES * whole) * whole, high)
                    a, b = (x * whole for x in kernel.part((high - low) // whole))
                    return fn.select(split, low + a, low), fn.select(split, low + b, high)

                positions = fn.at(state.address("pos"), line * state.number("entries"), "i32")
                start: Val | int = 0
                if before is not None:
                    start = fn.load(state.address("older_len_k"), "i64", line)
                    slot = head * state.number("older_blocks") * LANES
                    sizes = (row_bytes(form, dim) for form, dim in zip(before.forms, (site.dim, site.vdim), strict=True))
                    k, v = (fn.at(state.address(f"older_{what}"), slot * size) for what, size in zip("kv", sizes, strict=True))
                    mine = share((start + (LANES - 1)) // LANES, whole=max(before.block // LANES, 1))
                    visit(older, before, k, v, positions, *mine, start, arrays(state, before, "older_", head, slot))
                k_size, v_size = (row_bytes(form, dim) for form, dim in zip(site.forms, (site.dim, site.vdim), strict=True))
                at = head * state.number("blocks") * LANES
                visit(
                    flashes, site, fn.at(state.address("k"), at * k_size), fn.at(state.address("v"), at * v_size),
                    fn.at(positions, start, "i32"), *share(blocks, start), length, arrays(state, site, "", head, at), start,
                )  # fmt: skip
                if site.drafted:
                    nodes = fn.load(axis.array("node"), "i64", end - 1) + 1
                    idle = both(fn, fn.compare(kernel.tid, "ne", kernel.threads - 1), split)
                    high = fn.select(idle, zero, (nodes + (LANES - 1)) // LANES)
                    at = head * state.number("draft_blocks") * LANES
                    visit(
                        flashes, site, fn.at(state.address("draft_k"), at * k_size), fn.at(state.address("draft_v"), at * v_size),
                        fn.at(state.address("node_pos"), row * state.number("nodes"), "i32"), zero, high, nodes,
                        arrays(state, site, "draft_", head, at), drafted=True,
                    )  # fmt: skip
    return kernel, functions


def arrays(state: State, site: Site, prefix: str, head: Val, slot: Val) -> list[Val]:
    """What lies beside the codes of a head (`Site.beside`), whose first slot is ``slot``. Only an older segment has what
    several rows share."""
    fn, found = head.fn, []
    for name in site.beside:
        form, dim = (site.forms[0], site.dim) if name[0] == "k" else (site.forms[1], site.vdim)
        if isinstance(form, str):
            found.append(fn.at(state.address(prefix + name), slot, "f32"))
            continue
        block = head * state.number(f"{prefix}k_groups") if prefix == "older_" else head
        at, unit = form.place(name[2:], dim, slot, block)
        found.append(fn.at(state.address(prefix + name), at, unit))
    return found


def combine(name: str, site: Site) -> Kernel:
    """The partial sums of all threads as one result ``[tokens, heads, vdim]``; sinks take weight and give nothing."""
    kernel = Kernel(name)
    fn = kernel.fn
    axis, out = kernel.axis(), kernel.tensor("out")
    part, apart, stride = kernel.parts("part")
    split = kernel.integer("parts")
    sinks = kernel.weight("sinks") if site.sinks else None
    state = kernel.state("S") if site.observed else None
    parts = fn.select(fn.compare(split, "eq", 0), kernel.threads, split)
    size = site.vdim + PAD
    with kernel.tokens(axis) as t, fn.loop(0, site.queries) as heads:
        here = fn.at(part, (t * stride + heads.index * size) * 4)
        start = fn.load(sinks, "f32", heads.index) if sinks is not None else fn.const(HIDDEN, "f32")
        with fn.loop(0, parts, 1, [start]) as loop:
            loop.give(fn.maximum(loop.carried[0], fn.load(fn.at(here, loop.index * apart), "f32", site.vdim)))
        top = loop.results[0]
        begin = vm.exp(fn, start - top) if sinks is not None else fn.const(0.0, "f32")
        with fn.loop(0, parts, 1, [begin]) as loop:
            p = fn.at(here, loop.index * apart)
            scale = vm.exp(fn, fn.load(p, "f32", site.vdim) - top)
            loop.give(loop.carried[0] + scale * fn.load(p, "f32", site.vdim + 1))
        share = 1.0 / fn.maximum(loop.results[0], 1e-30)
        if state is not None:
            row = fn.load(axis.array("row"), "i64", t)
            place = waiting(axis, state, row, t, site.drafted) * site.queries + heads.index
            for i, x in enumerate((top, share)):
                fn.store(x, state.address("waiting_norm"), place * 2 + i)
        target = fn.at(out.token(t), heads.index * site.vdim, "f32")
        with fn.loop(0, parts) as loop:
            p = fn.at(here, loop.index * apart)
            scale = vm.exp(fn, fn.load(p, "f32", site.vdim) - top) * share
            wide = fn.splat(scale)
            begins = fn.compare(loop.index, "eq", 0)

            def write(c: Val | int, type: str, p: Val = p, scale: Val = scale, wide: Val = wide, begins: Val = begins) -> None:
                value = fn.load(p, type, c, "f32") * (scale if type == "f32" else wide)
                before = fn.select(begins, fn.const(0.0, type), fn.load(target, type, c, "f32"))
                fn.store(value + before, target, c, "f32")

            channels(fn, site.vdim, write)
    return kernel
