"""The launches of a round's end: the greedy path through drafts, the commit of what it accepts, the next token of plain
decoding."""

from __future__ import annotations

import zlib

from elision.codegen.refusal import need
from elision.codegen.triton.attention_rules import advance, moves, nodes, older, planes_of, readable
from elision.codegen.triton.configs import power
from elision.codegen.triton.launches import Arg, Launches, axis, cache, count, integer, on_round, piece, size
from elision.codegen.triton.score_rules import credit
from elision.ir.drafted import VERIFY
from elision.ir.states import KV, Budget, Dense
from elision.ir.value import Value


def commit(to: Launches, names: dict[str, KV]) -> None:
    """Every cache takes the accepted nodes of a round, then counts them. Raises NotNative for a cache that cannot."""
    for name, state in names.items():
        readable(state)
        need(isinstance(state.main[-1].slots, Dense | Budget), "a round over a Ring")
        need(not state.present.partial and state.scratch is not None, "a round without Scratch, or of tokens that pass by")
        if state.scores is not None and state.scores.depth:
            credit(to, name, state)
        args: dict[str, Arg | None] = {
            **planes_of(name, state, "", "to_"), **planes_of(name, state, "draft_", "from_"),
            "to_pos": cache(name, state, "pos"), "from_pos": cache(name, state, "node_pos"), "source": on_round("path"),
            "target": cache(name, state, "len_k"), "older": older(name, state)["older"], "n": integer(nodes(state)),
            "to_capacity": size(name, "capacity"), "from_capacity": integer(nodes(state)), "to_entries": size(name, "entries"),
            "from_entries": integer(nodes(state)),
        }  # fmt: skip
        fixed = moves(state) | dict(FROM_LISTS=1, SHARED=True, AFTER=True)
        to.launch("move", (nodes(state), ("rows", state.heads)), args, fixed, reads=[name], writes=[name], warps=1)
        advance(to, name, state, on_round("accepted"), True)


def sample(to: Launches, logits: Value, best: Value, tokens: int) -> Arg:
    """The token of every node: the likeliest, or, of sequences that ask for it, one that is drawn."""
    chosen = to.scratch(tokens, 1, 8)
    args: dict[str, Arg | None] = {
        "chosen": piece(chosen, "i64"), "best": to.whole(best), "logits": to.whole(logits), "row": axis(tokens, "row"),
        "pos": axis(tokens, "pos"), "numbers": Arg(("round", "numbers"), "*fp32"), "whole": on_round("whole"),
    }  # fmt: skip
    n = logits.tensor.width
    fixed = dict(N=n, WIDE=best.tensor.width, STREAM=zlib.crc32(VERIFY.encode()), BN=min(2048, power(n)))
    to.launch("sample", (("tokens", tokens, 1),), args, fixed, reads=["round"], writes=[chosen], warps=8)
    return piece(chosen, "i64")


def walk(to: Launches, ids: Arg, best: Arg, tokens: int, most: int) -> None:
    """The accepted path of each sequence's tree by the tokens of its nodes, and the token after it."""
    args: dict[str, Arg | None] = {
        **{n: on_round(n) for n in ("path", "accepted", "next")}, "ids": ids, "best": best, "parent": axis(tokens, "parent"),
        "start": axis(tokens, "start"),
    }  # fmt: skip
    to.launch("walk", (("rows", 1),), args, dict(NODES=most), writes=["round"], warps=1)


def follow(to: Launches, ids: Arg, best: Arg, tokens: int) -> None:
    """The token of each sequence becomes its next one, without asking the host."""
    args: dict[str, Arg | None] = {
        "ids": ids, "pos": axis(tokens, "pos"), "row": axis(tokens, "row"), "best": best, "next": on_round("next"),
        "tokens": on_round("tokens"), "length": on_round("length"), "count": count(tokens), "most": size("round", "most"),
    }  # fmt: skip
    to.launch("follow", (("tokens", tokens, 32),), args, dict(BLOCK=32), writes=["round"], warps=1)
