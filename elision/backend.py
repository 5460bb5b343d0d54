"""``elision`` among the backends of `torch.compile`: ``torch.compile(model, backend="elision", options={...})``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx

from elision.dynamo.report import GRAPHS, GraphReport, report
from elision.errors import BadInput, UnsupportedModel

__all__ = ["elision", "report"]


def elision(
    graph: fx.GraphModule, example: Sequence[Any], *, options: Mapping[str, Any] | None = None, mode: str | None = None
) -> Callable[..., Sequence[Any]]:
    """Compile a graph that Dynamo captured (`elision.dynamo`).

    ``options``: those of `elision.dynamo.options.Options`. What is not raised runs as it was captured, and `report` says why;
    calls in training mode or with gradients do so with a warning. Raises BadInput for options that cannot be used.
    """
    from elision.dynamo.frame import find_frame, ungraded
    from elision.dynamo.graph import CompiledGraph, otherwise
    from elision.dynamo.options import Options
    from elision.dynamo.static_cache import StaticCacheGraph

    if mode is not None:
        raise BadInput(f"mode={mode!r} is one of Inductor's; with backend='elision' give options={{...}}")
    chosen = Options.read(options)
    record = GraphReport("", sum(n.op.startswith("call") for n in graph.graph.nodes))
    GRAPHS.append(record)
    try:
        frame = find_frame(graph, example)
    except UnsupportedModel as err:
        record.runs, record.reason = chosen.fallback, str(err)
        return _counted(otherwise(graph, chosen), record)
    record.module = type(frame.module).__name__
    if reason := ungraded(frame.module, example):
        record.runs, record.reason = "eager", reason
        warnings.warn(f"torch.compile with backend='elision' runs {record.module} eagerly: {reason}", stacklevel=2)
        return _counted(graph.forward, record)
    return (StaticCacheGraph if frame.cache else CompiledGraph)(graph, frame, chosen, record)


def _counted(run: Callable[..., Sequence[Any]], record: GraphReport) -> Callable[..., Sequence[Any]]:
    def counted(*args: Any) -> Sequence[Any]:
        record.calls += 1
        return run(*args)

    return counted


def _reset() -> None:
    from elision.dynamo.forward import _KNOWN

    GRAPHS.clear()
    _KNOWN.clear()


elision.reset = _reset  # type: ignore[attr-defined]  # what torch._dynamo.reset() calls
