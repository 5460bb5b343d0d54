"""Attention over a cache: flash attention (Dao et al. 2022) with the positions of a sequence split among threads, or the queries.

A thread leaves, for every query and head, the sum of values, the largest score and the sum of weights; `combine` joins those
of all threads.
"""

from __future__ import annotations

from elision.codegen.cpu import vector_math as vm
from elision.codegen.cpu.cache_rows import BYTES
from elision.codegen.cpu.emit import LANES, Fn, Val
from elision.codegen.cpu.flash import (
    BITS,
    CHUNK,
    HIDDEN,
    HIGH,
    LOW,
    PAD,
    POS,
    QUERY,
    SLOPE,
    SUM,
    TILE,
    TILE_WORDS,
    Site,
    both,
    flash,
)
from elision.codegen.cpu.kernel import Kernel
from elision.codegen.cpu.rows import channels
from elision.ir.schedule import SEQUENCES

_FAR = 1 << 30


def attend(name: str, site: Site) -> tuple[Kernel, list[Fn]]:
    """The attention kernel of a site and the functions that it calls.

    ``by_queries`` 0: every thread takes part of the positions for all queries; 1: all positions for part of the queries.
    """
    helpers = {tile: flash(f"{name}_flash{tile}", site, tile) for tile in range(1, TILE + 1)}
    kernel = Kernel(name)
    fn = kernel.fn
    axis, q, state = kernel.axis(), kernel.view("q"), kernel.state("S")
    part, scores, tile_memory = kernel.tensor("part"), kernel.tensor("scores"), kernel.tensor("tile")
    by_queries, scale = kernel.integer("by_queries"), kernel.real("scale")
    window, chunk, full, sinks = (kernel.integer(n) for n in ("window", "chunk", "full", "ring_sinks"))
    slopes = kernel.weight("slopes") if site.slopes else None
    sequences = fn.load(kernel.ctx, "i64", SEQUENCES)
    starts, zero64 = axis.array("start"), fn.const(0, "i64")
    split = fn.compare(by_queries, "eq", 0)
    first_tile = fn.select(split, zero64, kernel.tid)
    tile_step = fn.select(split, fn.const(1, "i64"), kernel.threads)
    size = site.vdim + PAD

    with fn.loop(0, sequences) as rows:
        row = rows.index
        begin, end = fn.load(starts, "i64", row), fn.load(starts, "i64", row + 1)
        count = (end - begin) * site.group
        tiles = (count + (TILE - 1)) // TILE
        length = fn.load(state.address("len_k"), "i64", row)
        if not site.drafted:
            length = length + (end - begin)
        blocks = (length + (LANES - 1)) // LANES
        with fn.when(fn.compare(end, "sgt", begin)), fn.loop(0, site.heads) as heads:
            head = row * site.heads + heads.index

            def place(i: Val) -> tuple[Val, Val]:
                """The token and the query head of the i-th query of this cache head."""
                return begin + i // site.group, heads.index * site.group + i % site.group

            def partial(token: Val, query: Val) -> Val:
                return fn.at(part.token(token), query * size, "f32")

            with fn.loop(first_tile * TILE, count, tile_step * TILE) as fresh:
                end_of_tile = fn.emit(f"arith.minsi {(fresh.index + TILE).name}, {count.name} : i64", "i64")
                with fn.loop(fresh.index, end_of_tile) as each:
                    target = partial(*place(each.index))
                    _clear(fn, target, site.vdim)
                    fn.store(fn.const(HIDDEN, "f32"), target, site.vdim)
                    fn.store(fn.const(0.0, "f32"), target, site.vdim + 1)

            def visit(k: Val, v: Val, pos: Val, low: Val, high: Val, limit: Val, scales: list[Val], drafted: bool) -> None:
                """All tiles of this thread over blocks ``low .. high - 1``, a chunk at a time."""
                with fn.loop(low, high, CHUNK) as chunks, fn.loop(first_tile, tiles, tile_step) as loop:
                    last = fn.emit(f"arith.minsi {(chunks.index + CHUNK).name}, {high.name} : i64", "i64")
                    query0 = loop.index * TILE
                    left = count - query0
                    top = fn.const(-1, "i64")
                    for j in range(TILE):
                        i = fn.emit(f"arith.minsi {(query0 + j).name}, {(count - 1).name} : i64", "i64")
                        token, query = place(i)
                        where = fn.load(axis.array("pos"), "i64", token)
                        bounds = _bounds(fn, where, window, chunk, full)
                        top = fn.maximum(top, bounds[1])
                        bits = fn.load(axis.array("anc"), "i64", token) if drafted else zero64
                        slope = fn.load(slopes, "i32", query) if slopes is not None else None
                        items = {
                            QUERY: q.place(token, query), LOW: bounds[0], HIGH: bounds[1], BITS: bits, POS: where,
                            SUM: partial(token, query),
                        }  # fmt: skip
                        for at, item in items.items():
                            fn.store(item, tile_memory.base, j * TILE_WORDS + at, "i64")
                        if slope is not None:
                            fn.store(fn.cast(slope, "arith.extui", "i64"), tile_memory.base, j * TILE_WORDS + SLOPE, "i64")
                    inside: Val | None = None
                    if site.ordered and not drafted:  # nothing after the last position that the tile sees
                        inside = fn.compare(chunks.index * LANES, "sle", top)
                    for tile in range(1, TILE + 1):
                        fits = fn.compare(left, "sge" if tile == TILE else "eq", tile)
                        with fn.when(fits if inside is None else both(fn, fits, inside)):
                            fn.call(
                                f"{name}_flash{tile}", tile_memory.base, scores.base, k, v, pos,
                                chunks.index, last, limit, sinks, scale, *scales,
                            )  # fmt: skip

            low, high = zero64, blocks
            if site.ordered:  # nothing before the first position that the first token sees
                seen = _bounds(fn, fn.load(axis.array("pos"), "i64", begin), window, chunk, full)[0]
                low = fn.maximum(seen, 0) // LANES
                low = fn.select(fn.compare(sinks, "sgt", 0), zero64, low)
                low = fn.emit(f"arith.minsi {low.name}, {high.name} : i64", "i64")
            a, b = kernel.part(high - low)
            mine = fn.select(split, low + a, low), fn.select(split, low + b, high)
            k_size, v_size = BYTES[site.forms[0]], BYTES[site.forms[1]]
            at = head * state.number("blocks") * LANES
            visit(
                fn.at(state.address("k"), at * (site.dim * k_size)), fn.at(state.address("v"), at * (site.vdim * v_size)),
                fn.at(state.address("pos"), row * state.number("entries"), "i32"), *mine, length,
                [fn.at(state.address(f"{what}_scale"), at, "f32") for what in site.scaled], False,
            )  # fmt: skip
            if site.drafted:
                nodes = fn.load(axis.array("node"), "i64", end - 1) + 1
                idle = fn.compare(kernel.tid, "ne", kernel.threads - 1)
                idle = both(fn, idle, split)
                high = fn.select(idle, zero64, (nodes + (LANES - 1)) // LANES)
                at = head * state.number("draft_blocks") * LANES
                visit(
                    fn.at(state.address("draft_k"), at * (site.dim * k_size)),
                    fn.at(state.address("draft_v"), at * (site.vdim * v_size)),
                    fn.at(state.address("node_pos"), row * state.number("nodes"), "i32"), zero64, high, nodes,
                    [fn.at(state.address(f"draft_{what}_scale"), at, "f32") for what in site.scaled], True,
                )  # fmt: skip
    return kernel, list(helpers.values())


def _clear(fn: Fn, target: Val, size: int) -> None:
    channels(fn, size, lambda c, type: fn.store(fn.const(0.0, type), target, c, "f32"))


def _bounds(fn: Fn, where: Val, window: Val, chunk: Val, full: Val) -> tuple[Val, Val]:
    """The first and the last position in sight from ``where``."""
    far = fn.const(_FAR, "i64")
    low = fn.select(fn.compare(window, "sgt", 0), where - window + 1, fn.const(-_FAR, "i64"))
    whole = fn.maximum(chunk, 1)
    low = fn.select(fn.compare(chunk, "sgt", 0), (where // whole) * whole, low)
    return low, fn.select(fn.compare(full, "eq", 1), far, where)


def combine(name: str, site: Site) -> Kernel:
    """The partial sums of all threads as one result ``[tokens, heads, vdim]``; sinks take weight and give nothing."""
    kernel = Kernel(name)
    fn = kernel.fn
    axis, out = kernel.axis(), kernel.tensor("out")
    part, apart, stride = kernel.parts("part")
    split = kernel.integer("parts")
    sinks = kernel.weight("sinks") if site.sinks else None
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
