"""The example in the IR's README is a graph, printed as it would be now."""

from __future__ import annotations

import re
from pathlib import Path

from elision.ir import verifier
from elision.ir.parser import parse_graph
from elision.ir.printer import print_graph

README = (Path(verifier.__file__).parent / "README.md").read_text()


def test_the_example_round_trips() -> None:
    (text,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert print_graph(parse_graph(text)) == text


def test_every_rule_is_told() -> None:
    told = re.findall(r"^\| (\w+) \|", README, re.MULTILINE)[1:] + re.findall(r"\(\*(\w+)\*\)", README)
    assert sorted(told) == sorted({rule.__module__.rpartition(".")[2] for rule in verifier.RULES})
