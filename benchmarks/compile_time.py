"""Time from IR to machine code, and the code's size, by depth: SmolLM2, and Llamas with the heads of Llama 3 8B.

    python benchmarks/compile_time.py

Figures are processor seconds of this process (not slowed by what else runs). The code does not grow with the depth;
widths are constants in it, so narrow layers take as long to compile as wide ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM

from elision.codegen.cpu import compile as cpu
from elision.codegen.cpu.lower import to_object
from elision.frontend.capture import capture
from elision.frontend.raising import raise_model
from elision.frontend.source import load_source
from elision.passes import InsertCache
from elision.passes.pipeline import run

DEPTHS = (2, 32)


def llama(layers: int) -> LlamaForCausalLM:
    """The graph of a Llama 3 8B of ``layers`` layers, narrow."""
    config = LlamaConfig(
        vocab_size=2048, hidden_size=128, intermediate_size=448, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=8192, rope_theta=500000.0, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def timed(call: Callable[..., Any], *args: Any) -> tuple[Any, float]:
    start = time.process_time()
    found = call(*args)
    return found, time.process_time() - start


def measure(name: str, model: Any, positions: int) -> None:
    captured, capturing = timed(capture, model)
    raised, raising = timed(lambda: raise_model(captured, name, positions=positions))
    program = run(raised.program, [InsertCache("")])
    to_object.cache_clear()
    native, native_time = timed(cpu.compile_program, program)
    rows = len(native.schedules["step"].rows)
    print(
        f"{name:20} capture {capturing:5.2f} s  raise {raising:5.2f} s  IR to machine code {native_time:5.2f} s  "
        f"object {len(native.code) / 1e3:6.1f} kB  MLIR {len(native.text) / 1e3:6.1f} kB  step {rows} rows"
    )


def main() -> None:
    to_object("func.func @f() { return }", cpu.host_level())  # importing the bindings is not compiling
    source = load_source("smollm2", None)
    measure("SmolLM2", source.model, source.positions)
    for layers in DEPTHS:
        measure(f"8B heads, {layers} layers", llama(layers), 8192)


if __name__ == "__main__":
    main()
