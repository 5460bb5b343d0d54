"""What the engine needs of a device: memory by address, launches in order, and graphs of launches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

Number = int | float


class Device(Protocol):
    """One stream: what is asked for happens in that order. Addresses are multiples of 256."""

    def allocate(self, nbytes: int) -> int:
        """The address of zeros."""
        ...

    def free(self, address: int) -> None: ...

    def write(self, address: int, data: torch.Tensor) -> None:
        """Copy a tensor of the host, contiguous, to the device."""
        ...

    def read(self, address: int, into: torch.Tensor) -> None:
        """Fill a contiguous tensor of the host, after everything that was asked for."""
        ...

    def clear(self, address: int, nbytes: int) -> None: ...

    def copy(self, target: int, source: int, times: int, nbytes: int, apart: int, source_apart: int) -> None:
        """Copy runs of ``nbytes`` that lie so many bytes apart, from the device to itself."""
        ...

    def launch(self, kernel: str, grid: Sequence[int], args: Sequence[Number]) -> None:
        """Start the kernel's programs; addresses and numbers are its parameters in order."""
        ...

    def wait(self) -> None:
        """Until everything that was asked for is done."""
        ...

    def record(self, launches: Callable[[], None]) -> Callable[[], None]:
        """Launches as one graph, which the result starts again: the same kernels with the same arguments."""
        ...


def free_all(device: Device, addresses: Sequence[int]) -> None:
    """What a finalizer does."""
    for address in addresses:
        device.free(address)


class Held(Protocol):
    """Arrays on the device that are a run's: a cache, or its drafts. Numbers that kernels must know are ``sizes``."""

    address: dict[str, int]
    sizes: dict[str, int]
