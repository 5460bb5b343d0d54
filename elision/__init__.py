"""Elision: a compiler for transformer inference.

``compile`` turns a model into a program that does less work, ``load`` opens one that was saved.
"""

from __future__ import annotations

from elision.compiler import compile, load
from elision.errors import ArtefactError, BadInput, ElisionError, IllegalProgram, UnsupportedModel
from elision.runtime.model import Model
from elision.runtime.prefix import Prefix, load_prefix

__version__ = "0.1.0"

__all__ = [
    "ArtefactError",
    "BadInput",
    "ElisionError",
    "IllegalProgram",
    "Model",
    "Prefix",
    "UnsupportedModel",
    "compile",
    "load",
    "load_prefix",
]
