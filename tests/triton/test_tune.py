"""Tiles that were measured: the search by a clock that is made up, the table, what reads it, and calls as they are measured."""

from __future__ import annotations

import json
import os
from math import log2
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_cuda import FakeCuda, named
from test_programs import compiled
from tiny_models import tiny
from typer.testing import CliRunner

import elision
from elision.cli.app import app
from elision.cli.tune import Bench, gpu
from elision.codegen.triton.compile import plan_program
from elision.codegen.triton.configs import Tile
from elision.codegen.triton.launches import Kernels
from elision.codegen.triton.tuned import SCHEMA, Places, Table, load, neighbours, search
from elision.errors import BadInput
from elision.ir.launch import DeviceCode

TILES = {"gemm few f32 float 32 64": Tile(16, 64, 32, 4, 2), "attend one one f32 2 1 16 f32 f32": Tile(2, 64, 8, 2, 2)}


def test_the_search_walks_uphill_and_past_what_does_not_run() -> None:
    """Times are those of a product's distance from 128 outputs: two steps from the table. More warps do not run here, more inputs
    give other results, all of them in no time; where nothing matters nothing is left."""

    def measure(code: DeviceCode, places: Places) -> tuple[float, torch.Tensor]:
        used = [row.kernel for e, s in places for row in code.schedules[e][s].rows if row.kernel]
        found = [code.kernels[n] for n in used if code.kernels[n].template == "gemm"]
        if any(k.warps == 8 for k in found):
            raise RuntimeError("out of registers")
        result = torch.ones(4) * (2 if any(k.constants["BK"] > 32 for k in found) else 1)
        return (1e-9 if result[0] > 1 else 1 + sum(abs(log2(k.constants["BN"] / 128)) for k in found)), result

    lines: list[str] = []
    program = compiled("LlamaConfig").program
    found = search(program, measure, lines.append)
    assert found and {key.split()[0] for key in found} == {"gemm"} and {t.n for t in found.values()} == {128}
    assert {(t.k, t.warps) for t in found.values()} == {(32, 4)}
    assert any("does not run (out of registers)" in line for line in lines) and any("other results" in line for line in lines)
    asked = Kernels(found)
    code = plan_program(program, asked)
    assert found.keys() <= asked.asked.keys()
    assert {k.constants["BN"] for k in code.kernels.values() if k.template == "gemm"} == {128}


def test_neighbours_stay_in_bounds() -> None:
    assert Tile(1, 64, 512) not in neighbours("gemv one", Tile(1, 32, 512))
    found = list(neighbours("gemm few", Tile(16, 16, 64, 4, 3)))
    assert found == [
        Tile(16, 32, 64, 4, 3), Tile(16, 16, 128, 4, 3), Tile(16, 16, 32, 4, 3), Tile(16, 16, 64, 8, 3), Tile(16, 16, 64, 2, 3),
        Tile(16, 16, 64, 4, 4), Tile(16, 16, 64, 4, 2),
    ]  # fmt: skip


def test_tables_are_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, table = tmp_path / "tuned.json", Table("Made Up", "cuda:sm_90", TILES)
    table.save(path)
    assert load(path, ["cuda:sm_90"]) == table and os.listdir(tmp_path) == ["tuned.json"]
    before = path.read_text()

    def fails(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("elision.codegen.triton.tuned.os.replace", fails)
    with pytest.raises(BadInput, match="could not be written: No space"):
        Table("Other", "cuda:sm_80", {}).save(path)
    assert path.read_text() == before and os.listdir(tmp_path) == ["tuned.json"]


@pytest.mark.parametrize(
    "change,message",
    [
        ("{", "is not a table"), ([], "not a table of the form"), ({"schema": "elision-tuned-0"}, "not a table of the form"),
        ({"target": None}, "damaged"), ({"tiles": None}, "damaged"), ({"tiles": {"gemv one": [1, 4, 64, 4]}}, "damaged"),
        ({"tiles": {"gemv one": [1, 3, 64, 4, 3]}}, "powers of two"), ({"tiles": {"gemv one": [1, 4, 64, True, 3]}}, "damaged"),
        ({"tiles": {"attend one": [16, 64, 0, 4, 3]}}, "damaged"),
        ({"tiles": {"rm one": [1, 4, 64, 4, 3]}}, "damaged"), ({"target": "hip:gfx942"}, "says nothing of cuda:sm_90"),
    ],
)  # fmt: skip
def test_damaged_and_foreign_tables_are_refused(change: Any, message: str, tmp_path: Path) -> None:
    document: Any = {"schema": SCHEMA, "device": "Made Up", "target": "cuda:sm_90", "tiles": {}}
    if isinstance(change, dict):
        document |= change
        document = {k: v for k, v in document.items() if v is not None}
    (tmp_path / "t.json").write_text(change if isinstance(change, str) else json.dumps(document if change else change))
    with pytest.raises(BadInput, match=message):
        load(tmp_path / "t.json", ["cuda:sm_90"])
    with pytest.raises(BadInput, match="could not be read"):
        load(tmp_path / "none.json", ["cuda:sm_90"])


def test_code_is_made_by_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elision.codegen.triton.ahead.build", lambda code, targets: named(code, *targets))
    model, path = tiny("LlamaConfig", num_hidden_layers=1), tmp_path / "tuned.json"
    asked = Kernels()
    plan_program(elision.compile(model, target="reference").program, asked)
    key, first = next((k, t) for k, t in asked.asked.items() if k.startswith("gemm few"))
    half = Kernels()
    plan_program(elision.compile(model, target="reference", dtype="bfloat16").program, half)
    assert not asked.asked.keys() & half.asked.keys(), "what is twice as wide takes other tiles"
    Table("Made Up", "cuda:sm_90", {key: Tile(64, 128, 16, 2, 4)}).save(path)
    made = elision.compile(model, target="cuda:sm_90", tuned=path).gpu
    assert made is not None and first != Tile(16, 128, 16, 2, 4)
    found = [k for k in made.kernels.values() if k.template == "gemm" and k.constants["BN"] == 128 and k.stages == 4]
    assert found and {(k.constants["BM"], k.constants["BK"], k.warps) for k in found} == {(first.m, 16, 2)}
    with pytest.raises(BadInput, match="says nothing of hip:gfx942"):
        elision.compile(model, target=["cuda:sm_90", "hip:gfx942"], tuned=path)
    with pytest.raises(BadInput, match="for code for a GPU"):
        elision.compile(model, target="cpu", tuned=path)
    Table("Made Up", "cuda:sm_90", {}).save(path)
    assert elision.compile(model, target="cuda:sm_90", tuned=path).gpu is not None, "nothing was faster"
    Table("Made Up", "cuda:sm_90", {"gemm few f32 float 9999 9999": first}).save(path)
    with pytest.raises(BadInput, match="has nothing for"):
        elision.compile(model, target="cuda:sm_90", tuned=path)


def test_without_a_gpu_it_says_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elision.runtime.cuda.driver.LIBRARY", "libcuda-that-is-not-there.so")
    found = CliRunner().invoke(app, ["tune", "smollm2", "--out", str(tmp_path / "t.json")])
    assert isinstance(found.exception, BadInput) and found.exception.exit_status == 2
    assert "tune measures kernels, which needs an NVIDIA GPU: no NVIDIA driver here" in str(found.exception)
    fake = FakeCuda(DeviceCode({}, {}, {}))
    monkeypatch.setattr("elision.cli.tune.open_driver", lambda: fake)
    assert gpu(None)[1:] == gpu("cuda:sm_90")[1:] == ("cuda:sm_90", "Made Up")
    with pytest.raises(BadInput, match="which is cuda:sm_90: it cannot say anything of hip:gfx942"):
        gpu("hip:gfx942")


def test_calls_as_they_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kind of call runs, with the logits of the table's tiles; each kernel is compiled once, weights are brought once."""
    compiled_kernels: list[int] = []

    def build(code: DeviceCode, targets: list[str]) -> None:
        compiled_kernels.append(len(code.kernels))
        named(code, *targets)

    monkeypatch.setattr("elision.cli.tune.build", build)
    model = compiled("LlamaConfig", max_position_embeddings=64)
    places = [("decode", "one"), ("step", "few"), ("prefill", "many"), ("tick", "many")]
    asked = Kernels()
    code = plan_program(model.program, asked)
    fake = FakeCuda(code)
    bench = Bench(model, fake, "cuda:sm_90", repeats=1, context=4)
    seconds, logits = bench(code, places)
    assert seconds > 0 and logits.numel() == (1 + 4 + 1) * 40 and compiled_kernels == [len(code.kernels)]
    loaded = fake.device.launches["embed"]
    other = {k: next(neighbours(k, t)) for k, t in asked.asked.items()}
    fake.code = plan_program(model.program, Kernels(other))
    fake.device._kernels = fake.code.kernels
    _, found = bench(fake.code, places)
    assert 0 < compiled_kernels[1] < len(code.kernels) and loaded > 0
    assert torch.allclose(found, logits, 1e-4, 1e-4)
