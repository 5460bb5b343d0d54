"""Native eviction against the ops: the same entries stay, in the same slots, whatever ties."""

from __future__ import annotations

import pytest
import torch

import elision
from elision.ir.interp import Interpreter
from elision.ir.store import KVStore
from elision.ir.tokens import Tokens
from elision.runtime.session import Session
from tests.passes.small import tiny

CASES = (
    ("h2o:budget=24,recent=8,sinks=1",), ("h2o:budget=24,recent=8,sinks=1,per_head=false", "kv-quant"),
    ("h2o:budget=17,recent=0,sinks=0", "insert-cache:dtype=bf16"), ("streaming-llm:window=20,sinks=3",),
)  # fmt: skip


def parts(store: KVStore) -> list[torch.Tensor]:
    n = int(store.totals().max())
    there = torch.arange(n) < store.lengths()[..., None]
    found = [store.lengths(), store.positions()[..., :n]]
    found += [torch.where(there[..., None], store.entries(what, n), 0) for what in "kv"]
    return found + ([torch.where(there, store.index["score"][..., :n], 0)] if store.type.scores is not None else [])


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("passes", CASES, ids=str)
def test_native_eviction(passes: tuple[str, ...], threads: int) -> None:
    model = elision.compile(tiny(), passes=list(passes), threads=threads)
    (tick,), generator = model.program.ticks, torch.Generator().manual_seed(0)
    assert tick.graph.name in model._interpreter.natives
    slow = Interpreter(model.program, {})
    for levels in (2, 5, 1000):
        session = Session(model._interpreter, 4, 90)
        with torch.inference_mode():
            session.read([torch.randint(1, 60, (n,), generator=generator).tolist() for n in (80, 24, 3, 41)], [80, 24, 3, 41])
            for store in session._stores.values():
                if store.type.scores is not None:
                    store.index["score"].copy_(torch.randint(0, levels, store.index["score"].shape, generator=generator))
            other = {n: s.fork() for n, s in session._stores.items()}
            for due in ([0, 2, 3], [1, 0]):
                rows = torch.tensor(due)
                at = {tick.graph.inputs[0].tensor.axes[0].name: Tokens(rows, torch.zeros_like(rows), 4)}  # type: ignore[union-attr]
                model._interpreter.run(tick.graph, {"rows": rows, **session._stores}, at)
                slow.run(tick.graph, {"rows": rows, **other}, at)
                for name, store in session._stores.items():
                    assert all(torch.equal(a, b) for a, b in zip(parts(store), parts(other[name]), strict=True)), name
