"""The op set. Importing this package registers every op with `elision.ir.op`."""

from elision.ir.ops import aten, axes, choose, dense, edits, guess, image, matching, moe, program, prompt, ranking, state

__all__ = [
    "aten", "axes", "choose", "dense", "edits", "guess", "image", "matching", "moe", "program", "prompt", "ranking", "state",
]  # fmt: skip
