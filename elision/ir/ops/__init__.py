"""The op set. Importing this package registers every op with `elision.ir.op`."""

from elision.ir.ops import (
    aten,
    axes,
    choose,
    dense,
    depth,
    edits,
    exits,
    guess,
    image,
    matching,
    moe,
    pages,
    program,
    prompt,
    ranking,
    state,
)  # fmt: skip

__all__ = [
    "aten", "axes", "choose", "dense", "depth", "edits", "exits", "guess", "image", "matching", "moe", "pages", "program",
    "prompt", "ranking", "state",
]  # fmt: skip
