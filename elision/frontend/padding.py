"""Does attention see exactly the valid tokens? Padding does not exist in the IR: a captured mask hides padding, and no more."""

from __future__ import annotations

import torch
from torch import fx

from elision.errors import UnsupportedModel
from elision.frontend.capture import Captured
from elision.frontend.classify import visible
from elision.frontend.evaluate import evaluate
from elision.frontend.taint import Taint
from elision.ir.mask import Mask


def check_sources(captured: Captured, taint: Taint, mask: fx.Node | None) -> None:
    """Raises UnsupportedModel for a mask that is computed from more than positions and ``attention_mask``, and for attention
    without a mask in a model that has an ``attention_mask``."""
    if mask is None:
        if _validity(captured) is not None:
            raise UnsupportedModel("an attention site does not read the attention_mask, so it would see padding")
    elif "param" in taint[mask]:
        raise UnsupportedModel("its attention adds a learned bias by position to the scores, which attend cannot say")
    elif taint.token(mask):
        raise UnsupportedModel("an attention mask depends on token values; expected positions and attention_mask alone")


def check_padding(captured: Captured, node: fx.Node, mask: Mask, slopes: torch.Tensor | None = None) -> None:
    """Raises UnsupportedModel if the mask ``node`` (of class ``mask``, beside ALiBi of these slopes) shows padding, or hides more
    than that."""
    if not hides_padding(captured, node, mask, slopes):
        raise UnsupportedModel("an attention mask does not hide just the tokens that attention_mask marks as padding")


def _validity(captured: Captured) -> fx.Node | None:
    """The input that says which tokens are valid, if the model was captured with one."""
    return next((n for n in captured.graph.nodes if captured.kinds.get(n.name) == "valid"), None)


def hides_padding(captured: Captured, node: fx.Node, mask: Mask, slopes: torch.Tensor | None = None) -> bool:
    """``node`` (a mask ``[.., T, T]`` of the graph) shows every valid query the valid keys that ``mask`` shows, and no others.

    It is evaluated on sequences padded on the right, on the left, and with holes, at two lengths and two first positions.
    """
    given = _validity(captured)
    if given is None:
        return True
    for length, first in ((20, 0), (33, 7)):
        at = torch.arange(first, first + length)
        valid = _patterns(length)
        value = given.meta["val"]
        (found,) = evaluate(captured, [node], at.expand(valid.shape).contiguous(), given={given: valid.to(value.dtype)})
        seen = visible(found, slopes)
        if seen is None or seen.dim() < 3:
            return False
        if seen.shape[0] not in (1, len(valid)) or seen.shape[-2] not in (1, length) or seen.shape[-1] != length:
            return False
        seen = seen.expand(len(valid), *seen.shape[1:-2], length, length).reshape(len(valid), -1, length, length)
        want = (mask.visible(at[:, None], at) & valid[:, None]).unsqueeze(1)
        if not bool((seen == want)[valid[:, None, :, None].expand_as(seen)].all()):
            return False
    return True


def _patterns(length: int) -> torch.Tensor:
    """``bool [4, length]``: all valid, padded on the right, padded on the left, with holes."""
    at = torch.arange(length)
    return torch.stack((at >= 0, at < length - 5, at >= 3, at % 3 != 1))
