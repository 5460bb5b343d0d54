"""What methods act on that read a part of a cache and keep all of it: attention of one token to all before it."""

from __future__ import annotations

import re

from elision.errors import BadInput
from elision.ir.mask import Mask
from elision.ir.program import Program
from elision.ir.states import KV
from elision.ir.walk import Site, sites
from elision.passes.kv.caches import Cached, partly


def readable(program: Program, by: str, extras: tuple[str, ...] = ("sinks",)) -> dict[str, int]:
    """The caches that `step` reads by a causal mask, by name the layer that reads them. Layers with a window, which reads little
    already, and attention to another stream are left as they are. Raises BadInput if nothing is left, and for caches that another
    method has compressed or reads in part. ``extras``: operands of attention that the method can cope with."""
    cached, found = Cached(program, by), {}
    masks = set()
    for site in (s for s in sites(program, program.entries["step"]) if s.value.op == "attend"):
        mask, (name, type) = site.attr("mask"), site.state(site.value.args[1])
        masks.add(str(mask))
        if name not in cached.states or not isinstance(mask, Mask) or mask.kind != "causal":
            continue
        _check(site, name, type, by, extras)  # type: ignore[arg-type]
        number = re.match(r"(\d+)\.", site.frame.label)
        if number is None:
            raise BadInput(f"{by}: the attention to {name} is in no layer of the stream of {program.name}")
        found[name] = int(number[1])
    if not found:
        raise BadInput(f"{by}: {program.name} has no attention to all tokens before; its masks are {', '.join(sorted(masks))}")
    return found


def _check(site: Site, name: str, type: KV, by: str, extras: tuple[str, ...]) -> None:
    if type.keyed_by != "position" or len(type.main) != 1 or partly(site):
        raise BadInput(f"{by}: {name} has been compressed by another pass, or is read in part; apply one of them")
    if more := set(site.value.attr("extras") or ()) - set(extras):
        known = {"slopes": "ALiBi", "sinks": "learnt sinks"}
        what = " and ".join(known[x] for x in sorted(more))
        raise BadInput(f"{by}: {site.frame.label} attends with {what}, which the method does not know")
