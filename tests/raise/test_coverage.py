"""The coverage report of a model of which something stays opaque: compiled, saved and shown without transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import decoder
from right import VARIED, assert_right, assert_same_tokens
from torch import nn

import elision


class Summed(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cumsum(x, -1).tanh()


@pytest.fixture(scope="module")
def original() -> nn.Module:
    """A Llama whose activation is an operator without a rule; it looks at one token at a time."""
    model = decoder("llama", num_hidden_layers=2)
    for layer in model.model.layers:
        layer.mlp.act_fn = Summed()
    return model


@pytest.fixture(scope="module")
def compiled(original: nn.Module) -> elision.Model:
    return elision.compile(original)


def test_an_opaque_activation_runs_through_the_cache(original: nn.Module, compiled: elision.Model) -> None:
    assert_right(original, compiled)
    assert assert_same_tokens(original, compiled) >= VARIED


def test_the_report_of_an_opaque_activation(compiled: elision.Model) -> None:
    found = compiled.coverage
    assert found["opaque"] == {"cumsum": 2} and found["left"]["step"] == {"cumsum": 2}
    assert found["entries"] == {"score": 2, "prefill": 2, "step": 2}
    assert all(0.99 < share < 1 for share in found["flops"].values())


def test_it_is_kept_and_shown_without_transformers(compiled: elision.Model, tmp_path: Path) -> None:
    path = tmp_path / "x.elision"
    compiled.save(path)
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import json, elision\n"
        f"print(json.dumps(elision.load({str(path)!r}).coverage))\n"
        "from elision.cli import main\n"
        f"main(['show', {str(path)!r}, '--coverage', '--after', 'skip-layers:layers=1'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    kept, shown = done.stdout.split("\n", 1)
    assert json.loads(kept) == compiled.coverage
    assert done.returncode == 0 and "aten cumsum" in shown and "2 opaque" in shown, done.stderr
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines()]
    step = next(r for r in rows if r and r[0] == "step")
    assert step[1] == "1" and step[3] == "cumsum (1)", "the layer that is left out takes its opaque operator with it"
    assert any(r and r[0] == "any that selects tokens" for r in rows)
