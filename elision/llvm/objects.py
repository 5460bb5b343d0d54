"""The functions of an object file: their names and their instructions (libLLVM's disassembler)."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from elision import llvm
from elision.errors import ArtefactError
from elision.llvm.processor import target

_OPTIONS = 2 | 4  # immediates in hexadecimal; the syntax of the processor's manuals


@dataclass(frozen=True)
class Function:
    """``code``: its bytes; ``calls``: the symbol that the operand at an offset of it stands for."""

    name: str
    code: bytes
    calls: dict[int, str]


def functions(data: bytes) -> dict[str, Function]:
    """The functions of an object file by name. Raises ArtefactError for anything else."""
    api = llvm.library()
    buffer, message = llvm.buffer(data), llvm.POINTER()
    binary = llvm.POINTER(api.LLVMCreateBinary(buffer, None, ctypes.byref(message)))
    if not binary:
        raise ArtefactError(f"the native code is no object file: {llvm.text(message)}; compile the model again")
    try:
        found: dict[str, Function] = {}
        # In ELF the relocations of a section are a section of their own.
        calls = {llvm.text(api.LLVMGetSectionName(s)).removeprefix(".rela"): dict(_relocations(s)) for s in _sections(binary)}
        for section in _sections(binary):
            start, size = api.LLVMGetSectionAddress(section), api.LLVMGetSectionSize(section)
            here = (s for s in _symbols(binary) if api.LLVMGetSectionContainsSymbol(section, s[0]))
            symbols = [(at - start, n) for _, n, at in here if n[:1] != "."]
            name = llvm.text(api.LLVMGetSectionName(section))
            if not symbols or "text" not in name:
                continue
            code = ctypes.string_at(api.LLVMGetSectionContents(section), size)
            ends = [at for at, _ in sorted(symbols)][1:] + [size]
            for (first, symbol), end in zip(sorted(symbols), ends, strict=True):
                inside = {at - first: to for at, to in calls[name].items() if first <= at < end}
                found[symbol] = Function(symbol, code[first:end], inside)
        return found
    finally:
        api.LLVMDisposeBinary(binary)
        api.LLVMDisposeMemoryBuffer(buffer)


@contextmanager
def _iterating(iterator: ctypes.c_void_p, kind: str) -> Iterator[ctypes.c_void_p]:
    try:
        yield iterator
    finally:
        getattr(llvm.library(), f"LLVMDispose{kind}Iterator")(iterator)


def _sections(binary: ctypes.c_void_p) -> Iterator[ctypes.c_void_p]:
    api = llvm.library()
    with _iterating(llvm.POINTER(api.LLVMObjectFileCopySectionIterator(binary)), "Section") as at:
        while not api.LLVMObjectFileIsSectionIteratorAtEnd(binary, at):
            if api.LLVMGetSectionSize(at):
                yield at
            api.LLVMMoveToNextSection(at)


def _symbols(binary: ctypes.c_void_p) -> Iterator[tuple[ctypes.c_void_p, str, int]]:
    """Iterator, name and address of each symbol; the iterator stands there until the next is asked for."""
    api = llvm.library()
    with _iterating(llvm.POINTER(api.LLVMObjectFileCopySymbolIterator(binary)), "Symbol") as at:
        while not api.LLVMObjectFileIsSymbolIteratorAtEnd(binary, at):
            name = (api.LLVMGetSymbolName(at) or b"").decode(errors="replace")
            yield at, name, api.LLVMGetSymbolAddress(at)
            api.LLVMMoveToNextSymbol(at)


def _relocations(section: ctypes.c_void_p) -> Iterator[tuple[int, str]]:
    api = llvm.library()
    with _iterating(llvm.POINTER(api.LLVMGetRelocations(section)), "Relocation") as at:
        while not api.LLVMIsRelocationIteratorAtEnd(section, at):
            symbol = llvm.POINTER(api.LLVMGetRelocationSymbol(at))
            yield api.LLVMGetRelocationOffset(at), (api.LLVMGetSymbolName(symbol) or b"").decode(errors="replace")
            api.LLVMDisposeSymbolIterator(symbol)
            api.LLVMMoveToNextRelocation(at)


def disassemble(function: Function, level: str) -> str:
    """Its instructions, one a line: offset, text, and the symbol that the linker puts there."""
    api = llvm.library()
    triple = llvm.POINTER(api.LLVMGetDefaultTargetTriple())
    machine = llvm.POINTER(api.LLVMCreateDisasmCPUFeatures(triple, *target(level), None, 0, None, None))
    api.LLVMSetDisasmOptions(machine, ctypes.c_uint64(_OPTIONS))
    code, line = ctypes.create_string_buffer(function.code, len(function.code)), ctypes.create_string_buffer(256)
    lines, at = [f"{function.name}:"], 0
    try:
        while at < len(function.code):
            rest = ctypes.c_uint64(len(function.code) - at)
            place, room = ctypes.c_uint64(at), ctypes.c_size_t(256)
            size = api.LLVMDisasmInstruction(machine, ctypes.byref(code, at), rest, place, line, room)
            shown = re.sub(r"\s+", " ", line.value.decode()).strip() if size else f".byte {function.code[at]:#x}"
            size = size or 1
            named = "".join(f"  # {to}" for place, to in function.calls.items() if at <= place < at + size and to)
            lines.append(f"{at:6x}  {shown}{named}")
            at += size
    finally:
        api.LLVMDisasmDispose(machine)
    return "\n".join(lines) + "\n"
