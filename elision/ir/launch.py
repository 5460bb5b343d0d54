"""What a GPU runs: kernels with everything fixed, their machine code by target, and schedules of launches.

A schedule is as on the CPU (`elision.ir.schedule`), one for each entry and class of shapes, and its rows are launches in the
order of one stream. The first operand of a row is its grid, the others are the parameters of its kernel, in order. Operand kinds:

    ("grid", (a, b, c))        sizes: a number, or ("tokens", axis, per): programs for the tokens of an axis, ``per`` each, or so
                               many ``times`` behind it; ("longest", axis, per): for the sequence with most tokens; ("rows", n):
                               n for each sequence, perhaps ``per`` of all a program; ("entries", state, per): for the entries
                               that a cache has room for; ("slots", state, per): for those that may join it; ("over", state, n,
                               per): for those that can move when n are kept
    ("tensor", buffer, bytes)  address in a buffer; a buffer has its tokens one after the other, without gaps
    ("weight", name, i)        a plane of a weight (`elision.ir.planes`); -1: the weight decoded to the type of its type
    ("axis", i, array)         an array of a token axis, int64: row, pos, anc, node, start, index, ahead, parent, twins
    ("state", name, array)     an array of a cache (`elision.ir.layout`): k, v, their scales and minima (k_scale, k_low) of the
                               segment that is appended to, the same with older_ in the one before and with draft_ in Scratch,
                               and what lies in the index: pos, len_k, ...; of `DRAFTS`, an array of a run's drafts
    ("size", name, what)       of a cache: blocks, entries, slots, ...; of "round", the most tokens of a generation
    ("input", i), ("output", i) where an input or an output of the call lies
    ("round", array)           of a round, by sequence: path, accepted, next; how tokens are drawn: numbers, whole
    ("round", array, n)        n numbers for each sequence, int64
    ("count", axis), ("rows", ""), ("int", n), ("float", x)

A row with the operand ("made", axis, parent) is no launch: before the first one the runtime makes this axis, by the op ``host``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from elision.errors import BadInput
from elision.ir.schedule import Schedule


@dataclass(frozen=True)
class Kernel:
    """A template with its constants. ``types``: of its parameters in order, as Triton writes them (``*bf16``, ``i32``,
    ``fp32``), with ``:16`` where a multiple of 16 is promised. A constant is a number, text, None or ``{"expression":
    text, "operands": n}``."""

    template: str
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    warps: int = 4
    stages: int = 3


@dataclass(frozen=True)
class Binary:
    """Machine code of a kernel. ``threads`` of a program; ``shared``: bytes of shared memory that a launch asks for.
    ``registers``, and bytes that threads keep in memory instead: ``spills`` (stores and loads), ``stack``; -1: not known."""

    symbol: str
    code: bytes
    threads: int
    shared: int
    registers: int = -1
    spills: int = -1
    stack: int = -1


@dataclass(frozen=True)
class DeviceCode:
    """The GPU form of a program: ``schedules`` by entry and class of shapes (`SHAPES`), ``binaries`` by target and kernel, and by
    entry the ops that have no kernel, each with the reason; entries that have any are not run on a GPU."""

    kernels: Mapping[str, Kernel]
    schedules: Mapping[str, Mapping[str, Schedule]]
    hosts: Mapping[str, list[tuple[str, str]]]
    binaries: dict[str, dict[str, Binary]] = field(default_factory=dict)


def need_kernels(name: str, code: DeviceCode) -> None:
    """Raises BadInput if an op of the program of that name has no kernel, naming the op and the reason. A model that generates
    may do without its own forward (`score`): that is asked for when it is called."""
    for entry in code.hosts:
        if entry != "score" or not code.schedules:
            need_entry(name, code, entry)


def need_entry(name: str, code: DeviceCode, entry: str) -> None:
    """Raises BadInput if an op of that entry has no kernel."""
    if ops := code.hosts.get(entry):
        op, why = ops[0]
        raise BadInput(
            f"{name} does not run on a GPU: {op} in {entry} has no kernel ({why}); leave out the pass that brought it, or "
            "use target='cpu'"
        )


#: In the place of a cache's name: what drafts on the device (`elision.runtime.cuda.drafts`).
DRAFTS = "drafts"

#: Classes of shapes: the most tokens of a call for which its tiles are (0: any number).
SHAPES = {"one": 1, "few": 16, "some": 64, "many": 0}


def shape_of(tokens: int, there: Mapping[str, Any]) -> str:
    """The smallest class that is for calls of so many tokens, of those that are there; if none is, the largest: its launches are
    as many as tokens ask for."""
    known = [name for name in SHAPES if name in there]
    return next((name for name in known if tokens <= SHAPES[name] or SHAPES[name] == 0), known[-1])
