"""Greedy generation on a GPU: the prompt in one call, then steps that follow one another without asking the host."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from elision.errors import BadInput
from elision.ir.tokens import Tokens
from elision.ir.tree import Tree, pack
from elision.runtime.cuda.caches import DeviceCache, caches
from elision.runtime.cuda.engine import Engine


class Decoder:
    """Sequences in the caches of a device. ``capacity``: the most tokens of one."""

    def __init__(self, engine: Engine, rows: int, capacity: int) -> None:
        self.engine, self.rows, self.capacity = engine, rows, capacity
        engine.begin(rows, capacity)
        self.caches: dict[str, DeviceCache] = caches(engine.device, engine.program, rows, capacity)
        self.lengths = [0] * rows
        self.last = torch.zeros(rows, dtype=torch.int64)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Logits ``[rows, vocab]`` after the prompts, which have at least one token each."""
        if len(prompts) != self.rows or not all(prompts):
            raise BadInput(f"{len(prompts)} prompts, some perhaps empty; expected {self.rows} with at least one token each")
        at = Tokens.chunk([len(p) for p in prompts], self.lengths)
        ids = torch.tensor([i for p in prompts for i in p])
        call = self.engine.call("prefill", at, ids)
        self.engine.run(call, self.caches)
        self.lengths = [n + len(p) for n, p in zip(self.lengths, prompts, strict=True)]
        logits = self.engine.output(call, 0)
        self.last = logits.float().argmax(-1)
        return logits

    def decode(self, steps: int) -> torch.Tensor:
        """The next ``steps`` tokens ``[rows, steps]`` of each sequence, the first of them the one that the last call gave. One
        graph is launched again and again; the host reads when all is done."""
        if max(self.lengths) + steps > self.capacity:
            raise BadInput(f"{steps} more tokens, but the caches hold {self.capacity} and have {max(self.lengths)}")
        first = self.last[:, None]
        if steps > 1:
            engine, rows = self.engine, self.rows
            engine.device.clear(engine.round("length", rows), 8 * rows)
            at = Tokens(torch.arange(rows), torch.tensor(self.lengths), rows)
            call = engine.call("decode", at, self.last)
            replay = engine.graph(call, self.caches)
            for _ in range(steps - 1):
                replay()
            first = torch.cat((first, engine.read_round("tokens", rows)[:, : steps - 1]), 1)
            self.lengths = [n + steps - 1 for n in self.lengths]
            self.last = first[:, -1]
        return first

    def verify(self, trees: Sequence[Tree], ids: Sequence[Sequence[int]]) -> list[list[int]]:
        """A round: the trees, whose roots are the last tokens, are verified greedily and what is accepted is committed, on the
        device. The accepted tokens without the root and the one after them, by sequence: all that the host reads."""
        row, pos, parent, anc = pack(trees, self.lengths)
        at = Tokens(row, pos, self.rows, parent, anc)
        engine, rows = self.engine, self.rows
        call = engine.call("step", at, torch.tensor([i for each in ids for i in each]))
        engine.run(call, self.caches)
        commit = engine.call("commit", Tokens(row[:0], pos[:0], rows))
        engine.run(commit, self.caches)
        for cache in self.caches.values():
            cache.drop()
        paths, counts = engine.read_round("path", rows), engine.read_round("accepted", rows)[:, 0].tolist()
        self.last = engine.read_round("next", rows)[:, 0]
        found = [[ids[b][i] for i in paths[b, 1 : counts[b]].tolist()] + [int(self.last[b])] for b in range(rows)]
        self.lengths = [n + c for n, c in zip(self.lengths, counts, strict=True)]
        return found
