"""A schedule: an entry as rows of (kernel, operands), the table that native code walks without returning to Python.

A row is ``WORDS`` 64-bit words: the kernel's address, flags, and the operands in the order of the kernel's signature. What
differs between layers is data of the rows, so code is as large as the number of different kernels. A schedule is plain
data: it names weights, buffers and states, and the runtime puts addresses in their place.

Operand kinds and their words:

=========  ====================================================================================================
``tensor``  address, bytes from one thread's copy to the next (0: shared by all), elements from token to token
``weight``  address of a packed weight (`elision.ir.packing`)
``state``   index of a state's descriptor (`STATE`)
``axis``    word in the context where a token axis begins (`AXIS`)
``int``     an integer
``float``   the bits of a float32
=========  ====================================================================================================
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

WORDS = 40
KERNEL, FLAGS, OPERANDS = 0, 1, 2  # words of a row
BARRIER, HOST = 1, 2  # flags: wait for all threads after the row; return to the host before it

# Words of the context, the one argument that a run has.
THREADS, TABLE, STATES, SEQUENCES, AXES = 0, 1, 2, 3, 8
#: Words of a token axis in the context: how many tokens, then addresses of int64 arrays: the sequence, position, ancestor bits
#: and node of each token, the first token of each sequence (one more than there are), the token of the parent axis, how many
#: tokens of the prompt come after each.
AXIS = {"count": 0, "row": 1, "pos": 2, "anc": 3, "node": 4, "start": 5, "index": 6, "ahead": 7}
AXIS_WORDS, MAX_AXES = 8, 64
CONTEXT_WORDS = AXES + AXIS_WORDS * MAX_AXES

#: Words of a cache's descriptor: addresses of the arrays of `elision.ir.layout` (0 where there are none) in the main segment
#: that is appended to and in Scratch, and the blocks of 16 slots that a head has there (``pages``: of 16 pages); positions per
#: sequence; of a main segment before it (``older``) the same, its lengths, and items per head of what its keys and values have
#: for several rows.
STATE = {
    name: i
    for i, name in enumerate(
        ("k", "v", "k_scale", "v_scale", "pos", "len_k", "len_v", "blocks", "entries")
        + ("draft_k", "draft_v", "draft_k_scale", "draft_v_scale", "node_pos", "node_live", "draft_blocks", "nodes", "sequences")
        + ("score", "waiting", "waiting_nodes", "waiting_norm", "depth", "prompt", "local", "summary", "pages")
        + ("k_low", "v_low", "draft_k_low", "draft_v_low", "older_len_k", "older_blocks", "older_k_groups")
        + tuple(f"older_{what}{name}" for what in "kv" for name in ("", "_scale", "_low"))
        + ("older_len_v", *(f"older_{what}_{name}" for what in "kv" for name in ("left", "right", "outlier", "place")))
    )
}
STATE_WORDS = 56

# How a row shares its work, the value of the operand ``share``.
ALL, SPLIT, LAST = 0, 1, 2  # every thread does everything; each its part; only the last thread does anything


@dataclass(frozen=True)
class Buffer:
    """Activations of an entry: ``width`` elements per token of axis ``axis``; ``private``: every thread has its own copy.
    ``slot`` is the memory that it shares with buffers that are never alive at the same time; ``axis`` -1: ``width`` in all."""

    axis: int
    width: int
    private: bool
    slot: int


@dataclass(frozen=True)
class Row:
    """One call of ``kernel`` with its operands by kind (see above): ``("tensor", buffer, offset, stride)``,
    ``("weight", name)``, ``("state", name)``, ``("axis", i)``, ``("int", n)``, ``("float", x)``. A kernel of "" is the value
    with index ``host`` of the flat graph (`elision.ir.flatten`), which the host computes: ``("args", ..), ("results", ..)``."""

    kernel: str
    operands: tuple[tuple[Any, ...], ...]
    barrier: bool = False
    host: int = -1
    label: str = ""


@dataclass
class Schedule:
    """One entry. ``axes``: name of each token axis; ``inputs``: the buffer of each; ``outputs``: where each is, as
    ``("view", buffer, offset, strides, shape, dtype, axis)``; ``states``: the caches that kernels read; ``caches``: those that
    live for one call only, by name the index of the value that begins them in the flat graph and the axis of their tokens (-1:
    the host makes it, kernels do not read it); ``packings``: how each weight lies in memory."""

    entry: str
    axes: list[str]
    buffers: list[Buffer] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    inputs: list[int] = field(default_factory=list)
    outputs: list[tuple[Any, ...]] = field(default_factory=list)
    states: list[str] = field(default_factory=list)
    caches: dict[str, tuple[int, int]] = field(default_factory=dict)
    packings: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class NativeCode:
    """The native form of a program: an object file, a schedule for each entry and for ``commit``, and by entry the ops that the
    host runs, each with the reason. ``signatures``: the operands of each kernel, (kind, name). ``machine`` and ``level`` say
    which processors the object is for; ``text`` is the MLIR that it was made from, for others."""

    code: bytes
    schedules: dict[str, Schedule]
    hosts: dict[str, list[tuple[str, str]]]
    signatures: dict[str, list[tuple[str, str]]]
    machine: str
    level: str
    text: str

    @property
    def packings(self) -> dict[str, str]:
        """How each weight lies in memory."""
        return {name: how for s in self.schedules.values() for name, how in s.packings.items()}
