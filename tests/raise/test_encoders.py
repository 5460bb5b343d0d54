"""Encoders: every output field of padded batches of any shape, and of images; mutants that the checks must notice."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from encoders import IMAGES, TEXTS, encoder, images, texts
from table import AGAIN, KEPT, read, row
from torch import nn

import elision
from elision.errors import BadInput, UnsupportedModel
from elision.frontend import huggingface
from elision.frontend.capture import Captured, capture
from elision.frontend.check import check_program
from elision.frontend.raising import raise_model
from elision.ir.program import Program
from elision.ir.value import Builder, Value, rewrite
from elision.runtime.model import Model

SHAPES = [(1, 1), (1, 60), (3, 17), (5, 4)]


@cache
def source(name: str) -> Any:
    return encoder(name)


@cache
def compiled(name: str) -> Model:
    return elision.compile(source(name))


def known(name: str, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inputs that the model has; a model with one token type has no second."""
    reads = inspect.signature(source(name).forward).parameters
    one = name == "RobertaModel"
    return {n: x * 0 if one and n == "token_type_ids" else x for n, x in given.items() if n in reads}


def compare(found: Any, want: Any, mask: torch.Tensor | None = None, tolerance: float = 1e-5) -> None:
    """All fields, at the tokens that are there, to ``tolerance`` of the largest value."""
    assert list(found) == list(want)
    for name, exact in want.items():
        value = found[name]
        assert value.shape == exact.shape and value.dtype == exact.dtype, name
        if mask is not None and exact.shape[:2] == mask.shape:
            assert not value[~mask.bool()].any()
            value, exact = value[mask.bool()], exact[mask.bool()]
        assert float((value - exact).abs().max()) <= tolerance * float(exact.abs().max()), name


@pytest.mark.parametrize("name", TEXTS)
def test_text_fields_of_padded_batches(name: str) -> None:
    for rows, length in SHAPES:
        given = known(name, texts(rows, length))
        with torch.no_grad():
            want = source(name)(**given)
        compare(compiled(name)(**given), want, given["attention_mask"])
    opaque = {"cumsum", "ne"} if name == "RobertaModel" else set()  # its positions skip the pad token
    assert set(compiled(name).coverage["opaque"]) <= opaque


@pytest.mark.parametrize("name", [*TEXTS, *IMAGES])
def test_the_table_has_its_row(name: str) -> None:
    assert read().get(name) == row(name, compiled(name)), f"{KEPT} is not what is raised: run {AGAIN}"


@pytest.mark.parametrize("name", ["BertModel", "AlbertModel"])
def test_what_is_left_out_is_what_the_model_assumes(name: str) -> None:
    ids = texts(3, 17)["input_ids"]
    with torch.no_grad():
        compare(compiled(name)(ids), source(name)(ids))
        at = torch.arange(5, 22)[None]
        compare(compiled(name)(ids, position_ids=at), source(name)(ids, position_ids=at))


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("rows", [1, 4])
def test_image_fields(name: str, rows: int) -> None:
    with torch.no_grad():
        want = source(name)(pixel_values=images(rows))
    compare(compiled(name)(pixel_values=images(rows)), want)
    assert compiled(name).coverage["opaque"] == {} and compiled(name).coverage["sites"]["patches"] == 1


@pytest.mark.parametrize("name", ["BertModel", "ViTModel"])
def test_other_dtypes(name: str) -> None:
    wide, half = (copy.deepcopy(source(name)).to(dtype) for dtype in (torch.float64, torch.bfloat16))
    given = texts(1, 9) if name == "BertModel" else {"pixel_values": images(2).bfloat16()}
    with torch.no_grad():
        exact = wide(**{n: x.double() if x.is_floating_point() else x for n, x in given.items()})
        theirs = half(**given)
    compare(elision.compile(wide)(**given), exact, given.get("attention_mask"), 1e-9)
    ours = elision.compile(half)(**given)
    for field, want in exact.items():
        error = [float((found[field].double() - want).square().mean()) ** 0.5 for found in (ours, theirs)]
        assert ours[field].dtype == torch.bfloat16 and 0 < error[0] <= 1.5 * error[1], field


# --- the library around it ---


def without_layer(model: nn.Module, index: int) -> nn.Module:
    model = copy.deepcopy(model)
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 3]
    assert len(lists) == 1
    del lists[0][index]
    return model


@pytest.mark.parametrize("name", ["BertModel", "ViTForImageClassification", "CLIPVisionModelWithProjection"])
@pytest.mark.parametrize("layer", [0, 2])
def test_skipped_layer_equals_the_model_without_it(name: str, layer: int) -> None:
    """In a post-norm model a block ends with its norm, so the norm goes with it."""
    given = texts(3, 17) if name in TEXTS else {"pixel_values": images(2)}
    skipped = elision.compile(source(name), passes=[f"skip-layers:layers={layer}"])
    with torch.no_grad():
        want = without_layer(source(name), layer)(**given)
    compare(skipped(**given), want, given.get("attention_mask"))
    full = compiled(name)(**given)
    assert not torch.allclose(skipped(**given)[0], full[0], rtol=1e-3)


@pytest.mark.parametrize("name", ["BertModel", "ViTModel"])
def test_artefact(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.elision"
    compiled(name).save(path)
    given = texts(3, 17) if name == "BertModel" else {"pixel_values": images(2)}
    found, want = elision.load(path)(**given), compiled(name)(**given)
    assert list(found) == list(want) and all(torch.equal(found[n], want[n]) for n in want)


def test_generate_is_refused() -> None:
    for name in ("BertModel", "ViTModel"):
        with pytest.raises(BadInput, match="has no decoder: call it as m"):
            compiled(name).generate(torch.tensor([[5, 6]]))


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("BertModel", {"attention_mask": torch.tensor([[0, 1]])}, "first token of row 0.*pad on the right"),
        ("BertModel", {"token_type_ids": torch.tensor([[0, 2]])}, "token_type_ids: 2 is not one of 0 to 1"),
        ("BertModel", {"token_type_ids": torch.tensor([[0]])}, r"token_type_ids: expected a LongTensor \[1, 2\]"),
        ("BertModel", {"pixel_values": images(1)}, "pixel_values are not supported; expected input_ids.*token_type_ids"),
        ("BertModel", {"input_ids": None}, "LongTensor .B, T.*got NoneType"),
        ("ViTModel", {"pixel_values": images(1, 32)}, r"pixel_values: expected floats \[B, 3, 24, 24\].*\[1, 3, 32, 32\]"),
        ("ViTModel", {"pixel_values": None}, "pixel_values: expected floats.*got NoneType"),
        ("ViTModel", {"pixel_values": images(1), "bool_masked_pos": torch.ones(1, 9)}, "bool_masked_pos are not supported"),
    ],
)
def test_bad_input(name: str, given: dict[str, Any], message: str) -> None:
    usual = {"input_ids": torch.tensor([[5, 6]])} if name == "BertModel" else {}
    with pytest.raises(BadInput, match=message):
        compiled(name)(**{**usual, **given})


def test_left_padding_is_right_where_no_result_is_the_first_token_s() -> None:
    given = {n: x.flip(1) for n, x in texts(3, 17).items()}
    with torch.no_grad():
        want = source("BertForMaskedLM")(**given)
    compare(compiled("BertForMaskedLM")(**given), want, given["attention_mask"])


# --- mutants: the frontend's own checks must fail ---

Mutation = Callable[[Builder, Value, tuple[Value, ...]], Value | None]


def shifted_positions(b: Builder, v: Value, args: tuple[Value, ...]) -> Value | None:
    return b.add("map", b.add("positions", *args), expr="x0 + 1") if v.op == "positions" else None  # type: ignore[return-value]


def pooled_from_the_last(b: Builder, v: Value, args: tuple[Value, ...]) -> Value | None:
    return b.add("last", *args, axis="first") if v.op == "first" else None  # type: ignore[return-value]


def without_positions(b: Builder, v: Value, args: tuple[Value, ...]) -> Value | None:
    return args[0] if v.op == "map" and len(args) == 2 and args[1].op == "embed" else None


@cache
def raised(name: str) -> tuple[Captured, Program, dict[str, torch.Tensor]]:
    captured = capture(source(name))
    found = raise_model(captured, "it", positions=60)
    return captured, found.program, found.weights


@pytest.mark.parametrize(
    ("name", "mutation"),
    [
        ("BertModel", shifted_positions),
        ("BertModel", pooled_from_the_last),
        ("ViTModel", pooled_from_the_last),
        ("ViTModel", without_positions),
    ],
)
def test_a_wrong_program_is_noticed(name: str, mutation: Mutation) -> None:
    captured, program, weights = raised(name)
    check_program(program, weights, captured)
    mutant = program.copy()
    mutant.entries["score"] = rewrite(program.entries["score"], mutation, program.targets)
    assert mutant.entries["score"] != program.entries["score"]
    with pytest.raises(UnsupportedModel, match="differs from the model"):
        check_program(mutant, weights, captured)


def test_swapped_token_types_are_noticed() -> None:
    captured, program, weights = raised("BertModel")
    name = next(n for n in weights if "token_type" in n)
    with pytest.raises(UnsupportedModel, match="differs from the model"):
        check_program(program, {**weights, name: weights[name].flip(0)}, captured)


def blind(mask: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(mask)


def one_key_less(mask: torch.Tensor) -> torch.Tensor:
    return mask & torch.ones_like(mask).roll(1, -1) & (torch.arange(mask.shape[-1]) != 1)


def queries_too(mask: torch.Tensor) -> torch.Tensor:
    return mask & (torch.arange(mask.shape[-1]) <= torch.arange(mask.shape[-1])[:, None] + 3)


@pytest.mark.parametrize("change", [blind, one_key_less, queries_too])
def test_a_mask_that_does_not_hide_just_the_padding_is_refused(
    change: Callable[[torch.Tensor], torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an example without padding ``blind`` cannot be told from the model's own mask: only evaluation shows it. The comparison
    with the model, after which the model's own attention is captured instead, is switched off."""
    monkeypatch.setattr("elision.frontend.capture._agrees", lambda *_: True)
    before = huggingface._mask

    def changed(*args: Any, **kwargs: Any) -> torch.Tensor:
        found = before(*args, **kwargs)
        assert found is not None
        return change(found)

    monkeypatch.setattr(huggingface, "_mask", changed)
    with pytest.raises(UnsupportedModel, match="mask"):
        elision.compile(encoder("BertModel"))


def test_padding_and_token_types_matter() -> None:
    """The comparisons above can fail: without the mask, or with swapped types, the outputs are others."""
    given = texts(3, 17)
    keep = given["attention_mask"].bool()
    full = compiled("BertModel")(**given).last_hidden_state[keep]
    for change in ({"attention_mask": None}, {"token_type_ids": 1 - given["token_type_ids"]}):
        assert not torch.allclose(compiled("BertModel")(**{**given, **change}).last_hidden_state[keep], full, rtol=1e-2)
