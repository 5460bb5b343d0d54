"""torch.compile(model, backend="elision"): what is raised equals eager, all else runs as it was captured, and both are told."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from compiled import close, decoder, graphs, ids, twice
from encoders import encoder, images, texts
from torch import nn

import elision
from elision.backend import elision as backend
from elision.backend import report
from elision.errors import BadInput

ROOT = Path(__file__).parents[2]


def test_an_encoder_runs_whole_for_every_shape() -> None:
    model = encoder("BertModel")
    compiled = torch.compile(model, backend=backend)
    for rows, length in ((1, 11), (1, 7), (3, 9), (2, 12), (4, 21)):
        batch = texts(rows, length)
        keep = batch["attention_mask"].bool()
        with torch.no_grad():
            want = model(**batch)
        found = twice(compiled, **batch)
        assert type(found) is type(want)
        assert close(found[0][keep], want[0][keep]) and close(found[1], want[1])
    # One row of one length, one row, rows of any length: Dynamo asks once for each.
    assert [(g.runs, g.reason, dict(g.fallen)) for g in graphs()] == [("native", "", {})] * 3
    assert all("padding" in g.notes[0] for g in graphs())


def test_an_image_model_runs_whole() -> None:
    model = encoder("ViTForImageClassification")
    compiled = torch.compile(model, backend=backend)
    for rows in (1, 3, 4):
        with torch.no_grad():
            want = model(pixel_values=images(rows)).logits
        assert close(twice(compiled, images(rows)).logits, want)
    assert {g.runs for g in graphs()} == {"native"}


def test_what_a_native_program_leaves_to_the_interpreter_is_told() -> None:
    """Heads of 12 channels have no native attention."""
    model = encoder("ViTModel", hidden_size=48)
    with torch.no_grad():
        want = model(images(2)).last_hidden_state
    assert close(twice(torch.compile(model, backend=backend), images(2)).last_hidden_state, want)
    assert graphs()[0].runs == "native" and "attend on the interpreter: values of 12 channels" in graphs()[0].notes


def test_a_decoder_gives_its_logits_with_padding_on_the_left_too() -> None:
    model = decoder()
    compiled = torch.compile(model, backend=backend)
    given, mask = ids(2, 11), torch.ones(2, 11, dtype=torch.long)
    mask[1, :4] = 0
    with torch.no_grad():
        whole, padded = model(given).logits, model(given, attention_mask=mask).logits
    assert close(twice(compiled, given, use_cache=False).logits, whole)
    assert close(twice(compiled, given, attention_mask=mask, use_cache=False).logits[mask.bool()], padded[mask.bool()])
    assert [g.runs for g in graphs()] == ["native"] * 2 and graphs()[0].coverage["opaque"] == {}


def test_passes_are_applied() -> None:
    model, given = decoder(), ids(2, 11)
    options: Any = {"passes": ["skip-layers:layers=1", "int8"], "target": "reference"}
    found = twice(torch.compile(model, backend=backend, options=options), given, use_cache=False).logits
    want = elision.compile(model, passes=options["passes"], target="reference")(given).logits
    with torch.no_grad():
        assert close(found, want) and not close(found, model(given).logits)
    assert graphs()[0].runs == "interpreter"


@pytest.mark.parametrize("text", ["h2o:budget=100", "prompt-lookup", "insert-cache", "fastv:layer=1"])
def test_passes_of_generation_are_refused_with_the_way_to_them(text: str) -> None:
    compiled = torch.compile(decoder(), backend=backend, options={"passes": [text]})
    with torch.no_grad(), pytest.raises(BadInput, match=rf"{text}.*forward only.*elision\.compile\(model, passes=\['{text}"):
        compiled(ids(1, 9), use_cache=False)


def test_passes_that_fit_nothing_give_their_own_reason() -> None:
    compiled = torch.compile(decoder(), backend=backend, options={"passes": ["skip-layers:layers=7"]})
    with torch.no_grad(), pytest.raises(BadInput, match="skip-layers") as caught:
        compiled(ids(1, 9), use_cache=False)
    assert "elision.compile" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"options": {"pases": []}}, "'pases'; the options are passes, target"),
        ({"options": {"target": "gpu"}}, "unknown target 'gpu'"),
        ({"options": {"fallback": "none"}}, "expected eager or inductor"),
        ({"options": {"passes": ["tomme"]}}, "did you mean 'tome'"),
        ({"mode": "max-autotune"}, "mode='max-autotune' is one of Inductor's"),
    ],
)
def test_wrong_options_are_named(given: dict[str, Any], said: str) -> None:
    with torch.no_grad(), pytest.raises(Exception, match=said):
        torch.compile(decoder(), backend=backend, **given)(ids(1, 9), use_cache=False)


def test_training_and_gradients_run_eagerly_with_a_warning() -> None:
    model, given = decoder(), ids(2, 9)
    want = torch.autograd.grad(model(given, use_cache=False).logits.sum(), model.lm_head.weight)[0]
    compiled = torch.compile(model, backend=backend)
    with pytest.warns(UserWarning, match="gradients are asked for"):
        logits = compiled(given, use_cache=False).logits
    assert torch.equal(torch.autograd.grad(logits.sum(), model.lm_head.weight)[0], want)
    model.train()
    with torch.no_grad(), pytest.warns(UserWarning, match="training mode"):
        compiled(given, use_cache=False)
    assert [g.runs for g in graphs()] == ["eager"] * 2


def test_what_the_program_does_not_give_runs_as_captured() -> None:
    model, given = decoder(), ids(2, 9)
    compiled = torch.compile(model, backend=backend)
    found = twice(compiled, given)  # with the cache that it returns
    with torch.no_grad():
        want = model(given)
    assert torch.equal(found.logits, want.logits) and found.past_key_values.get_seq_length() == 9
    assert graphs()[0].runs == "eager" and "use_cache=False" in graphs()[0].reason


class Broken(nn.Module):
    """Its graph breaks behind the encoder, which Dynamo compiles on its own."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = encoder("BertModel")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return self.encoder(x).pooler_output.sum(-1)


def test_graph_breaks_are_counted_and_what_is_between_them_runs() -> None:
    model, given = Broken().eval(), ids(2, 9)
    with torch.no_grad():
        want = model(given)
    assert close(twice(torch.compile(model, backend=backend), given), want)
    assert sum(report()["graph_breaks"].values()) == 1


def test_graphs_without_a_module_run_through_inductor_if_asked() -> None:
    compiled = torch.compile(lambda x: x.sin() + 1, backend=backend, options={"fallback": "inductor"})
    x = torch.arange(3.0)
    assert close(compiled(x), x.sin() + 1)
    assert graphs()[0].runs == "inductor" and "0 modules" in graphs()[0].reason and graphs()[0].calls == 1


def test_the_entry_point_is_found_without_importing_elision(tmp_path: Path) -> None:
    """As where the package is installed: by its metadata alone."""
    info = tmp_path / "elision-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: elision\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text("[torch_dynamo_backends]\nelision = elision.backend:elision\n")
    code = """
import sys, torch
assert "elision" in torch._dynamo.list_backends() and not any(n.partition(".")[0] == "elision" for n in sys.modules)
print(float(torch.compile(lambda x: x + 1, backend="elision")(torch.ones(2)).sum()))
print("elision.backend" in sys.modules)
"""
    env = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=200)
    assert done.stdout.split() == ["4.0", "True"], done.stderr
