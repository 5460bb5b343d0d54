"""The command line: every verb, what it prints, and its exit status."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from elision.cli import main

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a byte tokenizer and a chat template, as transformers saves it."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        eos_token_id=None,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core)
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}>"
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def artefact(folder: Path) -> Path:
    path = folder.parent / "tiny.elision"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["elision"])
        with pytest.raises(SystemExit) as end:
            main(["compile", str(folder), "-p", "skip-layers:layers=1", "-o", str(path)])
    assert end.value.code in (0, None)
    return path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*args: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main([str(a) for a in args])
        out, err = capsys.readouterr()
        return int(end.value.code or 0), out, err

    return call


def test_compile_says_what_it_wrote_and_leaves_nothing_else(folder: Path, artefact: Path, run: Run) -> None:
    assert artefact.stat().st_size > 1000
    code, out, err = run("compile", folder, "-o", artefact.with_name("full.elision"), "--kv-dtype", "bf16")
    assert code == 0 and "3 layers, quality exact" in out and "templates verified" in err
    assert {p.name for p in artefact.parent.iterdir()} == {"tiny", "tiny.elision", "full.elision"}
    code, _, err = run("compile", folder, "-o", artefact.parent / "none" / "x.elision")
    assert code == 2 and "could not be written" in err


def test_run_is_greedy_by_default_and_the_same_from_the_artefact(folder: Path, artefact: Path, run: Run) -> None:
    code, out, err = run("run", artefact, "hello", "--max-new-tokens", 6)
    assert code == 0 and "6 tokens (length)" in err
    assert run("run", folder, "hello", "-p", "skip-layers:layers=1", "--max-new-tokens", 6)[1] == out
    assert run("run", folder, "hello", "--max-new-tokens", 6)[1] != out
    chat = run("run", artefact, "hello", "--max-new-tokens", 6, "--chat")
    assert chat[0] == 0 and chat[1] != out
    sampled = [run("run", artefact, "hello", "--max-new-tokens", 6, "--temperature", 2, "--seed", s)[1] for s in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    skipped_twice = run("run", artefact, "hello", "-p", "skip-layers:layers=2", "--max-new-tokens", 6)
    assert skipped_twice[0] == 0 and skipped_twice[1] != out


def test_run_on_an_artefact_needs_no_transformers(artefact: Path) -> None:
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "from elision.cli import main\n"
        f"main(['run', {str(artefact)!r}, 'hello', '--chat', '--max-new-tokens', '4'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "4 tokens (length)" in done.stderr


def test_show(folder: Path, artefact: Path, run: Run, tmp_path: Path) -> None:
    code, text, _ = run("show", artefact)
    assert code == 0 and text.startswith("program(") and "def step(" in text and "'2.mlp'" in text and "'1.mlp'" not in text
    assert "'1.mlp'" in run("show", folder)[1]
    assert "'1.mlp'" not in run("show", folder, "--after", "skip-layers:layers=1")[1]
    code, table, _ = run("show", artefact, "--cost", "--bandwidth", 10)
    assert code == 0 and "floor" in table and "10 GB/s" in table and "attend" in table
    assert "0 opaque" in run("show", artefact, "--coverage")[1]
    picture = tmp_path / "x.svg"
    assert run("show", folder, "--after", "skip-layers:layers=1", "--svg", picture)[0] == 0
    words = {e.text for e in ET.parse(picture).iter("{http://www.w3.org/2000/svg}text")}
    assert {f"{i}.{half}" for i in range(3) for half in ("attn", "mlp")} <= words


def test_check(folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = run("check", folder, "-p", "skip-layers:layers=0+2")
    assert code == 0 and "legal" in out and "approximate" in out
    from elision.passes.layers.skip_layers import SkipLayers

    monkeypatch.setattr(SkipLayers, "quality", "exact")
    monkeypatch.setattr(SkipLayers, "apply", lambda self, program: setattr(program, "round", None) or program.states.clear())
    code, _, err = run("check", folder, "-p", "skip-layers:layers=0")
    assert code == 1
    lines = err[err.index("error[") :].splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["written", "because", "help"] and "skip-layers:layers=0" in lines[1]


def test_bench_prints_json(folder: Path, run: Run) -> None:
    code, out, _ = run("bench", folder, "--against", "transformers", "--new-tokens", 4, "--runs", 2, "--json")
    found = json.loads(out)
    assert code == 0 and set(found["engines"]) == {"elision", "transformers"}
    assert all(row["tokens_per_second"] > 0 and row["state_bytes"] > 0 for row in found["engines"].values())
    assert found["floor_tokens_per_second"] > found["engines"]["elision"]["tokens_per_second"] > 0


def test_passes(run: Run) -> None:
    assert "skip-layers" in run("passes")[1]
    assert "skip-layers" in run("passes", "layers")[1]
    code, _, err = run("passes", "nonsense")
    assert code == 2 and "the families are core, layers" in err


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["run", "{tiny}", "x", "-p", "skip-layer:layers=1"], "did you mean 'skip-layers'"),
        (["run", "{tiny}", "x", "-p", "skip-layers:layer=1"], "did you mean 'layers'"),
        (["run", "{tiny}", "x", "-p", "skip-layers:layers=7"], "there is no layer 7; the layers of tiny are 0 to 2"),
        (["run", "{tiny}", "x", "-p", "skip-layers:layers=1,half=top"], "expected attn or mlp"),
        (["run", "{tiny}", ""], "the prompt is empty"),
        (["run", "{tiny}", "x" * 200], "the model has 128"),
        (["run", "{tiny}", "x", "--temperature", "-1"], "temperature=-1"),
        (["run", "/no/such/model", "x"], "does not exist"),
        (["run", "/no/such/model.elision", "x"], "cannot be read"),
        (["run", "{junk}", "x"], "not an"),
        (["compile", "{tiny}", "-o", "/tmp/x.elision", "--target", "tpu"], "unknown target 'tpu'"),
        (["compile", "{tiny}", "-o", "/tmp/x.elision", "--max-context", "4096"], "has 128 positions"),
        (["compile", "{tiny}", "-o", "/tmp/x.elision", "--dtype", "int3"], "unknown dtype"),
        (["bench", "{tiny}", "--against", "nobody"], "expected transformers"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(args: list[str], says: str, folder: Path, run: Run, tmp_path: Path) -> None:
    junk = tmp_path / "junk.elision"
    junk.write_bytes(b"not an artefact")
    code, _, err = run(*(a.format(tiny=folder, junk=junk) for a in args))
    assert code == 2
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: ") and says in last and "Traceback" not in err
