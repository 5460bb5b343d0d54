"""Drafts made on the device: the trees that the host would make, node by node, what tables learn, and whole generations."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from test_generate import MASK, PADDED, both, on_gpu
from test_programs import PROMPTS, compiled

from elision.codegen.triton.compile import plan_program
from elision.codegen.triton.drafts import recycle
from elision.codegen.triton.interpreted import Interpreted
from elision.ir.drafting.drafter import Drafter, make
from elision.ir.drafting.policy import Always
from elision.ir.drafting.proposal import Proposal
from elision.ir.drafting.run import Drafting
from elision.ir.launch import DRAFTS
from elision.ir.program import drafting
from elision.ir.requests import Requests
from elision.ir.tokens import Tokens
from elision.runtime.cuda.drafts import DeviceDrafts, Tables
from elision.runtime.cuda.engine import Engine
from elision.runtime.cuda.natives import Natives, _blank

V = 40
PASSES = ["prompt-lookup:match=3,length=5", "token-recycling:nodes=12,k=3,depth=3"]


def told(method: str) -> tuple[Engine, Drafter]:
    """An engine that drafts, and the host's drafter."""
    model = compiled("LlamaConfig", (method,))
    assert model.program.round is not None
    code = plan_program(model.program)
    engine = Engine(model.program, code, model.weights, Interpreted(code.kernels))
    return engine, make(drafting(model.program.round)[1][0], V)


@pytest.mark.parametrize("method", PASSES)
def test_trees_of_the_host(method: str) -> None:
    """Histories of few different tokens, tables with and without gaps, any number of levels and nodes; sequence 1 takes no
    part."""
    engine, drafter = told(method)
    noise, rows, capacity = np.random.default_rng(3), [0, 2], 48
    seen: Counter[int] = Counter()
    for trial in range(16):
        drafter.rates.right = drafter.rates.tried * noise.choice([0.01, 0.5, 0.9, 0.9, 0.9], len(drafter.rates.tried))
        for name, table in drafter.tables().items():
            table[:] = noise.integers(0, 4 if name == "steady" else V, table.shape)
            if name == "successors":
                table[noise.random(V) < 0.2] = -1
        histories = [torch.from_numpy(noise.integers(0, 3, noise.integers(1, [9, capacity][trial % 2]))) for _ in range(3)]
        requests = Requests([], histories, [1, 1, 1], noise.integers(0, 8, 3).tolist())
        n = int(noise.integers(1, 8))
        drafts = DeviceDrafts(engine.device, Tables(engine.device, drafter), drafter, 3, capacity)
        engine.device.write(drafts.address["history"], torch.from_numpy(noise.integers(0, 3, (3, capacity))))
        drafts.begin(rows, Requests([], [h[:1] for h in histories], [1, 1, 1], [0, 0, 0]))
        drafts.begin(rows, requests)
        nodes = _blank(rows, n + 1, 3)
        call = engine.call("step", nodes, torch.zeros_like(nodes.row))
        engine.graph(call, {DRAFTS: drafts}, ["propose"])()
        arrays = {"ids": call.buffer(call.schedule.inputs[0])} | {k: call.axes[0, k] for k in ("pos", "parent", "anc")}
        lines: dict[str, list[list[int]]] = {}
        for name, address in arrays.items():
            read = torch.empty(2, n + 1, dtype=torch.int64)
            engine.device.read(address, read)
            lines[name] = read.tolist()
        drafted, _, found = drafts.end(rows)
        for i, r in enumerate(rows):
            history = histories[r]
            host = Drafting([drafter], Always(n)).run(3)
            ids, at = host.propose(history[-1:], requests, Tokens(torch.tensor([r]), torch.tensor([len(history) - 1]), 3))
            assert at.parent is not None and at.anc is not None
            kept = len(ids)
            assert drafted[i] == kept - 1
            for name, expected in (("ids", ids), ("pos", at.pos), ("parent", at.parent), ("anc", at.anc)):
                assert lines[name][i][:kept] == expected.tolist(), (trial, name)
            assert lines["parent"][i][kept:] == [-2] * (n + 1 - kept)
            assert lines["anc"][i][kept:] == [1 << j for j in range(kept, n + 1)]
            _same(found[i], host._open[r][-1][1][0])
            seen[kept] += 1
    assert len(seen) > 3 and seen[1], seen


def _same(found: Proposal | None, expected: Proposal | None) -> None:
    assert (found is None) == (expected is None)
    if found is not None and expected is not None:
        for name in ("token", "parent", "depth", "kind"):
            assert getattr(found, name)[1:].tolist() == getattr(expected, name)[1:].tolist(), name


def test_what_a_table_learns() -> None:
    """Nodes with equal tokens: the first counts; nodes without a guess do not; constancy is counted up to three."""
    noise, drafter = torch.Generator().manual_seed(2), make("token-recycling:k=3", 6)
    successors, steady = (torch.from_numpy(t.copy()) for t in drafter.tables().values())
    for _ in range(7):
        ids, best = torch.randint(0, 6, (9,), generator=noise), torch.randint(0, 2, (9, 4), generator=noise)
        best[:, 0] = (ids % 3 + (torch.rand(9, generator=noise) < 0.1)) % 6
        parent = torch.tensor([-1, 0, 1, -2, 0, -1, 0, 0, -2])
        recycle[(9,)](successors, steady, ids, best, parent, K=3, WIDE=4, BLOCK=4)
        drafter.see(ids[parent > -2].numpy(), best[parent > -2].numpy())
        assert (successors.numpy() == drafter.tables()["successors"]).all()
        assert (steady.numpy() == drafter.tables()["steady"]).all()
    assert steady.max() == 3


@pytest.mark.parametrize("method", PASSES)
def test_rounds_without_the_host(method: str) -> None:
    """The tokens, drafts and acceptances of the reference, greedy and then, with the same tables, drawn; at last with penalties,
    for which the host drafts with what the device has learnt. A round is one graph, after which the host reads once."""
    model = compiled("LlamaConfig", (method,))
    gpu, fake = on_gpu(model)
    for each in (model, gpu):
        assert each.drafting is not None
        each.drafting.policy = Always(3)
    ids = model.generate(torch.tensor(PROMPTS[:1]), max_new_tokens=20, eos_token_id=[])  # it has begun to repeat itself
    model.drafting.drafters = [make(drafting(model.program.round)[1][0], V)]  # type: ignore
    calls: list[Counter[str]] = []
    steps: list[dict[str, Any]] = [
        dict(max_new_tokens=8), dict(max_new_tokens=3, do_sample=True, temperature=0.1),
        dict(max_new_tokens=3, repetition_penalty=1.1),
    ]  # fmt: skip
    for options in steps:
        found = gpu.generate(ids, **options, eos_token_id=[], streamer=lambda *_: calls.append(fake.calls.copy()))
        assert found.tolist() == model.generate(ids, **options, eos_token_id=[]).tolist()
        assert gpu.stats is not None and model.stats is not None
        for name in ("drafted", "accepted", "rounds", "sizes", "drafters"):
            assert getattr(gpu.stats, name) == getattr(model.stats, name), name
        if options is steps[0]:
            made = calls[-1] - calls[-2]
            assert made["cuGraphLaunch"] == made["cuMemcpyDtoHAsync_v2"] == 1 and made["cuMemcpyHtoDAsync_v2"] <= 2
            assert set(made) <= {"cuGraphLaunch", "cuMemcpyDtoHAsync_v2", "cuMemcpyHtoDAsync_v2", "cuStreamSynchronize"}
            assert gpu.stats.accepted > 0
    assert isinstance(model.drafting, Drafting) and isinstance(gpu.drafting, Drafting)
    for name, table in model.drafting.drafters[0].tables().items():
        assert (table == gpu.drafting.drafters[0].tables()[name]).all(), name


def test_batches() -> None:
    """Sequences that end at different times."""
    model = compiled("LlamaConfig", PASSES[1:])  # type: ignore[arg-type]
    gpu, _ = on_gpu(model)
    for each in (model, gpu):
        assert each.drafting is not None
        each.drafting.policy = Always(2)
    plain = model.generate(PADDED, MASK, max_new_tokens=6, eos_token_id=[]).tolist()
    found, expected = both(model, gpu, max_new_tokens=6, eos_token_id=plain[0][10], pad_token_id=39)
    assert found == expected and gpu.stats is not None and gpu.stats.drafted > 0
    assert gpu.stats.turns < 2 * gpu.stats.rounds


def test_what_is_on_the_device_is_of_so_many_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    """After two sequences, of which the first was the last to end, one by itself: launches for two would write beyond its
    memory."""
    gpu, _ = on_gpu(compiled("LlamaConfig", PASSES[1:]))  # type: ignore[arg-type]
    assert gpu.drafting is not None
    gpu.drafting.policy = Always(2)
    made: list[set[int]] = []

    def graph(engine: Engine, call: Any, caches: Any, entries: Any = ()) -> Any:
        made.append({call.rows, *(cache.rows for cache in caches.values())})
        return whole(engine, call, caches, entries)

    whole = Engine.graph
    monkeypatch.setattr(Engine, "graph", graph)
    gpu.generate(PADDED, MASK, max_new_tokens=6, eos_token_id=[], streamer=lambda row, *_: row == 0)
    gpu.generate(torch.tensor(PROMPTS[:1]), max_new_tokens=6, eos_token_id=[])
    assert {2} in made and all(len(rows) == 1 for rows in made), made


def test_how_to_draw_is_told_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls of other threads would tell the device otherwise between that and the round."""
    gpu, _ = on_gpu(compiled("LlamaConfig", PASSES[1:]))  # type: ignore[arg-type]
    assert gpu.drafting is not None
    gpu.drafting.policy = Always(2)
    asked, turns = Natives._asked, list[bool]()

    def told(natives: Natives, requests: Requests, at: Tokens) -> bool:
        turns.append(natives._lock._is_owned())  # type: ignore[attr-defined]
        return asked(natives, requests, at)

    monkeypatch.setattr(Natives, "_asked", told)
    gpu.generate(torch.tensor(PROMPTS[:1]), max_new_tokens=3, eos_token_id=[])
    assert turns and all(turns)
