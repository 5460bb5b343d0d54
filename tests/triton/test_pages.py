"""Pages that tokens choose, under Triton's interpreter: summaries, the choice, attention to it; and whole runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from caches import arrays, attention, axis, blocks, fill, kv, trees
from test_generate import on_gpu
from test_programs import compiled

from elision.codegen.triton.forms import form
from elision.codegen.triton.pages import bounds, pick, summarise, summarised
from elision.ir import pages as meaning
from elision.ir.attend import attend as attending
from elision.ir.mask import Mask
from elision.ir.pages import Chosen
from elision.ir.states import Float, Int, Summary
from elision.ir.store import KVStore
from elision.ir.tokens import Tokens


@pytest.mark.parametrize("drafted", [False, True])
@pytest.mark.parametrize("encoding,page,open", [(Float("f32"), 4, 8), (Int(8, "channel", 48), 16, 16), (Float("f32"), 1, 16)])
def test_what_tokens_choose(encoding: Float | Int, page: int, open: int, drafted: bool) -> None:
    """Summaries of the pages as they become complete, a sequence that is not due among them; then the choice, then attention."""
    type = replace(kv(2, 48, 48, encoding), summary=Summary(page) if page > 1 else None)
    store, lengths = KVStore(type, 3, 90), [61, 9, 80]
    fill(store, [n // 2 for n in lengths])
    k, _, scale, _, low, _ = arrays(store, 0)
    fixed: dict[str, Any] = dict(H=2, D=48, DP=64, FORM_K=form(encoding))
    expected: torch.Tensor | None = None
    if page > 1:
        table, done = torch.zeros_like(store.index["summary"]), torch.zeros(3, dtype=torch.int64)
        for due in ([0, 1, 2], [0, 2]):
            start = torch.tensor([sum(d < i for d in due) for i in range(4)])
            grid = (90 // page, 6)
            summarise[grid](
                table, done, start, k, scale, low, store.len["k"], blocks(store), 16 * table.shape[2], PAGE=page, PP=16, **fixed
            )
            summarised[(1,)](done, start, store.len["k"], 3, PAGE=page, BLOCK=4)
            meaning.summarise(store, torch.tensor(due))
            if due == [0, 1, 2]:
                fill(store, [n - n // 2 for n in lengths], [n // 2 for n in lengths], seed=5)
        assert torch.equal(table, store.index["summary"]) and torch.equal(done, store.index["summarised"])
        meaning.summarise(store, torch.tensor([1]))
    if drafted:
        tokens = trees(3, [5, 1, 3], lengths)
        store.append(tokens, *(torch.randn(len(tokens), 2, 48, generator=torch.Generator().manual_seed(s)) for s in (1, 2)))
    else:
        tokens = Tokens(torch.arange(3), torch.tensor(lengths) - 1, 3)
    q = torch.randn(len(tokens), 6, 48, generator=torch.Generator().manual_seed(7))
    q[0, :3] = 0  # all bounds are equal
    n, first, room, at = 3, 1 if page > 1 else 0, 90 // page, axis(tokens)
    expected = meaning.pick(q, store, tokens, n, page, open, first)
    source = store.index["summary"] if page > 1 else k
    assert source is not None
    bound, found = torch.full((len(tokens), 2, room), torch.nan), torch.full((len(tokens), 2, n), -7)
    shared = dict(PAGE=page, OPEN=open, PENDING=False)
    bounds[(-(-room // 16), len(tokens), 2)](
        bound, q, q.stride(0), at["row"], at["pos"], at["start"], source, None, None, store.len["k"], 16 * source.shape[2], room,
        **fixed | dict(G=3, SIDED=page > 1, FORM_K="", BN=16), **shared,
    )  # fmt: skip
    pick[(len(tokens), 2)](
        found, bound, at["row"], at["pos"], at["start"], store.len["k"], room, N=n, FIRST=first, H=2, BN=16, **shared
    )
    assert torch.equal(found, expected)
    for splits in (1, 2):
        out, _ = attention(q, store, tokens, Mask(), 0.2, splits=splits, pages=(found, page, open))
        whole = attending(q, store, tokens, Mask(), 0.2, chosen=Chosen(expected, page, open))[0]
        assert torch.allclose(out, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["quest:budget=12,page=4,dense=0", "tidal-decode:budget=5,layers=0"])
def test_methods_that_read_pages(method: str) -> None:
    model = compiled("LlamaConfig", (method,), num_hidden_layers=2)
    gpu, _ = on_gpu(model)
    ids = torch.randint(0, 40, (2, 23), generator=torch.Generator().manual_seed(1))
    options: dict[str, Any] = dict(max_new_tokens=6, eos_token_id=[])
    assert gpu.generate(ids, **options).tolist() == model.generate(ids, **options).tolist()
