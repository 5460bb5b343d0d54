"""torch.compile(model, backend="elision"): what is raised equals eager, all else runs as it was captured, and both are told."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from encoders import encoder, images, texts
from torch import nn

import elision
from elision.backend import elision as backend
from elision.backend import report
from elision.dynamo.report import GraphReport
from elision.errors import BadInput

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    yield
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    backend.reset()  # type: ignore[attr-defined]  # torch resets only what was compiled since its last reset


def graphs() -> list[GraphReport]:
    return report()["graphs"]


def decoder(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=99, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=64,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def ids(rows: int, length: int) -> torch.Tensor:
    return torch.randint(3, 99, (rows, length), generator=torch.Generator().manual_seed(rows * length))


def close(found: torch.Tensor, want: torch.Tensor) -> bool:
    return found.shape == want.shape and bool((found - want).abs().max() <= 1e-5 * want.abs().max())


def twice(compiled: Any, *args: Any, **kwargs: Any) -> Any:
    """The second call: the first of a graph gives what eager gives, and is what the graph is checked on."""
    with torch.no_grad():
        compiled(*args, **kwargs)
        return compiled(*args, **kwargs)


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


def test_weights_that_change_are_seen() -> None:
    model, given = decoder(), ids(2, 9)
    compiled = torch.compile(model, backend=backend)
    before = twice(compiled, given, use_cache=False).logits
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(3)
        after, want = compiled(given, use_cache=False).logits, model(given).logits
    assert close(after, want) and not close(after, before)
    assert "weights have changed" in next(iter(graphs()[0].fallen))
    torch._dynamo.reset()
    assert close(twice(compiled, given, use_cache=False).logits, want)
    assert [g.runs for g in graphs()] == ["native"]


@pytest.mark.parametrize("how", ["add", "copy"])
def test_weights_that_are_written_behind_torchs_back_are_seen(how: str) -> None:
    model, given = decoder(), ids(2, 9)
    compiled = torch.compile(model, backend=backend)
    before = twice(compiled, given, use_cache=False).logits
    weight = model.model.layers[1].self_attn.o_proj.weight
    version = weight._version
    if how == "add":
        weight.data += 1
    else:
        weight.data.copy_(weight.data * 3)
    assert weight._version == version
    with torch.no_grad():
        after, want = compiled(given, use_cache=False).logits, model(given).logits
        assert close(after, want) and not close(after, before)
        twice(compiled, ids(3, 7), use_cache=False)  # another graph does not get the program of the weights before
    assert "weights have changed" in next(iter(graphs()[0].fallen)) and graphs()[1].runs == "native"


def test_weights_of_inference_mode_are_not_compiled() -> None:
    with torch.inference_mode():
        model, given = decoder(), ids(2, 9)
        compiled = torch.compile(model, backend=backend)
        for _ in range(2):
            assert close(compiled(given, use_cache=False).logits, model(given).logits)
            model.lm_head.weight.mul_(3)
    assert "inference_mode" in graphs()[0].reason


def test_settings_that_change_are_seen() -> None:
    config: Any = {"vocab_size": 99, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = transformers.MistralForCausalLM(
        transformers.MistralConfig(**config, num_key_value_heads=1, sliding_window=None)
    ).eval()
    for p in model.parameters():
        p.data *= 3
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        for window, lengths in ((None, (9, 10)), (4, (3, 4, 12))):
            model.config.sliding_window = window
            for length in lengths:  # those within the window are the same with and without it
                found = compiled(ids(2, length), use_cache=False).logits
            assert close(found, model(ids(2, length), use_cache=False).logits)
    assert {g.runs for g in graphs()} == {"native"}


class Odd(nn.Module):
    """Its forward takes a tensor without dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, scale: Any) -> torch.Tensor:
        return self.linear(x) * scale


class Bare(transformers.LlamaForCausalLM):
    """Its forward names nothing that it returns."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None) -> Any:
        return super().forward(input_ids, attention_mask, position_ids, use_cache=False).logits


@pytest.mark.parametrize(
    ("model", "args"),
    [
        (lambda: Odd(), (torch.ones(2, 4, 8), torch.tensor(2.0))),
        (lambda: Odd(), (torch.ones(2, 4, 8), 2.5)),
        (lambda: Bare(decoder().config), (ids(2, 9),)),
    ],
)
def test_what_fails_on_the_way_runs_as_captured(model: Any, args: Any) -> None:
    model = model().eval()
    with torch.no_grad():
        want = model(*args)
    assert close(twice(torch.compile(model, backend=backend), *args), want)
    assert graphs()[0].runs == "eager" and graphs()[0].reason


def test_any_error_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError("of the frontend")

    monkeypatch.setattr("elision.dynamo.forward.capture", fails)
    model = decoder()
    with torch.no_grad():
        want = model(ids(2, 9)).logits
    assert close(twice(torch.compile(model, backend=backend), ids(2, 9), use_cache=False).logits, want)
    assert graphs()[0].runs == "eager" and graphs()[0].reason.endswith("of the frontend")


def test_what_the_program_does_not_give_runs_as_captured() -> None:
    model, given = decoder(), ids(2, 9)
    compiled = torch.compile(model, backend=backend)
    found = twice(compiled, given)  # with the cache that it returns
    with torch.no_grad():
        want = model(given)
    assert torch.equal(found.logits, want.logits) and found.past_key_values.get_seq_length() == 9
    assert graphs()[0].runs == "eager" and "use_cache=False" in graphs()[0].reason


def test_a_function_around_a_model_is_not_taken_for_the_model() -> None:
    """On their first call both give what the model gives."""
    model, given = decoder(), ids(2, 9).clamp(8, 50)
    other = given.clone()
    other[0, 3], other[1, 4] = 7, 90

    def masked(input_ids: torch.Tensor) -> torch.Tensor:
        return model(input_ids, use_cache=False).logits.masked_fill((input_ids == 7)[..., None], -1e9)

    def clamped(input_ids: torch.Tensor) -> torch.Tensor:
        return model(input_ids.clamp(max=50), use_cache=False).logits

    for function in (masked, clamped):
        compiled = torch.compile(function, backend=backend)
        with torch.no_grad():
            assert close(compiled(given), function(given)) and close(compiled(other), function(other))
    assert all("which is not the forward" in g.reason for g in graphs()) and len(graphs()) == 2


def test_a_forward_that_torch_decorates_is_a_forward() -> None:
    class Ungraded(transformers.LlamaForCausalLM):
        @torch.no_grad()
        def forward(self, input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None, **rest: Any) -> Any:
            scale = rest.pop("scale", 1)
            found = super().forward(input_ids, attention_mask, position_ids, **rest)
            found.logits = found.logits * scale
            return found

    model, given = Ungraded(decoder().config).eval(), ids(2, 9)
    compiled = torch.compile(model, backend=backend)
    for more in ({}, {"scale": 2}):
        assert close(twice(compiled, given, use_cache=False, **more).logits, model(given, use_cache=False, **more).logits)
    assert [g.runs for g in graphs()] == ["native", "eager"] and "scale=2 is no tensor" in graphs()[1].reason


def test_the_beginning_of_a_forward_is_not_taken_for_all_of_it() -> None:
    class Ends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.full((8,), 2.0))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            x = x * self.weight
            if torch.compiler.is_compiling():
                torch._dynamo.graph_break()
            return x, x.clamp(max=9)

    model = Ends().eval()
    with torch.no_grad():
        found, want = twice(torch.compile(model, backend=backend), torch.full((2, 8), 3.0)), model(torch.full((2, 8), 3.0))
    assert torch.equal(found[1], want[1]) and "breaks before the forward" in graphs()[0].reason


def test_arguments_that_are_no_tensors_are_not_taken_for_their_defaults() -> None:
    class Banning(transformers.LlamaForCausalLM):
        def forward(
            self, input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None, ban: int | None = None, **rest: Any
        ) -> Any:
            found = super().forward(input_ids, attention_mask=attention_mask, position_ids=position_ids, **rest)
            if ban is not None:
                found.logits = found.logits.masked_fill((input_ids == ban)[..., None], -1e9)
            return found

    model, given = Banning(decoder().config).eval(), ids(2, 9).clamp(min=8)
    other = given.clone()
    other[0, 3] = 7
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        for ban in (7, None):
            compiled(given, ban=ban, use_cache=False)
            assert close(compiled(other, ban=ban, use_cache=False).logits, model(other, ban=ban, use_cache=False).logits)
    assert [g.runs for g in graphs()] == ["eager", "native"] and "ban=7 is no tensor" in graphs()[0].reason


def test_numbers_that_vary_are_not_taken_for_constants() -> None:
    """Its first call keeps all logits, as the program does; the same graph keeps three of them later."""
    model, given = decoder(), ids(2, 11)
    compiled = torch.compile(model, backend=backend, dynamic=True)
    with torch.no_grad():
        for kept in (11, 3):
            found = compiled(given, logits_to_keep=kept, use_cache=False).logits
            assert close(found, model(given, logits_to_keep=kept, use_cache=False).logits)
    assert "a number that varies" in graphs()[0].reason


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
