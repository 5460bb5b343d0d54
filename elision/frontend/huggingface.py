"""What is special about models of the ``transformers`` library: the attention and experts registries."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from elision.errors import BadInput
from elision.frontend.attention import ATTENTION

# The name under which our attention function is registered with transformers.
IMPLEMENTATION = "elision"


def recognises(model: nn.Module) -> bool:
    """The model carries a transformers configuration."""
    return hasattr(getattr(model, "config", None), "model_type")


@contextmanager
def one_attention(model: nn.Module) -> Iterator[None]:
    """Inside, each attention site of ``model`` that uses the registry calls ``elision::attention``."""
    try:
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    except ImportError as error:
        raise BadInput(
            "the model has a transformers configuration, but transformers (5 or newer) cannot be imported; "
            "install it with: pip install 'transformers>=5'"
        ) from error
    ALL_MASK_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, _mask)
    ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, _attend)
    configs = {id(c): c for m in model.modules() for c in _configs(getattr(m, "config", None))}
    before = [(c, c._attn_implementation_internal) for c in configs.values()]
    try:
        for config, _ in before:
            config._attn_implementation_internal = IMPLEMENTATION
        yield
    finally:
        for config, name in before:
            config._attn_implementation_internal = name


@contextmanager
def plain_experts(model: nn.Module) -> Iterator[None]:
    """Inside, experts run one by one in a loop, in any dtype (the grouped product of torch knows no float64)."""
    configs = {id(c): c for m in model.modules() for c in _configs(getattr(m, "config", None))}
    before = [(c, getattr(c, "_experts_implementation_internal", None)) for c in configs.values()]
    try:
        for config, _ in before:
            config._experts_implementation_internal = "eager"
        yield
    finally:
        for config, name in before:
            config._experts_implementation_internal = name


def _configs(config: Any) -> Iterator[Any]:
    """A configuration and the configurations inside it (text, vision)."""
    if hasattr(config, "_attn_implementation_internal"):
        yield config
        for name in getattr(config, "sub_configs", ()):
            yield from _configs(getattr(config, name, None))


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    # A mask that is left out cannot be told from one that was never there, so it is always built.
    from transformers.masking_utils import sdpa_mask

    mask: Tensor | None = sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})
    return mask


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls: it records what it is told and decides nothing."""
    if position_bias is not None:
        lowest = torch.finfo(position_bias.dtype).min
        if attention_mask is None:
            attention_mask = position_bias
        elif attention_mask.dtype == torch.bool:
            attention_mask = torch.where(attention_mask, position_bias, lowest)
        else:
            attention_mask = attention_mask + position_bias
    # Where there is a mask it says all; the flags count only without one (as in transformers itself).
    bare = attention_mask is None
    causal = bool(getattr(module, "is_causal", False) if is_causal is None else is_causal)
    out = ATTENTION(
        query,
        key,
        value,
        attention_mask,
        s_aux,
        float(query.shape[-1] ** -0.5 if scaling is None else scaling),
        float(softcap or 0.0),
        int(sliding_window or 0) if bare else 0,
        causal and bare,
    )
    return out, None
