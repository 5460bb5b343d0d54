"""What the command line says of code for GPUs."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table

from elision.codegen.triton.ahead import totals
from elision.errors import BadInput
from elision.ir.launch import Binary, DeviceCode
from elision.runtime.model import Model


def compiled(code: DeviceCode) -> Iterator[str]:
    """A line for each target, and one for each op that keeps its entry from running on a GPU."""
    for target in code.binaries:
        t = totals(code, target)
        yield (
            f"{target}: {t['kernels']} kernels, {t['bytes'] / 1e6:.1f} MB, at most {t['registers']} registers and "
            f"{t['shared'] / 1024:.0f} KB shared memory, {t['spilling']} spill ({t['spills']} bytes)"
        )
    for entry, ops in code.hosts.items():
        for op, why in dict.fromkeys(ops):
            yield f"{entry} does not run on a GPU: {op} has no kernel ({why})"


def kernels(model: Model) -> Iterator[Table]:
    """A table for each target. Raises BadInput for a model without code for GPUs."""
    if model.gpu is None:
        raise BadInput(f"{model.program.name} has no code for GPUs: compile it with --target cuda:sm_90, for example")
    schedules = model.gpu.schedules
    for target, made in model.gpu.binaries.items():
        table = Table("kernel", "entries", "threads", "registers", "shared (B)", "spills (B)", "stack (B)", "bytes", title=target)
        for name, binary in made.items():
            used = [e for e, each in schedules.items() if any(r.kernel == name for s in each.values() for r in s.rows)]
            table.add_row(name, " ".join(used), str(binary.threads), *_numbers(binary), str(len(binary.code)))
        yield table


def _numbers(binary: Binary) -> Iterator[str]:
    for n in (binary.registers, binary.shared, binary.spills, binary.stack):
        yield str(n) if n >= 0 else "unknown"
