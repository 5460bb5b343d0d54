"""Encoders as native code, whole: against the reference interpreter, in calls of changing sizes, and from an artefact."""

from __future__ import annotations

import inspect
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from encoders import IMAGES, TEXTS, encoder, images, texts

import elision
from elision.runtime.model import Model

NATIVE = [name for name in (*TEXTS, *IMAGES) if name != "RobertaModel"]  # its positions are opaque operators
SIZES = [(1, 1), (5, 4), (1, 60), (3, 17), (2, 33)]


@cache
def both(name: str) -> tuple[Model, Model]:
    """The model as native code for two threads, and the same program interpreted."""
    native = elision.compile(encoder(name), threads=2)
    weights = {key: native.weights[key] for key in native.program.params}
    plain = Model(native.program, weights, tokenizer=None, defaults={}, coverage=native.coverage, max_context=native.max_context)
    return native, plain


def inputs(name: str, rows: int, length: int) -> dict[str, torch.Tensor]:
    if name in IMAGES:
        return {"pixel_values": images(rows)}
    reads = inspect.signature(encoder(name).forward).parameters
    return {n: x for n, x in texts(rows, length).items() if n in reads}


def compare(found: Any, want: Any) -> None:
    assert list(found) == list(want)
    for name, exact in want.items():
        assert found[name].shape == exact.shape and exact.abs().max() > 0
        assert float((found[name] - exact).abs().max()) <= 1e-5 * float(exact.abs().max()), name


@pytest.mark.parametrize("name", NATIVE)
def test_outputs_of_calls_of_many_sizes(name: str) -> None:
    native, plain = both(name)
    assert native.native is not None and not any(native.native.hosts.values())
    for rows, length in SIZES:
        given = inputs(name, rows, length)
        compare(native(**given), plain(**given))


@pytest.mark.parametrize("name", ["BertModel", "ViTModel"])
def test_inputs_that_are_part_of_a_tensor(name: str) -> None:
    """A slice of a batch begins in the middle of its memory; what is transposed has gaps."""
    native, plain = both(name)
    whole = inputs(name, 5, 9)
    compare(native(**{n: x[2:4] for n, x in whole.items()}), plain(**{n: x[2:4].clone() for n, x in whole.items()}))
    turned = {n: x.transpose(-1, -2).contiguous().transpose(-1, -2)[1:] for n, x in whole.items()}
    compare(native(**turned), plain(**{n: x[1:].clone() for n, x in whole.items()}))


@pytest.mark.parametrize("name", ["BertForPreTraining", "CLIPVisionModelWithProjection"])
def test_an_artefact(name: str, tmp_path: Path) -> None:
    native, _ = both(name)
    native.save(tmp_path / "encoder.elision")
    given = inputs(name, 3, 17)
    compare(elision.load(tmp_path / "encoder.elision", threads=2)(**given), native(**given))
    compare(elision.load(tmp_path / "encoder.elision", target="reference")(**given), native(**given))


def test_layers_share_one_cache_of_the_call() -> None:
    native, _ = both("BertModel")
    assert native.native is not None
    schedule = native.native.schedules["score"]
    assert schedule.states == ["call_0"] == list(schedule.caches) and len(native.program.layers) == 3
