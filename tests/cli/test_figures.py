"""The README's tables are those of the samples that are kept."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))
import run  # noqa: E402


def test_the_readme_shows_what_is_kept() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert run.readme(text) == text, "python benchmarks/run.py --draw"


def test_other_samples_give_another_readme(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text, cpu = (ROOT / "README.md").read_text(encoding="utf-8"), run.kept("cpu")
    cpu["rows"][1]["samples"]["decode 64"] = [2.0]
    cpu["rows"][1]["engine"] = "elision:fp32, kv bf16"
    (tmp_path / "cpu.json").write_text(json.dumps(cpu | {"rows": cpu["rows"][:2]}), encoding="utf-8")
    monkeypatch.setattr(run, "RAW", tmp_path)
    assert "| 500 |" in run.readme(text) and "| 500 |" not in text


def test_a_readme_without_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="no marks"):
        run.between("# Elision", "cpu", [])


def test_the_machine_is_said_by_the_python_that_measures(tmp_path: Path) -> None:
    """Engines of peers live in an environment of their own, with a torch of their own."""
    for name in ("torch", "transformers"):
        (tmp_path / f"{name}.py").write_text(f"__version__ = 'the {name} of the peers'")
    (tmp_path / "python").write_text(f'#!/bin/sh\nPYTHONPATH="{tmp_path}" exec "{sys.executable}" "$@"\n')
    (tmp_path / "python").chmod(0o755)
    found = run.machine(str(tmp_path / "python"))
    assert found["torch"] == "the torch of the peers" and found["transformers"] == "the transformers of the peers"
    assert {"date", "processor", "cores", "python"} <= found.keys()
