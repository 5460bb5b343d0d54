"""How many tokens of a sequence stay where ops choose among them: known before anything is computed, since it follows from how
many there are, so that a device is never asked."""

from __future__ import annotations

import math
from collections.abc import Callable

from elision.ir.value import Value


def _match(count: int, span: int, *, n: int = 0, share: float = 0.0, protect: int = 1, heads: bool = False) -> int:
    gone = min(n or int(count * share), (count + 1) // 2 - -(-protect // 2))
    return count - max(gone, 0) if count > 1 else count


def _fuse(count: int, span: int, *, keep: float, protect: int = 1) -> int:
    """Those that stay, and the one that stands for the others."""
    free = max(count - protect, 0)
    return min(count - free + math.ceil(keep * free) + 1, count)


def _prune(count: int, span: int, *, keep: float, similar: float = 0.0, protect: int = 1) -> int:
    free = count - min(count, protect)
    return count - free + math.ceil(keep * free - 1e-9)


def _foremost(count: int, span: int, *, keep: float, first: int = 1, last: int = 1) -> int:
    return min(count, max(math.ceil(keep * span - 1e-9), first + last))


_RULES: dict[str, Callable[..., int]] = {"match": _match, "fuse": _fuse, "prune": _prune, "foremost": _foremost}


def is_counted(value: Value) -> bool:
    """Whether `stay` knows the op that made the operand of `clusters` or `which`."""
    return value.op in _RULES


def stay(value: Value, count: int, span: int) -> int:
    """How many of ``count`` tokens are left of a sequence, by the op of ``value``, whose operand `clusters` or `which` makes an
    axis of. ``span``: positions from the first token to the last."""
    return _RULES[value.op](count, span, **dict(value.attrs)) if count else 0


def twins(value: Value, count: int) -> int:
    """How many tokens go by `prune` because others resemble them."""
    keep, similar, protect = value.attr("keep"), value.attr("similar", 0.0), value.attr("protect", 1)
    free = count - min(count, protect)
    left = math.ceil(keep * free - 1e-9)
    found: int = min(int(similar * (free - left)), left)
    return found
