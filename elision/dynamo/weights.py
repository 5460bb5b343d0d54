"""Whether a module is still the one that a program was made of: its weights, and what else its code reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

_SAMPLES = 4


class Weights:
    """Tensors as they were. Writes count torch's versions, which a write through ``.data`` leaves as they are: of those only
    are seen that change one of a few elements of each tensor (all of it scaled, say). What they miss,
    ``torch._dynamo.reset()`` makes good. The tensors are kept, so that no others get their addresses."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._kept, self._versions = tuple(tensors), tuple(map(version, tensors))
        groups: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            if tensor.numel():
                groups.setdefault(tensor.dtype, []).append(_sampled(tensor.detach()))
        self._samples = list(groups.values())
        self._values = self._read()

    def same(self, tensors: Sequence[Tensor]) -> bool:
        """``tensors`` are those that these were, as far as can be told."""
        return tuple(map(version, tensors)) == self._versions and all(map(torch.equal, self._values, self._read()))

    def _read(self) -> list[Tensor]:
        """The sampled bytes, for each dtype: equal also where they are no numbers."""
        return [torch.cat(views).view(torch.uint8) for views in self._samples]


def _sampled(tensor: Tensor) -> Tensor:
    """A view of a few elements between the first and the last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    count = min(_SAMPLES, last + 1)
    return tensor.as_strided((count,), (max(last // max(count - 1, 1), 1),), tensor.storage_offset())


def tensors(module: nn.Module) -> tuple[Tensor, ...]:
    return (*module.parameters(), *module.buffers())


def version(tensor: Tensor) -> tuple[int, int]:
    """Changes with every write to the tensor but those through its ``.data`` (tensors of inference mode do not count theirs)."""
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


def settings(module: nn.Module) -> tuple[Any, ...]:
    """What the code of a module reads beside tensors: plain attributes of all its modules, and their configurations."""
    modules = list(module.modules())
    configs: dict[int, Any] = {id(c): c for m in modules if hasattr(c := getattr(m, "config", None), "to_json_string")}
    plain = [(n, repr(v)) for m in modules for n, v in (("", type(m)), *sorted(vars(m).items())) if _is_plain(v)]
    return tuple(c.to_json_string() for c in configs.values()), tuple(plain)


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, int | float | str | type | torch.dtype)
