"""Does attention see exactly the valid tokens? Padding does not exist in the IR, so a captured mask may hide padding and no more."""

from __future__ import annotations

import torch
from torch import fx

from elision.frontend.capture import Captured
from elision.frontend.classify import visible
from elision.frontend.evaluate import evaluate
from elision.ir.mask import Mask


def validity(captured: Captured) -> fx.Node | None:
    """The input that says which tokens are valid, if the model was captured with one."""
    return next((n for n in captured.graph.nodes if captured.kinds.get(n.name) == "valid"), None)


def hides_padding(captured: Captured, node: fx.Node, mask: Mask) -> bool:
    """``node`` (a mask ``[.., T, T]`` of the graph) shows every valid query the valid keys that ``mask`` shows, and no others.

    It is evaluated on sequences padded on the right, on the left, and with holes, at two lengths and two first positions.
    """
    given = validity(captured)
    if given is None:
        return True
    for length, first in ((20, 0), (33, 7)):
        at = torch.arange(first, first + length)
        valid = _patterns(length)
        value = given.meta["val"]
        (found,) = evaluate(captured, [node], at.expand(valid.shape).contiguous(), given={given: valid.to(value.dtype)})
        seen = visible(found)
        if seen is None or seen.dim() < 3:
            return False
        try:
            seen = torch.broadcast_to(seen, (len(valid), *seen.shape[1:-2], length, length)).reshape(len(valid), -1, length, length)
        except RuntimeError:
            return False
        want = (mask.visible(at[:, None], at) & valid[:, None]).unsqueeze(1)
        if not bool((seen == want)[valid[:, None, :, None].expand_as(seen)].all()):
            return False
    return True


def _patterns(length: int) -> torch.Tensor:
    """``bool [4, length]``: all valid, padded on the right, padded on the left, with holes."""
    at = torch.arange(length)
    return torch.stack((at >= 0, at < length - 5, at >= 3, at % 3 != 1))
