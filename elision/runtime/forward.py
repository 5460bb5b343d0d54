"""The model's own forward: padded inputs become ragged tokens, and the results are put back in their places."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from elision.errors import BadInput
from elision.ir.program import vocabulary
from elision.ir.tokens import Tokens
from elision.ir.types import DTYPES
from elision.ir.value import Graph, Value

#: Forward arguments that ask for what is done anyway.
_NATURAL = {
    "use_cache": False,
    "output_attentions": False,
    "output_hidden_states": False,
    "interpolate_pos_encoding": False,
    "return_dict": True,
    "logits_to_keep": 0,
}


@dataclass(frozen=True)
class Batch:
    """What the interpreter runs on, and where the tokens belong: ``keep bool[B, T]`` marks those that are there; None for
    images, whose tokens the program makes. ``positions``: how many a sequence needs."""

    inputs: dict[str, Tensor]
    axes: dict[str, Tokens]
    keep: Tensor | None
    rows: int
    positions: int


def batch(graph: Graph, given: Mapping[str, Any]) -> Batch:
    """The inputs of the entry ``graph`` from those of the model's forward (None: left out). Raises BadInput for what it does
    not take, and for an ``attention_mask`` without a row's first token if a result is computed from it."""
    formals = {("input_ids" if graph.names[v] == "ids" else graph.names[v]): v for v in graph.inputs}
    main = next(iter(formals))
    known = [main, "attention_mask", "position_ids", *list(formals)[1:]] if main == "input_ids" else list(formals)
    other = [n for n, v in given.items() if n not in known and v is not None and v is not _NATURAL.get(n, ...)]
    if other:
        raise BadInput(f"forward arguments {', '.join(other)} are not supported; expected {', '.join(known)}")
    if main != "input_ids":
        images = {name: _images(name, v, given.get(name)) for name, v in formals.items()}
        rows = len(images[main])
        return Batch(images, {"b": Tokens.chunk([1] * rows, [0] * rows)}, None, rows, 0)
    ids, keep = check_ids(given.get(main), given.get("attention_mask"), vocabulary(graph, formals[main]))
    row, column = keep.nonzero(as_tuple=True)
    if not len(row):
        raise BadInput(f"attention_mask {list(keep.shape)} leaves no token; expected at least one 1")
    if any(_per_sequence(v) for v in graph.outputs) and not bool(keep[:, 0].all()):
        missing = int((~keep[:, 0]).nonzero()[0])
        raise BadInput(
            f"attention_mask leaves out the first token of row {missing}, which a result is computed from: pad on the right"
        )
    pos = _positions(given.get("position_ids"), ids)[row, column]
    if int(pos.min()) < 0 or bool((pos[1:] <= pos[:-1])[row[1:] == row[:-1]].any()):
        raise BadInput("position_ids: expected positions from 0 that increase along every row")
    tokens = {"ids": ids[row, column]}
    for name, value in list(formals.items())[1:]:
        tokens[name] = _more_ids(name, given.get(name), ids, keep, vocabulary(graph, value))[row, column]
    return Batch(tokens, {"t": Tokens(row, pos, len(ids))}, keep, len(ids), int(pos.max()) + 1)


def outputs(graph: Graph, names: tuple[str, ...], of: Batch, found: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """The results by name: ``[B, T, ..]`` with zeros at padding, or ``[B, ..]`` for one per sequence."""
    placed: dict[str, Tensor] = {}
    for name, value, x in zip(names, graph.outputs, found, strict=True):
        if _per_sequence(value):
            placed[name] = x
        elif of.keep is None or len(x) == of.keep.numel():
            placed[name] = x.view(of.rows, -1, *x.shape[1:])
        else:
            placed[name] = x.new_zeros((*of.keep.shape, *x.shape[1:]))
            placed[name][of.keep] = x
    return placed


def check_ids(ids: Any, mask: Any, vocab: int, name: str = "token ids") -> tuple[Tensor, Tensor]:
    """Token ids ``[B, T]`` and which of them are there, ``bool[B, T]``. Raises BadInput for anything else."""
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64 or ids.dim() != 2 or ids.numel() == 0:
        raise BadInput(f"{name}: expected a LongTensor [B, T] with at least one token, got {_shown(ids)}")
    mask = torch.ones_like(ids) if mask is None else mask
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        shown = str(list(mask.shape)) if isinstance(mask, Tensor) else type(mask).__name__
        raise BadInput(
            f"attention_mask {shown} does not fit the token ids {list(ids.shape)}: expected a tensor of the same shape"
        )
    keep = mask.bool()
    wrong = ids[keep & ((ids < 0) | (ids >= vocab))]
    if len(wrong):
        raise BadInput(f"token id {int(wrong[0])}; the vocabulary has 0 to {vocab - 1}")
    return ids, keep


def _more_ids(name: str, given: Any, ids: Tensor, keep: Tensor, vocab: int) -> Tensor:
    """Ids beside the token ids, such as their types: zeros where they are left out."""
    if given is None:
        return torch.zeros_like(ids)
    if not isinstance(given, Tensor) or given.dtype != torch.int64 or given.shape != ids.shape:
        raise BadInput(f"{name}: expected a LongTensor {list(ids.shape)}, got {_shown(given)}")
    wrong = given[keep & ((given < 0) | (given >= vocab))]
    if len(wrong):
        raise BadInput(f"{name}: {int(wrong[0])} is not one of 0 to {vocab - 1}")
    return given


def _images(name: str, value: Value, given: Any) -> Tensor:
    shape = value.tensor.features
    if not isinstance(given, Tensor) or not given.is_floating_point() or tuple(given.shape[1:]) != shape or not len(given):
        raise BadInput(f"{name}: expected floats [B, {', '.join(map(str, shape))}], got {_shown(given)}")
    return given.to(DTYPES[value.tensor.dtype])


def _positions(position_ids: Tensor | None, ids: Tensor) -> Tensor:
    """The positions of the tokens, ``[B, T]``: counted along the row, padding too, unless given as ``[B or 1, T]``."""
    if position_ids is None:
        return torch.arange(ids.shape[1]).expand_as(ids)
    shape = position_ids.shape
    if position_ids.dtype != torch.int64 or len(shape) != 2 or shape[1] != ids.shape[1] or shape[0] not in (1, len(ids)):
        expected = f"expected a LongTensor {list(ids.shape)} or {[1, ids.shape[1]]}"
        raise BadInput(f"position_ids: {expected}, got {position_ids.dtype} {list(shape)}")
    return position_ids.expand_as(ids)


def _per_sequence(output: Value) -> bool:
    """One value per sequence: its axis was taken from that of the tokens."""
    axis = output.tensor.tokens
    return axis is not None and axis.parent is not None


def _shown(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
