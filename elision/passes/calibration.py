"""What a pass looks at to choose numbers: text, through the model that it is about to change."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from elision.errors import BadInput
from elision.ir.interp import Interpreter, Observe
from elision.ir.program import Program, Weights, vocabulary
from elision.ir.tokens import Tokens
from elision.ir.value import Graph
from elision.passes.base import Pass

#: The most tokens of a sequence: text is cut into sequences of this length.
LENGTH = 512


@dataclass(frozen=True)
class Text:
    """Text to calibrate on. ``given``: texts, or token ids ``i64[n]`` or ``i64[sequences, n]``; None for every second topic of
    Python's own documentation (`pydoc_data.topics`). ``encode``: from text to ids, None for a model without a tokenizer."""

    given: torch.Tensor | Sequence[str] | None = None
    encode: Callable[[str], list[int]] | None = None

    def sequences(self, program: Program, tokens: int) -> list[torch.Tensor]:
        """Sequences ``i64[n]`` of about ``tokens`` tokens in all, spread evenly over the text; of all of it, if it is shorter."""
        if tokens < 1:
            raise BadInput(f"tokens={tokens}: expected at least 1 to calibrate on")
        length = min(LENGTH, int(program.meta["positions"]), tokens)
        found = [part for ids in self._ids(program) for part in torch.split(ids, length)]
        full = [part for part in found if len(part) == length] or found
        count = min(len(full), -(-tokens // length))
        return [full[i * len(full) // count] for i in range(count)]

    def _ids(self, program: Program) -> list[torch.Tensor]:
        if isinstance(self.given, torch.Tensor):
            return _checked(self.given, program)
        texts = [topics(0)] if self.given is None else [self.given] if isinstance(self.given, str) else list(self.given)
        if not texts or not all(isinstance(text, str) for text in texts):
            raise BadInput(f"calibration: expected texts, or a LongTensor [n] or [sequences, n], got {self.given!r:.80}")
        if self.encode is None:
            raise BadInput(f"calibration of {program.name}: it came without a tokenizer; give token ids, as in calibration=ids")
        found = [torch.tensor(self.encode(text), dtype=torch.int64) for text in texts]
        return _checked([ids for ids in found if len(ids)], program)


def _checked(given: torch.Tensor | list[torch.Tensor], program: Program) -> list[torch.Tensor]:
    """The sequences of token ids, if they are ones that the program knows."""
    rows = given
    if isinstance(given, torch.Tensor) and given.dim() in (1, 2):
        rows = list(given) if given.dim() == 2 else [given]
    graph = program.entries["score"]
    most = vocabulary(graph, graph.inputs[0])
    if not most:
        raise BadInput(f"calibration: {program.name} does not read token ids, so it cannot be calibrated on text")
    if isinstance(rows, torch.Tensor) or not any(r.numel() for r in rows) or any(r.dtype != torch.int64 for r in rows):
        raise BadInput(
            f"calibration: expected texts, or a LongTensor [n] or [sequences, n], with at least one token, got {given!r:.80}"
        )
    low, high = min(int(r.min()) for r in rows), max(int(r.max()) for r in rows)
    if low < 0 or high >= most:
        raise BadInput(f"calibration: token ids from {low} to {high}; expected 0 to {most - 1}")
    return rows


def topics(part: int) -> str:
    """Every second topic of Python's documentation, in order of their names: those of number 0, 2, .. (``part`` 0), on which
    passes calibrate, or the others (``part`` 1), which are left to measure with. The text is the running Python's."""
    import pydoc_data.topics  # large, hence not at import

    known: Mapping[str, str] = pydoc_data.topics.topics
    return "\n".join(known[name] for name in sorted(known)[part::2])


class Calibrated(Pass):
    """A pass that chooses numbers of the weights, beside rewriting the program: `apply` says which weights change and how they
    are stored from then on, `calibrate` what is stored."""

    def calibrate(self, program: Program, weights: Weights, text: Text) -> dict[str, torch.Tensor]:
        """The tensors, of the types that they have after `apply`, of the weights that change; ``program`` is the one before
        `apply` with its ``weights``, which stay as they are."""
        raise NotImplementedError


class Choosing(Pass):
    """A pass that chooses some of its own fields, so that its text says what was chosen: `apply` needs no text then."""

    def choose(self, program: Program, weights: Weights, text: Text) -> Pass:
        """The pass with these fields, chosen on the program that it is about to change (which stays as it is)."""
        raise NotImplementedError


def run_score(
    program: Program, weights: Weights, sequences: list[torch.Tensor], observe: Observe | None = None, blocks: bool = False
) -> tuple[torch.Tensor, ...]:
    """The model's own forward over the sequences, in one run of the reference interpreter; further inputs are zeros.
    ``blocks``: only up to the end of the last block."""
    graph = program.entries["score"]
    graph = up_to_last_block(graph) if blocks else graph
    ids, at = torch.cat(sequences), Tokens.chunk([len(s) for s in sequences], [0] * len(sequences))
    first = graph.inputs[0]
    axis = first.tensor.tokens
    assert axis is not None
    inputs: dict[str, Any] = {graph.names[v]: torch.zeros_like(ids) for v in graph.inputs} | {graph.names[first]: ids}
    with torch.inference_mode():
        return Interpreter(program, weights, observe=observe).run(graph, inputs, {axis.name: at})


def up_to_last_block(graph: Graph) -> Graph:
    """The graph up to the results of the last block."""
    calls = graph.calls()
    if not calls:
        return graph
    until = graph.values.index(calls[-1]) + 1
    results = tuple(v for v in graph.values[until:] if v.op == "item" and v.args[0] is calls[-1])
    return replace(graph, outputs=results or (calls[-1],), values=graph.values[:until] + results)
