"""Models with the shapes of large ones on a GPU: right or wrong, and how near to the floor.

    python benchmarks/gpu.py [--model llama-3-8b] [--layers 32] [--minutes 9] [--output benchmarks/results/NAME.md]
    python benchmarks/gpu.py --dry-run         the same on a tiny model under Triton's interpreter: no GPU, and no figures

Weights are random numbers; every layer has memory of its own. Machine code is made for the GPU at hand before anything is timed.
Decoding is one graph launched again and again without the host; a time is the mean over so many launches that they last a while,
the best of three. The floor of a step is the bytes that it must read (weights, and the keys and values of the contexts) over the
bandwidth at which this GPU reads the largest weight with our own product of one token. Where torch sees the GPU, its own
attention (`scaled_dot_product_attention`) and transformers with a static cache under `torch.compile` are timed beside ours. What
does not fit into the memory or into ``--minutes`` is left out, and said so.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

if "--dry-run" in sys.argv:
    import os

    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

import torch
from gpu_shapes import SHAPES, shaped

import elision
from elision.codegen.triton.ahead import build, totals
from elision.codegen.triton.compile import plan_program
from elision.codegen.triton.interpreted import Interpreted
from elision.ir.launch import DeviceCode
from elision.ir.program import Program
from elision.ir.tokens import Tokens
from elision.ir.tree import Tree, pack
from elision.runtime.cuda.decode import Decoder
from elision.runtime.cuda.driver import Cuda, capability
from elision.runtime.cuda.engine import Engine

#: Passes of a variant, batches, contexts, drafted nodes.
VARIANTS: dict[str, tuple[str, ...]] = {
    "bf16": (), "int4": ("int4:group=32",), "int8": ("int8",), "bf16, kv int8": ("insert-cache:dtype=int8",),
}  # fmt: skip
#: Attention alone: batches and contexts, as torch's own is timed; and the budget of h2o, whose scoring is timed beside it.
ATTENDED, BUDGET = ((1, 8192), (8, 8192), (1, 32768)), 8192
BATCHES, CONTEXTS, NODES = (1, 8, 64), (1024, 8192, 32768), (1, 16)
MEMORY = 110e9  # bytes that weights and caches may take together


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
    from elision.ir.layout import row_bytes

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


def correctness(device_of: Callable[[DeviceCode], Any]) -> str:
    """Greedy tokens of a tiny model on the device beside the reference interpreter's."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128,
    )  # fmt: skip
    model = elision.compile(transformers.AutoModelForCausalLM.from_config(config).eval(), target="reference", dtype="float32")
    code = plan_program(model.program)
    decoder = Decoder(Engine(model.program, code, model.weights, device_of(code)), 1, 64)
    prompt = [5, 17, 29, 3, 81, 44]
    logits = decoder.prefill([prompt])[0]
    error = float((logits - model(torch.tensor([prompt]))["logits"][0, -1]).abs().max())
    found = decoder.decode(6)[0].tolist()
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=6, eos_token_id=[])[0, len(prompt) :].tolist()
    if found != expected or error > 1e-2:
        raise SystemExit(f"wrong: {found} instead of {expected}, logits differ by {error}")
    return f"greedy tokens equal the reference's; logits differ by at most {error:.1e}"


def peers(name: str, least: float) -> Iterator[str]:
    """torch's attention, and transformers under torch.compile, if torch sees the GPU."""
    if not torch.cuda.is_available():
        yield "torch sees no GPU: no peers"
        return
    import transformers

    family, heads, cached, dim, hidden, inside, vocabulary = SHAPES[name]
    for rows, context in ((1, 8192), (8, 8192), (1, 32768)):
        q = torch.randn(rows, heads, 1, dim, device="cuda", dtype=torch.bfloat16)
        k, v = (torch.randn(rows, cached, context, dim, device="cuda", dtype=torch.bfloat16) for _ in "kv")
        call = lambda q=q, k=k, v=v: torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)  # noqa: E731
        spent = timed(call, torch.cuda.synchronize, least)
        yield f"torch sdpa, batch {rows}, context {context}: {spent * 1e6:.0f} us"
    config = getattr(transformers, family)(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inside, num_hidden_layers=8, num_attention_heads=heads,
        num_key_value_heads=cached, head_dim=dim, max_position_embeddings=8192,
    )  # fmt: skip
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    cache = transformers.StaticCache(config=config, max_cache_len=2048)
    forward = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)
    ids, at = torch.zeros(1, 1, dtype=torch.int64, device="cuda"), torch.tensor([1024], device="cuda")
    with torch.inference_mode():
        spent = timed(lambda: forward(ids, past_key_values=cache, cache_position=at), torch.cuda.synchronize, least)
    yield f"transformers, torch.compile, static cache, 8 layers, batch 1, context 1k: {spent * 1e3:.2f} ms a token"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    dry, began = options.dry_run, time.monotonic()
    name, layers, least = ("tiny", 1, 0.0) if dry else (options.model, options.layers, 0.2)
    batches, contexts = ((1, 2), (20,)) if dry else (BATCHES, CONTEXTS)
    target = "" if dry else f"cuda:sm_{''.join(map(str, capability()))}"

    def device_of(code: DeviceCode) -> Any:
        if dry:
            return Interpreted(code.kernels)
        build(code, [target], workers=8)
        return Cuda(code)

    lines = [
        f"# {name} on {'Triton interpreter: no figures' if dry else target}",
        "",
        f"{time.strftime('%Y-%m-%d')}, {platform.platform()}, torch {torch.__version__}",
        "",
    ]

    def say(text: str) -> None:
        lines.append(text)
        print(text, flush=True)

    def late() -> bool:
        return time.monotonic() - began > 60 * options.minutes - 60

    def shown(seconds: float) -> str:
        return "ran" if dry else f"{seconds * 1e6:.0f} us"

    say(correctness(device_of))
    bandwidth, plain = 0.0, 0.0
    attended: dict[tuple[int, int], float] = {}
    for variant, passes in VARIANTS.items():
        program = shaped(name, passes, layers)
        code, weights = plan_program(program), RandomWeights(program)
        if late():
            say(f"\n{variant}: not run (time)")
            continue
        start = time.monotonic()
        engine = Engine(program, code, weights, device_of(code))
        if not dry:
            say(f"\n## {variant}: compiled in {time.monotonic() - start:.0f} s, {totals(code, target)}\n")
        if not bandwidth and not dry:
            say(f"reads {(bandwidth := read_bandwidth(engine, least)) / 1e12:.2f} TB/s")
        for rows in batches:
            for context in contexts:
                read = weights.nbytes() + context_bytes(program, rows, context)
                if read > MEMORY or late():
                    say(f"batch {rows}, context {context}: not run ({'memory' if read > MEMORY else 'time'})")
                    continue
                one = step_time(engine, rows, context, 1, least)
                tree = step_time(engine, rows, context, NODES[1], least) if rows <= 2 and (not dry or variant == "bf16") else 0.0
                if dry:
                    say(f"{variant}, batch {rows}, context {context}: ran")
                    continue
                plain = plain or one
                text = f"batch {rows}, context {context}: {one * 1e3:.3f} ms a step, {read / bandwidth / one:.2f} of the floor"
                say(
                    text
                    + (f", {tree / one:.2f} times that for {NODES[1]} nodes" if tree else "")
                    + f", {plain / one:.2f} times the first"
                )
        if variant == "bf16":
            nodes = NODES[1]
            spent = round_time(engine, 1, contexts[0], nodes, least)
            say(f"a round of {nodes} nodes, batch 1, context {contexts[0]}, nothing read by the host: {shown(spent)}")
            for rows, context in ((2, 20),) if dry else ATTENDED:
                attended[rows, context] = attention_time(engine, layers, rows, context, least)
                say(f"attention of a layer, batch {rows}, context {context}: {shown(attended[rows, context])}")
        engine.free()
    budget = 20 if dry else BUDGET
    program = shaped(name, (f"h2o:budget={budget},recent=4",), layers)
    code = plan_program(program)
    if late():
        say("scores of h2o: not run (time)")
    else:
        engine = Engine(program, code, RandomWeights(program), device_of(code))
        for rows in (2,) if dry else (1, 8):
            spent, plain = attention_time(engine, layers, rows, budget, least), attended[rows, budget]
            text = "" if dry else f", {spent / plain:.2f} times attention alone"
            say(f"attention of a layer with the scores of h2o, batch {rows}, budget {budget}: {shown(spent)}{text}")
        engine.free()
    if late():
        say("peers: not run (time)")
    else:
        for line in peers(name, least):
            say(line)
    if options.output is not None and not dry:
        options.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
