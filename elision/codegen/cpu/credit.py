"""Scores of cache entries (`elision.ir.scores`) after the prompt: attention leaves its logits, and what they give is counted once
all of a token's are there: by the commit of a round for those of accepted nodes, in the same call for a token that was no draft.
A thread has part of the entries of every sequence."""

from __future__ import annotations

from elision.codegen.cpu.emit import Val
from elision.codegen.cpu.flash import VF, VI
from elision.codegen.cpu.gumbel import Noise
from elision.codegen.cpu.kernel import Axis, Kernel, State
from elision.codegen.cpu.kernels import Kernels
from elision.codegen.cpu.observe import Weight, below, padded, weighing
from elision.codegen.cpu.tile import HIDDEN
from elision.ir.layout import LANES
from elision.ir.schedule import SEQUENCES
from elision.ir.states import KV


def credited(kernels: Kernels, state: KV, array: str, direct: bool = False) -> str:
    """The name of a cache's kernel `credit`."""
    assert state.scores is not None
    lists, noisy = state.heads if state.keep == "per_head" else 1, state.scores.gumbel is not None
    sizes = (state.heads, state.scores.group, lists, noisy, array, direct)
    return kernels.add(("credit", *sizes), lambda name: credit(name, *sizes))


def credit(name: str, heads: int, group: int, lists: int, noisy: bool, array: str, direct: bool) -> Kernel:
    """What accepted nodes gave counts, before they are counted into the length. The axis is that of the accepted tokens.
    ``noisy``: by the softmax of `Gumbel`, whose sums every thread makes for itself. ``direct``: not of nodes, but of one token
    of a sequence, which is the entry after the others."""
    kernel = Kernel(name)
    fn = kernel.fn
    axis, state, decay = kernel.axis(), kernel.state("S"), kernel.real("decay")
    starts = axis.array("start")
    wide, nodes_wide = padded(state.number("entries")), padded(state.number("nodes"))
    norms, kept = state.address("waiting_norm"), fn.splat(decay, LANES)
    noise = Noise.of(kernel) if noisy else None

    def position(row: Val, t: Val) -> Val:
        """Of an accepted token."""
        if direct:
            return fn.load(axis.array("pos"), "i64", t)
        node = fn.load(axis.array("node"), "i64", t)
        return fn.cast(fn.load(state.address("node_pos"), "i32", row * state.number("nodes") + node), "arith.extsi", "i64")

    def place(row: Val, t: Val, head: Val, g: int) -> Val:
        """Which logits are those of an accepted token."""
        return waiting(axis, state, row, t, not direct) * (heads * group) + head * group + g

    def weighed(row: Val, t: Val, query: Val) -> Weight:
        """The weights of an accepted token's query."""
        if noise is None:
            return weighing(None, query, t)
        return weighing(noise, query, position(row, t), fn.load(state.address("prompt"), "i64", row))

    with fn.loop(0, fn.load(kernel.ctx, "i64", SEQUENCES)) as rows, fn.loop(0, heads) as head_loop:
        row, head = rows.index, head_loop.index
        begin, end = fn.load(starts, "i64", row), fn.load(starts, "i64", row + 1)
        before = length = fn.load(state.address("len_k"), "i64", row * heads + head if lists > 1 else row)
        if direct:
            length = length + (end - begin)
        score = fn.at(state.address(array), (row * heads + head) * wide, "f32")
        positions = fn.at(state.address("pos"), (row * heads + head if lists > 1 else row) * state.number("entries"), "i32")

        def noisy_share(row: Val, begin: Val, t: Val, at: Val, weight: Weight, entries: Val = positions, n: Val = length) -> None:
            """Put the share of the noisy softmax of a query in the place of that of the plain one."""
            logits, top = fn.at(state.address("waiting"), at * wide, "f32"), fn.load(norms, "f32", at * 2)
            with fn.loop(0, (n + (LANES - 1)) // LANES, 1, [fn.const(0.0, VF)]) as blocks:
                x = fn.load(logits, VF, blocks.index * LANES, "f32") - fn.splat(top, LANES)
                blocks.give(blocks.carried[0] + weight(x, fn.load(entries, VI, blocks.index * LANES, "i32")))
            total = fn.sum(blocks.results[0])
            if not direct:
                with fn.loop(begin, t + 1, 1, [total]) as seen:
                    node = fn.load(axis.array("node"), "i64", seen.index)
                    x = fn.load(state.address("waiting_nodes"), "f32", at * nodes_wide + node) - top
                    seen.give(seen.carried[0] + weight(x, fn.i32(position(row, seen.index))))
                total = seen.results[0]
            fn.store(1.0 / fn.maximum(total, 1e-30), norms, at * 2 + 1)

        with fn.when(fn.compare(end, "sgt", begin)):
            low, high = kernel.part((length + (LANES - 1)) // LANES)
            with fn.loop(begin, end) as tokens:
                given = []
                for g in range(group):
                    at, weight = place(row, tokens.index, head, g), weighed(row, tokens.index, head * group + g)
                    if noise is not None:
                        noisy_share(row, begin, tokens.index, at, weight)
                    top, share = (fn.splat(fn.load(norms, "f32", at * 2 + i), LANES) for i in range(2))
                    given.append((fn.at(state.address("waiting"), at * wide, "f32"), top, share, weight))
                with fn.loop(low, high) as blocks:
                    at = blocks.index * LANES
                    found = fn.load(score, VF, at, "f32")
                    if direct:  # an entry begins at 0
                        found = fn.select(below(fn, blocks.index, before), found, fn.const(0.0, VF))
                    found = found * kept
                    pos = fn.load(positions, VI, at, "i32")
                    for logits, top, share, weight in given:
                        found = fn.fma(weight(fn.load(logits, VF, at, "f32") - top, pos), share, found)
                    fn.store(found, score, at, "f32")
            if not direct:  # the accepted tokens themselves
                low, high = begin, fn.select(fn.compare(kernel.tid, "eq", kernel.threads - 1), end, begin)
                with fn.loop(low, high) as new:
                    node = fn.load(axis.array("node"), "i64", new.index)
                    with fn.loop(new.index, end, 1, [fn.const(0.0, "f32")]) as tokens:
                        found = tokens.carried[0] * decay
                        for g in range(group):
                            at = place(row, tokens.index, head, g)
                            top, share = (fn.load(norms, "f32", at * 2 + i) for i in range(2))
                            x = fn.load(state.address("waiting_nodes"), "f32", at * nodes_wide + node)
                            weight = weighed(row, tokens.index, head * group + g)
                            p = weight(x - top, fn.i32(position(row, new.index))) * share
                            found = found + fn.select(fn.compare(x, "ole", HIDDEN / 2), fn.const(0.0, "f32"), p)
                        tokens.give(found)
                    fn.store(tokens.results[0], score, length + (new.index - begin))
    return kernel


def waiting(axis: Axis, state: State, row: Val, token: Val, drafted: bool) -> Val:
    """The place of a drafted token among those that wait for `commit`: of its node (rule retract: there are as many places). That
    of another, the only one of its sequence, is the first."""
    fn, depth = token.fn, state.number("depth")
    if not drafted:
        return row * depth
    return row * depth + fn.minimum(fn.load(axis.array("node"), "i64", token), depth - 1)
