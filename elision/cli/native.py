"""What `elision show` prints of native code: MLIR, machine code, kernels with where they are used, and what the host runs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from elision.errors import BadInput
from elision.ir.schedule import NativeCode
from elision.llvm.objects import disassemble, functions
from elision.runtime.model import Model


def generated(model: Model, kernel: str, *, asm: bool) -> Iterator[str]:
    """The MLIR or the machine code of the kernels that ``kernel`` names; for "" all MLIR, or the list of kernels."""
    native = _native(model)
    if asm and not kernel:
        yield from _kernels(native)
        return
    if not kernel:
        yield native.text
        return
    parts = _functions(native.text)
    names = [name for name in parts if name == kernel or re.fullmatch(rf"{re.escape(kernel)}_\d+(_\w+)?", name)]
    if not names:
        raise BadInput(f"no kernel {kernel!r}; the kernels are {', '.join(native.signatures)}")
    code = functions(native.code) if asm else {}
    for name in names:
        if not asm:
            yield parts[name]
        elif name in code:
            yield disassemble(code[name], native.level)


def hosts(model: Model) -> Iterator[str]:
    """A line for every op of the native entries that the host runs, with the reason; none if there is none."""
    if model.native is not None:
        for entry, ops in model.native.hosts.items():
            for (op, why), count in Counter(ops).items():
                yield f"# {entry}: {op} runs on the host ({why}), {count} times\n"


def _kernels(native: NativeCode) -> Iterator[str]:
    """A line for every kernel: its bytes, its rows in each entry, its operands."""
    code = functions(native.code)
    yield f"# {native.machine}, {native.level}: kernel, bytes, rows by entry, operands"
    for name, signature in native.signatures.items():
        used = {entry: sum(row.kernel == name for row in s.rows) for entry, s in native.schedules.items()}
        rows = " ".join(f"{entry}={count}" for entry, count in used.items() if count)
        yield f"{name}  {len(code[name].code)}  {rows}  {' '.join(f'{n}:{kind}' for kind, n in signature)}"
    yield ""


def _functions(text: str) -> dict[str, str]:
    """The functions of MLIR text by name."""
    parts = re.split(r"^(?=func\.func )", text, flags=re.M)[1:]
    return {found[1]: part for part in parts if (found := re.match(r"func\.func (?:private )?@(\w+)", part))}


def _native(model: Model) -> NativeCode:
    if model.native is None:
        raise BadInput(f"{model.program.name} has no native code: it was compiled for the interpreter")
    return model.native
