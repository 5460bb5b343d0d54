"""Passes: one method, one file, in the folder of its family. Importing this package registers all of them."""

from elision.passes.base import REGISTRY, Pass, from_text
from elision.passes.cache import InsertCache
from elision.passes.clean import Clean
from elision.passes.layers.skip_layers import SkipLayers

__all__ = ["REGISTRY", "Clean", "InsertCache", "Pass", "SkipLayers", "from_text"]
