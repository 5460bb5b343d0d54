"""A compiled model where transformers expects one of its own."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
import transformers

import elision

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Any:
    found = transformers.AutoTokenizer.from_pretrained(tiny)
    found.pad_token_id = 0
    return found


@pytest.fixture(scope="module")
def theirs(tiny: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(tiny)


@pytest.fixture(scope="module")
def ours(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> elision.Model:
    path = tmp_path_factory.mktemp("artefact") / "tiny.elision"
    elision.compile(tiny).save(path)
    return elision.load(path)


def test_a_pipeline_gives_the_texts_of_transformers(
    ours: elision.Model, theirs: Any, tokenizer: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    given = ["hello", "a longer text", [{"role": "user", "content": "hi"}]]
    found, want = (transformers.pipeline("text-generation", model=m, tokenizer=tokenizer) for m in (ours, theirs))
    for prompt in given:
        assert found(prompt, max_new_tokens=8, do_sample=False) == want(prompt, max_new_tokens=8, do_sample=False)
    pair: Any = {"batch_size": 2, "max_new_tokens": 5, "do_sample": False}
    assert found(given[:2], **pair) == want(given[:2], **pair)
    sampled = found("hello", max_new_tokens=20, num_return_sequences=2, temperature=5.0)  # pipelines sample by themselves
    assert len(sampled) == 2 and sampled[0] != sampled[1]
    assert "not supported" not in caplog.text and "CompiledModel" in repr(found)


def test_a_streamer_in_another_thread(ours: elision.Model, tokenizer: Any) -> None:
    ids = tokenizer("hello", return_tensors="pt")
    streamer = transformers.TextIteratorStreamer(tokenizer, skip_prompt=True)
    thread = Thread(target=ours.generate, kwargs={**ids, "streamer": streamer, "max_new_tokens": 8})
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == tokenizer.decode(ours.generate(**ids, max_new_tokens=8)[0, 5:])


def test_a_generation_config_counts_and_arguments_win(ours: elision.Model, theirs: Any, tokenizer: Any) -> None:
    ids = tokenizer(["hello", "a longer text"], return_tensors="pt", padding=True, padding_side="left")
    config = transformers.GenerationConfig(max_length=20, temperature=9.0, repetition_penalty=1.2, pad_token_id=0)
    want = theirs.generate(**ids, generation_config=config)
    assert torch.equal(ours.generate(**ids, generation_config=config), want)  # greedy: a temperature alone does not ask
    assert ours.generate(**ids, generation_config=config, max_new_tokens=3).shape[1] == ids["input_ids"].shape[1] + 3
    config = transformers.GenerationConfig(max_new_tokens=12, do_sample=True, temperature=9.0, top_k=200)
    rows = [ours.generate(**ids, generation_config=config, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], rows[2])


def test_what_is_written_to_the_generation_config_counts(ours: elision.Model, theirs: Any, tokenizer: Any) -> None:
    model: Any = type(ours).of(ours)  # type: ignore[attr-defined]
    model.__dict__.pop("generation_config", None)  # others may have asked for it
    ids = tokenizer(["hello"], return_tensors="pt")
    before = model.generate(**ids)
    config = model.generation_config
    assert torch.equal(model.generate(**ids), before)
    config.max_new_tokens, config.repetition_penalty = 7, 1.5
    want = theirs.generate(**ids, max_new_tokens=7, repetition_penalty=1.5)
    assert torch.equal(model.generate(**ids), want) and model.generate(**ids, max_new_tokens=3).shape[1] == want.shape[1] - 4
    config.eos_token_id = int(want[0, -6])
    assert len(model.generate(**ids)[0]) < len(want[0])
    config.num_beams = 3
    with pytest.raises(elision.BadInput, match="does not support num_beams=3"):
        model.generate(**ids)
    assert torch.equal(ours.generate(**ids), before)


def test_rows_that_end_are_filled_with_the_pad_token_asked_for(ours: elision.Model, tokenizer: Any) -> None:
    ids = tokenizer(["hello", "another text"], return_tensors="pt", padding=True, padding_side="left")
    plain = ours.generate(**ids, max_new_tokens=6)
    new = plain[:, -6:].tolist()
    end = next(t for t in new[0] if t not in new[1])
    at = new[0].index(end)
    found = ours.generate(**ids, max_new_tokens=6, eos_token_id=end, pad_token_id=77)[:, -6:].tolist()
    assert found == [new[0][: at + 1] + [77] * (5 - at), new[1]]


@pytest.mark.parametrize(
    "given",
    [
        {"num_beams": 4},
        {"logits_processor": [print]},
        {"cache_implementation": "static"},
        {"return_dict_in_generate": True},
        {"no_such_argument": 1},
        {"generation_config": transformers.GenerationConfig(num_beams=3)},
    ],
)
def test_what_is_not_supported_is_named(ours: elision.Model, given: dict[str, Any]) -> None:
    name = "num_beams" if "generation_config" in given else next(iter(given))
    with pytest.raises(elision.BadInput, match=f"does not support {name}="):
        ours.generate(torch.tensor([[5, 6]]), max_new_tokens=2, **given)


def test_what_asks_for_nothing_is_taken(ours: elision.Model) -> None:
    ids = torch.tensor([[5, 6]])
    assert torch.equal(ours.generate(ids, max_new_tokens=2, num_beams=1, use_cache=True), ours.generate(ids, max_new_tokens=2))


def test_the_length_of_a_text_cannot_be_counted_in_all(ours: elision.Model) -> None:
    with pytest.raises(elision.BadInput, match="max_length=9 counts the prompt's tokens too: with texts, give max_new_tokens"):
        ours.generate("hello", max_length=9)


def test_another_device_is_refused(ours: elision.Model) -> None:
    assert ours.to("cpu") is ours and str(ours.device) == "cpu" and ours.dtype == torch.float32
    with pytest.raises(elision.BadInput, match="compiled for the CPU"):
        ours.to("cuda")


def test_an_artefact_runs_without_transformers(ours: elision.Model, tmp_path: Path) -> None:
    path = tmp_path / "m.elision"
    ours.save(path)
    code = f"""
import sys, elision
print(len(elision.load({str(path)!r}).generate("hello", max_new_tokens=3, temperature=0)) > 0)
print(any(n.partition(".")[0] == "transformers" for n in sys.modules))
"""
    env = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=200)
    assert done.stdout.split() == ["True", "False"], done.stderr
