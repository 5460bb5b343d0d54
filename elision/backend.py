"""The name ``elision`` among the backends of `torch.compile`."""

from __future__ import annotations

from typing import Any, NoReturn

from elision.errors import UnsupportedModel


def elision(graph: Any, example_inputs: Any) -> NoReturn:
    """Refuse the graph that Dynamo captured: only whole models can be compiled so far. Raises UnsupportedModel."""
    raise UnsupportedModel(
        'torch.compile(backend="elision") cannot compile a captured graph yet: '
        "compile the whole model with elision.compile(model) and call the result"
    )
