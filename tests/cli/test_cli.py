"""The command line: every verb, what it prints, and its exit status."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import elision
from elision.cli import main
from elision.ir.program import Program

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


def test_an_interrupted_compile_leaves_no_file(folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupt(handle: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("elision.runtime.archive.os.fsync", interrupt)  # the last thing before the file gets its name
    code, out, _ = run("compile", folder, "-o", tmp_path / "x.elision")
    assert code == 130 and out == "" and list(tmp_path.iterdir()) == []


def test_what_an_artefact_has_settled_is_refused_not_ignored(artefact: Path, run: Run, tmp_path: Path) -> None:
    options = {"--dtype": "bf16", "--kv-dtype": "bf16", "--max-context": 64, "--max-batch": 2, "--target": "cpu"}
    for option, value in options.items():
        code, _, err = run("compile", artefact, "-o", tmp_path / "x.elision", option, value)
        assert code == 2 and f"where {option} cannot be changed" in err
    assert run("compile", artefact, "-o", tmp_path / "x.elision", "-p", "skip-layers:layers=2")[0] == 0
    assert "'2.mlp'" not in run("show", tmp_path / "x.elision")[1]


def test_damaged_artefacts_are_refused(artefact: Path, run: Run, tmp_path: Path) -> None:
    whole, bad = artefact.read_bytes(), tmp_path / "bad.elision"
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for damaged, says in ((whole[:-1000], "cut short"), (bytes(flipped), "SHA-256")):
        bad.write_bytes(damaged)
        for verb in (["run", bad, "x"], ["show", bad], ["check", bad, "-p", "skip-layers:layers=0"], ["bench", bad]):
            code, out, err = run(*verb)
            assert code == 2 and out == "" and err.startswith("error: ") and says in err and len(err.splitlines()) == 1


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


def test_errors_of_a_process_are_one_sentence_without_a_traceback(tmp_path: Path) -> None:
    code = "from elision.cli import main; main()"
    args = ["run", str(tmp_path / "none.elision"), "x"]
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1 and "cannot be read" in done.stderr


def test_text_is_printed_as_it_comes_and_ctrl_c_ends_cleanly(artefact: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from elision.runtime import generate

    whole = run("run", artefact, "hello", "--max-new-tokens", 12)[1]
    rounds, step = iter(range(4)), generate.Session.round

    def interrupted(*args: object) -> object:
        if next(rounds) == 3:
            raise KeyboardInterrupt
        return step(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(generate.Session, "round", interrupted)
    code, out, err = run("run", artefact, "hello", "--max-new-tokens", 12)
    assert code == 130 and out.strip("\n") and whole.startswith(out.rstrip("\n")) and out != whole and err == ""


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
    assert {w.split(":")[0] for w in words if w and "B/token" in w} == {"kv_0", "kv_2"}
    assert "skip-layers:layers=1; 256 bytes of cache" in " ".join(w for w in words if w)


def test_show_counts_the_context_that_is_asked_for(artefact: Path, run: Run) -> None:
    floors = []
    for context in (16, 128):
        code, table, _ = run("show", artefact, "--cost", "--context", context, "--bandwidth", 0.001, "--flops", 1e6)
        assert code == 0 and f"step: 1 token, context {context}" in table
        floors.append(float(table[table.index("step: 1 token") :].split("floor ")[1].split(" ms")[0]))
    # Two layers with keys and values of two heads of eight fp32 numbers, at 1 MB/s.
    assert floors[1] - floors[0] == pytest.approx((128 - 16) * 2 * 2 * 2 * 8 * 4 / 1e3, abs=0.02)


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


def test_check_says_what_makes_it_legal_and_what_would(artefact: Path, run: Run) -> None:
    """What passes do so that they compose, the order, and a longer clock where one rolls back too far."""
    code, out, _ = run("check", artefact, "-p", "token-recycling", "-p", "h2o:budget=24,recent=8")
    assert code == 0
    assert "order: h2o:budget=24,recent=8, then token-recycling" in out
    assert "h2o: runs when a sequence has a multiple of 16 tokens, which no round of drafts crosses (rule retract)" in out
    assert "h2o: entries say their own positions, since some are dropped or absent (rule address): kv_0" in out
    code, out, _ = run("check", artefact, "-p", "int8")
    assert code == 0 and len(out.splitlines()) == 1, "nothing had to be done"
    code, _, err = run("check", artefact, "-p", "h2o:budget=24,recent=8,every=1", "-p", "token-recycling")
    assert code == 1 and err.count("error[retract]") >= 1
    assert "legal with h2o:budget=24,recent=8 in the place of h2o:budget=24,recent=8,every=1" in err


def test_check_prints_every_violation(artefact: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from elision.ir.states import KV, Int
    from elision.passes.layers.skip_layers import SkipLayers

    def apply(self: SkipLayers, program: Program) -> None:
        """Claim caches of integers that nobody writes."""
        for name, type in program.states.items():
            assert isinstance(type, KV)
            program.states[name] = type.with_segment(0, replace(type.segments[0], k=Int(8, group=8)))

    monkeypatch.setattr(SkipLayers, "apply", apply)
    code, out, err = run("check", artefact, "-p", "skip-layers:layers=0")
    found = err.strip().split("\n\n")
    assert code == 1 and out == "" and len(found) > 1
    for text in found:
        lines = text.splitlines()
        assert lines[0].startswith("error[") and [line.split()[0] for line in lines[1:]] == ["written", "because", "help"]
        assert "skip-layers:layers=0; " in lines[1]


def test_bench_prints_json(folder: Path, run: Run) -> None:
    code, out, _ = run("bench", folder, "--against", "transformers", "--new-tokens", 4, "--runs", 2, "--json")
    found = json.loads(out)
    assert code == 0 and set(found["engines"]) == {"elision", "transformers"}
    assert all(row["tokens_per_second"] > 0 and row["state_bytes"] > 0 for row in found["engines"].values())
    assert found["floor_tokens_per_second"] > found["engines"]["elision"]["tokens_per_second"] > 0
    assert found["peak_memory_bytes"] > 1e7 and found["threads"] == torch.get_num_threads()


def test_bench_compares_only_what_it_can(artefact: Path, run: Run) -> None:
    code, out, err = run("bench", artefact, "--against", "transformers")
    assert code == 2 and out == "" and "needs the model that" in err
    code, out, err = run("bench", artefact, "--new-tokens", 100)
    assert code == 2 and out == "" and "at most 128 together" in err
    code, out, _ = run("bench", artefact, "--new-tokens", 2, "--runs", 1)
    assert code == 0 and "floor: " in out and "peak memory of the process" in out


def test_the_report_adds_up(artefact: Path) -> None:
    report = elision.load(artefact).report
    assert report["passes"] == ["insert-cache", "skip-layers:layers=1"] and report["quality"] == "approximate"
    assert report["layers"] == [0, 2]
    assert report["state_bytes_per_token"] >= 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, channels, bytes
    assert report["state_bytes"] >= 128 * 256
    attention, mlp, norms = 32 * (32 + 16 + 16 + 32), 3 * 32 * 48, 2 * 32
    embedding, frequencies = 256 * 32, 8 // 2
    assert report["weight_bytes"] == 4 * (2 * (attention + mlp + norms) + 2 * embedding + 32 + frequencies)
    read = report["step"]["weight_bytes"] / 4 - 2 * (attention + mlp + norms) - embedding - 32
    assert read - 32 == 2 * 2 * frequencies  # one row is embedded; queries and keys of two layers are rotated
    json.dumps(report)


def test_compile_calibrates_on_a_file_or_by_default(folder: Path, run: Run, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("The harbour was quiet in the early morning. " * 9, encoding="utf-8")
    compile = ["compile", folder, "-o", tmp_path / "m.elision", "-p", "gptq:group=16,tokens=128"]
    sizes = []
    for more in ([], ["--calibration", tmp_path / "text"]):
        code, out, err = run(*compile, *more)
        assert code == 0 and "passes insert-cache, gptq:group=16,tokens=128" in out and "calibrating gptq" in err
        sizes.append((tmp_path / "m.elision").read_bytes())
    assert sizes[0] != sizes[1]
    code, _, err = run(*compile, "--calibration", tmp_path / "none")
    assert code == 2 and "none could not be read as text in UTF-8: No such file" in err
    code, _, err = run(*compile[:4], "--calibration", tmp_path / "text")
    assert code == 2 and "no pass calibrates; those that do are" in err and "gptq" in err


def test_passes(run: Run) -> None:
    assert "skip-layers" in run("passes")[1]
    assert "skip-layers" in run("passes", "layers")[1]
    code, _, err = run("passes", "nonsense")
    assert code == 2 and "the families are core, " in err


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["run", "{tiny}", "x", "-p", "skip-layer:layers=1"], "did you mean 'skip-layers'"),
        (["run", "{tiny}", "x", "-p", "skip-layers:layer=1"], "did you mean 'layers'"),
        (["run", "{tiny}", "x", "-p", "skip-layers:layers=7"], "there is no layer 7; the layers of tiny are 0 to 2"),
        (["run", "{tiny}", "x", "-p", "skip-layers:layers=1,half=top"], "expected attn or mlp"),
        (["run", "{art}", ""], "the prompt is empty"),
        (["run", "{art}", "x" * 200], "the model has 128"),
        (["run", "{art}", "x", "--temperature", "-1"], "temperature=-1"),
        (["run", "/no/such/model", "x"], "does not exist"),
        (["run", "/no/such/model.elision", "x"], "cannot be read"),
        (["run", "{junk}", "x"], "not an"),
        (["compile", "{tiny}", "-o", "{out}", "--target", "tpu"], "unknown target 'tpu'"),
        (["compile", "{tiny}", "-o", "{out}", "--max-context", "4096"], "has 128 positions"),
        (["compile", "{tiny}", "-o", "{out}", "--dtype", "int3"], "unknown dtype"),
        (["bench", "{tiny}", "--against", "nobody"], "expected transformers"),
        (["bench", "{art}", "--runs", "0"], "expected at least 1"),
        (["show", "{art}", "--svg", "{out}/x.svg"], "x.svg could not be written"),
        (["show", "{art}", "--cost", "--bandwidth", "0"], "expected numbers above 0"),
        (["show", "{art}", "--cost", "--context", "129"], "expected 1 to 128"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(
    args: list[str], says: str, folder: Path, artefact: Path, run: Run, tmp_path: Path
) -> None:
    junk = tmp_path / "junk.elision"
    junk.write_bytes(b"not an artefact")
    code, _, err = run(*(a.format(tiny=folder, art=artefact, junk=junk, out=tmp_path / "out.elision") for a in args))
    assert code == 2
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: ") and says in last and "Traceback" not in err
