"""Rule rotation: a key that was rotated for its position keeps that position.

Example: a streaming window that counts positions within the cache (`select` with renumber) over keys that were stored after RoPE:
the stored rotation belongs to the old position.
"""

from __future__ import annotations

from collections.abc import Iterator

from elision.errors import IllegalProgram
from elision.ir.rules.view import View
from elision.ir.states import KV
from elision.ir.value import Value

#: Ops that a rotated key may pass and still be a rotated key.
_ALONG = ("view", "expand", "slice", "concat", "map", "norm", "restrict", "gather")


def rotation(view: View) -> Iterator[IllegalProgram]:
    """Renumbering positions needs ``rope=on_read``, and keys that are rotated when they are read are stored unrotated."""
    for site in view.once("select"):
        name, type = site.state(site.value.args[0])
        if site.value.attr("renumber", False) and isinstance(type, KV) and type.rope == "on_write":
            yield IllegalProgram(
                "rotation",
                f"the entries of {name} get new positions, but its keys are rotated for the old ones",
                sides=f"{site.where}: select with renumber, on a cache with rope=on_write",
                because="RoPE was applied when the keys were written",
                help="store keys before RoPE (rope=on_read), or keep the positions",
            )
    for site in view.once("append"):
        name, type = site.state(site.value.args[0])
        if isinstance(type, KV) and type.rope == "on_read" and _rotated(site.value.args[1]):
            yield IllegalProgram(
                "rotation",
                f"the keys of {name} are rotated when they are read, and were rotated before",
                sides=f"{site.where}: rope, then append to a cache with rope=on_read",
                because="a key would be turned twice",
                help="append the keys from before `rope`, or keep rope=on_write",
            )


def _rotated(keys: Value) -> bool:
    """Whether the keys went through `rope` in this graph."""
    stack, seen = [keys], {keys}
    while stack:
        value = stack.pop()
        if value.op == "rope":
            return True
        if value.op in _ALONG:
            stack += [a for a in value.args if a not in seen]
            seen.update(value.args)
    return False
