"""Rule address: an entry is found by its index only while no entry can be missing.

Example: ``select(kv_0, kept, rows)`` on a cache with keyed_by=position. Afterwards entry i does not hold position i, and whatever
finds entries by position (an overwrite by slot, a mask by index) hits another token.
"""

from __future__ import annotations

from collections.abc import Iterator

from elision.errors import IllegalProgram
from elision.ir.rules.view import View
from elision.ir.states import KV, Ring
from elision.ir.types import Tensor
from elision.ir.walk import Site


def address(view: View) -> Iterator[IllegalProgram]:
    """Eviction needs explicit positions and rows that this cache owns one by one; kept sets per head need ``keep=per_head`` and a
    kernel that reads such a cache; only an owned segment is moved or recoded."""
    for site in view.once("select", "flush", "recode"):
        name, type = site.state(site.value.args[0])
        assert isinstance(type, KV)
        yield from (_select if site.value.op == "select" else _move)(site, name, type)
    if "per_head" not in view.kernels.get("attend", ()):
        for site in view.once("attend"):
            name, type = site.state(site.value.args[1])
            if isinstance(type, KV) and type.keep == "per_head":
                yield IllegalProgram(
                    "address",
                    f"{name} keeps other entries in each head",
                    sides=f"{site.where}: attend over a cache with keep=per_head",
                    because="the kernel for attend on this target reads one list of entries for all heads",
                    help="keep=per_layer, with the scores summed over the heads",
                )


def _select(site: Site, name: str, type: KV) -> Iterator[IllegalProgram]:
    kept = site.actual(site.value.args[1])
    heads = kept.axes[1] if isinstance(kept, Tensor) else 1
    if type.keyed_by == "position":
        yield _illegal(
            site,
            f"{name} is keyed by position and entries are evicted from it",
            "after an eviction entry i no longer holds position i",
            "give the cache keyed_by=explicit",
        )
    if heads != 1 and type.keep != "per_head":
        yield _illegal(
            site,
            f"each of the {heads} heads of {name} keeps its own entries, but the cache has keep={type.keep}",
            "its heads share one list of positions",
            "sum the scores over the heads, or give the cache keep=per_head",
        )
    if all(s.shared or isinstance(s.slots, Ring) for s in type.main):
        yield _illegal(
            site,
            f"{name} has no segment to evict from",
            "a Ring drops its own oldest rows, and a shared segment is read-only",
            "evict from a Dense, Budget or Paged segment that the cache owns",
        )


def _move(site: Site, name: str, type: KV) -> Iterator[IllegalProgram]:
    value = site.value
    touched = [value.attr("segment")] if value.op == "recode" else [value.attr("frm"), value.attr("to")]
    for index in touched:
        segment = type.segments[index]
        if segment.shared or (value.op == "flush" and isinstance(segment.slots, Ring)):
            yield _illegal(
                site,
                f"{value.op} changes segment {index} of {name}, {'a shared one' if segment.shared else segment.slots}",
                "a shared segment is read-only, and the oldest row of a Ring is overwritten, not moved",
                "use a Dense, Budget or Paged segment that the cache owns",
            )


def _illegal(site: Site, what: str, because: str, help: str) -> IllegalProgram:
    return IllegalProgram("address", what, sides=f"{site.where}: {site.value.op}", because=because, help=help)
