"""Which heads retrieve: what a head's output loses when it sees only the first and the last tokens, on text that asks for more.

Text is made to ask by spans of it that come again at the end, in order, far from where they were (the task that DuoAttention,
Xiao et al. 2024, trains its gates on, without words of its own). The error of a key head is the mean over the tokens of the
second copies of |W (o - o')|^2 / |h|^2: o are the outputs of its query heads, o' those with sinks and window only, W what the
block makes of them, h the stream before the block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from elision.errors import BadInput
from elision.ir.attend import attend
from elision.ir.mask import Mask
from elision.ir.op import lookup
from elision.ir.program import Program, Weights
from elision.ir.states import KV
from elision.ir.tokens import Tokens
from elision.ir.value import Value
from elision.passes.calibration import Text, run_score

LENGTH, SPAN = 1024, 32  # tokens of a sequence, and of each span that comes again


def asking(ids: torch.Tensor, sinks: int, window: int) -> tuple[torch.Tensor, int]:
    """A sequence whose last tokens repeat spans from before: the tokens, and where the repetitions begin. What they repeat is
    neither among the first ``sinks`` tokens nor the ``window`` before them."""
    room = len(ids) - sinks - window - 2 * SPAN
    count = max(1, min(8, room // (2 * SPAN)))
    starts = [sinks + i * room // count for i in range(count)]
    copies = torch.cat([ids[s : s + SPAN] for s in starts])
    begin = len(ids) - len(copies)
    return torch.cat((ids[:begin], copies)), begin


def retrieval_errors(
    program: Program, weights: Weights, text: Text, tokens: int, sinks: int, window: int
) -> dict[tuple[str, int], float]:
    """By cache and head, the error of streaming."""
    length = min(LENGTH, int(program.meta["positions"]))
    if length < sinks + window + 4 * SPAN:
        raise BadInput(
            f"duo-attention: {program.name} has {program.meta['positions']} positions, too few to tell what heads lose that see "
            f"{sinks + window} tokens; say which retrieve with heads="
        )
    ids = torch.cat(text.sequences(program, tokens))
    parts = [part for part in torch.split(ids, length) if len(part) == length]
    if not parts:
        raise BadInput(f"duo-attention: {len(ids)} tokens to calibrate on; expected at least {length}")
    names = [name for name, type in program.states.items() if isinstance(type, KV)]
    found: dict[tuple[str, int], float] = {}
    for part in parts:
        sequence, begin = asking(part, sinks, window)
        pos = torch.arange(begin, len(sequence))
        looking = _Looking(Tokens(torch.zeros_like(pos), pos, 1), Mask("window", window, sinks))
        run_score(program, weights, [sequence], looking)
        if len(looking.errors) != len(names):
            raise BadInput(f"duo-attention: {len(looking.errors)} attentions to {len(names)} caches; say which heads retrieve")
        for name, errors in zip(names, looking.errors, strict=True):
            for head, error in enumerate(errors):
                found[name, head] = found.get((name, head), 0.0) + error / len(parts)
    return found


class _Looking:
    """Is shown every op of a forward of one sequence, and sees what streaming would change of the tokens ``at``. ``errors``: by
    attention in order, of each key head."""

    def __init__(self, at: Tokens, mask: Mask) -> None:
        self.errors: list[list[float]] = []
        self._at, self._mask = at, mask
        self._stream = torch.empty(0)
        self._attend: Value | None = None
        self._change = torch.empty(0)

    def __call__(self, value: Value, operands: Sequence[Any]) -> None:
        if value.op == "call":
            self._stream = operands[0][self._at.pos].double()
        elif value.op == "attend":
            q, store, *_ = operands
            more = value.attr("scale"), value.attr("softcap")
            # what an `Env` supplies is the mask: causal, of all caches that the pass divides
            whole, few = (attend(q[self._at.pos], store, self._at, mask, *more)[0] for mask in (Mask(), self._mask))
            self._attend, self._change = value, whole - few
            self.errors.append(self._sizes(store.type.heads, lambda x: x))
        elif value.op == "linear" and self._attend is not None and _begins(value.args[0]) is self._attend:
            body = lookup("linear").body
            self.errors[-1] = self._sizes(len(self.errors[-1]), lambda x: body(x, operands[1]))
            self._attend = None

    def _sizes(self, heads: int, made: Callable[[torch.Tensor], torch.Tensor]) -> list[float]:
        found = []
        for h in range(heads):
            own = torch.zeros_like(self._change)
            group = own.shape[1] // heads
            own[:, h * group : (h + 1) * group] = self._change[:, h * group : (h + 1) * group]
            size = made(own.flatten(1)).double().square().sum(-1) / self._stream.square().sum(-1).clamp(min=1e-30)
            found.append(float(size.mean()))
        return found


def _begins(value: Value) -> Value:
    """What a value is a view of."""
    while value.op == "view":
        value = value.args[0]
    return value
