"""What methods that edit prompts share: a graph that says which tokens of a prompt stay, run before the model reads it."""

from __future__ import annotations

from collections.abc import Callable

from elision.errors import BadInput
from elision.ir.program import Program
from elision.ir.types import Axis, Tensor
from elision.ir.value import Builder, Value

#: The tokens that stay, an axis made of that of ``ids``, from the ids and the numbers of the words that they are part of.
Stays = Callable[[Builder, Value, Value], Value]


def edit_prompts(program: Program, name: str, stays: Stays) -> None:
    """Let every prompt be edited after the edits that there are. What stays is an ordinary prompt: its positions are 0, 1, ..
    Raises BadInput for a program that reads no prompts."""
    if "step" not in program.entries or "score" not in program.entries:
        raise BadInput(f"{name}: {program.name} does not generate, so there is no prompt to edit (is it an encoder?)")
    b = Builder(f"edit_{name}_{len(program.edits)}".replace("-", "_"), program.targets)
    ids, words = (b.input(n, Tensor((Axis("t"),), "i64")) for n in ("ids", "words"))
    kept = b.named(stays(b, ids, words), "kept")
    program.edits = (*program.edits, b.build(b.add("restrict", ids, kept, name="edited"), kept))


def sizes(name: str, keep: float, segment: int, first: int, last: int) -> None:
    """Check what an edit is given. Raises BadInput."""
    if not 0 < keep <= 1:
        raise BadInput(f"{name}: keep={keep}; expected a share of the prompt above 0, at most 1")
    if min(segment, first, last) < 1:
        raise BadInput(f"{name}: segment={segment}, first={first}, last={last}; expected at least 1 token of each")
