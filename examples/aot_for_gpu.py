"""Compile for GPUs on a machine that has none, and show what is in the artefact.

python examples/aot_for_gpu.py [MODEL] [--target cuda:sm_90] [--output model.elision]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import elision
from elision.cli.gpu import compiled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2", help="a packaged name, a GGUF file or a Hugging Face directory")
    parser.add_argument("--target", action="append", help="cuda:sm_80, cuda:sm_90, hip:gfx942; may be given more than once")
    parser.add_argument("--output", type=Path, default=Path("gpu.elision"))
    args = parser.parse_args()

    model = elision.compile(args.model, target=["cpu", *(args.target or ["cuda:sm_90"])])
    model.save(args.output)
    again = elision.load(args.output)  # runs on the CPU here; the kernels lie beside its native code
    assert again.gpu is not None
    print(f"{args.output}: {args.output.stat().st_size / 1e6:.1f} MB")
    print(*compiled(again.gpu), sep="\n")
    print(again.generate("The three primary colours are", max_new_tokens=8, temperature=0))


if __name__ == "__main__":
    main()
