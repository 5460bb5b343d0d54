"""The guide for users does what it says, top to bottom."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from elision.backend import elision as backend
from elision.cli import main

GUIDE = Path(__file__).parents[2] / "docs" / "guide.md"


@pytest.fixture
def text(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The guide, for a tiny model, in a directory of its own."""
    monkeypatch.chdir(tmp_path)
    if "elision" not in torch._dynamo.list_backends():  # its entry point is there where elision is installed
        torch._dynamo.register_backend(backend, name="elision")
    return GUIDE.read_text()


def test_the_code_runs(text: str, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 6
    exec(compile("\n".join(blocks).replace('"smollm2"', repr(str(tiny))), str(GUIDE), "exec"), {"__name__": "guide"})
    said = capsys.readouterr().out
    assert "approximate 0." in said and "drafted tokens accepted" in said and "error[" in said and "Sequential eager" in said


def test_the_commands_run(text: str, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = re.findall(r"^    (elision .*)$", text, re.MULTILINE)
    assert len(lines) == 5
    for line in lines:
        with pytest.raises(SystemExit) as ended:
            main(shlex.split(line.replace("smollm2", str(tiny)))[1:])
        assert not ended.value.code, (line, capsys.readouterr())
