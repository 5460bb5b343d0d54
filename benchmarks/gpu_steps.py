"""Steps of models of random weights on a device, and the time that they take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from elision.ir.layout import row_bytes
from elision.ir.program import Program
from elision.ir.tokens import Tokens
from elision.ir.tree import Tree, pack
from elision.runtime.cuda.decode import Decoder
from elision.runtime.cuda.engine import Engine


class RandomWeights(Mapping[str, torch.Tensor]):
    """A weight of every name, equal ones for equal types: made once, put on the device as often as it is asked for."""

    def __init__(self, program: Program) -> None:
        self._types, self._made = program.params, dict[Any, torch.Tensor]()

    def __getitem__(self, name: str) -> torch.Tensor:
        type = self._types[name]
        key = (type.axes, type.dtype, type.encoding, "inv_freq" in name)
        if key not in self._made:
            shape, dtype = type.storage
            if "inv_freq" in name:
                found = 10000.0 ** (-torch.arange(*shape) / shape[0])
            elif type.encoding is None:
                found = (
                    torch.empty(shape, dtype=dtype).uniform_(-0.02, 0.02) if len(shape) > 1 else torch.ones(shape, dtype=dtype)
                )
            else:  # any bytes are codes; scales must be finite
                found = torch.randint(0, 32, shape, dtype=dtype)
            self._made[key] = found
        return self._made[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._types)

    def __len__(self) -> int:
        return len(self._types)

    def nbytes(self) -> int:
        """Bytes of all weights but the table of the embedding, of which a step reads a few rows."""
        each = {n: self[n].numel() * self[n].element_size() for n in self}
        return sum(each.values()) - max((v for n, v in each.items() if "embed" in n), default=0) * ("lm_head.weight" in each)


def timed(run: Callable[[], object], wait: Callable[[], None], least: float) -> float:
    """Seconds of one run."""
    run()
    wait()
    best, count = float("inf"), 1
    for _ in range(3):
        while True:
            start = time.perf_counter()
            for _ in range(count):
                run()
            wait()
            spent = time.perf_counter() - start
            if spent >= least or least == 0:
                break
            count = max(2 * count, int(1.2 * count * least / max(spent, 1e-6)))
        best = min(best, spent / count)
    return best


def at_context(engine: Engine, rows: int, context: int, more: int) -> Decoder:
    """Sequences that have so many tokens already, without having read them."""
    decoder = Decoder(engine, rows, context + more)
    for cache in decoder.caches.values():
        for name in ("len_k", "len_v"):
            shape, dtype = cache.specs[name]
            engine.device.write(cache.address[name], torch.full(shape, context, dtype=dtype))
        shape, dtype = cache.specs["pos"]
        engine.device.write(cache.address["pos"], torch.arange(shape[-1], dtype=dtype).expand(shape).contiguous())
    decoder.lengths = [context] * rows
    return decoder


def step_time(engine: Engine, rows: int, context: int, nodes: int, least: float) -> float:
    """Seconds of a step: of one token a sequence by ``decode``, of a tree of nodes by ``step``."""
    decoder = at_context(engine, rows, context, 4096 if least else 64)
    if nodes == 1:
        call = engine.call("decode", Tokens(torch.arange(rows), torch.tensor(decoder.lengths), rows), decoder.last)
    else:
        row, pos, parent, anc = pack([Tree((-1, *(i // 2 for i in range(nodes - 1))))] * rows, decoder.lengths)
        call = engine.call("step", Tokens(row, pos, rows, parent, anc), torch.zeros(len(row)))
    found = timed(engine.graph(call, decoder.caches), engine.device.wait, least)
    for cache in decoder.caches.values():
        cache.free()
    return found


def round_time(engine: Engine, rows: int, context: int, nodes: int, least: float) -> float:
    """Seconds of a whole round of drafts: verified, walked and committed on the device, with nothing read in between."""
    decoder = at_context(engine, rows, context, 1 << 16 if least else 64)
    row, pos, parent, anc = pack([Tree((-1, *(i // 2 for i in range(nodes - 1))))] * rows, decoder.lengths)
    call = engine.call("step", Tokens(row, pos, rows, parent, anc), torch.zeros(len(row)))
    step = engine.graph(call, decoder.caches)
    commit = engine.graph(engine.call("commit", Tokens(row[:0], pos[:0], rows)), decoder.caches)

    def both() -> None:
        step()
        commit()

    found = timed(both, engine.device.wait, least)
    for cache in decoder.caches.values():
        cache.free()
    return found


def attention_time(engine: Engine, layers: int, rows: int, context: int, least: float) -> float:
    """Seconds of a layer's attention of one token a sequence, with the scores of its entries if the program keeps them."""
    decoder = at_context(engine, rows, context, 16)
    call = engine.call("decode", Tokens(torch.arange(rows), torch.tensor(decoder.lengths), rows), decoder.last)
    kernels = engine.code.kernels
    wanted = [r for r in call.schedule.rows if r.host < 0 and kernels[r.kernel].template in ("attend", "combine", "mass")]
    call.schedule = replace(call.schedule, rows=wanted)
    found = timed(engine.graph(call, decoder.caches), engine.device.wait, least)
    engine.begin(0, 0)  # the call is not whole
    for cache in decoder.caches.values():
        cache.free()
    return found / layers


def context_bytes(program: Program, rows: int, context: int) -> float:
    return sum(rows * context * row_bytes(t) for t in program.states.values())  # type: ignore[arg-type]


def read_bandwidth(engine: Engine, least: float) -> float:
    """Bytes a second at which the head's weight is read by the product of one token."""
    decoder, zero = Decoder(engine, 1, 64), torch.zeros(1, dtype=torch.int64)
    call = engine.call("decode", Tokens(zero, zero, 1), zero)
    call.schedule = replace(call.schedule, rows=[r for r in call.schedule.rows if "lm_head.weight" in str(r.operands)])
    spent = timed(engine.graph(call, decoder.caches), engine.device.wait, least)
    for cache in decoder.caches.values():
        cache.free()
    weight = engine.program.params["lm_head.weight"]
    return float(weight.sizes[0] * weight.row * 2 / spent)
