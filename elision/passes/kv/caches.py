"""What the methods of this folder act on: the caches that decoding reads, and the attention over them."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, field, replace

from elision.errors import BadInput
from elision.ir.mask import Mask
from elision.ir.ops.program import origin
from elision.ir.program import Program, Tick, state_inputs, steps
from elision.ir.states import KV, Dense, Float, Scores, Slots
from elision.ir.types import Axis, Tensor
from elision.ir.value import Builder, Graph, Value, rewrite
from elision.ir.walk import Site, sites

#: Gives what stands for an `attend` with these operands.
Read = Callable[[Builder, Value, tuple[Value, ...]], Value]
#: Gives the next state from the sequences that are due, the state, and what it holds (`entries`).
Change = Callable[[Builder, Value, Value, Value], Value]


@dataclass(frozen=True)
class Cached:
    """The attention sites of a program that decode from a cache of their own. ``by`` names the pass in messages."""

    program: Program
    by: str

    def __post_init__(self) -> None:
        if "step" not in self.program.entries or not self.states:
            raise BadInput(f"{self.by}: {self.program.name} has no cache that decoding reads (is it an encoder?)")

    def evictable(self) -> None:
        """Raises BadInput where entries cannot be left out as eviction does: in layers with a window, and once again."""
        for site in self._attends("step"):
            mask, (name, type) = site.attr("mask"), site.state(site.value.args[1])
            if not isinstance(mask, Mask) or mask.kind != "causal":
                raise BadInput(
                    f"{self.by}: {site.frame.label} attends by the mask {mask}, and the method is for layers that see all before "
                    "them; a window bounds its cache already"
                )
            pruned = isinstance(type, KV) and type.present.kind == "subset" and isinstance(type.main[0].slots, Dense)
            keyed = isinstance(type, KV) and (type.keyed_by == "position" or pruned)
            if isinstance(type, KV) and (not keyed or len(type.main) != 1 or partly(site)):
                raise BadInput(f"{self.by}: {name} has been compressed by another pass; apply one of them")

    def whole(self) -> None:
        """Raises BadInput for caches that are not one growing segment of floats by position that is read as a whole, as they are
        before any method."""
        read = {site.state(site.value.args[1])[0] for site in self._attends("step") if partly(site)}
        for name, type in self.states.items():
            segment = type.main[0]
            floats = isinstance(segment.k, Float) and isinstance(segment.v, Float)
            if len(type.main) != 1 or type.keyed_by != "position" or segment.slots != Dense() or not floats or name in read:
                raise BadInput(f"{self.by}: {name} has been compressed by another pass, or is read in part; apply one of them")

    @property
    def states(self) -> dict[str, KV]:
        return {n: t for n, t in self.program.states.items() if isinstance(t, KV)}

    @property
    def group(self) -> int:
        """Query heads of each cache head."""
        found: set[int] = set()
        for site in self._attends("step"):
            heads, cache = site.value.args[0].tensor.axes[1], site.value.args[1].type
            assert isinstance(heads, int) and isinstance(cache, KV)
            found.add(heads // cache.heads)
        if len(found) != 1:
            raise BadInput(f"{self.by}: layers have {sorted(found)} query heads for a key head; expected one number")
        return found.pop()

    def _attends(self, entry: str) -> Iterator[Site]:
        return (s for s in sites(self.program, self.program.entries[entry]) if s.value.op == "attend")

    def become(
        self,
        slots: Slots,
        scores: Scores | None = None,
        observe: tuple[str, ...] = (),
        last: int = 0,
        mask: Mask | None = None,
        per_head: bool = False,
    ) -> None:
        """Give every cache explicit positions in ``slots``, with ``scores`` that attention in the entries ``observe`` adds to
        (``last``: that of the prompt's last queries only); attend by another ``mask``. ``per_head``: heads keep entries of their
        own."""
        self.evictable()

        def changed(type: KV) -> KV:
            found = type.with_segment(0, replace(type.main[0], slots=slots))
            return replace(found, keyed_by="explicit", keep="per_head" if per_head else "per_layer", scores=scores)

        self.retype(changed, observe, last, mask)

    def retype(
        self,
        change: Callable[[KV], KV],
        observe: tuple[str, ...] = (),
        last: int = 0,
        mask: Mask | None = None,
        only: Container[str] | None = None,
        read: Read | None = None,
    ) -> None:
        """Change the type of every cache, or of those named ``only``. The model's own forward stays as it is. ``read``: how
        `step` attends to them."""
        types = {n: change(t) for n, t in self.states.items() if only is None or n in only}
        self.take(types, observe, last, mask, read)

    def take(
        self,
        types: dict[str, KV],
        observe: tuple[str, ...] = (),
        last: int = 0,
        mask: Mask | None = None,
        read: Read | None = None,
    ) -> None:
        """Give caches, by name, other types."""
        program = self.program
        program.states = {**program.states, **types}
        for entry in dict.fromkeys(("prefill", "step", *steps(program))):
            work = _Templates(program, types, entry in observe, last, mask, read if entry != "prefill" else None)
            program.entries[entry] = work.entry(program.entries[entry])
            program.templates.update(work.made)
        program.ticks = tuple(replace(t, graph=_Templates(program, types).entry(t.graph)) for t in program.ticks)
        program.drop_unused()

    def deepen(self, nodes: int) -> None:
        """Let scores keep what up to ``nodes`` drafted nodes give until they are accepted."""
        if any(t.scores is not None and 0 < t.scores.depth < nodes for t in self.states.values()):
            self.retype(lambda type: replace(type, scores=type.scores and replace(type.scores, depth=nodes)))

    def on_tick(self, every: int, change: Change, chunks: bool = False, only: Container[str] | None = None) -> None:
        """Change every cache, or those named ``only``, on the clock (`Tick`)."""
        b = Builder(self.by.replace("-", "_"), self.program.targets)
        rows = b.input("rows", Tensor((Axis("b"),), "i64"))
        states = {n: b.input(n, t) for n, t in self.states.items() if only is None or n in only}
        done = [change(b, rows, s, b.add("entries", s, rows, name="pos")) for s in states.values()]
        self.program.ticks = (*self.program.ticks, Tick(every, b.build(*done), chunks))


@dataclass
class _Templates:
    """The blocks of one entry on caches of other types. Templates that other entries call stay as they are."""

    program: Program
    types: dict[str, KV]
    observe: bool = False
    last: int = 0
    mask: Mask | None = None
    read: Read | None = None
    made: dict[str, Graph] = field(default_factory=dict)
    names: dict[tuple[str, tuple[tuple[KV, bool], ...]], str] = field(default_factory=dict)

    def entry(self, graph: Graph) -> Graph:
        named = {v: self.types[n] for n, v in state_inputs(graph).items() if n in self.types}

        def rule(b: Builder, v: Value, args: tuple[Value, ...]) -> Value | None:
            if v in named:
                return b.input(v.attr("name"), named[v])
            caches = tuple((a.type, origin(old) in named) for old, a in zip(v.args, args, strict=True) if isinstance(a.type, KV))
            if v.op == "call" and any(mine for _, mine in caches):
                attrs = {**dict(v.attrs), "target": self._template(v.attr("target"), caches)}
                return b.add_with("call", args, attrs, None)
            return None

        return rewrite(graph, rule, ChainMap(self.made, dict(self.program.targets)), keep=True)

    def _template(self, name: str, caches: tuple[tuple[KV, bool], ...]) -> str:
        if (name, caches) not in self.names:
            taken = {**self.program.targets, **self.made}
            new = next(n for i in range(1, len(taken) + 2) if (n := f"{name}_kv{i}") not in taken)
            self.made[new] = replace(self._changed(self.program.templates[name], caches), name=new)
            self.names[name, caches] = new
        return self.names[name, caches]

    def _changed(self, graph: Graph, caches: tuple[tuple[KV, bool], ...]) -> Graph:
        """``caches``: their types, and whether they are among those that are changed."""
        inputs = [v for v in graph.inputs if isinstance(v.type, KV)]
        given = {v: type for v, (type, mine) in zip(inputs, caches, strict=True) if mine}
        observed: dict[Value, Value] = {}

        def rule(b: Builder, v: Value, args: tuple[Value, ...]) -> Value | None:
            if v in given:
                return b.input(v.attr("name"), given[v])
            if v.op != "attend" or origin(v.args[1]) not in given:
                return None
            if self.read is not None:
                return self.read(b, v, args)
            attrs = dict(v.attrs) | ({"mask": self.mask} if self.mask is not None else {})
            found = b.add_with("attend", args, attrs, None, graph.names.get(v))
            if self.observe:
                q, cache, *extra = args
                attrs = {k: a for k, a in attrs.items() if k != "results"} | ({"last": self.last} if self.last else {})
                observed[cache] = b.add_with("observe", (cache, q, *extra), attrs, None, "kv")
            return found

        new = rewrite(graph, rule, more=lambda: observed.values())
        count = len(new.outputs) - len(observed)
        return replace(new, outputs=tuple(observed.get(v, v) for v in new.outputs[:count]))


def partly(site: Site) -> bool:
    """Whether this attention reads chosen pages only."""
    return "pages" in (site.value.attr("extras") or ())


def sizes(by: str, **given: int) -> None:
    """Check the sizes that a method is given, in tokens: ``budget`` at least ``recent + sinks``, ``every`` at least 1. A budget
    beyond the context is as good as the context: no more memory is taken than a run asks for."""
    for name, n in given.items():
        least = 0 if name in ("recent", "sinks") else 1
        if n < least:
            raise BadInput(f"{by}: {name}={n}; expected at least {least} tokens")
    protected = given.get("recent", 0) + given.get("sinks", 0)
    if "budget" in given and given["budget"] < protected:
        raise BadInput(
            f"{by}: budget={given['budget']} is less than what is always kept, {protected} tokens (recent and sinks); raise it"
        )
