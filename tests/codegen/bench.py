"""Many small graphs compiled at once, each run natively and by the interpreter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from elision.codegen.cpu.compile import _advance_all, _commit, _plain
from elision.codegen.cpu.emitters import Emitter
from elision.codegen.cpu.kernels import Kernels
from elision.codegen.cpu.lower import to_object
from elision.codegen.planner import Planner
from elision.codegen.regions import regions
from elision.ir.flatten import committed, flatten
from elision.ir.interp import Interpreter
from elision.ir.program import Program
from elision.ir.schedule import NativeCode
from elision.ir.store import KVStore
from elision.ir.tokens import Tokens
from elision.ir.types import DTYPES, Axis, Tensor
from elision.ir.value import Builder, Value
from elision.ir.weights import WeightEncoding
from elision.llvm.processor import host_level, machine
from elision.runtime.native.engine import Engine
from elision.runtime.native.weights import PackedWeights

T = Axis("t")
MODES = ("step", "prefill")  # few tokens, many tokens


class Maker:
    """A graph that is being built, on tokens ``axis``; weights are random and shared by all graphs of one case."""

    def __init__(self, bench: Bench, name: str, axis: Axis) -> None:
        self.builder = Builder(name)
        self.axis, self._bench, self._name, self._inputs = axis, bench, name.split(".")[-1], 0

    def x(self, *features: int, dtype: str = "f32") -> Value:
        self._inputs += 1
        return self.builder.input(f"x{self._inputs}", Tensor((self.axis, *features), dtype))

    def weight(
        self, name: str, *shape: int, dtype: str = "f32", rows: tuple[WeightEncoding, torch.Tensor] | None = None
    ) -> Value:
        """A weight of random numbers, or of stored ``rows`` in an encoding."""
        name = f"{self._name}.{name}"
        if rows is not None:
            self._bench.program.params[name], self._bench.weights[name] = Tensor(shape, "f32", rows[0]), rows[1]
        if name not in self._bench.weights:
            found = torch.randn(shape, generator=self._bench.generator) * shape[-1] ** -0.5
            self._bench.weights[name] = found.to(DTYPES[dtype])
            self._bench.program.params[name] = Tensor(shape, dtype)
        return self.builder.param(name, self._bench.program.params[name])

    def state(self, type: Any) -> Value:
        self._bench.program.states.setdefault(f"kv_{self._name}", type)
        return self.builder.input(f"kv_{self._name}", type)

    def __call__(self, op: str, *args: Value, **attrs: Any) -> Value:
        return self.builder.add(op, *args, **attrs)  # type: ignore[no-any-return]


@dataclass
class Bench:
    """``add`` cases, ``compile``, then ``run`` them."""

    program: Program = field(default_factory=lambda: Program("bench"))
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(1))

    def add(self, make: Callable[[Maker], tuple[Value, ...]]) -> None:
        """A case, as an entry for few tokens and one for many; with states, the first one is on drafted tokens, and there is one
        on committed tokens, one of a sequence."""
        index, drafted = sum(name.startswith("step") for name in self.program.entries), False
        for mode in reversed(MODES):
            maker = Maker(self, f"{mode}.{index}", Axis("t", draft=mode == "step" and drafted))
            outputs = make(maker)
            drafted = f"kv_{index}" in self.program.states
            self.program.entries[f"{mode}.{index}"] = maker.builder.build(*outputs)
        if drafted:
            step = self.program.entries[f"step.{index}"]
            self.program.entries[f"decode.{index}"] = committed(step)

    def compile(self, hosts: set[str] | None = None, level: str | None = None) -> None:
        """Native code for all cases, for this processor or one of ``level``; ``hosts``: the ops that are expected to run on the
        host."""
        kernels, level = Kernels(), level or host_level()
        emitter, packings, schedules = Emitter(kernels, level), {}, {}
        self.hosts: set[tuple[str, str]] = set()
        for name in self.program.entries:
            graph = flatten(self.program, name)
            plan = Planner(graph, name.startswith("prefill"), kernels.signatures.__getitem__)
            plan.schedule.packings = packings
            schedules[name] = plan.plan(regions(graph), emitter, lambda p: _advance_all(p, kernels))
            self.hosts |= set(plan.hosts)
        assert {op for op, _ in self.hosts} == (hosts or set()), self.hosts
        if self.program.states and all(_plain(s) for s in self.program.states.values()):
            schedules["commit"] = _commit(self.program, kernels)
        text = kernels.text()
        code = NativeCode(to_object(text, level), schedules, {}, kernels.signatures, machine(), level, text)
        packed = PackedWeights.pack(self.program, self.weights, packings)
        self.engines = {n: Engine(self.program, code, packed, n) for n in (1, 2, 3)}
        self.plain = Interpreter(self.program, self.weights)

    def inputs(self, entry: str, n: int, spread: float = 1.0) -> dict[str, torch.Tensor]:
        graph = self.program.entries[entry]
        found: dict[str, torch.Tensor] = {}
        for v in graph.inputs:
            if isinstance(v.type, Tensor):
                shape = (n, *v.type.axes[1:])
                x = torch.randn(shape, generator=self.generator) * spread
                found[graph.names[v]] = x if v.type.dtype == "f32" else (x.abs() * 10).to(DTYPES[v.type.dtype])
        return found

    def run(self, entry: str, at: Tokens, threads: int, inputs: dict[str, torch.Tensor], stores: Any = None) -> list[Any]:
        """What native code and the interpreter give, as pairs of tensors. ``stores``: the states of both, by name."""
        graph = self.program.entries[entry]
        names = [graph.names[v] for v in graph.inputs]
        fast, slow = stores or ({}, {})
        found = self.engines[threads].run(entry, [inputs[n] if n in inputs else fast[n] for n in names], at)
        want = self.plain.run(graph, {**inputs, **slow}, {"t": at})
        return [(a, b) for a, b in zip(found, want, strict=True) if isinstance(a, torch.Tensor)]

    def check(self, at: Tokens, tolerance: float = 2e-5, spread: float = 1.0) -> None:
        """All cases without states, in both modes, by 1, 2 and 3 threads."""
        for entry in self.program.entries:
            inputs = self.inputs(entry, len(at), spread)
            for threads in self.engines:
                for found, want in self.run(entry, at, threads, inputs):
                    close(found, want, tolerance, f"{entry} {threads} threads: {self.program.entries[entry].outputs}")

    def stores(self, rows: int, capacity: int) -> tuple[dict[str, KVStore], dict[str, KVStore]]:
        made = [{n: KVStore(t, rows, capacity) for n, t in self.program.states.items()} for _ in range(2)]  # type: ignore[arg-type]
        return made[0], made[1]


def close(found: torch.Tensor, want: torch.Tensor, tolerance: float, what: str) -> None:
    assert found.shape == want.shape and found.dtype == want.dtype, what
    if not found.dtype.is_floating_point:
        assert torch.equal(found, want), what
        return
    error = (found - want).abs() / (want.abs() + want.abs().mean() + 1e-6)
    assert not error.isnan().any() and float(error.max() if error.numel() else 0) <= tolerance, f"{what}: {float(error.max())}"


__all__ = ["MODES", "T", "Bench", "Maker", "close", "replace"]
