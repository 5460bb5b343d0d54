"""Attention sites: what an attention operator of a captured graph says, whichever operator it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from elision.frontend.attention import ATTENTION


@dataclass(frozen=True)
class AttentionSite:
    """One attention operator: its operands, and its attributes as plain numbers. ``mask`` is a value of the graph or
    None; ``window`` 0 is none."""

    node: fx.Node
    q: fx.Node
    k: fx.Node
    v: fx.Node
    mask: fx.Node | None
    sinks: fx.Node | None
    scale: float
    softcap: float
    window: int
    causal: bool


def attention_site(node: fx.Node) -> AttentionSite:
    """The site of an ``elision::attention`` or ``aten::scaled_dot_product_attention`` node."""
    args: tuple[Any, ...] = node.args
    if node.target is ATTENTION:
        q, k, v, mask, sinks, scale, softcap, window, causal = args
        return AttentionSite(node, q, k, v, mask, sinks, scale, softcap, window, causal)
    given = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args, strict=False)) | dict(node.kwargs)
    q = given["query"]
    scale = given.get("scale")
    return AttentionSite(
        node=node,
        q=q,
        k=given["key"],
        v=given["value"],
        mask=given.get("attn_mask"),
        sinks=None,
        scale=float(q.meta["val"].shape[-1] ** -0.5 if scale is None else scale),
        softcap=0.0,
        window=0,
        causal=bool(given.get("is_causal", False)),
    )
