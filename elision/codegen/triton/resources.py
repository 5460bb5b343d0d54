"""What a kernel takes of a processor: registers, and the bytes that its threads keep in memory for want of them."""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from pathlib import Path

UNKNOWN = -1
# Attributes of the section .nv.info of a cubin.
_REGISTERS, _FRAME = 0x2F, 0x11


def of_ptx(ptx: str, target: str) -> dict[str, int]:
    """Registers of a thread, bytes of spill stores and loads, bytes of its stack, as the assembler ``ptxas`` reports them."""
    from triton import knobs

    arch = target.removeprefix("cuda:")
    arch += "a" if arch == "sm_90" else ""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [knobs.nvidia.ptxas.path, "-v", f"--gpu-name={arch}", str(source), "-o", str(source.with_suffix(".cubin"))]
        text = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    return {
        "registers": _number(r"Used (\d+) registers", text),
        "spills": _sum(_number(r"(\d+) bytes spill stores", text), _number(r"(\d+) bytes spill loads", text)),
        "stack": _number(r"(\d+) bytes stack frame", text),
    }


def of_amdgcn(text: str) -> dict[str, int]:
    """The same from the metadata at the end of AMD's assembly: vector registers, four bytes for each that is spilled, of a
    lane."""
    spilled = _number(r"\.vgpr_spill_count:\s*(\d+)", text)
    return {
        "registers": _number(r"\.vgpr_count:\s*(\d+)", text),
        "spills": UNKNOWN if spilled < 0 else 4 * spilled,
        "stack": _number(r"\.private_segment_fixed_size:\s*(\d+)", text),
    }


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else UNKNOWN


def _sum(*numbers: int) -> int:
    return UNKNOWN if min(numbers) < 0 else sum(numbers)


def of_cubin(code: bytes) -> dict[str, int]:
    """The same but for the spills, which a cubin does not tell from the rest of a stack: from the attributes in .nv.info
    (ELF)."""
    found = {"registers": UNKNOWN, "spills": UNKNOWN, "stack": UNKNOWN}
    offset, size, count, names = struct.unpack_from("<Q", code, 40)[0], *struct.unpack_from("<HHH", code, 58)
    sections = [struct.unpack_from("<IIQQQQ", code, offset + i * size) for i in range(count)]
    text = sections[names][4]
    for name, _, _, _, start, length in sections:
        if code[text + name : code.index(b"\0", text + name)] != b".nv.info":
            continue
        at = start
        while at < start + length:
            form, attribute, value = struct.unpack_from("<BBH", code, at)
            if form == 4 and value == 8 and attribute in (_REGISTERS, _FRAME):
                number = struct.unpack_from("<II", code, at + 4)[1]
                found["registers" if attribute == _REGISTERS else "stack"] = number
            at += 4 + (value if form == 4 else 0)
    return found
