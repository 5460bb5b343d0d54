"""A process that compiles kernels: ``python -m elision.codegen.triton.worker``, one JSON object a line in, one a line out.

A process of its own, because Triton's compiler and its interpreter exclude one another, and because several can share the work.
"""

from __future__ import annotations

import base64
import json
import os
import sys
from typing import Any

from elision.codegen.triton.targets import triton_target


def build(kernel: dict[str, Any], target: str) -> dict[str, Any]:
    """A kernel's machine code for a target, with what a launch must know."""
    import triton
    from triton.compiler import ASTSource

    from elision.codegen.triton.resources import of_amdgcn, of_cubin, of_ptx
    from elision.codegen.triton.templates import TEMPLATES, constants
    from elision.ir.launch import Kernel

    made = Kernel(**kernel)
    function = TEMPLATES[made.template]
    types = {n: t.removesuffix(":16") for n, t in made.types.items()}
    signature = {n: types.get(n, "constexpr") for n in function.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(function.arg_names) if made.types.get(n, "").endswith(":16")}
    chip = triton_target(target)
    source = ASTSource(function, signature, constants(made), aligned)
    options = {"num_warps": made.warps, "num_stages": made.stages}
    found = triton.compile(source, target=chip, options=options)
    kind = "cubin" if target.startswith("cuda") else "hsaco"
    if kind == "hsaco":
        used = of_amdgcn(found.asm["amdgcn"])
    elif not (used := of_cubin(found.asm["cubin"]))["stack"]:
        used["spills"] = 0
    else:  # only the assembler tells what of a stack is spilled
        told = of_ptx(found.asm["ptx"], target)
        used |= {name: n for name, n in told.items() if n >= 0}
    return {
        "symbol": found.metadata.name, "code": base64.b64encode(found.asm[kind]).decode(), "shared": found.metadata.shared,
        "threads": made.warps * chip.warp_size, **used,
    }  # fmt: skip


def main() -> None:
    """Answer until the input ends. What else is printed goes to the standard error."""
    out, sys.stdout = sys.stdout, sys.stderr
    os.environ.pop("TRITON_INTERPRET", None)
    for line in sys.stdin:
        job = json.loads(line)
        try:
            answer = build(job["kernel"], job["target"])
        except Exception as err:  # whatever the compiler raises is the answer
            answer = {"error": f"{type(err).__name__}: {err}"}
        print(json.dumps({"name": job["name"], "target": job["target"], **answer}), file=out, flush=True)


if __name__ == "__main__":
    main()
