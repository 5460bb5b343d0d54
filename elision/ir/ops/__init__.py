"""The op set. Importing this package registers every op with `elision.ir.op`."""

from elision.ir.ops import aten, axes, choose, dense, depth, exits, guess, image, matching, moe, pages, program, state

__all__ = ["aten", "axes", "choose", "dense", "depth", "exits", "guess", "image", "matching", "moe", "pages", "program", "state"]
