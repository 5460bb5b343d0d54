"""Rule rotation: a key that was rotated for its position keeps that position.

Example: a streaming window that counts positions within the cache (`select` with renumber) over keys that were stored after RoPE: the
stored rotation belongs to the old position.
"""

from __future__ import annotations

from collections.abc import Iterator

from elision.errors import IllegalProgram
from elision.ir.rules.view import View
from elision.ir.states import KV


def rotation(view: View) -> Iterator[IllegalProgram]:
    """Renumbering positions needs ``rope=on_read``."""
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
