"""Is a compiled model right? Its outputs and its tokens against those of transformers without a cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from elision.runtime.model import Model

PROMPT, NEW = 20, 24
#: Greedy tokens are compared where the best two logits differ by this much, relative to the largest: rounding cannot swap them.
MARGIN = 1e-4
#: So many different tokens can show a fault of positions or of the cache.
VARIED = 6


def shaken(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model with random weights so large that greedy decoding varies, and no norm weight is exactly one."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        p.data = noise * (1.0 if "embed" in name else 2.0 * p.shape[-1] ** -0.5) if p.dim() > 1 else p.data + 0.1 * noise
    return model.eval()


def assert_right(original: Any, compiled: Model, vocabulary: int = 128) -> None:
    """All outputs for two sequences, to 1e-5 of the largest value."""
    ids = torch.randint(3, vocabulary, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = original(ids)
    for name, value in compiled(ids).items():
        error = float((value - want[name]).abs().max()) / float(want[name].abs().max())
        assert error <= 1e-5, f"{name} differs by {error:.1e} of the largest value"


def assert_same_tokens(original: Any, compiled: Model, vocabulary: int = 128, least: int = 16) -> int:
    """At least that many greedy tokens through the cache equal those of the original without one; how many of them are
    different from each other. Of several prompts the one is taken whose tokens are clear, and vary if any do."""
    prompts = (torch.randint(3, vocabulary, (1, PROMPT), generator=torch.Generator().manual_seed(2 + i)) for i in range(6))
    best = torch.empty(1, 0)
    for want in (greedy(original, p) for p in prompts):
        if want.shape[1] - PROMPT >= least and _different(want) > _different(best):
            best = want
        if _different(best) >= VARIED:
            break
    assert best.numel(), f"no prompt has {least} tokens that are clear"
    found = compiled.generate(best[:, :PROMPT], max_new_tokens=best.shape[1] - PROMPT, eos_token_id=[])
    assert torch.equal(found, best), f"tokens {found[0, PROMPT:].tolist()} instead of {best[0, PROMPT:].tolist()}"
    return _different(best)


def _different(tokens: torch.Tensor) -> int:
    return len(set(tokens[0, PROMPT:].tolist()))


def greedy(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """The prompt and the model's own greedy tokens without a cache, up to the first that is not clear."""
    with torch.no_grad():
        for _ in range(NEW):
            logits = model(tokens, use_cache=False).logits[0, -1]
            best, ids = logits.topk(2)
            if float(best[0] - best[1]) < MARGIN * float(logits.abs().max()):
                break
            tokens = torch.cat((tokens, ids[:1][None]), 1)
    return tokens
