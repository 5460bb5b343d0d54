"""Which module a graph of Dynamo was captured from, and which of its arguments are inputs of the module's forward."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from elision.dynamo.call import Call
from elision.dynamo.weights import tensors
from elision.errors import UnsupportedModel

_STATE = re.compile(r"([LG])\['([^']+)'\](?=\._(?:modules|parameters|buffers)\[)")
_STORED = re.compile(r"\._(?:parameters|buffers)\['[^']+'\]$")
_CACHED = re.compile(r"L\['(?:[^']+'\]\[')?past_key_values'\]\.layers\[(\d+)\]\.(\w+)")
# Passed beside the tensors, where they vary.
_SIZE = re.compile(r"\.(?:size\(\)\[\d+\]|stride\(\)\[\d+\]|storage_offset\(\))$")


#: What a layer of transformers' static cache has.
CACHE = {"keys", "values", "cumulative_length"}


@dataclass(frozen=True)
class Frame:
    """``inputs``: names of the forward's arguments to places among the graph's; ``state``: places of parameters and buffers;
    ``cache``: places of the tensors of each layer of the caller's cache, by name."""

    module: nn.Module
    inputs: dict[str, int]
    state: tuple[int, ...]
    cache: tuple[dict[str, int], ...]


def find_frame(graph: fx.GraphModule, example: Sequence[Any]) -> Frame:
    """The frame that Dynamo is compiling. Raises UnsupportedModel for a graph that is not of one module's forward, or that reads
    what is not an argument of it, such as the caller's cache."""
    inputs: list[str] = []
    places: list[int] = []
    state: list[int] = []
    cache: dict[int, dict[str, int]] = {}
    roots: set[tuple[str, str]] = set()
    nodes = [n for n in graph.graph.nodes if n.op == "placeholder"]
    for place, (node, value) in enumerate(zip(nodes, example, strict=True)):
        source = _source(node)
        if not isinstance(value, Tensor):
            if not _SIZE.search(source):
                raise UnsupportedModel(f"the graph computes with {source}, a number that varies from call to call")
        elif found := _STATE.match(source):
            if not value.dim() and not _STORED.search(source):  # as which Dynamo passes floats
                raise UnsupportedModel(f"the graph computes with {source}, a number that varies from call to call")
            roots.add((found[1], found[2]))
            state.append(place)
        elif found := _CACHED.fullmatch(source):
            cache.setdefault(int(found[1]), {})[found[2]] = place
        else:
            inputs.append(source)
            places.append(place)
    if len(roots) != 1:
        raise UnsupportedModel(f"the graph reads weights of {len(roots)} modules; expected those of one module's forward")
    call = Call()
    module = call.variable(*roots.pop())
    if not isinstance(module, nn.Module):
        raise UnsupportedModel(f"its weights belong to a {type(module).__name__}; expected a torch.nn.Module")
    if any(w.is_inference() for w in tensors(module)):
        raise UnsupportedModel("weights made in inference_mode do not say when they are written to; expected torch.no_grad()")
    if any(set(layer) != CACHE for layer in cache.values()) or sorted(cache) != list(range(len(cache))):
        expected = ", ".join(sorted(CACHE))
        raise UnsupportedModel(f"past_key_values: the graph makes them, or reads something else than {expected} of every layer")
    call.check(module, step=bool(cache))
    named = dict(zip((call.argument(s, module) for s in inputs), places, strict=True))
    return Frame(module, named, tuple(state), tuple(cache[i] for i in range(len(cache))))


def _source(node: fx.Node) -> str:
    """Where the value of a placeholder comes from, as Dynamo writes it: ``L['self']._modules['head']._parameters['weight']``."""
    name = getattr(getattr(node.meta.get("grapharg"), "source", None), "name", node.name)
    return str(name() if callable(name) else name)


def plain(module: nn.Module) -> nn.Module:
    """The module with the forward of its class and without hooks, which run around it, sharing all else."""
    found = module.__new__(type(module))
    found.__dict__ = {name: value for name, value in module.__dict__.items() if name != "forward"}
    found.__dict__ |= {name: OrderedDict() for name in ("_forward_hooks", "_forward_pre_hooks")}
    return found


def ungraded(module: nn.Module, example: Sequence[Any]) -> str | None:
    """Why the call is not inference, None if it is."""
    if any(m.training for m in module.modules()):
        return f"{type(module).__name__} is in training mode (model.eval() ends it)"
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in example):
        return "gradients are asked for (torch.no_grad() or torch.inference_mode() ends that)"
    return None
