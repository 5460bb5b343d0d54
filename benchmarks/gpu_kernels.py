"""Kernels for GPUs compiled ahead of time, for the shapes of large models: how long it takes, what they ask of a GPU.

    TRITON_CACHE_DIR=$(mktemp -d) python benchmarks/gpu_kernels.py [--models smollm2+mixtral] [--targets cuda:sm_90+hip:gfx942]

Needs no GPU. One layer is as good as all: layers that are alike ask for the same kernels. ``--workers`` processes compile.
"""

from __future__ import annotations

import argparse
import time

from gpu_shapes import CHECKED, SHAPES, shaped

from elision.codegen.triton.ahead import build, totals
from elision.codegen.triton.compile import plan_program
from elision.codegen.triton.targets import TARGETS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="+".join(n for n in SHAPES if n not in CHECKED))
    parser.add_argument("--targets", default="+".join(TARGETS))
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    print("| model | target | kernels | seconds | MB | most registers | most shared (KB) | spilling |")
    print("|---|---|---|---|---|---|---|---|")
    for name in options.models.split("+"):
        code = plan_program(shaped(name))
        for target in options.targets.split("+"):
            start = time.perf_counter()
            build(code, [target], options.workers)
            spent, found = time.perf_counter() - start, totals(code, target)
            print(
                f"| {name} | {target} | {found['kernels']} | {spent:.0f} | {found['bytes'] / 1e6:.1f} | {found['registers']} | "
                f"{found['shared'] / 1024:.0f} | {found['spilling']} ({found['spills']} bytes) |",
                flush=True,
            )


if __name__ == "__main__":
    main()
