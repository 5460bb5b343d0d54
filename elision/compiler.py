"""The way from a model to a `Model`: load, capture, raise, rewrite, run."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from elision.errors import BadInput
from elision.ir.types import parse_dtype

if TYPE_CHECKING:
    from elision.ir.program import Program, Weights
    from elision.passes.base import Pass
    from elision.runtime.model import Model
    from elision.runtime.text import Tokenizer

log = logging.getLogger("elision")

TARGETS = ("cpu", "reference")


def compile(
    model: nn.Module | str | os.PathLike[str],
    passes: Sequence[str | Pass] = (),
    target: str | Sequence[str] = "cpu",
    dtype: str | torch.dtype | None = None,
    kv_dtype: str | torch.dtype | None = None,
    threads: int | None = None,
    max_context: int | None = None,
    max_batch: int = 8,
    calibration: torch.Tensor | Sequence[str] | None = None,
    tuned: str | os.PathLike[str] | None = None,
) -> Model:
    """Compile a model.

    ``model``: an `nn.Module`, a Hugging Face directory, a GGUF file, or ``"smollm2"``. ``passes``: text or Pass objects, such as
    ``["skip-layers:layers=3", "stored"]``. ``dtype``, ``kv_dtype``: of weights and activations, and of the cache (default: the
    model's own); ``target``: ``cpu``, ``reference`` (the interpreter), or GPUs, as ``cuda:sm_90`` or ``hip:gfx942``: several of
    these may be given, and one of the first two besides. Code for GPUs is compiled ahead of time, for `load` with
    ``device="cuda"``; ``target="cuda"`` is the GPU of this machine, and the model runs on it at once.
    ``kv_dtype="int8"`` is a cache of bytes with a scale per token and head (pass ``insert-cache:dtype=int8``).
    ``max_context``: the most positions of a sequence (default: the model's). ``max_batch``: the most sequences of a call.
    ``calibration``: what passes such as ``gptq`` look at: texts, or token ids ``i64[n]`` or ``i64[sequences, n]`` (default: half
    of Python's own documentation, through the model's tokenizer). ``tuned``: a table that ``elision tune`` has measured, for the
    one GPU target that it is of.

    Raises BadInput for what cannot be used, UnsupportedModel for a model that cannot be raised, IllegalProgram for a
    composition of passes that breaks a legality rule. Progress by stage goes to the logger ``elision`` at level INFO.
    """
    from elision.frontend.capture import capture
    from elision.frontend.inputs import left_out
    from elision.frontend.raising import raise_model
    from elision.frontend.source import load_source
    from elision.frontend.stored import blocks_of
    from elision.ir.coverage import opaque
    from elision.ir.weights import Blocks
    from elision.passes import InsertCache
    from elision.passes.calibration import Text
    from elision.passes.pipeline import resolve, transform
    from elision.runtime.text import Tokenizer

    here = target == "cuda"
    host, gpus = _targets(_this_gpu() if here else target)
    if tuned is not None and not gpus:
        raise BadInput(f"tuned={os.fspath(tuned)!r} is for code for a GPU, and target={target!r}: give target='cuda:sm_90', say")
    if max_batch < 1 or (max_context is not None and max_context < 2):
        raise BadInput(f"max_batch={max_batch}, max_context={max_context}; expected at least 1 and at least 2")
    chosen: list[Any] = resolve(passes)
    given = [p.text() for p in chosen if isinstance(p, InsertCache)]
    if given and kv_dtype is not None:
        raise BadInput(f"kv_dtype={kv_dtype!r} and the pass {given[0]}: give one of the two")
    source = load_source(model, dtype)
    captured = capture(source.model)
    log.info("captured %s: %d operators", source.name, len(captured.graph.nodes))
    if missing := left_out(source.model, captured.inputs):
        log.warning("%s is compiled for %s; left out: %s", source.name, ", ".join(captured.inputs), ", ".join(missing))
    raised = raise_model(captured, source.name, positions=source.positions)
    stored = blocks_of(raised.weights, source.model, source.stored)
    raised.program.stored = {name: Blocks(found.format) for name, found in stored.items()}
    longest = raised.program.meta["positions"]
    if max_context is not None and max_context > longest:
        raise BadInput(f"max_context={max_context}, but {source.name} has {longest} positions")
    if raised.program.meta["causal"] and not given:
        chosen.insert(0, InsertCache(parse_dtype(kv_dtype) if kv_dtype is not None else ""))
    tokenizer = Tokenizer.from_json(*source.tokenizer) if source.tokenizer else None
    raised.program.models = cache(partial(_draft, tokenizer))
    text = Text(calibration, tokenizer.encode if tokenizer else None)
    able = host == "cpu" and not opaque(raised.program, "score")
    clock = partial(_seconds, threads=threads) if able else None
    program, weights = transform(raised.program, raised.weights, chosen, text, stored, clock)
    return finish(
        raised.program,
        program,
        weights,
        host,
        gpus,
        tokenizer=tokenizer,
        defaults=source.defaults,
        max_context=max_context or longest,
        max_batch=max_batch,
        threads=threads,
        here=here,
        tuned=tuned,
    )


def finish(
    raised: Program, program: Program, weights: Weights, host: str, gpus: Sequence[str] = (), here: bool = False,
    tuned: str | os.PathLike[str] | None = None, **facts: Any,
) -> Model:  # fmt: skip
    """The model of a program that passes made of ``raised``, with native code for ``host="cpu"`` where it has a native form, and
    with code for these GPUs; ``here``: it runs on the one of this process. ``facts``: what `Model` is told besides."""
    from elision.hf import CompiledModel
    from elision.ir.coverage import coverage

    report = coverage(raised, program)
    native = None
    if host == "cpu" and not any(report["entries"].values()):  # what is padded has no native form
        from elision.codegen.cpu.compile import compile_program

        native = compile_program(program)
    gpu = device = None
    if gpus:
        from elision.codegen.triton.ahead import build
        from elision.codegen.triton.compile import plan_program
        from elision.codegen.triton.launches import Kernels
        from elision.codegen.triton.tuned import load as load_table
        from elision.ir.launch import need_kernels
        from elision.runtime.cuda.driver import Cuda

        kernels = Kernels(load_table(tuned, gpus).tiles if tuned is not None else {})
        gpu = plan_program(program, kernels)
        if tuned is not None and kernels.tiles and not kernels.tiles.keys() & kernels.asked.keys():
            raise BadInput(f"{os.fspath(tuned)} has nothing for {program.name}: measure this model with `elision tune`")
        need_kernels(program.name, gpu)
        build(gpu, gpus)
        device = Cuda(gpu) if here else None
    log.info("compiled: %d layers, quality %s", len(program.layers), program.quality)
    return CompiledModel(program, weights, coverage=report, native=native, gpu=gpu, device=device, **facts)


def _this_gpu() -> str:
    """The target of the first GPU of this process. Raises BadInput without a driver or GPU."""
    from elision.runtime.cuda.driver import capability

    return "cuda:sm_{}{}".format(*capability())


def _targets(target: str | Sequence[str]) -> tuple[str, list[str]]:
    """What the host runs, the interpreter beside GPUs alone, and the GPUs. Raises BadInput for what is neither or cannot be
    made."""
    given = list(dict.fromkeys([target] if isinstance(target, str) else target))
    gpus = [t for t in given if t.startswith(("cuda:", "hip:"))]
    hosts = [t for t in given if t not in gpus]
    for each in hosts:
        if each not in TARGETS:
            raise BadInput(f"unknown target {each!r}; the targets are {', '.join(TARGETS)}, and GPUs as cuda:sm_90")
    if len(hosts) > 1 or not given:
        raise BadInput(f"target={target!r}; expected GPUs, one of {', '.join(TARGETS)}, or both")
    if gpus:
        from elision.codegen.triton.ahead import available
        from elision.codegen.triton.targets import checked

        for each in gpus:
            checked(each)
        if not available():
            raise BadInput(f"{', '.join(gpus)}: Triton, which makes code for GPUs, is not installed: pip install 'elision[gpu]'")
    return (hosts or ["reference"])[0], gpus


def load(
    path: str | os.PathLike[str],
    threads: int | None = None,
    verify: bool = True,
    target: str | None = None,
    device: str | None = None,
) -> Model:
    """Open an artefact; its weights are mapped, not read. ``verify=False`` skips the check of the weights' bytes only.

    ``target``: ``"cpu"`` for native code, ``"reference"`` for the interpreter; None takes what the artefact has. Code for a
    processor that can do more than this one is made again, where the MLIR bindings are installed. ``device="cuda"``: the model
    runs on the first GPU of this process, by the machine code in the artefact (``target="cuda:sm_90"`` of `compile`).

    Raises BadInput for a file or a device that is not there, ArtefactError for one that is damaged, foreign, of another version,
    or without code for this processor.
    """
    from elision.hf import CompiledModel
    from elision.runtime import artefact

    return CompiledModel.of(artefact.load(path, threads, verify, target, _rebuild, device))


def _seconds(programs: Sequence[Program], contexts: Sequence[int], threads: int | None) -> list[list[float]]:
    """What decode steps take in native code, of a program and of others with some of its layers, on weights that are made up (as
    much memory as the program's). They share that memory: where weights lie changes times more than a layer does."""
    from elision.codegen.cpu.compile import compile_program
    from elision.runtime.clock import decode_seconds, made_up
    from elision.runtime.model import Model
    from elision.runtime.native.weights import PackedWeights

    codes = [compile_program(p) for p in programs]
    whole = PackedWeights.pack(programs[0], made_up(programs[0]), codes[0].packings)
    rest: dict[str, Any] = {"tokenizer": None, "defaults": {}, "coverage": {}, "max_context": programs[0].meta["positions"]}
    models = [Model(p, whole.of(p), threads=threads, native=code, **rest) for p, code in zip(programs, codes, strict=True)]
    with models[0]._threads(1):
        return decode_seconds([m._interpreter for m in models], contexts)


def _draft(tokenizer: Tokenizer | None, path: str) -> tuple[Program, Weights]:
    """A compiled model that is to draft for one with this tokenizer. Raises BadInput for one with another."""
    from elision.runtime import artefact

    found = artefact.load(path, target="reference")
    if tokenizer and found.tokenizer and not tokenizer.agrees(found.tokenizer):
        raise BadInput(f"model={path}: its tokenizer is another one than the model's, so its tokens mean something else")
    return found.program, found.weights


def _rebuild(text: str, level: str) -> bytes:
    from elision.codegen.cpu.lower import to_object

    return to_object(text, level)
