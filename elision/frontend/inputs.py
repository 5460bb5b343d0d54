"""The inputs that a model of ``transformers`` is traced with, from the signature of its forward and from its configuration."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from elision.errors import BadInput

Inputs = dict[str, Any]
ROWS, LENGTH = 2, 12


def examples(model: nn.Module) -> list[Inputs]:
    """Keyword arguments to trace ``model`` with: token ids alone, if it reads them, and two examples of all that it reads.

    Raises BadInput for a model that reads nothing that is known here.
    """
    known = inspect.signature(model.forward).parameters
    every = {n: x for n, make in _MAKE.items() if n in known and (x := make(model)) is not None}
    if not every:
        raise BadInput(f"{type(model).__name__} reads none of {', '.join(_MAKE)}; pass its inputs as example={{name: tensor}}")
    alone = {n: x for n, x in every.items() if n == "input_ids"}
    return [alone, every] if alone and len(every) > 1 else [every]


def left_out(model: nn.Module, captured: tuple[str, ...]) -> list[str]:
    """Inputs that the model reads and that it was captured without (a text model's images)."""
    known = inspect.signature(model.forward).parameters
    return [n for n in _MAKE if n in known and n not in captured and "input_ids" in captured]


def without_cache(model: nn.Module) -> Inputs:
    """The argument that leaves the cache out, if there is one; the model's configuration is changed to say the same."""
    for config in configs(getattr(model, "config", None)):
        if hasattr(config, "use_cache"):
            config.use_cache = False
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}


def assumed(
    model: nn.Module, kwargs: Inputs, expected: Mapping[str, Any], same: Callable[[Mapping[str, Any], Mapping[str, Any]], bool]
) -> Inputs:
    """The inputs that the model assumes where they are left out, so that they can be given: positions; and, where a token
    sees later ones, which tokens are valid and of what type they are.

    An input is among them only if giving it leaves the outputs the same (``same(found, expected)``).
    """
    known = inspect.signature(model.forward).parameters
    ids = kwargs.get("input_ids")
    found: Inputs = {}
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        return found
    candidates = {"position_ids": torch.arange(ids.shape[1], device=ids.device).expand_as(ids).contiguous()}
    if set(known) & {"attention_mask", "token_type_ids"} and _looks_ahead(model, kwargs, expected):
        candidates |= {"attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    for name, value in candidates.items():
        if name in known and name not in kwargs and same(model(**kwargs, **found, **{name: value}), expected):
            found[name] = value
    return found


def _looks_ahead(model: nn.Module, kwargs: Inputs, expected: Mapping[str, Any]) -> bool:
    """Other tokens behind it change what the first token gives; True also for a model that gives nothing per token."""
    ids = kwargs["input_ids"]
    name = next((n for n, x in expected.items() if isinstance(x, Tensor) and x.shape[:2] == ids.shape), None)
    if name is None:
        return True
    changed = torch.cat((ids[:, :1], ids[:, 1:].flip(1)), 1)
    before, after = expected[name][:, 0].double(), model(**{**kwargs, "input_ids": changed})[name][:, 0].double()
    return bool(((after - before).abs() > 1e-5 * before.abs().max()).any())


def _vocabulary(model: nn.Module) -> int:
    return next((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), 2)


def _ids(model: nn.Module) -> Tensor:
    ids = (torch.arange(3, 3 + ROWS * LENGTH, device=_device(model)) % _vocabulary(model)).reshape(ROWS, LENGTH)
    image = next((x for n in ("image_token_id", "image_token_index") if (x := _number(model, n)) is not None), None)
    size, patch = _number(model, "image_size"), _number(model, "patch_size")
    if image is None or not isinstance(size, int) or not isinstance(patch, int):
        return ids
    places = torch.full((ROWS, (size // patch) ** 2), image, device=ids.device)  # where the patches of an image go
    return torch.cat((ids[:, :3], places, ids[:, 3:]), 1)


def _decoder_ids(model: nn.Module) -> Tensor:
    return _ids(model)[:, :7].contiguous()  # another length than the encoder's


def _pixels(model: nn.Module) -> Tensor | None:
    size, channels = _number(model, "image_size"), _number(model, "num_channels")
    if size is None:
        return None
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return torch.randn(ROWS, channels or 3, height, width, generator=torch.Generator().manual_seed(0)).to(_dtype(model))


def _features(model: nn.Module) -> Tensor | None:
    bins, length = _number(model, "num_mel_bins"), _number(model, "max_source_positions")
    if bins is None or length is None:
        return None
    return torch.randn(ROWS, bins, 2 * length, generator=torch.Generator().manual_seed(0)).to(_dtype(model))


#: What can be made, by the name that transformers gives it.
_MAKE: dict[str, Callable[[nn.Module], Tensor | None]] = {
    "input_ids": _ids,
    "pixel_values": _pixels,
    "input_features": _features,
    "decoder_input_ids": _decoder_ids,
}


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters()), torch.float32)


def _number(model: nn.Module, name: str) -> Any:
    """A size from the model's configuration, or from one inside it."""
    return next((found for c in configs(getattr(model, "config", None)) if (found := getattr(c, name, None)) is not None), None)


def configs(config: Any) -> Iterator[Any]:
    """A configuration and the configurations inside it (text, vision)."""
    if config is not None:
        yield config
        for name in getattr(config, "sub_configs", ()):
            yield from configs(getattr(config, name, None))
