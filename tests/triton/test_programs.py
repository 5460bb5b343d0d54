"""Whole programs as launches, under Triton's interpreter, against the reference interpreter of the IR."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import tiny

import elision
from elision.codegen.triton.compile import plan_program
from elision.codegen.triton.interpreted import Interpreted
from elision.errors import BadInput
from elision.ir.tree import Tree
from elision.runtime.cuda.decode import Decoder
from elision.runtime.cuda.engine import Engine
from elision.runtime.model import Model


def engine(model: Model) -> Engine:
    code = plan_program(model.program)
    return Engine(model.program, code, model.weights, Interpreted(code.kernels))


def compiled(family: str, passes: tuple[str, ...] = (), dtype: str = "float32", **changes: Any) -> Model:
    small = dict(
        num_hidden_layers=1, vocab_size=40, hidden_size=32, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1
    )  # fmt: skip
    model = tiny(family, **{**small, **changes})
    return elision.compile(model, passes=passes, target="reference", dtype=dtype, max_context=48)


PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [27, 18, 28]]

CASES = [
    ("LlamaConfig", (), "float32", {"num_hidden_layers": 2}),
    ("LlamaConfig", (), "bfloat16", {}),
    ("LlamaConfig", ("int4:group=32",), "float32", {}),
    ("LlamaConfig", ("int8", "insert-cache:dtype=int8"), "float32", {}),
    ("Qwen3Config", (), "float32", {"head_dim": 16}),
    ("MixtralConfig", (), "float32", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    ("GPT2Config", (), "float32", {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}),
]


@pytest.mark.parametrize("family,passes,dtype,changes", CASES, ids=lambda x: str(x) if x else "")
def test_prompts_then_decoding(family: str, passes: tuple[str, ...], dtype: str, changes: dict[str, Any]) -> None:
    model = compiled(family, passes, dtype, **changes)
    decoder = Decoder(engine(model), 2, 48)
    logits = decoder.prefill(PROMPTS)
    for prompt, found in zip(PROMPTS, logits, strict=True):
        expected = model(torch.tensor([prompt]))["logits"][0, -1]  # which rounds nothing to bytes
        assert "int8" in str(passes) or torch.allclose(
            found.float(), expected.float(), *([1e-3, 1e-3] if dtype == "float32" else [5e-2, 5e-2])
        )
    if dtype != "float32":
        return
    found = decoder.decode(4)
    for row, prompt in enumerate(PROMPTS):
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=4, eos_token_id=[])[0, len(prompt) :]
        assert found[row].tolist() == expected.tolist()


def test_a_sequence_alone_takes_the_kernels_for_one_token() -> None:
    model = compiled("LlamaConfig")
    made = engine(model)
    decoder = Decoder(made, 1, 48)
    decoder.prefill(PROMPTS[:1])
    found = decoder.decode(4)[0].tolist()
    expected = model.generate(torch.tensor(PROMPTS[:1]), max_new_tokens=4, eos_token_id=[])[0, len(PROMPTS[0]) :]
    assert found == expected.tolist() and isinstance(made.device, Interpreted) and made.device.launches["gemv"] > 0


def test_rounds_of_drafts_give_the_tokens_of_plain_decoding() -> None:
    """Trees with what plain decoding gives in some branch, and with wrong guesses."""
    model = compiled("LlamaConfig", ("insert-cache:dtype=int8",))
    plain = [model.generate(torch.tensor([p]), max_new_tokens=12, eos_token_id=[])[0, len(p) :].tolist() for p in PROMPTS]
    decoder = Decoder(engine(model), 2, 48)
    decoder.prefill(PROMPTS)
    found = [[int(t)] for t in decoder.last]
    trees = [Tree((-1, 0, 0, 1, 2, 4)), Tree((-1, 0))]
    accepted = 0
    for _ in range(3):
        ids = []
        for row, tree in enumerate(trees):
            right = plain[row][len(found[row]) - 1 :]
            ids.append(
                [right[0], 39 - right[1], right[1], right[2], right[2], 39 - right[3]] if row == 0 else [right[0], 39 - right[1]]
            )
            assert len(ids[-1]) == len(tree.parent)
        for row, tokens in enumerate(decoder.verify(trees, ids)):
            accepted += len(tokens) - 1
            found[row] += tokens
    assert accepted == 6 and all(f == p[: len(f)] for f, p in zip(found, plain, strict=True))
    assert decoder.caches["kv_0"].read("len_k")[0, :, 0].tolist() == [
        len(p) + len(f) - 1 for p, f in zip(PROMPTS, found, strict=True)
    ]


def test_what_has_no_kernel_is_refused_by_name() -> None:
    model = compiled("LlamaConfig", ("gear:block=16,rank=1",))
    with pytest.raises(BadInput, match="append.*has no kernel.*older entries stored as Repaired"):
        engine(model)


def test_launches_of_long_prompts() -> None:
    """CUDA takes any number of programs along the first axis of a grid, and 65535 along the others."""
    made, n = engine(compiled("MixtralConfig", num_local_experts=4, num_experts_per_tok=2)), 1 << 16
    call: Any = SimpleNamespace(counts=defaultdict(lambda: n), longest=defaultdict(lambda: n), rows=1)
    for entry in ("score", "prefill"):
        for row in made.code.schedules[entry]["many"].rows:
            if row.host < 0:
                sizes = [made._programs(part, call, {}) for part in row.operands[0][1]]
                assert max(sizes[1:], default=1) <= 65535, (row.kernel, sizes)
