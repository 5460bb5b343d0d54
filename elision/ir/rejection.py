"""Verification rules for drawn drafts: the accepted path and the token after it are distributed as the target's own draws.

V3 ``chain`` (Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding") accepts a token x with
probability ``min(1, p(x)/q(x))`` and after a rejection draws from ``norm((p-q)+)``. V4 ``recursive`` (Miao et al. 2024,
"SpecInfer"; without replacement: Jeon et al. 2024, "Recursive Speculative Decoding") does so for one sibling after another.
V5 ``k-seq`` (Sun et al. 2023, "SpecTr") tests i.i.d. siblings by one threshold. V6 ``block`` (Sun et al. 2024, "Block
Verification Accelerates Speculative Decoding") judges a chain as a whole.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from elision.errors import BadInput
from elision.ir.drafted import ACCEPT, BLOCK, Trees, norm

#: Bisections of the threshold of k-seq: every threshold from the exact one up to k is lossless, so few digits do.
BISECTIONS = 16

#: For trees the last accepted node ``[m]`` and the token after it ``[m]``.
Sampled = Callable[[Trees], tuple[torch.Tensor, torch.Tensor]]

#: One node's children, of the rows that are there: from ``p`` and ``q`` (float64 ``[m, V]``, q None for point), tokens ``x``
#: (``[m, k]``, -1 where a row has fewer), uniform numbers ``u [m, k]`` and the kind, which child is accepted (``[m]``, -1 for
#: none), and what the token is drawn from where none is (``[m, V]``).
Step = Callable[[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor, str], tuple[torch.Tensor, torch.Tensor]]


def residual(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """``norm((p-q)+)``; p where that is empty, which only rounding can reach."""
    rest = (p - q).clamp_min(0)
    return torch.where(rest.sum(-1, keepdim=True) > 0, norm(rest), p)


def recursive(
    p: torch.Tensor, q: torch.Tensor | None, x: torch.Tensor, u: torch.Tensor, kind: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """V4: siblings in the order drawn, each against what the rejected ones left of p (and, "wor", of q)."""
    found = x.new_full((len(x),), -1)
    for i in range(x.shape[1]):
        live = (found < 0) & (x[:, i] >= 0)
        token = x[:, i, None].clamp_min(0)
        given = _one_hot(p, token) if q is None else q
        if kind == "wor":
            live &= given.sum(-1) > 0  # nothing was left to draw from: no draw
        accepted = live & (u[:, i] * _probability(given, token, live) < p.gather(1, token)[:, 0])
        found[accepted] = i
        rejected = (live & ~accepted)[:, None]
        if rejected.any():
            p = torch.where(rejected, residual(p, given), p)
            if kind == "wor":
                left = given.scatter(1, token, 0.0)
                q = torch.where(left.sum(-1, keepdim=True) > 0, norm(left), left)
    return found, p


def k_seq(
    p: torch.Tensor, q: torch.Tensor | None, x: torch.Tensor, u: torch.Tensor, kind: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """V5: with ``beta(rho) = sum min(q, p/rho)``, at the least rho in [1, k] with ``rho beta >= 1-(1-beta)^k`` accept the first
    sibling that passes ``min(1, p/(rho q))``; otherwise draw from ``p - min(q, p/rho) (1-(1-beta)^k)/beta``."""
    k = (x >= 0).sum(1, keepdim=True)
    if x.shape[1] > 1 and kind != "iid":
        raise BadInput(f"rule k-seq: {x.shape[1]} siblings of kind {kind}; it tests i.i.d. draws only: use rule recursive")
    if not x.shape[1]:
        return x.new_full((len(x),), -1), p
    tokens = x.clamp_min(0)
    given = _one_hot(p, tokens) if q is None else q
    low, high = torch.ones(len(x), 1, dtype=p.dtype), k.clamp_min(1).to(p.dtype)
    for _ in range(BISECTIONS if x.shape[1] > 1 else 0):
        rho = (low + high) / 2
        beta = torch.minimum(given, p / rho).sum(-1, keepdim=True)
        enough = rho * beta >= 1 - (1 - beta) ** k
        low, high = torch.where(enough, low, rho), torch.where(enough, rho, high)
    held = torch.minimum(given, p / high)
    beta = held.sum(-1, keepdim=True).clamp(torch.finfo(p.dtype).tiny, 1.0)
    passed = (x >= 0) & (u * high * _probability(given, tokens, x >= 0) < p.gather(1, tokens))
    first = torch.where(passed, torch.arange(x.shape[1]), x.shape[1]).amin(1)
    return torch.where(passed.any(1), first, -1), residual(p, held * ((1 - (1 - beta) ** k) / beta))


def walk(step: Step) -> Sampled:
    """The rule that goes from each node to the child that ``step`` accepts, until none is. All rows go one level at a time."""

    def rule(trees: Trees) -> tuple[torch.Tensor, torch.Tensor]:
        m = len(trees.tokens)
        node, token, rows, depth = torch.zeros(m, dtype=torch.int64), torch.empty(m, dtype=torch.int64), torch.arange(m), 0
        while len(rows):
            children = trees.children(rows, node[rows], depth)
            x = torch.where(children >= 0, trees.tokens[rows[:, None], children], -1)
            u = trees.noise(rows, depth + 1, ACCEPT, x.shape[1])
            found, rest = step(norm(trees.p(rows, node[rows])), trees.q(rows, node[rows]), x, u, trees.drafted.kind)
            ends, goes = found < 0, found >= 0
            if ends.any():
                token[rows[ends]] = trees.draw(rows[ends], depth + 1, rest[ends])
            node[rows[goes]] = children[goes, found[goes]]
            rows, depth = rows[goes], depth + 1
        return node, token

    return rule


def chain(trees: Trees) -> tuple[torch.Tensor, torch.Tensor]:
    """V3: recursive rejection where every node has one child at most."""
    _need_chains(trees, "chain")
    return walk(recursive)(trees)


def block(trees: Trees) -> tuple[torch.Tensor, torch.Tensor]:
    """V6: the longest prefix that passes, judged at every length; never shorter on average than by V3.

    ``w_i = min(1, w_{i-1} p(x_i)/q(x_i))``, ``R_i = sum (w_i p_i - q_i)+``; length i passes with ``R_i/(R_i + 1 - w_i)``, all of
    the chain with ``w_g``. The token after length i is drawn from ``(w_i p_i - q_i)+``.
    """
    _need_chains(trees, "block")
    m, n = trees.tokens.shape
    rows, length = torch.arange(m), torch.zeros(m, dtype=torch.int64)
    # Keyed on the root: lengths that failed are judged again in later rounds, by numbers that this round has not seen.
    u = trees.noise(rows, 0, BLOCK, n)
    w, after = torch.ones(m, 1, dtype=torch.float64), torch.empty(0)
    for i in range(n):
        at = torch.full((m,), i)
        rest = p = norm(trees.p(rows, at))
        passes = w
        if i < n - 1:
            token = trees.tokens[:, i + 1, None]
            given = trees.q(rows, at)
            given = _one_hot(p, token) if given is None else given
            over = (w * p - given).clamp_min(0).sum(-1, keepdim=True)
            passes = torch.where(over + 1 - w > 0, over / (over + 1 - w), 1.0)
            rest = residual(w * p, given)
            held = _probability(given, token, torch.ones(m, dtype=torch.bool))
            w = (w * p.gather(1, token) / held[:, None]).clamp_max(1.0)
        taken = u[:, i, None] < passes
        after = torch.where(taken, rest, after) if i else rest
        length = torch.where(taken[:, 0], i, length)
    token = torch.empty_like(length)
    for i in set(length.tolist()):
        token[length == i] = trees.draw(rows[length == i], i + 1, after[length == i])
    return length, token


SAMPLED: dict[str, Sampled] = {"chain": chain, "recursive": walk(recursive), "k-seq": walk(k_seq), "block": block}


def _one_hot(p: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """What a token that is a function of the past was drawn from."""
    return torch.zeros_like(p).scatter_(1, token, 1.0)


def _probability(q: torch.Tensor, x: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
    """``q(x)``, of ``x``'s shape (or ``[m]`` for one token). Raises BadInput where it is 0 for a token that was drawn."""
    held = q.gather(1, x).reshape(live.shape)
    if (impossible := live & ~(held > 0)).any():
        token = int(x.reshape(live.shape)[impossible][0])
        raise BadInput(f"token {token} was drafted, but in q its probability is 0; q must be what the drafter drew from, warped")
    return held


def _need_chains(trees: Trees, rule: str) -> None:
    if bool((trees.parent != torch.arange(-1, trees.parent.shape[1] - 1)).any()):
        raise BadInput(f"rule {rule} verifies chains, and the draft branches: use rule recursive")
    if trees.drafted.draws is not None and bool((trees.drafted.draws[:, 1:] > 1).any()):
        raise BadInput(f"rule {rule} verifies chains, and some nodes were drawn more than once: use rule recursive or k-seq")
