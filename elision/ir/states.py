"""State types: what a program remembers between calls, with the contract that the verifier checks.

A KV cache is a list of segments under one softmax; the bytes that it occupies follow from its type
(`elision.ir.layout`), so a saving that does not exist cannot be reported.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from elision.errors import BadInput
from elision.ir.types import FLOATS

# --- encodings: how the rows of a segment are stored -------------------------------------------------------------------


@dataclass(frozen=True)
class Float:
    """Rows stored in a float dtype: ``f64 f32 f16 bf16``."""

    dtype: str = "f32"

    def __post_init__(self) -> None:
        if self.dtype not in FLOATS:
            raise BadInput(f"unknown float encoding {self.dtype!r}; expected one of {', '.join(FLOATS)}")

    @property
    def token_group(self) -> int:
        """Rows that can only be written and dropped together."""
        return 1


@dataclass(frozen=True)
class Int:
    """Rows stored as ``bits``-bit codes with an fp32 scale (and minimum, if ``zero``) per group.

    ``axis="channel"``: groups of ``group`` channels within one row; ``axis="token"``: groups of ``group`` rows within
    one channel, written and dropped only together (KIVI's keys).
    """

    bits: int = 8
    axis: str = "channel"
    group: int = 32
    zero: bool = False

    def __post_init__(self) -> None:
        if self.bits not in (2, 4, 8) or self.axis not in ("channel", "token") or self.group < 1:
            raise BadInput(f"unknown encoding {self}; expected bits 2, 4 or 8, axis channel or token, group >= 1")

    @property
    def token_group(self) -> int:
        return self.group if self.axis == "token" else 1


@dataclass(frozen=True)
class Repaired:
    """Rows stored as ``codes``, and beside them, for every ``block`` rows of a head, what repairs their rounding: a matrix of
    rank ``rank``, and, exact to float16, the ``outliers`` largest and as many smallest numbers of every vector (a channel of the
    block where codes are grouped by token, else a row). Written and dropped by blocks (GEAR)."""

    codes: Int
    block: int
    rank: int = 2
    outliers: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.block <= 256 or self.block % self.codes.token_group:
            raise BadInput(f"{self}: expected blocks of 1 to 256 rows, whole token groups of {self.codes.token_group}")
        if not 0 <= self.rank <= self.block or self.outliers < 0:
            raise BadInput(f"{self}: expected a rank of 0 to {self.block} and outliers of at least 0")

    @property
    def bits(self) -> int:
        return self.codes.bits

    @property
    def token_group(self) -> int:
        return self.block


Encoding = Float | Int | Repaired

# --- slots: which rows of a segment are in use, and where the next one goes ----------------------------------------------


@dataclass(frozen=True)
class Dense:
    """Rows in order of arrival, up to the capacity that the run asks for."""


@dataclass(frozen=True)
class Ring:
    """The first ``sinks`` rows and the last ``window``: a row is visible while ``q_pos - k_pos < window`` or
    ``k_pos < sinks``. ``chunk`` is the most rows that one append may bring (``chunk - 1`` slots more)."""

    window: int
    sinks: int = 0
    chunk: int = 1


@dataclass(frozen=True)
class Budget:
    """At most ``n`` rows; `select` makes room, and an append that does not fit is an error.

    While the prompt comes in there is room for ``prompt`` rows more, or, with -1, for as many as the run asks for; that memory
    is given back when it is in (`KVStore.settled`). ``open``: what comes after the prompt is kept beside the ``n``.
    """

    n: int
    prompt: int = 0
    open: bool = False

    def __post_init__(self) -> None:
        if self.n < 1 or self.prompt < -1:
            raise BadInput(f"Budget(n={self.n}, prompt={self.prompt}); expected n >= 1, and prompt >= 0 or -1")


@dataclass(frozen=True)
class Paged:
    """Rows in pages of ``page`` rows from a pool, taken as they are needed."""

    page: int = 16


@dataclass(frozen=True)
class Scratch:
    """Rows of drafted tokens, by node index; dropped or moved by `commit`."""

    n: int = 64


Slots = Dense | Ring | Budget | Paged | Scratch


@dataclass(frozen=True)
class Segment:
    """One part of a cache. ``shared`` segments are read-only (a forked prefix)."""

    slots: Slots
    k: Encoding = Float()
    v: Encoding = Float()
    shared: bool = False


# --- states ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Present:
    """Which positions exist in this layer: ``all``; ``subset`` of the positions of the axis named ``of``; ``nested`` (a
    later token's active layers are a subset of every earlier token's); ``masked`` (holes are declared per entry); ``deferred``
    (tokens that passed by join before the next token of their sequence that does not)."""

    kind: str = "all"
    of: str = ""

    def __post_init__(self) -> None:
        if self.kind not in ("all", "subset", "nested", "masked", "deferred"):
            raise BadInput(f"unknown presence {self.kind!r}; expected all, subset, nested, masked or deferred")

    @property
    def partial(self) -> bool:
        """Whether tokens that are decoded may pass by."""
        return self.kind in ("nested", "masked", "deferred")


@dataclass(frozen=True)
class Gumbel:
    """Scores are of ``softmax((logit + amplitude g) / tau)``, with g standard Gumbel noise of (seed, query head, position of the
    query, position of the key) (`elision.ir.gumbel`). tau is ``start`` in the prompt and goes to ``end`` in ``steps`` tokens."""

    seed: int = 0
    amplitude: float = 1.0
    start: float = 1.0
    end: float = 2.0
    steps: int = 256

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 1 << 31 or self.amplitude not in (0, 1) or min(self.start, self.end) < 0.5 or self.steps < 1:
            raise BadInput(f"{self}: expected a seed of 31 bits, amplitude 0 or 1, temperatures of at least 0.5, steps >= 1")


@dataclass(frozen=True)
class Scores:
    """A number of fp32 per entry and head: the probability that it received (`observe`). It moves with the entry.

    ``group``: query heads of a cache head, which are summed. ``decay``: what remains of a score when one more token is
    observed. ``depth``: nodes of a draft that can be observed before `commit` takes the accepted ones (0: none). ``gumbel``: of
    what softmax, if not of the one that attends. ``local``: the decay of a second number beside it (0: there is none).
    """

    group: int
    depth: int = 1
    decay: float = 1.0
    gumbel: Gumbel | None = None
    local: float = 0.0

    def __post_init__(self) -> None:
        if self.group < 1 or not 0 <= self.depth <= 64 or not 0 < self.decay <= 1 or not 0 <= self.local <= 1:
            raise BadInput(f"{self}: expected group >= 1, depth 0 to 64, 0 < decay <= 1 and local 0 to 1")

    @property
    def arrays(self) -> dict[str, float]:
        """The numbers beside an entry, with their decays."""
        return {"score": self.decay} | ({"local": self.local} if self.local else {})


@dataclass(frozen=True)
class Summary:
    """Beside every ``page`` entries, once they are complete, the largest and the smallest number of each channel of their keys
    (`elision.ir.pages`)."""

    page: int = 16

    def __post_init__(self) -> None:
        if self.page < 1:
            raise BadInput(f"{self}: expected at least 1 entry to a page")


@dataclass(frozen=True)
class KV:
    """A key/value cache of one attention site. Per row b and head h: ``pos [B, heads, C]``, ``len [B, heads]``.

    ``dim``/``vdim``: channels of a key / of a value. Rows are appended to the last segment that is not Scratch.
    ``keyed_by``: ``position`` (entry i holds position i) or ``explicit`` (once entries can be evicted).
    ``keep``: entries are chosen for all layers (``shared``), ``per_layer`` or ``per_head``.
    ``rope``: keys are rotated ``on_write`` or ``on_read``. ``ragged``: rows may differ in length.
    ``storage``: ``owned``, or ``external`` (the caller's tensors). ``scores``: what is counted beside each entry. ``summary``:
    what is known of each page of entries.
    """

    heads: int
    dim: int
    vdim: int
    segments: tuple[Segment, ...]
    keyed_by: str = "position"
    keep: str = "per_layer"
    rope: str = "on_write"
    present: Present = Present()
    ragged: bool = True
    storage: str = "owned"
    scores: Scores | None = None
    summary: Summary | None = None

    def __post_init__(self) -> None:
        for field, allowed in _CHOICES.items():
            if getattr(self, field) not in allowed:
                raise BadInput(f"KV: {field}={getattr(self, field)!r}; expected one of {', '.join(allowed)}")
        main = [s for s in self.segments if not isinstance(s.slots, Scratch)]
        if not main or any(isinstance(s.slots, Scratch) for s in self.segments[: len(main)]):
            raise BadInput("KV: expected at least one main segment, and at most one Scratch, the last")
        if len(self.segments) - len(main) > 1:
            raise BadInput("KV: more than one Scratch segment")
        tail = main[-1]
        if tail.shared:
            raise BadInput("KV: the last main segment is appended to and cannot be shared")
        for s in (tail, *self.segments[len(main) :]):
            if s.k.token_group > 1 or s.v.token_group > 1:
                raise BadInput(f"KV: rows are appended one by one, so {s.slots} cannot have token-grouped encodings")
        if any(isinstance(s.slots, Ring) for s in main[:-1]):
            raise BadInput("KV: a Ring overwrites its oldest row, so only the last main segment can be one")
        if self.scores is not None and isinstance(tail.slots, Ring):
            raise BadInput("KV: the rows of a Ring are overwritten, so they have no scores")
        if self.summary is not None and not (len(main) == 1 and isinstance(tail.slots, Dense) and self.keyed_by == "position"):
            raise BadInput("KV: pages are summarised of one Dense segment that nothing evicts from; leave out one of the methods")

    @property
    def main(self) -> tuple[Segment, ...]:
        """The segments that hold committed rows."""
        return tuple(s for s in self.segments if not isinstance(s.slots, Scratch))

    @property
    def scratch(self) -> Segment | None:
        last = self.segments[-1]
        return last if isinstance(last.slots, Scratch) else None

    def with_segment(self, index: int, segment: Segment) -> KV:
        segments = list(self.segments)
        segments[index] = segment
        return replace(self, segments=tuple(segments))


_CHOICES = {
    "keyed_by": ("position", "explicit"),
    "keep": ("shared", "per_layer", "per_head"),
    "rope": ("on_write", "on_read"),
    "storage": ("owned", "external"),
}


@dataclass(frozen=True)
class Journal:
    """Values written at the nodes of a draft of up to ``depth`` tokens are kept apart; commit takes the accepted one."""

    depth: int


@dataclass(frozen=True)
class Snapshot:
    """A checkpoint copies the value; a commit that does not accept every drafted token restores it."""


Undo = Journal | Snapshot


@dataclass(frozen=True)
class Array:
    """Any other state: one array of ``shape`` per row (a recurrent state, a score accumulator, a table), filled with
    ``init``. An ``undo`` of None means that it may not be written inside a round."""

    shape: tuple[int, ...]
    dtype: str = "f32"
    init: float = 0.0
    undo: Undo | None = None


StateType = KV | Array
