"""Readable names of templates and of their operands."""

from __future__ import annotations

from collections.abc import Collection


def unique_name(kind: str, taken: Collection[str]) -> str:
    """The name of a template whose blocks are of this kind: ``attn``, ``attn_1``."""
    base = {"both": "block", "other": "block"}.get(kind, kind)
    return base if base not in taken else next(n for i in range(1, 10_000) if (n := f"{base}_{i}") not in taken)


def short_name(name: str) -> str:
    """A readable operand name from a weight's: its last module."""
    parts = [p for p in name.split(".") if p not in ("weight",)]
    return parts[-2] + "_bias" if parts[-1] == "bias" and len(parts) > 1 else parts[-1]
