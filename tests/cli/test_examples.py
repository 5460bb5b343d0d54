"""Every example runs, on a tiny model with a tokenizer, and prints what it saved."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


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
    width = 3 * 64 * 96 + 64  # three projections and a norm
    assert f"saved: {4 * width / 1e6:.1f} of " in out and "0 of " in out


def test_skipping_a_layer_frees_its_share_of_the_state(tiny: Path, run: Callable[..., str]) -> None:
    saved, _, state = run("skip_layers.py", tiny, "--layers", "2").rpartition("weights, ")[2].partition(" of ")
    assert float(saved) * 3 == pytest.approx(float(state.split()[0]), abs=3)


def test_demo(tiny: Path, run: Callable[..., str]) -> None:
    out = run("demo.py", tiny, "-p", "skip-layers:layers=1", "-p", "int8 a8", "--tokens", "8", "--runs", "1")
    assert "tokens/s" in out and "int8" in out
    assert re.search(r"layers +│ +3 │ +3 │ +2 │ +3 │", out)
    assert next(line for line in out.splitlines() if "tokens as transformers" in line).count("all") >= 1


def test_every_example_is_run_here() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {"compile_and_run.py", "skip_layers.py", "demo.py"}
