"""The verbs of the command line. Exit status: 0, 1 for an illegal program, 2 for bad input or a bad artefact."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from elision.cli.opening import errors, is_artefact, open_model, progress, read_text, violations
from elision.errors import BadInput, ElisionError

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Elision: a compiler for transformer inference.")

Source = Annotated[str, typer.Argument(metavar="X", help="smollm2, a Hugging Face directory, a .gguf file or an artefact.")]
Passes = Annotated[list[str], typer.Option("-p", "--pass", metavar="PASS", help="As in skip-layers:layers=3+7-9.")]
Threads = Annotated[int | None, typer.Option(help="Threads to run on.")]
Target = Annotated[list[str], typer.Option(metavar="T", help="What to generate code for. Repeatable.  [default: cpu]")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON to standard output.")]


@app.command("compile")
def compile_(
    model: Source,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="OUT.elision", help="The artefact to write.")],
    passes: Passes = [],  # noqa: B006 - typer's way to say repeatable
    target: Target = [],  # noqa: B006
    dtype: Annotated[str | None, typer.Option(help="Of weights and activations, as float32.")] = None,
    kv_dtype: Annotated[str | None, typer.Option(help="Of the key/value cache, as bfloat16 or int8.")] = None,
    max_context: Annotated[int | None, typer.Option(help="The most positions of a sequence.")] = None,
    max_batch: Annotated[int | None, typer.Option(help="The most sequences of a call.")] = None,
    calibration: Annotated[Path | None, typer.Option(metavar="TEXT", help="A text file for passes that calibrate.")] = None,
    tuned: Annotated[Path | None, typer.Option(metavar="FILE", help="What `elision tune` has measured.")] = None,
) -> None:
    """Compile a model ahead of time into one file."""
    with progress():
        text = [read_text(calibration)] if calibration is not None else None
        found = open_model(
            model,
            passes,
            target=target or None,
            dtype=dtype,
            kv_dtype=kv_dtype,
            max_context=max_context,
            max_batch=max_batch,
            calibration=text,
            tuned=tuned,
        )
        found.save(output)
    size = output.stat().st_size / 1e6
    Console(soft_wrap=True, markup=False).print(
        f"{output}: {size:.1f} MB, {len(found.program.layers)} layers, quality {found.program.quality}, "
        f"passes {', '.join(found.program.applied)}"
    )
    if found.gpu is not None:
        from elision.cli.gpu import compiled

        Console(soft_wrap=True, markup=False).print(*compiled(found.gpu), sep="\n")


@app.command()
def run(
    model: Source,
    prompt: Annotated[str, typer.Argument(help="The text to continue, or the message with --chat.")],
    passes: Passes = [],  # noqa: B006
    chat: Annotated[bool, typer.Option("--chat", help="Wrap the prompt in the model's chat template.")] = False,
    max_new_tokens: Annotated[int | None, typer.Option(help="The most tokens to generate.")] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    threads: Threads = None,
    device: Annotated[str | None, typer.Option(help="cuda: run on the GPU that the artefact has code for.")] = None,
) -> None:
    """Generate text, printed as it comes."""
    import torch

    with progress():
        found = open_model(model, passes, threads=threads, device=device)
    if "step" not in found.program.entries:
        raise BadInput(f"{model} has no decoder, so it generates no text: call it from Python for its outputs")
    if found.tokenizer is None:
        raise BadInput(f"{model} came without a tokenizer, so it cannot run on text")
    text = found.tokenizer.chat(prompt) if chat else prompt
    ids = found.tokenizer.encode(text, add_special=not chat)
    if not ids:
        raise BadInput("the prompt is empty: expected at least one token")

    def show(row: int, tokens: list[int], piece: str) -> None:
        print(piece, end="", flush=True)

    try:
        found.generate(torch.tensor([ids]), max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, streamer=show)
    except KeyboardInterrupt:
        print()
        raise typer.Exit(130) from None
    print()
    stats = found.stats
    assert stats is not None
    errors.print(
        f"{stats.new_tokens} tokens ({stats.finish[0]}), {stats.tokens_per_second:.1f} tokens/s, first after "
        f"{stats.time_to_first_token * 1e3:.0f} ms, state {stats.state_bytes / 1e6:.1f} MB",
        style="dim",
    )


@app.command()
def show(
    model: Source,
    kernel: Annotated[str, typer.Argument(help="For --mlir and --asm: a kernel by name, or its op as in linear.")] = "",
    after: Annotated[list[str], typer.Option("--after", metavar="PASS", help="Show the program after this pass.")] = [],  # noqa: B006
    cost: Annotated[bool, typer.Option("--cost", help="FLOPs and bytes by op and phase, with the floor.")] = False,
    coverage: Annotated[bool, typer.Option("--coverage", help="What was raised and what stayed opaque.")] = False,
    mlir: Annotated[bool, typer.Option("--mlir", help="The MLIR generated for the CPU: all of it, or of KERNEL.")] = False,
    asm: Annotated[bool, typer.Option("--asm", help="The machine code of KERNEL; without one, the kernels.")] = False,
    gpu: Annotated[bool, typer.Option("--gpu", help="The kernels for GPUs: registers, shared memory, spills, bytes.")] = False,
    svg: Annotated[Path | None, typer.Option(help="Write a picture of stream, layers and states.")] = None,
    bandwidth: Annotated[float, typer.Option(help="GB/s, for the floor.")] = 30.0,
    flops: Annotated[float, typer.Option(help="GFLOP/s, for the floor.")] = 150.0,
    context: Annotated[int | None, typer.Option(help="Entries that a token attends to.  [default: 1024 or fewer]")] = None,
) -> None:
    """Print the IR as text, its cost or its coverage, or draw it."""
    from elision.cli import native, tables
    from elision.cli.picture import picture
    from elision.ir.printer import print_program

    with progress():
        found = open_model(model, after)
        before = open_model(model) if svg is not None and after else found
    console = Console(soft_wrap=True, markup=False)
    if svg is not None:
        try:
            svg.write_text(picture(found.program, before.program), encoding="utf-8")
        except OSError as err:
            raise BadInput(f"{svg} could not be written: {err.strerror or err}") from err
        console.print(f"{svg}: the stream of {found.program.name}")
    if cost:
        console.print(*tables.cost(found, context, bandwidth * 1e9, flops * 1e9))
    if coverage:
        console.print(*tables.coverage(found))
    if gpu:
        from elision.cli.gpu import kernels

        console.print(*kernels(found))
    if mlir or asm:
        print(*native.generated(found, kernel, asm=asm), sep="\n", end="")
    elif kernel:
        raise BadInput(f"{kernel!r} names a kernel: add --mlir or --asm")
    if not (svg or cost or coverage or mlir or asm or gpu):
        print(print_program(found.program), end="")
        print(*native.hosts(found), sep="\n", end="")


@app.command()
def check(model: Source, passes: Passes = []) -> None:  # noqa: B006
    """Say whether the passes compose on this model, what is done so that they do, or by which rule not and what would mend it."""
    from elision.cli.repairs import explained, mended
    from elision.passes.pipeline import run as run_passes

    with progress():
        before = open_model(model)
        if broken := violations(before.program, passes):
            print(*broken, sep="\n\n", file=sys.stderr)
            if repair := mended(before.program, passes):
                print(f"\n{repair}", file=sys.stderr)
            raise typer.Exit(1)
        found, lines = run_passes(before.program, passes), explained(before.program, passes)
    console = Console(soft_wrap=True, markup=False)
    console.print(f"legal: {' '.join(found.applied)}, quality {found.quality}")
    console.print(*(f"  {line}" for line in lines), sep="\n", end="\n" if lines else "")


@app.command()
def bench(
    model: Source,
    passes: Passes = [],  # noqa: B006
    against: Annotated[str | None, typer.Option(metavar="ENGINE", help="transformers: run it in turns with ours.")] = None,
    prompt: Annotated[str | None, typer.Option(help="The prompt; by default random tokens, which drafters cannot guess.")] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of a random prompt.")] = 64,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 64,
    runs: Annotated[int, typer.Option(help="Runs of each engine, after one warm-up.")] = 3,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Measure tokens/s, time to first token and memory, beside the floor of this machine."""
    from elision.cli.bench import compare

    if against not in (None, "transformers"):
        raise BadInput(f"--against {against}: expected transformers")
    if against and is_artefact(model):
        raise BadInput(f"--against {against} needs the model that {model} was compiled from: bench that, with its passes as -p")
    with progress():
        found = open_model(model, passes, threads=threads)
        result = compare(found, model, against, prompt_tokens, new_tokens, runs, prompt)
    if as_json:
        print(json.dumps(result, indent=1))
        return
    table = Table("engine", "tokens/s", "first token (ms)", "state (MB)")
    for name, row in result["engines"].items():
        table.add_row(
            name, f"{row['tokens_per_second']:.1f}", f"{row['first_token'] * 1e3:.0f}", f"{row['state_bytes'] / 1e6:.2f}"
        )
    console = Console(soft_wrap=True, markup=False)
    console.print(table)
    console.print(
        f"floor: {result['floor_tokens_per_second']:.0f} tokens/s at {result['bandwidth'] / 1e9:.1f} GB/s read; peak memory of "
        f"the process {result['peak_memory_bytes'] / 1e6:.0f} MB; {result['threads']} threads; medians of {runs}"
    )
    if drafts := result.get("speculation"):
        each = ", ".join(f"{n} {c['accepted']} of {c['drafted']}" for n, c in drafts["drafters"].items())
        console.print(
            f"speculation: {drafts['speed_up']:.2f} times as fast as without; {drafts['tokens_per_round']:.2f} tokens a round in "
            f"{drafts['rounds']} rounds; accepted {drafts['accepted']} of {drafts['drafted']} ({each}); "
            f"{drafts['draft_time'] * 1e3:.0f} ms drafting, {drafts['verify_time'] * 1e3:.0f} ms verifying, "
            f"{drafts['commit_time'] * 1e3:.0f} ms committing"
        )


@app.command()
def tune(
    model: Source,
    output: Annotated[Path, typer.Option("-o", "--out", metavar="FILE", help="The table to write.")] = Path("tuned.json"),
    passes: Passes = [],  # noqa: B006
    target: Annotated[str | None, typer.Option(metavar="T", help="The GPU's target, as cuda:sm_90; others are refused.")] = None,
) -> None:
    """Measure how a model's kernels are best cut on the GPU that is here, for `compile --tuned`."""
    from elision.cli.tune import Bench, gpu
    from elision.codegen.triton.tuned import Table, search

    library, here, name = gpu(target)
    with progress():
        found = open_model(model, passes) if is_artefact(model) else open_model(model, passes, target="reference")
    tiles = search(found.program, Bench(found, library, here), errors.print)
    Table(name, here, tiles).save(output)
    Console(soft_wrap=True, markup=False).print(f"{output}: {len(tiles)} tiles of {name} ({here}) in the place of the table's")


@app.command("passes")
def passes_(family: Annotated[str | None, typer.Argument(help="Only this family.")] = None) -> None:
    """List the passes, their parameters and defaults."""
    from elision.cli.tables import passes

    Console(soft_wrap=True, markup=False).print(passes(family))


def main(args: list[str] | None = None) -> None:
    """Run the command line; an error of our own is one sentence (a violated rule: four lines) and its exit status."""
    try:
        app(args=args, prog_name="elision")
    except ElisionError as err:
        text = str(err) if err.exit_status == 1 else f"error: {err}"
        print(text, file=sys.stderr)
        sys.exit(err.exit_status)
