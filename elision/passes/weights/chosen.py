"""Which weights the calibrated passes round."""

from __future__ import annotations

from collections import Counter

from elision.errors import BadInput
from elision.ir.program import Program
from elision.ir.retype import encodable
from elision.ir.types import Tensor
from elision.ir.walk import CONTROL, sites
from elision.ir.weights import WeightEncoding


def chosen(program: Program, encoding: WeightEncoding, by: str) -> dict[str, Tensor]:
    """The float weights that one `linear` of one block reads, and whose rows are whole groups of ``encoding``: those whose
    inputs can be told. Left alone are embeddings, heads (also tied ones), experts, and what several blocks share; the plain
    encodings take these. Raises BadInput if there is none."""
    floats, once = encodable(program), read_once(program, "linear")
    found = {name: type for name, type in floats.items() if name in once and _whole(type, encoding)}
    if not found:
        some = f"{len(floats)} float weights, as {next(iter(floats.values()))}" if floats else "no float weights"
        raise BadInput(f"{by}: nothing to store in {encoding}: {program.name} has {some}, none of one linear of a block alone")
    return found


def read_once(program: Program, op: str) -> set[str]:
    """The parameters that every entry reads at most once, by that op in a block, and the ticks not at all."""
    found: set[str] = set()
    others: set[str] = set()
    for graph in program.entries.values():
        reads: Counter[str] = Counter()
        for site in sites(program, graph):
            if site.value.op in CONTROL:
                continue
            for operand in site.value.args:
                begin = site.frame.source(operand)[1]
                if begin.op == "param":
                    reads[begin.attr("name")] += 1
                    (found if site.value.op == op and site.frame.label else others).add(begin.attr("name"))
        others.update(name for name, count in reads.items() if count > 1)
    for tick in program.ticks:
        for site in sites(program, tick.graph):
            begins = (site.frame.source(operand)[1] for operand in site.value.args)
            others.update(begin.attr("name") for begin in begins if begin.op == "param")
    return found - others


def _whole(type: Tensor, encoding: WeightEncoding) -> bool:
    try:
        return encoding.row_bytes(type.row) < type.row * type.itemsize
    except BadInput:
        return False
