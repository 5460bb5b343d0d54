"""One graph of Dynamo as a function: checked on its first call, then native, or as it was captured."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any

import torch
from torch import Tensor, fx

from elision.dynamo.forward import BadOption, Forward, compile_forward
from elision.dynamo.frame import Frame
from elision.dynamo.options import Options
from elision.dynamo.report import GraphReport
from elision.dynamo.weights import Weights
from elision.errors import BadInput, ElisionError, UnsupportedModel

log = logging.getLogger("elision")

#: How far the program may be from the graph on its first call, relative to the largest value: other sums, other rounding.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_CHANGED = "weights have changed since they were compiled (torch._dynamo.reset() compiles them again)"


class CompiledGraph:
    """The first call decides, with its real inputs: the module is raised outside of Dynamo's tracing, and the program must give
    what the graph gives. That call returns the graph's own results, so what the graph writes to is written once."""

    def __init__(self, graph: fx.GraphModule, frame: Frame, options: Options, record: GraphReport) -> None:
        self._graph, self._frame, self._options, self._record = graph, frame, options, record
        self._otherwise = otherwise(graph, options)
        self._lock = Lock()
        self._run: Callable[..., Sequence[Any]] | None = None
        self._outputs: list[str] = []
        self._forward: Forward | None = None
        self._weights = Weights(())

    def __call__(self, *args: Any) -> Sequence[Any]:
        self._record.calls += 1
        if self._run is None:
            with self._lock:
                if self._run is None:
                    return self._first(args)
        return self._run(*args)

    def _first(self, args: tuple[Any, ...]) -> Sequence[Any]:
        before = self._before(args)
        want: Sequence[Any] = self._graph(*args)
        try:
            found = self._bind(args, before, want)
        except BadOption as err:
            raise BadInput(str(err)) from err
        except Exception as err:  # of the module's own code too, which torch.export runs in its own way
            reason = str(err) if isinstance(err, ElisionError) else f"{type(err).__name__} while it was raised: {err}"
            self._record.runs, self._record.reason = self._options.fallback, reason
            log.warning("torch.compile: a graph of %s runs in %s: %s", self._record.module, self._record.runs, reason)
            self._run = self._otherwise
            return want
        self._forward, self._weights = found, Weights(self._state(args))
        native = found.model.native
        self._record.runs = "native" if native is not None else "interpreter"
        hosts = native.hosts.get("prefill" if self._frame.cache else "score", []) if native is not None else []
        self._record.notes += [f"{op} on the interpreter: {why}" for op, why in dict.fromkeys(hosts)]
        self._record.coverage = dict(found.model.coverage)
        self._run = self._native
        return want

    def _inputs(self, args: Sequence[Any]) -> dict[str, Tensor]:
        return {name: args[place] for name, place in self._frame.inputs.items()}

    def _state(self, args: Sequence[Any]) -> list[Tensor]:
        return [args[place] for place in self._frame.state]

    def _before(self, args: Sequence[Any]) -> Any:
        """What the graph may write to, as it is before."""
        return {name: x.clone() for name, x in self._inputs(args).items()}

    def _bind(self, args: Sequence[Any], before: Any, want: Sequence[Any]) -> Forward:
        """The program that the graph's results ``want`` are those of. Raises UnsupportedModel if there is none."""
        inputs = self._inputs(args)
        if any(not torch.equal(x, inputs[name]) for name, x in before.items()):
            raise UnsupportedModel("the graph writes to its inputs")
        found = compile_forward(self._frame.module, inputs, self._options)
        self._outputs = _match(want, found.exact(**inputs), inputs.get("attention_mask"))
        if "attention_mask" in inputs:
            self._record.notes.append("results at padding are zeros")
        return found

    def _native(self, *args: Any) -> Sequence[Any]:
        assert self._forward is not None
        if not self._weights.same(self._state(args)):
            return self._fall(_CHANGED, args)
        try:
            return self._replaced(self._forward, args)
        except BadInput as err:
            return self._fall(str(err), args)

    def _replaced(self, forward: Forward, args: Sequence[Any]) -> Sequence[Any]:
        """The graph's results by the program. Raises BadInput for inputs that it does not take, before it writes anything."""
        found = forward.model(**self._inputs(args))
        return [found[name] for name in self._outputs]

    def _fall(self, reason: str, args: tuple[Any, ...]) -> Sequence[Any]:
        if not self._record.fallen[reason]:
            where = self._options.fallback
            log.warning("torch.compile: calls of a graph of %s run in %s: %s", self._record.module, where, reason)
        self._record.fallen[reason] += 1
        return self._otherwise(*args)


def otherwise(graph: fx.GraphModule, options: Options) -> Callable[..., Sequence[Any]]:
    """The graph as it was captured, eagerly or through Inductor."""
    return torch.compile(graph) if options.fallback == "inductor" else graph.forward


def _match(want: Sequence[Any], found: dict[str, Tensor], mask: Tensor | None) -> list[str]:
    """The program's output that each of the graph's results is, by its values where tokens are valid."""
    names: list[str] = []
    for value in want:
        same = [n for n, x in found.items() if isinstance(value, Tensor) and close(x, value, mask)]
        if not same:
            shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise UnsupportedModel(
                f"the graph returns {len(want)} values, of which {shape} is none of what the raised model gives "
                f"({', '.join(f'{n} {list(x.shape)}' for n, x in found.items())}); flags such as use_cache=False leave others out"
            )
        names.append(same[0])
    return names


def close(x: Tensor, want: Tensor, mask: Tensor | None) -> bool:
    """Equal up to rounding, where ``mask [B, T]`` says that tokens are valid."""
    if x.shape != want.shape or x.dtype != want.dtype:
        return False
    if mask is not None and x.shape[:2] == mask.shape:
        x, want = x[mask.bool()], want[mask.bool()]
    if not x.is_floating_point():
        return torch.equal(x, want)
    error, most = (x.double() - want.double()).abs().max(), want.double().abs().max()
    return bool(error <= _TOLERANCE[x.dtype] * most)
