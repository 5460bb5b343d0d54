"""The kernels of a model, each generated once for its key."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from elision.codegen.cpu.driver import driver
from elision.codegen.cpu.emit import Fn
from elision.codegen.cpu.kernel import Kernel

Made = Kernel | tuple[Kernel, list[Fn]]


class Kernels:
    """Kernels by key; what is fixed in their code is the key, everything else is data of rows."""

    def __init__(self) -> None:
        self._names: dict[Any, str] = {}
        self._texts: dict[str, str] = {}
        self.signatures: dict[str, list[tuple[str, str]]] = {}

    def add(self, key: tuple[Any, ...], make: Callable[[str], Made]) -> str:
        """The name of the kernel of that key, made if there is none."""
        if key not in self._names:
            name = f"{key[0]}_{len(self._names)}"
            made = make(name)
            kernel, helpers = made if isinstance(made, tuple) else (made, [])
            self._names[key] = name
            self._texts[name] = kernel.text() + "".join(h.text() for h in helpers)
            self.signatures[name] = kernel.signature
        return self._names[key]

    def text(self, name: str | None = None) -> str:
        """MLIR of one kernel, or of the whole module with its driver."""
        return self._texts[name] if name else driver() + "".join(self._texts.values())
