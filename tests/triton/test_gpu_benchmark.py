"""The benchmark of GPUs runs without one: its smallest part, its checks, what it leaves out."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import gpu  # noqa: E402
import gpu_checks  # noqa: E402

SMALL = replace(gpu.DRY, batches=(1,))


def test_a_part_runs_and_says_when_and_where() -> None:
    found = gpu.run(gpu.Bench(SMALL), ["decode"], 9)
    assert json.loads(json.dumps(found)) == found and {"date", "device", "torch", "triton"} <= found.keys()
    (part,) = found["parts"]
    assert part["seconds"] > 0 and "left out" not in part
    steps = [row for row in part["rows"] if "ms" in row]
    assert [(row["batch"], row["context"]) for row in steps] == [(1, 20)] and steps[0]["of the floor"] > 0


def test_checks_against_float64_find_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "VARIANTS", {"bf16": gpu.VARIANTS["bf16"]})
    (part,) = gpu.run(gpu.Bench(SMALL), ["checks"], 9)["parts"]
    assert set(part["rows"][0]["errors"]) == {f"{e}: {k}" for e in ("prefill, 2 tokens", "decode, 1 tokens") for k in (
        ("gemm", "attend") if "prefill" in e else ("project", "gemv", "combine"))}  # fmt: skip
    monkeypatch.setattr(gpu_checks, "LIMITS", {"bf16": 1e-4})
    with pytest.raises(SystemExit, match="wrong: bf16, prefill, 2 tokens: gemm: differs by"):
        gpu.run(gpu.Bench(SMALL), ["checks"], 9)


def test_what_would_take_too_long_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert sum(estimate for _, estimate in gpu.PARTS.values()) < 9 * 60
    found = gpu.run(gpu.Bench(SMALL), list(gpu.PARTS), 0)
    assert all(part["left out"] == "time" and not part["rows"] for part in found["parts"])
    assert capsys.readouterr().out.count("left out (time)") == len(gpu.PARTS)
