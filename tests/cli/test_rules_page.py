"""The page on the rules prints what it says, for every rule."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from elision.ir.verifier import RULES

PAGE = Path(__file__).parents[2] / "docs" / "rules.md"


def test_every_rule_says_what_the_page_says(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = PAGE.read_text(encoding="utf-8")
    told = re.findall(r"^    error\[.*\n(?:      .*\n)+", text, re.MULTILINE)
    assert sorted(re.findall(r"error\[(\w+)\]", "".join(told))) == sorted(rule.__name__ for rule in RULES)
    space: dict[str, object] = {"__name__": "rules"}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(block.replace('"smollm2"', repr(str(tiny))), str(PAGE), "exec", dont_inherit=True), space)
        said = capsys.readouterr().out
        assert not said or said == re.sub(r"^    ", "", told.pop(0), flags=re.MULTILINE)
    assert not told
