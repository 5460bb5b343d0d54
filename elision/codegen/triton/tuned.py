"""Tiles measured on a GPU in the place of those that `elision.codegen.triton.configs` gives: the search, and the file that keeps
what it found."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from elision.codegen.triton.compile import plan_program
from elision.codegen.triton.configs import Tile
from elision.codegen.triton.launches import Kernels
from elision.errors import BadInput
from elision.ir.launch import DeviceCode
from elision.ir.program import Program

SCHEMA = "elision-tuned-1"
#: By template the least and the most of ``n`` and ``k``. What leaves no room for registers or shared memory is not compiled, or
#: not launched, and loses.
_BOUNDS = {
    "gemv": ((1, 32), (32, 1024)), "expert_gemv": ((1, 32), (32, 1024)), "gemm": ((16, 256), (16, 256)),
    "attend": ((16, 128), (1, 128)),
}  # fmt: skip
_GAIN = 0.98  # a tile that saves less than this is not worth leaving the table for
Places = Iterable[tuple[str, str]]
#: Seconds of some entries for a class of shapes each, with these launches, and their logits.
Measure = Callable[[DeviceCode, Places], tuple[float, torch.Tensor]]


@dataclass(frozen=True)
class Table:
    """Tiles by what asks for them (`Launches.tile`), of a kind of ``device``, with code for ``target``."""

    device: str
    target: str
    tiles: Mapping[str, Tile]

    def save(self, path: Path) -> None:
        """Write it, whole or not at all. Raises BadInput where that cannot be done."""
        tiles = {key: list(astuple(tile)) for key, tile in self.tiles.items()}
        text = json.dumps({"schema": SCHEMA, "device": self.device, "target": self.target, "tiles": tiles}, indent=1)
        try:
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as folder:
                (Path(folder) / path.name).write_text(text + "\n", encoding="utf-8")
                os.replace(Path(folder) / path.name, path)
        except OSError as err:
            raise BadInput(f"{path} could not be written: {err.strerror or err}") from err


def load(path: str | os.PathLike[str], targets: Iterable[str]) -> Table:
    """A table for code for these targets. Raises BadInput for a file that is not one, is damaged, or was measured on another
    kind of GPU."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as err:
        raise BadInput(f"{path} could not be read: {err.strerror or err}") from err
    except ValueError as err:
        raise BadInput(f"{path} is not a table that `elision tune` wrote: {err}") from err
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise BadInput(f"{path} is not a table of the form {SCHEMA}: measure again with `elision tune`")
    try:
        tiles = {key: _tile(key, numbers) for key, numbers in found["tiles"].items()}
        table = Table(str(found["device"]), str(found["target"]), tiles)
    except (KeyError, TypeError, ValueError, AttributeError) as err:
        raise BadInput(f"{path} is damaged ({err}): measure again with `elision tune`") from err
    if others := [t for t in targets if t != table.target]:
        raise BadInput(
            f"{path} was measured on {table.device} for {table.target}, and says nothing of {', '.join(others)}: compile for "
            f"{table.target} alone, or without a table"
        )
    return table


def _tile(key: str, numbers: Any) -> Tile:
    m, n, k, warps, stages = numbers
    if key.split()[0] not in _BOUNDS or not all(type(x) is int and x > 0 for x in numbers):
        raise ValueError(f"{key}: {numbers}")
    if any(x & (x - 1) for x in (m, n, k, warps)):
        raise ValueError(f"{key}: {numbers}, which should be powers of two")
    return Tile(m, n, k, warps, stages)


def neighbours(key: str, tile: Tile) -> Iterator[Tile]:
    """Tiles of twice and half of one of the sizes, and with other loads in flight. ``m`` follows from the class of shapes."""
    n, k = _BOUNDS[key.split()[0]]
    for name, (least, most) in (("n", n), ("k", k), ("warps", (2, 8)), ("stages", (2, 4))):
        now = getattr(tile, name)
        for other in (2 * now, now // 2) if name != "stages" else (now + 1, now - 1):
            if least <= other <= most:
                yield replace(tile, **{name: other})


def search(program: Program, measure: Measure, say: Callable[[str], None] = lambda line: None) -> dict[str, Tile]:
    """The tiles that are faster than those of the table, by what asks for them: one after the other, each from the table's uphill
    as long as a neighbour gains. A tile whose results are others, or that cannot be compiled or launched, is left out."""
    asked = Kernels()
    plan_program(program, asked)
    found: dict[str, Tile] = {}
    for key, first in asked.asked.items():
        best, places = first, sorted(asked.places[key])
        start, expected = measure(plan_program(program, Kernels(found)), places)
        least, tried, better = start, {first}, True
        while better:
            better = False
            for tile in neighbours(key, best):
                if tile in tried:
                    continue
                tried.add(tile)
                try:
                    seconds, result = measure(plan_program(program, Kernels({**found, key: tile})), places)
                except (BadInput, RuntimeError) as err:
                    say(f"{key}: {tile} does not run ({err})")
                    continue
                if not torch.allclose(result, expected, 5e-2, 5e-2 * float(expected.abs().max())):
                    say(f"{key}: {tile} gives other results")
                elif seconds < _GAIN * least:
                    best, least, better = tile, seconds, True
                    break
        if best != first:
            found[key] = best
        say(f"{key}: {best}, {start * 1e6:.1f} to {least * 1e6:.1f} us, {len(tried)} tried")
    return found
