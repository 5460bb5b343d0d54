"""A decode step on the caller's cache: one token of every row, keys and values in transformers' static cache.

The caller's tensors are the cache: other code may read or write them between calls. Native code reads keys in blocks of its own
(`elision.ir.layout`), so a mirror is kept beside them: new rows are written to both, and what others wrote, or what belongs to
another cache, is seen by the tensors' versions and read anew. A row's mask says which slots it sees; padding is not mirrored. The
mirror keeps the caller's tensors alive until it is that of another cache, so an address is never that of another tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from elision.dynamo.forward import Forward, compile_steps
from elision.dynamo.frame import Frame
from elision.dynamo.graph import CompiledGraph, close
from elision.dynamo.weights import version
from elision.errors import UnsupportedModel
from elision.ir.states import KV, Dense, Float
from elision.ir.store import KVStore
from elision.ir.tokens import Tokens
from elision.ir.types import DTYPES
from elision.runtime.model import Model

INPUTS = {"input_ids", "position_ids", "attention_mask"}


class Layer:
    """The cache of a layer: ``keys``, ``values [B, H, S, D]``, and ``length []``, how many slots are written."""

    def __init__(self, keys: Tensor, values: Tensor, cumulative_length: Tensor) -> None:
        self.keys, self.values, self.length = keys, values, cumulative_length

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.keys, self.values, self.length


class Mirror:
    """The caller's cache as ``model`` reads it. ``seen bool[B, S]``: the slots that each row's entries came from."""

    def __init__(self, model: Model, layers: Sequence[Layer], seen: Tensor) -> None:
        self.seen, self.counts = seen.clone(), seen.sum(1)
        rows, _, self.slots, _ = layers[0].keys.shape
        self.stores: dict[str, Any] = {}
        tokens = Tokens.chunk(self.counts.tolist(), [0] * rows)
        row, slot = seen.nonzero(as_tuple=True)
        for (name, type), layer in zip(model.program.states.items(), layers, strict=True):
            assert isinstance(type, KV)
            store = self.stores[name] = KVStore(type, rows, self.slots + 1, DTYPES[model.program.meta["dtype"]])
            store.append(tokens, layer.keys[row, :, slot], layer.values[row, :, slot])
        self.layers, self.length = layers, int(layers[0].length)
        self.marked()

    def marked(self) -> None:
        """What the caller's tensors hold now is what is mirrored."""
        self.versions = [version(t) for layer in self.layers for t in layer.tensors]

    def counts_for(self, layer: Layer) -> bool:
        """``layer`` is the first one, and as long as is mirrored."""
        return self.versions[2] == version(layer.length)

    def holds(self, layers: Sequence[Layer], seen: Tensor) -> bool:
        """These are the caller's tensors that are mirrored, nobody has written to them, and the rows see the same of them."""
        return self.versions == [version(t) for layer in layers for t in layer.tensors] and torch.equal(self.seen, seen)

    def step(self, model: Model, ids: Tensor) -> Tensor:
        """The logits ``[B, 1, V]`` of the next token of every row, whose keys and values join both caches."""
        graph, rows = model.program.entries["prefill"], len(ids)
        at = Tokens.chunk([1] * rows, self.counts.tolist(), (self.counts + 1).tolist())
        axis = graph.inputs[0].tensor.tokens
        assert axis is not None
        logits = model._interpreter.run(graph, {**self.stores, "ids": ids.flatten()}, {axis.name: at})[0]
        b = torch.arange(rows)[:, None, None]
        for store, layer in zip(self.stores.values(), self.layers, strict=True):
            segment, heads = store.segments[0], torch.arange(layer.keys.shape[1])[:, None]
            for what, given in (("k", layer.keys), ("v", layer.values)):
                given[:, :, self.length] = segment.read(what, b, heads, self.counts[:, None, None], given.dtype)[:, :, 0]
            layer.length.add_(1)
        self.seen[:, self.length] = True
        self.counts, self.length = self.counts + 1, self.length + 1
        self.marked()
        return logits[:, None]


class StaticCacheGraph(CompiledGraph):
    """A graph that reads and writes the caller's static cache."""

    _mirror: Mirror | None = None

    def _before(self, args: Sequence[Any]) -> list[Layer]:
        return [Layer(*(t.clone() for t in layer.tensors)) for layer in _layers(self._frame, args)]

    def _bind(self, args: Sequence[Any], before: list[Layer], want: Sequence[Any]) -> Forward:
        inputs = self._inputs(args)
        if set(inputs) != INPUTS:
            expected = ", ".join(sorted(INPUTS))
            raise UnsupportedModel(f"a step on the caller's cache reads {', '.join(inputs)}; expected {expected}")
        found = compile_steps(self._frame.module, inputs, self._options)
        for model in (found.exact, found.model):
            _check_states(model, before)
        after = _layers(self._frame, args)
        mirror = Mirror(found.exact, [Layer(*(t.clone() for t in x.tensors)) for x in before], _seen(inputs, before))
        logits = mirror.step(found.exact, inputs["input_ids"])
        same = len(want) == 1 and isinstance(want[0], Tensor) and close(logits, want[0], None)
        pairs = ((a, b) for x, y in zip(mirror.layers, after, strict=True) for a, b in zip(x.tensors, y.tensors, strict=True))
        if not same or not all(close(a, b, None) for a, b in pairs):
            raise UnsupportedModel("a step on the caller's cache gives other logits, keys or values than the raised model")
        self._record.notes.append("the caller's static cache is mirrored")
        return found

    def _replaced(self, forward: Forward, args: Sequence[Any]) -> Sequence[Any]:
        inputs, layers = self._inputs(args), _layers(self._frame, args)
        with self._lock:
            known = self._mirror
            # A mirrored length saves reading the tensor, unless somebody has written to it (a cache that is reset).
            length = known.length if known is not None and known.counts_for(layers[0]) else int(layers[0].length)
            seen = _seen(inputs, layers, length)
            if known is None or not known.holds(layers, seen):
                self._mirror = known = Mirror(forward.model, layers, seen)
            known.layers = layers
            return [known.step(forward.model, inputs["input_ids"])]


def _layers(frame: Frame, args: Sequence[Any]) -> list[Layer]:
    return [Layer(**{what: args[place] for what, place in places.items()}) for places in frame.cache]


def _seen(inputs: Mapping[str, Tensor], layers: Sequence[Layer], length: int | None = None) -> Tensor:
    """The slots ``bool[B, S]`` that the rows see beside their new token's. Raises UnsupportedModel for a mask or positions of
    another kind than a causal mask with padding gives."""
    if any(t.is_inference() for layer in layers for t in layer.tensors):
        raise UnsupportedModel("a cache made in inference_mode does not say when it is written to; expected torch.no_grad()")
    ids, mask, at = (inputs[n] for n in ("input_ids", "attention_mask", "position_ids"))
    lengths = {int(layer.length) for layer in layers} if length is None else {length}
    rows, _, slots, _ = layers[0].keys.shape
    if ids.shape != (rows, 1) or mask.dtype != torch.bool or mask.shape != (rows, 1, 1, slots) or len(lengths) != 1:
        raise UnsupportedModel(f"ids {list(ids.shape)}, {mask.dtype} mask {list(mask.shape)}; expected a token of every row")
    (length,) = lengths
    seen = mask[:, 0, 0].clone()
    if length >= slots or not bool(seen[:, length].all()) or bool(seen[:, length + 1 :].any()):
        raise UnsupportedModel("the mask is not that of the next token")
    seen[:, length] = False
    if not torch.equal(at.expand(rows, 1)[:, 0], seen.sum(1)) or not bool(seen.any(1).all()):
        raise UnsupportedModel("the positions of new tokens are not how many tokens the rows see")
    return seen


def _check_states(model: Model, layers: Sequence[Layer]) -> None:
    """Raises UnsupportedModel unless the model's caches hold what the caller's do, each in its place."""
    program, types = model.program, list(model.program.states.values())
    if program.ticks or program.edits or len(types) != len(layers) or not all(isinstance(t, KV) for t in types):
        raise UnsupportedModel(f"the program of {program.name} has {len(types)} states, the caller {len(layers)} caches")
    for type, layer in zip(types, layers, strict=True):
        assert isinstance(type, KV)
        plain = len(type.main) == 1 and isinstance(type.main[0].slots, Dense) and isinstance(type.main[0].k, Float)
        widths = (layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3])
        if not plain or widths != (type.heads, type.dim, type.vdim) or type.present.partial:
            raise UnsupportedModel(f"{type} cannot be the caller's cache {list(layer.keys.shape)}")
