"""What pyproject.toml promises is there."""

from __future__ import annotations

import importlib
import tomllib
from pathlib import Path

import elision

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]


def test_entry_points_name_functions() -> None:
    for target in (*PROJECT["scripts"].values(), *PROJECT["entry-points"]["torch_dynamo_backends"].values()):
        module, _, function = target.partition(":")
        assert callable(getattr(importlib.import_module(module), function))


def test_version_is_said_once() -> None:
    assert PROJECT["version"] == elision.__version__
