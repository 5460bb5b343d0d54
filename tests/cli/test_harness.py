"""lm-evaluation-harness runs a compiled model (`make nightly`, with the extra ``eval``)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import elision

ROOT = Path(__file__).parents[2]
DOCS = [
    {"question": f"What is {a} and {b}?", "choices": [str(a + b), str(a * b), "a lot"], "label": a % 2, "text": f"{a} {b} " * 9}
    for a, b in ((2, 3), (4, 5), (7, 8), (9, 9), (1, 6))
]
TASKS = {
    "choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: label
metric_list: [{metric: acc}]
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
""",
    "written": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["?"], max_gen_toks: 6}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "docs.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    for name, text in TASKS.items():
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
        (folder / f"{name}.yaml").write_text(head + text)
    return folder


def evaluated(tasks: Path, kind: str, names: list[str], **args: Any) -> dict[str, Any]:
    import lm_eval
    from lm_eval.tasks import TaskManager

    import elision.harness  # noqa: F401  (registers the model)

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    return lm_eval.simple_evaluate(kind, model_args=args, tasks=names, task_manager=manager, bootstrap_iters=0)


def answers(found: dict[str, Any], name: str) -> list[Any]:
    return [sample["filtered_resps"] for sample in found["samples"][name]]


@pytest.mark.nightly
def test_scores_are_those_of_transformers(tiny: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    names = ["choice", "rolling"]
    eos: Any = 10  # random weights have no end of text; both begin texts without a context with it
    model = elision.compile(tiny, max_batch=4)
    model.defaults["eos_token_id"] = eos
    found = evaluated(tasks, "elision", names, model=model, batch_size=3)
    peer: Any = {"pretrained": str(tiny), "device": "cpu", "max_length": 1024, "prefix_token_id": eos, "dtype": "float32"}
    want = evaluated(tasks, "hf", names, **peer)
    assert found["results"]["choice"]["acc,none"] == want["results"]["choice"]["acc,none"]
    bits = [x["results"]["rolling"]["bits_per_byte,none"] for x in (found, want)]
    assert bits[0] == pytest.approx(bits[1], rel=1e-5)
    for ours, theirs in zip(answers(found, "choice"), answers(want, "choice"), strict=True):
        assert [score for score, _ in ours] == pytest.approx([score for score, _ in theirs], rel=1e-4)
        assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


@pytest.mark.nightly
def test_caches_count_and_texts_are_those_of_generate(tiny: Path, tasks: Path) -> None:
    names = ["choice", "written"]
    model = elision.compile(tiny, passes=["streaming-llm:window=4,sinks=1"])
    model.defaults["eos_token_id"] = 10
    found, plain = (evaluated(tasks, "elision", names, model=m) for m in (model, elision.compile(tiny)))
    assert answers(found, "choice") != answers(plain, "choice")
    for doc, (text,) in zip(DOCS, answers(found, "written"), strict=True):
        assert text == model.generate(doc["question"], max_new_tokens=6, stop="?", do_sample=False)


@pytest.mark.nightly
def test_the_command_line_knows_the_model(tiny: Path, tasks: Path, tmp_path: Path) -> None:
    args = json.dumps({"model": str(tiny), "passes": ["skip-layers:layers=1"], "threads": 1})
    command = [sys.executable, "-m", "elision.harness", "--model", "elision", "--model_args", args, "--tasks", "choice"]
    done = subprocess.run(
        [*command, "--include_path", str(tasks), "--output_path", str(tmp_path)],
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert "|acc" in done.stdout, done.stderr[-2000:]


@pytest.mark.nightly
def test_what_cannot_be_scored_is_refused(tiny: Path) -> None:
    from elision.harness import ElisionLM

    with pytest.raises(elision.BadInput, match="speculation does not change what is generated"):
        ElisionLM(str(tiny), passes="prompt-lookup")
    with pytest.raises(elision.BadInput, match="names no end of text"):
        _ = ElisionLM(str(tiny)).eot_token_id


@pytest.mark.nightly
def test_more_new_tokens_than_the_model_has_positions(tiny: Path) -> None:
    """Contexts keep half of the positions; what is cached is known by all that a task asked for."""
    from elision.harness import ElisionLM

    model, told = ElisionLM(elision.compile(tiny, max_context=16)), []
    model.cache_hook = SimpleNamespace(add_partial=lambda *args: told.append(args))
    asked = {"until": ["?"], "max_gen_toks": 400}
    found = model.generate_until([SimpleNamespace(args=("a context of many more than sixteen tokens", dict(asked)))])
    ids = model.tok_encode("a context of many more than sixteen tokens")[-8:]
    assert found == [model.model.generate(model.text.decode(ids), max_new_tokens=8, stop="?", do_sample=False)]
    assert told == [("generate_until", ("a context of many more than sixteen tokens", asked), found[0])]
