"""A model of K-quants from a GGUF file, as the kernels read them: the tokens of the reference, the bytes of the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf_files import write_model

import elision
from elision.codegen.triton.compile import plan_program
from elision.codegen.triton.configs import Tile
from elision.codegen.triton.interpreted import Interpreted
from elision.ir.blocks import block_format
from elision.runtime.cuda.decode import Decoder
from elision.runtime.cuda.engine import Engine

#: Where the fp16 scale and minimum of a block are, and what makes weights of random codes about 0.1.
SCALES: dict[str, dict[int, float]] = {
    "Q4_K": {0: 0.1 / 63 / 15, 2: 0.05 / 63}, "Q5_K": {0: 0.1 / 63 / 31, 2: 0.05 / 63}, "Q6_K": {208: 0.1 / 128 / 32},
}  # fmt: skip


def formats(name: str) -> str:
    """As files are mixed: more bits where it matters."""
    if "gate.weight" in name:  # a router
        return "F32"
    return "Q6_K" if "v_proj" in name or "down_proj" in name or "lm_head" in name else "Q5_K" if "o_proj" in name else "Q4_K"


def random_blocks(data: np.ndarray[Any, Any], form: Any) -> np.ndarray[Any, Any]:
    """Rows of random codes in the place of encoded ones, which the package does not make of K-quants."""
    if form.name not in SCALES:
        return gguf.quants.quantize(data, form)  # type: ignore[no-any-return]
    block = block_format(form.name)
    rows = torch.randint(0, 256, (data.size // block.elements, block.nbytes), dtype=torch.uint8)
    for at, number in SCALES[form.name].items():
        rows[:, at : at + 2] = torch.tensor([number]).half().view(torch.uint8)
    return rows.view(*data.shape[:-1], -1).numpy()


def test_tokens_and_bytes_of_a_mixture_in_k_quants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "quantize", random_blocks)
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=48, hidden_size=256, intermediate_size=256, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        head_dim=128, num_local_experts=3, num_experts_per_tok=2, max_position_embeddings=64,
    )  # fmt: skip
    write_model(tmp_path / "m.gguf", "llama", transformers.MixtralForCausalLM(config), formats=formats)
    model = elision.compile(tmp_path / "m.gguf", passes=["stored"], target="reference", dtype="float32", max_context=32)
    encodings = {str(t.encoding) for t in model.program.params.values()}
    assert encodings >= {"Q4_K", "Q5_K", "Q6_K"}
    for rules in ("moe_rules", "dense_rules"):  # fewer and larger programs, of which the interpreter takes one after the other
        monkeypatch.setattr(f"elision.codegen.triton.{rules}.gemv", lambda outputs, codes: Tile(1, 128, codes))
    code = plan_program(model.program)
    device = Interpreted(code.kernels)
    engine, memory = Engine(model.program, code, model.weights, device), device._memory
    decoder, prompt = Decoder(engine, 1, 32), [3, 1, 4]
    logits = decoder.prefill([prompt])[0]
    assert torch.allclose(logits, model(torch.tensor([prompt]))["logits"][0, -1], rtol=1e-3, atol=1e-3)
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=3, eos_token_id=[])[0, len(prompt) :]
    assert decoder.decode(3)[0].tolist() == expected.tolist()
    assert {n for n, plane in engine._addresses if plane < 0} == set()  # nothing was decoded when it was loaded
    used = {n for n, _ in engine._addresses}
    assert used >= {n for n, type in model.program.params.items() if type.encoding is not None}
    in_file = sum(model.weights[n].numel() * model.weights[n].element_size() for n in used)
    assert 0 <= len(memory[engine._arena]) - in_file <= 1024 * len(used)  # alignment
