"""The operator ``elision::attention``: what a captured model calls where it attended.

One opaque node per attention site keeps the graph small, and keeps every fact (scale, mask, soft cap, sinks)
that the different attention kernels of the model's library would spread over many nodes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
    window: int,
    causal: bool,
) -> Tensor:
    """Softmax attention with grouped heads, materialised scores and a softmax in float32 at least.

    ``q [B, H, T, D]``, ``k [B, Hkv, S, D]``, ``v [B, Hkv, S, Dv]`` give ``[B, T, H, Dv]``; query head ``h``
    reads key head ``h // (H / Hkv)``. ``mask`` broadcasts to ``[B, H, T, S]``: boolean (True attends) or
    additive.
    Scores are ``q.k * scale``, then ``softcap * tanh(s / softcap)`` if ``softcap > 0`` (Gemma 2,
    arXiv:2408.00118, section 2). ``sinks [H]`` are logits that take part in the softmax and carry no value
    (gpt-oss). ``causal`` and ``window`` (``i - j < window``, 0 is none) restrict further; the query rows are
    the last ``T`` of the ``S`` entries.
    """
    groups = q.shape[1] // k.shape[1]
    keys, values = k, v
    if groups > 1:
        keys, values = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = torch.matmul(q, keys.transpose(2, 3)) * scale
    if softcap > 0:
        scores = torch.tanh(scores / softcap) * softcap
    lowest = torch.finfo(scores.dtype).min
    if mask is not None:
        scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
    if causal or window > 0:
        j = torch.arange(k.shape[2], device=q.device)
        i = torch.arange(q.shape[2], device=q.device)[:, None] + (k.shape[2] - q.shape[2])
        hidden = torch.zeros_like(i > j)
        if causal:
            hidden = hidden | (j > i)
        if window > 0:
            hidden = hidden | (i - j >= window)
        scores = scores.masked_fill(hidden, lowest)
    wide = torch.promote_types(scores.dtype, torch.float32)
    if sinks is None:
        probabilities = torch.softmax(scores, dim=-1, dtype=wide)
    else:
        sink = sinks.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1).to(scores.dtype)
        probabilities = torch.softmax(torch.cat([scores, sink], dim=-1), dim=-1, dtype=wide)[..., :-1]
    out = torch.matmul(probabilities.to(values.dtype), values)
    return out.transpose(1, 2).contiguous()


attention = torch.library.custom_op("elision::attention", reference_attention, mutates_args=())


@attention.register_fake
def _shape(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
    window: int,
    causal: bool,
) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[-1])


ATTENTION = torch.ops.elision.attention.default
