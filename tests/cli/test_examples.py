"""Every example runs, on a tiny model with a tokenizer, and prints what it saved."""

from __future__ import annotations

import logging
import re
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from elision.backend import elision as backend
from elision.passes.base import REGISTRY

EXAMPLES = Path(__file__).parents[2] / "examples"
GUIDE = Path(__file__).parents[2] / "docs" / "write_a_pass.md"
WIDTH = 3 * 64 * 96 + 64  # parameters of an MLP of the tiny model: three projections and a norm


@pytest.fixture(autouse=True)
def same_passes() -> Iterator[None]:
    """Passes that are written here are forgotten."""
    before = dict(REGISTRY)
    yield
    REGISTRY.clear()
    REGISTRY.update(before)


@pytest.fixture(autouse=True)
def same_logging() -> Iterator[None]:
    """Who listens to the compiler in a script stops when it has ended."""
    log = logging.getLogger("elision")
    level, handlers = log.level, list(log.handlers)
    yield
    log.setLevel(level)
    log.handlers[:] = handlers


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """``run(file, *arguments)``: what the example prints."""

    def example(name: str, *args: str | Path) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
        monkeypatch.setenv("COLUMNS", "160")
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return example


def test_compile_and_run(tiny: Path, run: Callable[..., str]) -> None:
    out = run("compile_and_run.py", tiny)
    assert "24 tokens, " in out and "saved: " in out


def test_skip_layers(tiny: Path, run: Callable[..., str]) -> None:
    out = run("skip_layers.py", tiny, "--layers", "1", "--half", "mlp")
    assert f"saved: {4 * WIDTH / 1e6:.1f} of " in out and "0 of " in out


def test_skipping_a_layer_frees_its_share_of_the_state(tiny: Path, run: Callable[..., str]) -> None:
    saved, _, state = run("skip_layers.py", tiny, "--layers", "2").rpartition("weights, ")[2].partition(" of ")
    assert float(saved) * 3 == pytest.approx(float(state.split()[0]), abs=3)


def test_demo(tiny: Path, run: Callable[..., str]) -> None:
    out = run("demo.py", tiny, "-p", "skip-layers:layers=1", "-p", "int8 a8", "--tokens", "8", "--runs", "1")
    assert "tokens/s" in out and "int8" in out
    assert re.search(r"layers +│ +3 │ +3 │ +2 │ +3 │", out)
    assert next(line for line in out.splitlines() if "tokens as transformers" in line).count("all") >= 1


def test_compose(tiny: Path, run: Callable[..., str]) -> None:
    out = run("compose.py", tiny, "--layer", "1")
    assert out.count("tokens/s") == 5 and "error[validity]" in out and "help " in out
    weights = [float(found) for found in re.findall(r"([\d.]+) MB of weights", out)]
    assert weights[4] < weights[2] < weights[1] < weights[0]


def test_torch_compile_backend(run: Callable[..., str]) -> None:
    if "elision" not in torch._dynamo.list_backends():  # its entry point is there where elision is installed
        torch._dynamo.register_backend(backend, name="elision")
    out = run("torch_compile_backend.py")
    torch._dynamo.reset()
    apart = [float(found) for found in re.findall(r"largest difference (\S+)", out)]
    assert len(apart) == 2 and max(apart) < 1e-4 and out.count("operators: native") == 2


def test_write_a_pass(tiny: Path, run: Callable[..., str]) -> None:
    out = run("write_a_pass.py", tiny, "--every", "2")
    weights = [float(found) for found in re.findall(r"([\d.]+) MB of weights", out)]
    assert weights == sorted(weights, reverse=True) and weights[0] - weights[1] == pytest.approx(4 * WIDTH / 1e6, abs=0.011)


def test_the_guide_to_writing_a_pass(tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first block is the example's code; all blocks run, one after another."""
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    given, _, pass_ = blocks[0].partition("\n\n\n")
    example = (EXAMPLES / "write_a_pass.py").read_text()
    assert given in example and pass_ in example and len(pass_.splitlines()) <= 30
    module = ModuleType("guide")
    monkeypatch.setitem(sys.modules, "guide", module)  # where dataclasses look for it
    exec(compile("\n".join(blocks).replace('"smollm2"', repr(str(tiny))), str(GUIDE), "exec"), module.__dict__)
    said = capsys.readouterr().out
    assert said[said.index("error[") :].strip() in GUIDE.read_text().replace("\n    ", "\n")


def test_encoder_pruning(run: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    out = run("encoder_pruning.py", "--passes", "tome:share=0.1,metric=heads")
    moved = [float(found) for found in re.findall(r"move by (\S+)", out)]
    assert len(moved) == 2 and moved[0] == 0 < moved[1] < 0.3


def test_aot_for_gpu(tiny: Path, run: Callable[..., str], tmp_path: Path) -> None:
    out = run("aot_for_gpu.py", tiny, "--target", "cuda:sm_90", "--output", tmp_path / "gpu.elision")
    assert re.search(r"cuda:sm_90: \d+ kernels, [\d.]+ MB, at most \d+ registers", out)


def test_every_example_is_run_here() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {
        "aot_for_gpu.py", "compile_and_run.py", "compose.py", "demo.py", "encoder_pruning.py", "skip_layers.py",
        "torch_compile_backend.py", "write_a_pass.py",
    }  # fmt: skip
