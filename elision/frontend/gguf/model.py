"""A model of transformers from a GGUF file: its configuration, its weights decoded, and the blocks that they are stored in."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from elision.errors import BadInput
from elision.frontend.gguf.architecture import architecture_of
from elision.frontend.gguf.configuration import configuration, heads
from elision.frontend.gguf.container import GGUF
from elision.ir.blocks import Stored

#: Tensors that are no weights of the model: factors of rotary frequencies, and frequencies that old files state.
_NO_WEIGHTS = re.compile(r"rope_freqs\.weight|rope_factors_(long|short)\.weight|blk\.\d+\.attn_rot_embd(\.weight)?")
_LAYER = re.compile(r"(?<=blk\.)\d+(?=\.)")


@dataclass(frozen=True)
class Weight:
    """A parameter and the tensors of the file that it is made of, in order along its second last axis."""

    tensors: tuple[str, ...]
    rows: Tensor | None = None
    transposed: bool = False
    offset: float = 0.0

    def shape(self, file: GGUF) -> tuple[int, ...]:
        parts = [file.tensors[t].shape for t in self.tensors]
        if len(parts) > 1:
            return (*parts[0][:-2], sum(p[-2] for p in parts), parts[0][-1])
        return parts[0][::-1] if self.transposed else parts[0]

    def decode(self, file: GGUF, dtype: torch.dtype) -> Tensor:
        """The parameter. The difference from a stored sum is taken in float32, as llama.cpp's files hold the sum."""
        parts = [file.stored(t).decode() for t in self.tensors]
        value = torch.cat(parts, -2) if len(parts) > 1 else parts[0]
        if self.rows is not None:
            value = value[self.rows]
        if self.offset:
            value = value - self.offset
        if self.transposed:
            value = value.T
        in_file = file.tensors[self.tensors[0]].format == "F32"  # decoded without a copy, and the file may go away
        return value.to(dtype, copy=in_file).contiguous()

    def stored(self, file: GGUF) -> Stored | None:
        """The blocks of a weight that is stored as it is, but for the order of its rows; None for any other."""
        parts = [file.stored(t) for t in self.tensors]
        if len({p.format for p in parts}) > 1 or self.transposed or self.offset:
            return None
        return Stored(parts[0].format, parts[0].blocks, self.rows, tuple(p.blocks for p in parts[1:]))


def load(file: GGUF, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict[str, Stored]]:
    """The model in ``dtype`` and, by parameter name, the blocks of its weights (views of the file). Raises BadInput."""
    import transformers

    config = configuration(file)
    kind: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with torch.device("meta"):
        empty = kind(config)
    weights = dict(_weights(file, config))
    _match(file, weights, empty)
    with _one_thread():
        values = {name: weight.decode(file, dtype) for name, weight in weights.items()}
    model = kind.from_pretrained(None, config=config, state_dict=values, dtype=dtype)
    model.config.name_or_path = str(file.path)
    if "rope_freqs.weight" in file.tensors:
        _scale_frequencies(file, model)
    stored = {name: found for name, weight in weights.items() if (found := weight.stored(file)) is not None}
    return model.eval(), stored


def _weights(file: GGUF, config: Any) -> Iterator[tuple[str, Weight]]:
    """The parameters that the tensors of the file make up."""
    architecture = architecture_of(file)[1]
    queries, grouped = heads(config)
    taken: set[str] = set()
    for layer in range(config.num_hidden_layers):
        for parameter, tensors in architecture.joined.items():
            found = tuple(t.format(layer) for t in tensors)
            if all(t in file.tensors for t in found):
                taken.update(found)
                yield parameter.format(layer), Weight(found)
    for name, info in file.tensors.items():
        if name in taken or _NO_WEIGHTS.fullmatch(name):
            continue
        number = _LAYER.search(name)
        base, _, suffix = _LAYER.sub("{}", name).rpartition(".")
        module = architecture.names.get(base)
        if module is None or suffix not in ("weight", "bias"):
            raise BadInput(f"{file.path}: the tensor {name!r} is not known in models of its architecture; convert the model anew")
        order = architecture.rows.get(base)
        rows = None if order is None else order(info.shape[0], queries, grouped)
        offset = architecture.norm_offset if base.endswith("norm") else 0.0
        transposed = base in architecture.transposed and suffix == "weight"
        yield f"{module.format(number and number[0])}.{suffix}", Weight((name,), rows, transposed, offset)


def _match(file: GGUF, weights: Mapping[str, Weight], empty: nn.Module) -> None:
    """Raises BadInput unless the file has exactly the weights of the model, in their shapes."""
    expected = {name: tuple(value.shape) for name, value in empty.state_dict().items()}
    tied = getattr(empty, "all_tied_weights_keys", None) or {}
    missing = [name for name in expected if name not in weights and name not in tied]
    if missing:
        raise BadInput(f"{file.path} lacks the weight {missing[0]!r} and {len(missing) - 1} more; expected a whole model")
    for name, weight in weights.items():
        if name not in expected:
            raise BadInput(f"{file.path}: the tensor {weight.tensors[0]!r} has no place in the model that the metadata describe")
        if weight.shape(file) != expected[name]:
            shapes = f"{weight.shape(file)}, not {expected[name]}"
            raise BadInput(f"{file.path}: the tensor {weight.tensors[0]!r} has the shape {shapes} as the metadata say")


def _scale_frequencies(file: GGUF, model: nn.Module) -> None:
    """Divide rotary frequencies by the file's factors, which is how it states the scaling of Llama 3."""
    factors = file.stored("rope_freqs.weight").decode()
    for module in model.modules():
        for name in ("inv_freq", "original_inv_freq"):
            if isinstance(found := getattr(module, name, None), Tensor):
                if found.shape != factors.shape:
                    raise BadInput(f"{file.path}: rope_freqs.weight has {len(factors)} factors for {len(found)} frequencies")
                setattr(module, name, found / factors)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Decoding is many short operations: a team of threads gains little on them and, where cores are busy, waits for ever."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
