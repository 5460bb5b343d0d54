"""What position-only sub-graphs mean, found by evaluating them: attention masks and rotation tables.

No operator sequence is matched, so the many spellings of a causal mask or of RoPE are all the same here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx

from elision.frontend.capture import Captured
from elision.frontend.evaluate import ancestors, evaluate

MaskKind = Literal["full", "causal", "window", "chunk"]
Style = Literal["half", "interleaved", "single"]

# Short lengths at which every mask is evaluated, and the first position of each.
_PROBES = ((20, 0), (33, 0), (33, 7))
# A mask is materialised as [T, T] booleans: lengths above this one cost too much memory to look at.
_LONGEST_PROBE = 16384
# The same for an ALiBi bias: numbers of heads * T * T.
_LARGEST_BIAS = 1 << 25
# A logit so far below the largest of its row hides its key: exp(-500) is nothing beside any sum of probabilities.
HIDDEN = 500.0


@dataclass(frozen=True)
class Mask:
    """Which key position ``j`` a query position ``i`` attends to: ``full`` all; ``causal`` ``j <= i``;
    ``window`` ``j <= i`` and ``i - j < size``; ``chunk`` ``j <= i`` and ``j // size == i // size``."""

    kind: MaskKind
    size: int = 0

    def allows(self, i: Tensor, j: Tensor) -> Tensor:
        """Boolean, elementwise over broadcast positions."""
        if self.kind == "full":
            return torch.ones_like(i >= j)
        allowed = j <= i
        if self.kind == "window":
            allowed = allowed & (i - j < self.size)
        elif self.kind == "chunk":
            allowed = allowed & (i // self.size == j // self.size)
        return allowed


def classify_mask(
    captured: Captured, node: fx.Node, *, limit: int = 131072, length: int = 0, slopes: Tensor | None = None
) -> Mask | None:
    """The mask that the position-only value ``node`` (boolean or additive, ``[.., T, T]``) is, or None.

    It is compared at two lengths and at positions that do not start at 0, and again just past every integer
    constant of its sub-graph below ``limit`` (the longest sequence of interest): a window of 4096 looks
    causal on short sequences; and at ``limit`` if it comes out of a table. ``length``: the only length there is, for a
    graph of one length. None if no predicate fits everywhere or a constant is too large to be tried. What an additive
    mask adds where it hides nothing must be constant along a row, besides ``slopes [H]`` times the key's position
    (ALiBi), which is compared at ``limit`` too, as far as memory allows.
    """
    limit = min(limit, captured.longest)
    constants = _constants(captured, node, limit)
    if _reads_table(captured, node, limit):
        constants.add(limit)
    if any(c > _LONGEST_PROBE for c in constants):
        return None
    longer = {min(c + 17, limit) for c in constants if c + 17 > 33}
    if slopes is not None:
        longest = int((_LARGEST_BIAS / slopes.numel()) ** 0.5)
        if any(n > longest for n in longer):
            return None
        longer.add(min(limit, longest))
    found: Mask | None = None
    probes = [(n, 0) for n in sorted(longer, reverse=True)] + [(min(n, limit - first), first) for n, first in _PROBES]
    for size, first in [(length, 0)] if length else probes:
        allowed = _allowed(captured, node, size, first, slopes)
        if allowed is None:
            return None
        at = torch.arange(first, first + size)
        candidates = _candidates(allowed) if found is None else [found]
        found = next((m for m in candidates if torch.equal(m.allows(at[:, None], at), allowed)), None)
        if found is None:
            return None
    return found


def _candidates(allowed: Tensor) -> Iterator[Mask]:
    yield Mask("full")
    yield Mask("causal")
    lost = (~allowed[:, 0]).nonzero()  # the first query that no longer sees key 0 tells the size
    if lost.numel() and int(lost[0]) > 0:
        yield Mask("window", int(lost[0]))
        yield Mask("chunk", int(lost[0]))


def _allowed(captured: Captured, node: fx.Node, length: int, first: int, slopes: Tensor | None) -> Tensor | None:
    """The mask as booleans ``[T, T]``; None if it differs by row of the batch or head, or is not a mask."""
    batch = 2 if length <= 64 else 1
    positions = torch.arange(first, first + length).expand(batch, length).contiguous()
    (mask,) = evaluate(captured, [node], positions)
    if mask.dim() < 2 or mask.shape[-1] != length or mask.shape[-2] not in (1, length):
        return None
    allowed = visible(mask, slopes)
    if allowed is None:
        return None
    allowed = allowed.reshape(-1, *mask.shape[-2:])
    if not bool((allowed == allowed[:1]).all()):
        return None
    return torch.broadcast_to(allowed[0], (length, length))


def visible(mask: Tensor, slopes: Tensor | None = None) -> Tensor | None:
    """A boolean or additive mask ``[.., T, T]``, beside ALiBi of these slopes, as booleans; None for another bias."""
    if mask.dtype == torch.bool or not mask.is_floating_point():
        return mask if mask.dtype == torch.bool else None
    line = mask if slopes is None else mask.double() - slopes[:, None, None] * torch.arange(mask.shape[-1])
    top = line.amax(-1, keepdim=True)
    seen = line > top - HIDDEN
    level = line == top
    if slopes is not None:  # models of any dtype compute it in float32 at most
        rounding = 2 * max(torch.finfo(t).eps for t in (mask.dtype, torch.float32))
        level = top - line <= rounding * mask.masked_fill(~seen, 0).abs().amax(-1, keepdim=True)
    return seen if bool((level | ~seen).all()) else None


def _constants(captured: Captured, node: fx.Node, limit: int) -> set[int]:
    """Integers above 1 in the arguments and the constant inputs of the sub-graph, in absolute value."""
    found: set[int] = set()

    def note(value: Any) -> None:
        if isinstance(value, (list, tuple)):
            for item in value:
                note(item)
        elif isinstance(value, int) and not isinstance(value, bool) and 1 < abs(value) < limit:
            found.add(abs(value))

    for used in ancestors([node]):
        if used.op == "placeholder":
            tensor = captured.params.get(captured.source.get(used.name, ""))
            if tensor is not None and tensor.numel() <= 8:
                note(tensor.flatten().tolist())
        else:
            note(used.args)
            note(tuple(used.kwargs.values()))
    return found


def _reads_table(captured: Captured, node: fx.Node, length: int) -> bool:
    """A constant takes part that has an entry for every position: all of it must be looked at."""
    inputs = [captured.params.get(captured.source.get(n.name, "")) for n in ancestors([node]) if n.op == "placeholder"]
    return any(t is not None and t.numel() > 1 and max(t.shape) >= length for t in inputs)


@dataclass(frozen=True, eq=False)
class RopeTable:
    """``cos = scale * cos(position * inv_freq)`` and the same with ``sin`` (RoFormer, arXiv:2104.09864).

    ``inv_freq [D / 2]``: radians per position. ``style``: how the table repeats the angles over its last
    axis, ``half`` (a b a b), ``interleaved`` (a a b b) or ``single`` (a b). ``exact``: the model's own buffer
    reproduces both tables bit for bit; otherwise ``inv_freq`` (float64) is fitted.
    """

    inv_freq: Tensor
    scale: float
    style: Style
    exact: bool


def classify_rope(captured: Captured, cos: fx.Node, sin: fx.Node, *, limit: int = 8192) -> RopeTable | None:
    """The rotation that two position-only tables ``[.., T, D]`` are; None if they are no plain rotation. Of a complex table,
    given as both, the real part is the cosine and the imaginary part the sine.

    They are compared at small positions and at positions near ``limit`` (the model's longest sequence), each
    evaluated apart, so tables whose frequencies depend on the length (dynamic NTK, LongRoPE) do not fit.
    """
    probes = [torch.arange(24), torch.arange(limit - 24, limit), torch.arange(24) * max(1, (limit - 1) // 23)]
    tables = [_tables(captured, cos, sin, p) for p in probes]
    if any(t is None for t in tables):
        return None
    pairs = [t for t in tables if t is not None]
    scale = _scale(pairs[0][0], ancestors([cos]))
    if not scale > 0 or not bool((pairs[0][1][0] == 0).all()):
        return None
    for inv_freq, exact in _frequencies(captured, cos, sin, pairs[0][0].shape[-1], limit):
        for style in _styles(pairs[0][0], inv_freq):
            table = RopeTable(inv_freq, scale, style, exact)
            if all(_reproduces(table, p, *pair) for p, pair in zip(probes, pairs, strict=True)):
                return table
    return None


def rope_tables(table: RopeTable, positions: Tensor) -> tuple[Tensor, Tensor]:
    """``cos, sin [T, D]`` of ``positions [T]`` in the type of ``inv_freq``."""
    angle = _angles(table, positions)
    return angle.cos() * table.scale, angle.sin() * table.scale


def _angles(table: RopeTable, positions: Tensor) -> Tensor:
    angle = positions.to(table.inv_freq.dtype)[:, None] * table.inv_freq
    if table.style == "half":
        angle = torch.cat([angle, angle], dim=-1)
    elif table.style == "interleaved":
        angle = angle.repeat_interleave(2, dim=-1)
    return angle


def _tables(captured: Captured, cos: fx.Node, sin: fx.Node, positions: Tensor) -> tuple[Tensor, Tensor] | None:
    pair = evaluate(captured, [cos, sin], positions.expand(2, -1).contiguous())
    if all(value.is_complex() for value in pair):
        pair = [pair[0].real, pair[1].imag]
    out = []
    for value in pair:
        sizes = [n for n in value.shape[:-1] if n != 1]  # an axis for the heads may follow the length
        if not sizes or sizes[-1] != positions.numel() or not value.is_floating_point():
            return None
        rows = value.reshape(-1, sizes[-1], value.shape[-1])
        if not bool((rows == rows[:1]).all()):
            return None
        out.append(rows[0])
    return (out[0], out[1]) if out[0].shape == out[1].shape else None


def _scale(cos: Tensor, above: set[fx.Node]) -> float:
    """The factor of the table: its value at position 0, as the constant in the graph that rounds to it."""
    observed = cos[0, 0]
    literals = [x for node in above for x in node.args if isinstance(x, float)]
    return next((x for x in literals if torch.tensor(x).to(cos.dtype) == observed), float(observed))


def _frequencies(captured: Captured, cos: fx.Node, sin: fx.Node, width: int, limit: int) -> Iterator[tuple[Tensor, bool]]:
    """Candidate frequency vectors: the constants that the tables are computed from, then a fit."""
    nowhere = torch.zeros(1, 1, dtype=torch.int64)
    for node in sorted(ancestors([cos, sin])):
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.is_floating_point() and _is_constant(captured, node):
            if value.numel() in (width, width // 2):
                yield evaluate(captured, [node], nowhere)[0].flatten(), True
    for frequency in _fitted(captured, cos, sin, width, limit):
        yield frequency, False


def _is_constant(captured: Captured, node: fx.Node) -> bool:
    return all(n.name in captured.source for n in ancestors([node]) if n.op == "placeholder")


def _fitted(captured: Captured, cos: fx.Node, sin: fx.Node, width: int, limit: int) -> Iterator[Tensor]:
    """Angles at 1, 2, 4, ...: each doubling fixes one more bit of the frequency (the turns are known)."""
    powers = [1 << k for k in range(max(1, (limit - 1).bit_length()))]
    pair = _tables(captured, cos, sin, torch.tensor([p for p in powers if p < limit]))
    if pair is None:
        return
    angles = torch.atan2(pair[1].double(), pair[0].double())
    frequency = angles[0]
    for power, angle in zip(powers[1:], angles[1:], strict=False):
        turns = torch.round((frequency * power - angle) / (2 * torch.pi))
        frequency = (angle + 2 * torch.pi * turns) / power
    half = width // 2
    yield from (frequency[:half], frequency[::2], frequency)


def _styles(table: Tensor, inv_freq: Tensor) -> tuple[Style, ...]:
    return ("single",) if inv_freq.numel() == table.shape[-1] else ("half", "interleaved")


def _reproduces(table: RopeTable, positions: Tensor, cos: Tensor, sin: Tensor) -> bool:
    want = rope_tables(table, positions)
    if want[0].shape != cos.shape:
        return False
    if table.exact:
        angle = _angles(table, positions)
        angle = angle.to(torch.promote_types(angle.dtype, torch.float32))
        turn = torch.polar(torch.ones_like(angle), angle) * table.scale  # which rounds otherwise than cos and sin
        spellings = (want, (turn.real, turn.imag))
        return any(torch.equal(c.to(cos.dtype), cos) and torch.equal(s.to(sin.dtype), sin) for c, s in spellings)
    # A fit is judged by what float32 angles allow: half a unit of the last place of position * frequency.
    reach = float(positions.max() * table.inv_freq.abs().max())
    tolerance = table.scale * (reach * 2.0**-22 + 4 * torch.finfo(cos.dtype).eps)
    return bool(((want[0] - cos).abs() <= tolerance).all() and ((want[1] - sin).abs() <= tolerance).all())
