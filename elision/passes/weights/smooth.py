"""Moving scales between a norm and the linears that read it, which leaves what the program computes as it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from elision.ir.program import Program, Weights
from elision.ir.types import Tensor
from elision.ir.value import Graph, Value
from elision.ir.walk import Site, sites
from elision.passes.calibration import run_score
from elision.passes.weights.chosen import read_once

#: No maximum counts as less: nothing divides by zero.
LEAST = 1e-5


@dataclass(frozen=True)
class Smoothed:
    """A norm, by the names of its ``gain`` and ``bias`` (None without one), whose result only the ``linears`` read; the gain acts
    as gain + ``offset``."""

    gain: str
    bias: str | None
    offset: float
    linears: tuple[str, ...]

    def folded(self, weights: Weights, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        """The weights with the norm's result divided, and the linears' inputs multiplied, by ``scale f32[k]``: those of the norm
        in their dtype, the matrices in float32 (float64 ones in float64)."""
        gain = weights[self.gain]
        found = {self.gain: ((gain.double() + self.offset) / scale - self.offset).to(gain.dtype)}
        if self.bias is not None:
            found[self.bias] = (weights[self.bias].double() / scale).to(weights[self.bias].dtype)
        for name in self.linears:
            wide = torch.promote_types(weights[name].dtype, torch.float32)
            found[name] = weights[name].to(wide) * scale.to(wide)
        return found


def smoothable(program: Program, linears: Mapping[str, Tensor]) -> list[Smoothed]:
    """The norms with a gain of their own that no entry gives to anything but ``linears`` (so the scales have nowhere else to go:
    not to a router, an exit or a residual stream), and without which no entry runs these."""
    norms = read_once(program, "norm")
    found: dict[Smoothed, None] = {}
    wrong: set[str] = set()  # norms and linears of which one is without the others somewhere
    for graph in program.entries.values():
        here = [s for site in sites(program, graph) if (s := _smoothed(program, site, norms, linears)) is not None]
        found |= dict.fromkeys(here)
        fine = {name for s in here for name in (s.gain, *s.linears)}
        wrong |= {name for name in _params(program, graph) if name in norms or name in linears} - fine
    gains = Counter(s.gain for s in found)  # twice: by other linears in another entry
    return [s for s in found if gains[s.gain] == 1 and wrong.isdisjoint((s.gain, *s.linears))]


def _smoothed(program: Program, site: Site, norms: set[str], linears: Mapping[str, Tensor]) -> Smoothed | None:
    if site.value.op != "norm" or len(site.value.args) < 2:
        return None
    gain, *bias = (_param(site, operand) for operand in site.value.args[1:])
    readers = _readers(site)
    if not readers or not set(readers) <= set(linears) or gain is None or not {gain, *bias} <= norms:
        return None
    if program.params[gain].axes != (linears[readers[0]].row,):
        return None
    return Smoothed(gain, bias[0] if bias else None, site.attr("offset") or 0.0, tuple(sorted(readers)))


def _params(program: Program, graph: Graph) -> set[str]:
    return {n for site in sites(program, graph) for a in site.value.args if (n := _param(site, a)) is not None}


def maxima(program: Program, weights: Weights, sequences: list[torch.Tensor], names: Sequence[str]) -> dict[str, torch.Tensor]:
    """By weight, ``max |x| f32[k]`` over the tokens of the sequences for each input of its `linear`."""
    known, found = {id(weights[name]): name for name in names}, {}

    def observe(value: Value, operands: Sequence[Any]) -> None:
        if value.op == "linear" and (name := known.get(id(operands[1]))) is not None:
            found[name] = operands[0].abs().flatten(0, -2).amax(0).float()

    run_score(program, weights, sequences, observe, blocks=True)
    return found


def scales(inputs: torch.Tensor, matrices: Sequence[torch.Tensor], alpha: float) -> torch.Tensor:
    """``max|X_j|^alpha / max|W_j|^(1 - alpha)``, ``f32[k]``, over all matrices ``[n, k]`` that read the inputs (SmoothQuant, Xiao
    et al. 2023, equation 4)."""
    most = torch.stack([matrix.abs().amax(0).float() for matrix in matrices]).amax(0)
    found: torch.Tensor = inputs.clamp_min(LEAST) ** alpha / most.clamp_min(LEAST) ** (1 - alpha)
    return found.clamp_min(LEAST)


def _readers(site: Site) -> list[str]:
    """The weights of the linears that read a site's result ("" for what is no parameter); none if something else does, too."""
    graph = site.frame.graph
    readers = graph.users()[site.value]
    fits = all(v.op == "linear" and v.args[0] is site.value and site.value not in v.args[1:] for v in readers)
    return [_param(site, v.args[1]) or "" for v in readers] if fits and site.value not in graph.outputs else []


def _param(site: Site, operand: Value) -> str | None:
    begin = site.frame.source(operand)[1]
    name: str | None = begin.attr("name") if begin.op == "param" else None
    return name
