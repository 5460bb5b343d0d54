"""Ops on states. Each consumes a state value once and gives the next; the bodies act on the storage (`elision.ir.store`)."""

from __future__ import annotations

from typing import Any

import torch

from elision.ir import absorb as absorbing
from elision.ir import attend as attention
from elision.ir import observe as observation
from elision.ir.layout import row_bytes, slot_count
from elision.ir.mask import Mask
from elision.ir.op import Cost, Sizes, need, op, token_axis
from elision.ir.pages import Chosen
from elision.ir.states import KV, Array, Encoding
from elision.ir.store import ArrayStore, KVStore
from elision.ir.tokens import Tokens
from elision.ir.types import Axis, Tensor


def _kv_rows(k: Tensor, v: Tensor, S: KV) -> None:
    token_axis(k, v)
    need(k.axes[1:] == (S.heads, S.dim), f"expected keys [t, {S.heads}, {S.dim}], got {k}")
    need(v.axes[1:] == (S.heads, S.vdim), f"expected values [t, {S.heads}, {S.vdim}], got {v}")


def _kv_cost(sizes: Sizes, types: list[Any], result: KV, attrs: dict[str, Any]) -> Cost:
    moved = {i: t for i, t in enumerate(types) if isinstance(t, Tensor)}
    tokens = sizes.of(token_axis(*moved.values()))
    return Cost(0.0, {i: float(sizes.bytes(t)) for i, t in moved.items()}, tokens * row_bytes(result))


def _move_cost(sizes: Sizes, types: list[Any], result: KV, attrs: dict[str, Any]) -> Cost:
    """``n`` entries of every sequence (all of them, where no number is given) are read and written."""
    read = {i: float(sizes.bytes(t)) for i, t in enumerate(types) if isinstance(t, Tensor)}
    kept = types[1].axes[-1] if "n" not in attrs and len(types) > 1 else None
    n = attrs.get("n", kept if isinstance(kept, int) else sizes.context)
    moved = sizes.rows * n * row_bytes(types[0])
    return Cost(0.0, {0: moved, **read}, sizes.rows * n * row_bytes(result))


def _fresh_type(k: Tensor, v: Tensor, *, type: KV) -> KV:
    _kv_rows(k, v, type)
    return type


@op(_fresh_type, cost=_kv_cost)
def fresh(k: torch.Tensor, v: torch.Tensor, *, type: KV, at: Tokens) -> KVStore:
    """A cache that holds just these keys and values: what attention without a cache looks at."""
    store = KVStore(type, at.rows, len(at), k.dtype)
    store.append(at, k, v)
    return store


def _empty_type(x: Tensor, *, type: KV) -> KV:
    token_axis(x)
    return type


@op(_empty_type, cost=lambda *_: Cost())
def empty(x: torch.Tensor, *, type: KV, at: Tokens) -> KVStore:
    """An empty cache that lives for this call only, with room for the tokens of x."""
    return KVStore(type, at.rows, max(1, len(at)), torch.float32)


def _append_type(S: KV, k: Tensor, v: Tensor) -> KV:
    _kv_rows(k, v, S)
    return S


@op(_append_type, cost=_kv_cost)
def append(S: KVStore, k: torch.Tensor, v: torch.Tensor, *, at: Tokens) -> KVStore:
    """Append the keys ``[t, heads, dim]`` and values of the tokens. Drafted tokens go to Scratch, by node."""
    S.append(at, k, v)
    return S


def _attend_type(
    q: Tensor,
    S: KV,
    *extra: Tensor,
    mask: Any,
    scale: Any,
    softcap: Any = None,
    extras: tuple[str, ...] = (),
    results: tuple[str, ...] = (),
    page: int = 0,
    open: int = 0,
) -> Any:
    axis = token_axis(q)
    need(len(q.axes) == 3 and q.axes[2] == S.dim, f"expected queries [t, heads, {S.dim}], got {q}")
    heads = q.axes[1]
    need(isinstance(heads, int) and heads % S.heads == 0, f"{heads} query heads over {S.heads} key heads")
    known = {"sinks", "slopes", "pages"}
    need(len(extra) == len(extras) and set(extras) <= known, f"extras {extras} for {len(extra)} operands")
    pages = dict(zip(extras, extra, strict=True)).get("pages")
    need((pages is not None) == (page > 0) == (open > 0), f"page={page}, open={open}; expected both, with the operand pages")
    if pages is not None:
        legal = pages.dtype == "i64" and pages.axes[:2] == (axis, S.heads) and len(pages.axes) == 3
        need(legal and open % page == 0, f"expected pages i64[{axis}, {S.heads}, n], and open={open} in pages of {page}")
    need(set(results) <= {"lse", "mass"}, f"results {results}; expected lse or mass")
    out: list[Tensor] = [Tensor((axis, heads, S.vdim), q.dtype)]
    for name in results:
        out.append(Tensor((axis, heads) if name == "lse" else (Axis("rows"), S.heads, Axis("entries")), q.dtype))
    return tuple(out) if results else out[0]


def _attend_cost(sizes: Sizes, types: list[Any], result: Any, attrs: dict[str, Any]) -> Cost:
    q, S, mask = types[0], types[1], attrs["mask"]
    entries = min(sizes.context, sum(slot_count(s.slots, sizes.context) for s in S.main))
    if isinstance(mask, Mask) and mask.size:
        entries = min(entries, mask.size + mask.sinks)
    if "pages" in attrs.get("extras", ()):
        entries = min(entries, types[2 + attrs["extras"].index("pages")].width * attrs["page"] + attrs["open"])
    flops = 2.0 * sizes.of(q.axes[0]) * entries * q.axes[1] * (S.dim + S.vdim)
    cache = float(sizes.rows * entries * row_bytes(S))
    out = result[0] if isinstance(result, tuple) else result
    extra = {i: float(sizes.bytes(t)) for i, t in enumerate(types[2:], 2)}
    return Cost(flops, {0: float(sizes.bytes(q)), 1: cache, **extra}, float(sizes.bytes(out)))


@op(_attend_type, cost=_attend_cost)
def attend(
    q: torch.Tensor,
    S: KVStore,
    *extra: torch.Tensor,
    mask: Mask,
    scale: float,
    softcap: float | None = None,
    extras: tuple[str, ...] = (),
    results: tuple[str, ...] = (),
    page: int = 0,
    open: int = 0,
    at: Tokens,
) -> Any:
    """Softmax attention of queries ``[t, heads, dim]`` over every visible entry of the cache (see `elision.ir.attend`).

    ``extras`` names further operands: ``sinks [heads]`` (a logit that takes mass and gives nothing), ``slopes [heads]`` (ALiBi),
    ``pages [t, kv heads, n]`` (see `pick`): of the entries before the last multiple of ``open``, only those of these pages of
    ``page`` entries are seen.
    ``results``: ``lse [t, heads]`` and ``mass [rows, kv heads, entries]``, the column sums of the probabilities.
    """
    named: dict[str, Any] = dict(zip(extras, extra, strict=True))
    if "pages" in named:
        named["chosen"] = Chosen(named.pop("pages"), page, open)
    found = attention.attend(q, S, at, mask, scale, softcap, results=results, **named)
    return found if results else found[0]


def _observe_type(
    S: KV,
    q: Tensor,
    *extra: Tensor,
    mask: Any,
    scale: Any,
    softcap: Any = None,
    extras: tuple[str, ...] = (),
    last: int = 0,
    decoding: bool = False,
) -> KV:
    _attend_type(q, S, *extra, mask=mask, scale=scale, softcap=softcap, extras=extras)
    need(S.scores is not None and S.scores.group * S.heads == q.axes[1], f"{S.scores} for {q.axes[1]} query heads")
    need(last >= 0, f"last={last}; expected 0 (all), or how many tokens of the prompt")
    need(S.scores is None or S.scores.gumbel is None or "sinks" not in extras, "scores of a noisy softmax have no sinks")
    return S


def _observe_cost(sizes: Sizes, types: list[Any], result: Any, attrs: dict[str, Any]) -> Cost:
    """A second look at the keys."""
    S, q = types[:2]
    entries = min(sizes.context, sum(slot_count(s.slots, sizes.context) for s in S.main))
    share = S.dim / (S.dim + S.vdim)
    flops = 2.0 * sizes.of(q.axes[0]) * entries * q.axes[1] * S.dim
    score = 4.0 * sizes.rows * entries * S.heads
    return Cost(flops, {0: sizes.rows * entries * row_bytes(S) * share + score, 1: float(sizes.bytes(q))}, score)


@op(_observe_type, cost=_observe_cost)
def observe(
    S: KVStore,
    q: torch.Tensor,
    *extra: torch.Tensor,
    mask: Mask,
    scale: float,
    softcap: float | None = None,
    extras: tuple[str, ...] = (),
    last: int = 0,
    decoding: bool = False,
    at: Tokens,
) -> KVStore:
    """Count what every entry receives of the attention of queries ``[t, heads, dim]`` (as in `attend`) into its score
    (`elision.ir.scores`). ``last``: only that of the last so many tokens of the prompt. ``decoding``: the tokens, one of a
    sequence, come after the prompt."""
    observation.observe(q, S, at, mask, scale, softcap, last=last, decoding=decoding, **dict(zip(extras, extra, strict=True)))
    return S


def _select_type(S: KV, kept: Tensor, rows: Tensor, *, renumber: bool = False) -> KV:
    token_axis(kept, rows)
    need(kept.dtype == "i64" and len(kept.axes) == 3 and kept.axes[1] in (1, S.heads), f"expected i64[b, heads, n], got {kept}")
    return S


@op(_select_type, cost=_move_cost)
def select(S: KVStore, kept: torch.Tensor, rows: torch.Tensor, *, renumber: bool = False) -> KVStore:
    """Evict: of the sequences ``rows [b]`` keep just the logical entries ``kept [b, heads or 1, n]``.

    ``renumber``: the positions of what is kept become 0, 1, .. in order (StreamingLLM, Xiao et al. 2023; see rule rotation).
    """
    S.select(kept, rows)
    if renumber:
        S.pos[rows] = torch.arange(S.pos.shape[2], dtype=S.pos.dtype)
    return S


def _absorb_type(S: KV, score: Tensor, pos: Tensor, kept: Tensor, rows: Tensor, *, n: int, least: float, near: int) -> KV:
    _select_type(S, kept, rows)
    need(score.axes == pos.axes and S.keep == "per_head" and S.scores is not None, "expected scores, and entries of every head")
    need(n >= 0 and near >= 1, f"n={n}, near={near}; expected at least 0 and at least 1")
    need(len(S.main) == 1 and max(S.main[0].k.token_group, S.main[0].v.token_group) == 1, "expected rows written one by one")
    return S


@op(_absorb_type, cost=_move_cost)
def absorb(
    S: KVStore, score: torch.Tensor, pos: torch.Tensor, kept: torch.Tensor, rows: torch.Tensor, *, n: int, least: float, near: int
) -> KVStore:
    """Before a `select` of ``kept``: the best ``n`` of the others, by ``score [b, heads, entries]``, join the kept entry whose
    key is most like theirs (`elision.ir.absorb`)."""
    absorbing.absorb(S, score, pos, kept, rows, n, least, near)
    return S


def _flush_type(S: KV, rows: Tensor, *, frm: int, to: int, n: int, what: str = "kv", keep: int = -1) -> KV:
    need(0 <= to == frm - 1 and frm < len(S.main), f"flush goes from a main segment to the one before it, not {frm} to {to}")
    need(what in ("k", "v", "kv") and n > 0, f"what={what!r}, n={n}; expected k, v or kv and n > 0")
    return S


@op(_flush_type, cost=_move_cost)
def flush(S: KVStore, rows: torch.Tensor, *, frm: int, to: int, n: int, what: str = "kv", keep: int = -1) -> KVStore:
    """Move the oldest ``n`` rows of segment ``frm`` to the end of segment ``to``, in the encoding of ``to``: once, or, if
    ``keep`` is not negative, as often as at least ``keep`` rows remain."""
    S.flush(rows, frm, to, n, what, keep)
    return S


def _recode_type(S: KV, *, segment: int, k: Encoding, v: Encoding) -> KV:
    from dataclasses import replace

    need(0 <= segment < len(S.segments), f"no segment {segment} in {len(S.segments)}")
    return S.with_segment(segment, replace(S.segments[segment], k=k, v=v))


@op(_recode_type, cost=_move_cost)
def recode(S: KVStore, *, segment: int, k: Encoding, v: Encoding) -> KVStore:
    """Store a segment in another encoding."""
    S.recode(segment, k, v)
    return S


def _read_type(S: Array, rows: Tensor) -> Tensor:
    return Tensor((token_axis(rows), *S.shape), S.dtype)


@op(_read_type)
def read(S: ArrayStore, rows: torch.Tensor) -> torch.Tensor:
    """The value of an array state for the sequences ``rows [b]``."""
    return S.read()[rows]


def _write_type(S: Array, x: Tensor) -> Array:
    token_axis(x)
    need(x.axes[1:] == S.shape and x.dtype == S.dtype, f"expected {S.dtype}[t, {', '.join(map(str, S.shape))}], got {x}")
    return S


@op(_write_type)
def write(S: ArrayStore, x: torch.Tensor, *, at: Tokens) -> ArrayStore:
    """Set the array state from per-token values: each row's last token wins; at drafted tokens the values wait for commit."""
    S.write(at, x)
    return S
