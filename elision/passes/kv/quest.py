"""Quest: read the pages of the cache that the query may look at (Tang et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from elision.errors import BadInput
from elision.ir.program import Program
from elision.ir.states import Summary
from elision.ir.value import Builder, Value
from elision.passes.base import Pass, register
from elision.passes.kv.caches import Cached, sizes
from elision.passes.kv.reading import readable


@register
@dataclass(frozen=True)
class Quest(Pass):
    """Every token reads ``budget`` entries of the cache, in pages of ``page``: those in which the largest products can be.

    The rewrite in one sentence: beside every complete page lie the largest and the smallest number of each channel of its keys,
    from which `pick` bounds the products of a query with the keys of the page, and attention reads the pages with the largest
    bounds, the first page, and the entries after the last complete one. Nothing is evicted: what is saved is reading, at the cost
    of ``2 / page`` of the bytes of the keys. Every key head chooses its pages, by the largest bound of its queries. The prompt
    and the ``dense`` first layers attend to everything. Drafted tokens choose each for itself, and no round of drafts crosses the
    end of a page, so the tokens are those of decoding one by one (the authors know no drafts). Layers with a window of their own
    stay as they are. Published defaults: pages of 16, budgets of 1024 to 4096, two dense layers. Identity setting: a ``budget``
    of at least the context. Native code: pages of a multiple of 16.
    """

    budget: int = 1024
    page: int = 16
    dense: int = 2

    name: ClassVar[str] = "quest"
    family: ClassVar[str] = "kv"
    changes: ClassVar[str] = "cache"

    def apply(self, program: Program) -> None:
        sizes(self.name, budget=self.budget, page=self.page)
        if self.dense < 0:
            raise BadInput(f"{self.name}: dense={self.dense}; expected how many first layers read everything, at least 0")
        layers = readable(program, self.name)
        chosen = {name for name, layer in layers.items() if layer >= self.dense}
        if not chosen:
            raise BadInput(f"{self.name}: all layers that could be read in part are among the first {self.dense}; lower dense")
        pages = max(3, -(-self.budget // self.page)) - 1  # beside the page that is not complete
        room = int(program.meta["positions"])

        def read(b: Builder, v: Value, args: tuple[Value, ...]) -> Value:
            q, cache, *extra = args
            picked = b.add("pick", q, cache, n=pages, page=self.page, open=self.page, room=room, first=1, name="pages")
            attrs = {**dict(v.attrs), "extras": (*v.attr("extras", ()), "pages"), "page": self.page, "open": self.page}
            return b.add_with("attend", (q, cache, *extra, picked), attrs, None, "o")

        cached = Cached(program, self.name)
        cached.retype(lambda type: replace(type, summary=Summary(self.page)), only=chosen, read=read)
        cached.on_tick(self.page, lambda b, rows, cache, pos: b.add("summarise", cache, rows), only=chosen)
