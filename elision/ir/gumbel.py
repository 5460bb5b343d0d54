"""Scores of a noisy softmax: Gumbel noise on logits, and a temperature that rises (Keyformer, Adnan et al. 2024).

The noise is a function of (seed, query head, position of the query, position of the key) alone, so drafting, batches and the
order of entries change nothing; the layers share it. Bits come from the mixer ``lowbias32`` (Wellons 2018).
"""

from __future__ import annotations

import torch

from elision.ir.states import Gumbel

GOLDEN = 0x9E3779B9
#: Of the mixer: shift to the right, multiply, in turns.
SHIFTS, FACTORS = (16, 15, 16), (0x7FEB352D, 0x846CA68B)
_LOW = 0xFFFFFFFF


def mixed(x: torch.Tensor) -> torch.Tensor:
    """32 well mixed bits for 32 bits, in int64."""
    x = x & _LOW
    for shift, factor in zip(SHIFTS, FACTORS, strict=False):
        x = ((x ^ (x >> shift)) * factor) & _LOW
    return x ^ (x >> SHIFTS[-1])


def noise(seed: int, head: torch.Tensor, q_pos: torch.Tensor, k_pos: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel numbers, float32 of the shape that the three (int64) broadcast to; between -2.9 and 16.7."""
    key = mixed(mixed(seed + GOLDEN * (head + 1)) + q_pos)
    bits = mixed(key ^ ((k_pos * GOLDEN) & _LOW))
    uniform = ((bits >> 9).double() + 0.5) * 2.0**-23
    return -(-uniform.log()).log().float()


def temperature(gumbel: Gumbel, q_pos: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
    """tau of queries at ``q_pos`` after prompts of so many tokens, float32."""
    share = ((q_pos - prompt + 1) / gumbel.steps).clamp(0, 1)
    return gumbel.start + (gumbel.end - gumbel.start) * share


def noisy(
    logits: torch.Tensor, gumbel: Gumbel, head: torch.Tensor, q_pos: torch.Tensor, k_pos: torch.Tensor, prompt: torch.Tensor
) -> torch.Tensor:
    """The softmax over the last axis of ``(logits + amplitude g) / tau``; zeros where all are -inf. ``logits``: the largest is
    about 0; the rest broadcasts with them."""
    g = noise(gumbel.seed, head, q_pos, k_pos) * gumbel.amplitude
    weight = ((logits + g) / temperature(gumbel, q_pos, prompt)).exp()
    total = weight.sum(-1, keepdim=True)
    return weight / torch.where(total > 0, total, 1)
