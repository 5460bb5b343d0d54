"""Rule axis: the tokens that verify and emit read are all there, and no op sees fewer tokens than it was raised for.

Example: pruning in `step`. The logits come out on ``draft(t)/kept``, so the logits of a dropped node cannot be verified.
"""

from __future__ import annotations

from collections.abc import Iterator

from elision.errors import IllegalProgram
from elision.ir.mask import Mask
from elision.ir.rules.view import View
from elision.ir.types import Axis, Tensor
from elision.ir.value import Value
from elision.ir.walk import made_axis


def axis(view: View) -> Iterator[IllegalProgram]:
    """Every axis is made once; nothing is merged where attention is causal; opaque operators see all tokens of a call (or each
    row's last), no trees."""
    yield from _made_twice(view)
    yield from _merged(view)
    yield from _opaque(view)


def verified(view: View) -> Iterator[IllegalProgram]:
    """The logits of `step` are on the draft's own axis. Checked first of all: no round can be built against such a step."""
    step = view.program.entries.get("step")
    if step is None:
        return
    ids, logits = step.inputs[0].type, step.outputs[0].type
    if isinstance(ids, Tensor) and isinstance(logits, Tensor) and ids.tokens != logits.tokens:
        yield IllegalProgram(
            "axis",
            f"the logits of step are on {logits.tokens}, but the drafted tokens on {ids.tokens}",
            sides="step: a selection of tokens, read by verify in the round",
            because="verify and emit need the logits of every drafted token",
            help="restrict in prefill only, or lift the tokens back to the draft's axis before the head",
        )


def _made_twice(view: View) -> Iterator[IllegalProgram]:
    for graph in view.program.graphs().values():
        makers: dict[Axis, Value] = {}
        for value in graph.values:
            at = made_axis(value)
            first = makers.setdefault(at, value) if at is not None else value
            if first is not value:
                yield IllegalProgram(
                    "axis",
                    f"{at} is made twice in {graph.name}",
                    sides=f"{graph.name}: {first.op} and {value.op}",
                    because="values on one axis have the same tokens, and two selections need not",
                    help="give each selection an axis of its own name",
                )


def _merged(view: View) -> Iterator[IllegalProgram]:
    for name, reached in view.sites.items():
        seen = [s.attr("mask") for s in reached if s.value.op == "attend"]
        masks = {str(m) for m in seen if isinstance(m, Mask) and m.kind != "full"}
        for site in reached:
            if masks and site.value.op == "merge" and site.top.attr("target") not in view.program.entries:
                yield IllegalProgram(
                    "axis",
                    f"tokens are merged in {name}, whose attention is {', '.join(sorted(masks))}",
                    sides=f"{site.where}: merge, before attention with that mask",
                    because="a merged token carries later tokens back across the causal frontier",
                    help="merge in encoders only; in a decoder drop tokens (restrict) instead",
                )


def _opaque(view: View) -> Iterator[IllegalProgram]:
    for name, reached in view.sites.items():
        for site in reached:
            at = site.axis(site.value.args[0]) if site.value.op == "pad" else None
            if at is None:
                continue
            if view.chosen(site, at) and site.top.attr("target") not in view.program.entries:
                yield IllegalProgram(
                    "axis",
                    f"an operator that was not raised runs on {at}, where tokens are missing",
                    sides=f"{site.where}: pad, after a selection of tokens",
                    because="it may read neighbouring tokens, and was raised for contiguous ones",
                    help="lift the tokens back before it, or select after it",
                )
            if at.drafted and view.makers.get((name, at), "root") != "root":
                yield IllegalProgram(
                    "axis",
                    f"an operator that was not raised runs on {at}, a tree of drafted tokens",
                    sides=f"{site.where}: pad, and {view.makers[name, at]} in {name}",
                    because="it may read neighbouring tokens, and neighbours in a tree are not neighbours in the text",
                    help="decode this model without drafts",
                )
