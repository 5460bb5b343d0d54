"""What ``elision tune`` measures: entries of a model on the GPU that is here."""

from __future__ import annotations

import time
from typing import Any

import torch

from elision.codegen.triton.ahead import build
from elision.codegen.triton.tuned import Places
from elision.errors import BadInput
from elision.ir.launch import Binary, DeviceCode
from elision.ir.tokens import Tokens
from elision.ir.tree import Tree, pack
from elision.runtime.cuda.caches import caches
from elision.runtime.cuda.device import Device
from elision.runtime.cuda.driver import Cuda, capability, device_name, open_driver
from elision.runtime.cuda.engine import Engine
from elision.runtime.model import Model

#: By entry and class of shapes: sequences, and tokens of each.
_CALLS = {
    "decode": {"one": (1, 1), "few": (8, 1), "some": (32, 1)}, "step": {"one": (1, 1), "few": (1, 16), "some": (4, 16)},
    "prefill": {"many": (1, 512)},
}  # fmt: skip
_CONTEXT = 1024  # tokens that are there before


def gpu(target: str | None) -> tuple[Any, str, str]:
    """The driver, the target of the GPU that is here, and its name. Raises BadInput where there is none, or another one than
    ``target``."""
    try:
        library = open_driver()
        here = "cuda:sm_{}{}".format(*capability(library))
    except BadInput as err:
        raise BadInput(f"tune measures kernels, which needs an NVIDIA GPU: {err}") from err
    if target not in (None, here):
        raise BadInput(f"tune measures on the GPU that is here, which is {here}: it cannot say anything of {target}")
    return library, here, device_name(library)


class Bench:
    """Calls of a model's entries. Kernels that were compiled stay; weights lie on the GPU once."""

    def __init__(self, model: Model, library: Any, target: str, repeats: int = 20, context: int = _CONTEXT) -> None:
        self.model, self.target, self._library, self._repeats = model, target, library, repeats
        self._context = min(context, model.max_context // 2)
        self._made: dict[str, Binary] = {}
        self._engine: Engine | None = None

    def __call__(self, code: DeviceCode, places: Places) -> tuple[float, torch.Tensor]:
        new = DeviceCode({n: k for n, k in code.kernels.items() if repr(k) not in self._made}, {}, {})
        build(new, [self.target])
        self._made |= {repr(k): new.binaries[self.target][n] for n, k in new.kernels.items()}
        code.binaries[self.target] = {n: self._made[repr(k)] for n, k in code.kernels.items()}
        device = Cuda(code, self._library)
        if self._engine is None:
            self._engine = Engine(self.model.program, code, self.model.weights, device)
        self._engine.device, self._engine.code = device, code
        each = [self._time(self._engine, device, e, *_CALLS[e][s]) for e, s in places if s in _CALLS.get(e, {})]
        return sum(t for t, _ in each), torch.cat([x.flatten() for _, x in each]) if each else torch.zeros(1)

    def _time(self, engine: Engine, device: Device, entry: str, rows: int, tokens: int) -> tuple[float, torch.Tensor]:
        """The least seconds of a call in three runs, and its first logits."""
        tokens = min(tokens, self._context)
        each = 3 if entry == "prefill" else self._repeats
        most = min(self.model.max_context, self._context + (3 * each + 1) * tokens)
        each = max(1, ((most - self._context) // tokens - 1) // 3)
        engine.begin(rows, most)
        held = caches(device, engine.program, rows, most)
        noise = torch.Generator().manual_seed(0)
        vocabulary = engine.program.meta["vocab"]
        before = Tokens.chunk([self._context] * rows, [0] * rows)
        engine.run(engine.call("prefill", before, torch.randint(0, vocabulary, (len(before),), generator=noise)), held)
        if entry == "step":
            chains = [Tree(tuple(range(-1, tokens - 1)))] * rows
            row, pos, parent, anc = pack(chains, [self._context] * rows)
            at = Tokens(row, pos, rows, parent, anc)
        else:
            at = Tokens.chunk([tokens] * rows, [self._context] * rows)
        call = engine.call(entry, at, torch.randint(0, vocabulary, (len(at),), generator=noise))
        start = engine.graph(call, held)
        start()
        logits, seconds = engine.output(call, 0).float(), []
        for _ in range(3):
            begin = time.perf_counter()
            for _ in range(each):
                start()
            device.wait()
            seconds.append((time.perf_counter() - begin) / each)
        engine.begin(0, 0)
        return min(seconds), logits
