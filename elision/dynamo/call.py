"""The call that Dynamo is compiling: that its frame is a module's own forward, and what the forward is given beside tensors.

A graph may read the weights of one module and still not be its forward: a function may call the module and mask what it gives.
The values of the first call need not show that, so the frame itself must be the forward. And a graph is specialised on numbers
and flags, where a program is raised for the forward's defaults.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from elision.errors import UnsupportedModel

_LOCAL = re.compile(r"L\['(\w+)'\](?:\[(\d+)\]|\['(\w+)'\])?")
#: Arguments by which transformers' forwards are asked for what the graph's own results show, and their values.
_SHOWN: Mapping[str, tuple[Any, ...]] = {
    "use_cache": (None, False, True),
    "return_dict": (None, False, True),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
    "output_router_logits": (None, False),
}
#: In a step on the caller's cache also: the cache, and how many of its one token's logits are asked for.
_STEP = ("past_key_values", "logits_to_keep")


class Call:
    """The root frame of the graph that is being compiled."""

    def __init__(self) -> None:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        root: Any = InstructionTranslator.current_tx().output.root_tx
        self.ends = not root.output.compile_subgraph_reason.graph_break
        self.code, self.locals, self.globals = root.f_code, root.f_locals, root.f_globals
        read = inspect.getargs(self.code)
        self._own, self._more, self._named = read.args, read.varargs, read.varkw

    def variable(self, scope: str, name: str) -> Any:
        """A local (L) or global (G) variable, which the graph itself does not hold."""
        return (self.locals if scope == "L" else self.globals).get(name)

    def check(self, module: nn.Module, step: bool) -> None:
        """Raises UnsupportedModel unless this is the forward of ``module``, asked for nothing but its defaults."""
        if not (self._is_forward(module) or self._calls(module)):
            name = self.code.co_qualname
            raise UnsupportedModel(
                f"the graph is of {name}, which is not the forward of the {type(module).__name__} whose weights it reads; "
                "compile the model itself, and call it from there"
            )
        if not self.ends:
            raise UnsupportedModel(f"the graph breaks before the forward of {type(module).__name__} ends (see graph_breaks)")
        for given, value, default in self._given(module):
            plain = value is default or (
                isinstance(value, int | float | str) and (type(value), value) == (type(default), default)
            )
            known = any(value is v for v in _SHOWN.get(given, ())) or (step and given in _STEP)
            if not (isinstance(value, Tensor) or plain or known):
                raise UnsupportedModel(f"{given}={value!r:.60} is no tensor; programs are raised for the forward's defaults")

    def argument(self, source: str, module: nn.Module) -> str:
        """The name of the forward's argument that a placeholder of the graph comes from."""
        names = list(signature(module).parameters)
        if found := _LOCAL.fullmatch(source):
            local, place, key = found.groups()
            if local == self._more and place is not None and (at := int(place) + len(self._own[1:])) < len(names):
                return names[at]
            name = key if local == self._named else local if place is None and key is None else None
            if name in names:
                return str(name)
        raise UnsupportedModel(f"the graph reads {source}, which is no argument of {type(module).__name__}'s forward")

    def _is_forward(self, module: nn.Module) -> bool:
        own = [f for f in _decorated(type(module).forward) if getattr(f, "__code__", None) is self.code and self._closes_over(f)]
        return bool(own and self._own) and self.locals.get(self._own[0]) is module

    def _calls(self, module: nn.Module) -> bool:
        """This is the frame that Dynamo puts around a module whose forward it would leave out: one that torch decorates. Hooks
        run inside of it."""
        inner = self.globals.get("__name__") == "torch._dynamo.external_utils" and self.locals.get("fn") is module
        return inner and not (module._forward_hooks or module._forward_pre_hooks)

    def _closes_over(self, function: Callable[..., Any]) -> bool:
        """The frame has this function's variables from outside, too: decorators share their code."""
        cells = zip(self.code.co_freevars, function.__closure__ or (), strict=True)
        return all(name in ("__class__", *self.code.co_cellvars) or self.locals.get(name) is c.cell_contents for name, c in cells)

    def _given(self, module: nn.Module) -> Iterator[tuple[str, Any, Any]]:
        """Name, value and default of everything that the forward is given."""
        known, local = signature(module), self.locals
        args = [*(local[n] for n in self._own[1:]), *(local[self._more] if self._more else ())]
        # Arguments by name only are among the frame's own variables.
        names = self.code.co_varnames[len(self._own) :][: self.code.co_kwonlyargcount]
        kwargs = {**{n: local[n] for n in names}, **(local[self._named] if self._named else {})}
        try:
            bound = known.bind(*args, **kwargs).arguments
        except TypeError as err:
            raise UnsupportedModel(f"{type(module).__name__}'s forward is not called as it is defined: {err}") from err
        for name, value in bound.items():
            kind = known.parameters[name].kind
            if kind is inspect.Parameter.VAR_KEYWORD:
                yield from ((n, v, inspect.Parameter.empty) for n, v in value.items())
            elif kind is inspect.Parameter.VAR_POSITIONAL:
                yield from ((name, v, inspect.Parameter.empty) for v in value)
            else:
                yield name, value, known.parameters[name].default


def signature(module: nn.Module) -> inspect.Signature:
    """Of the forward of the class: that of the object may be compiled already (``m.forward = torch.compile(m.forward)``)."""
    return inspect.signature(type(module).forward.__get__(module))


def _decorated(forward: Any) -> Iterator[Any]:
    """The functions whose frame may be that of ``forward``: itself, and what torch's own decorators, left out by Dynamo, call."""
    while True:
        yield forward
        place = getattr(forward, "__globals__", {}).get("__name__", "")
        if not (place.startswith("torch.") and hasattr(forward, "__wrapped__")):
            return
        forward = forward.__wrapped__
