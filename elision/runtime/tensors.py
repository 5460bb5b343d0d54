"""Tensors packed into one archive member and mapped back out of it without a copy.

The table is plain JSON: one row per stored tensor, in file order, with the fields name, aliases, dtype,
shape, offset, nbytes and packing. Data is row-major and little-endian, each tensor at the next multiple of 64 bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

import torch

from elision.errors import ArtefactError, BadInput
from elision.runtime.archive import ALIGNMENT

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16,
        torch.int8, torch.uint8, torch.int32, torch.int64,
    )
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_FIELDS = {"name", "aliases", "dtype", "shape", "offset", "nbytes", "packing"}


def _padding(offset: int) -> int:
    return -offset % ALIGNMENT


def pack_tensors(
    tensors: Mapping[str, torch.Tensor], packings: Mapping[str, str] | None = None
) -> tuple[list[dict[str, Any]], Iterator[memoryview]]:
    """The table of ``tensors`` and the chunks of the member that holds them.

    Names that share one view of one storage (a tied embedding and head) are stored once, under the first name
    with the others as its aliases. ``packings``: what the bytes of a tensor are, where that is not the tensor itself
    (`elision.ir.packing`). Chunks are made one at a time, without a copy where the tensor is
    contiguous and in host memory. Raises `BadInput` for a dtype or layout that the format does not have.
    """
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    stored: list[torch.Tensor] = []
    offset = 0
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.dtype not in _NAMES or tensor.is_meta:
            raise BadInput(
                f"tensor {name!r} ({tensor.dtype}, {tensor.layout}, {tensor.device}) cannot be stored: "
                f"expected dense values of one of {', '.join(DTYPES)}"
            )
        view = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if view in rows:
            rows[view]["aliases"].append(name)
            continue
        offset += _padding(offset)
        nbytes = tensor.numel() * tensor.element_size()
        rows[view] = {
            "name": name, "aliases": [], "dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape),
            "offset": offset, "nbytes": nbytes, "packing": (packings or {}).get(name, "plain"),
        }  # fmt: skip
        stored.append(tensor)
        offset += nbytes
    return list(rows.values()), _chunks(stored)


def _chunks(tensors: list[torch.Tensor]) -> Iterator[memoryview]:
    offset = 0
    for tensor in tensors:
        yield memoryview(bytes(_padding(offset)))
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        yield data.data
        offset += _padding(offset) + data.nbytes


def unpack_tensors(table: object, view: memoryview) -> dict[str, torch.Tensor]:
    """The tensors of ``table`` as views of ``view``; aliases are the same tensor under another name.

    Raises `ArtefactError` unless the table is exactly one that `pack_tensors` could have written for this
    many bytes: known dtypes, sizes that agree, every tensor where the one before it ends, nothing left over.
    """
    tensors: dict[str, torch.Tensor] = {}
    end = 0
    if not isinstance(table, list):
        raise ArtefactError(f"the table of tensors is a {type(table).__name__}, not a list")
    for row in table:
        tensor, end = _unpack(row, view, end)
        for name in (row["name"], *row["aliases"]):
            if name in tensors:
                raise ArtefactError(f"the table of tensors names {name!r} twice")
            tensors[name] = tensor
    if end != len(view):
        raise ArtefactError(f"the table of tensors describes {end} bytes, the weights have {len(view)}")
    return tensors


def packings(table: list[dict[str, Any]]) -> dict[str, str]:
    """The packing of each tensor of a table that `unpack_tensors` read."""
    return {name: row["packing"] for row in table for name in (row["name"], *row["aliases"])}


def _unpack(row: object, view: memoryview, end: int) -> tuple[torch.Tensor, int]:
    """The tensor of one table row and the offset behind it; ``end`` is the offset behind the one before."""
    if not isinstance(row, dict) or set(row) != _FIELDS:
        raise ArtefactError(f"a row of the table of tensors has not the fields {', '.join(sorted(_FIELDS))}")
    name, aliases, shape, nbytes = row["name"], row["aliases"], row["shape"], row["nbytes"]
    if not isinstance(aliases, list) or not all(isinstance(text, str) and text for text in (name, *aliases)):
        raise ArtefactError(f"a tensor has names that are no texts: {name!r}, {aliases!r}")
    if not isinstance(row["packing"], str) or not row["packing"]:
        raise ArtefactError(f"tensor {name!r} has the packing {row['packing']!r}: expected a name")
    dtype = DTYPES.get(row["dtype"]) if isinstance(row["dtype"], str) else None
    if dtype is None:
        raise ArtefactError(f"tensor {name!r} has dtype {row['dtype']!r}, not one of {', '.join(DTYPES)}")
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise ArtefactError(f"tensor {name!r} has the shape {shape!r}: expected a list of sizes")
    offset = end + _padding(end)
    count = prod(shape)
    extent = prod(max(size, 1) for size in shape) * dtype.itemsize  # an empty tensor has strides, too
    fits = extent < 2**63 and offset + count * dtype.itemsize <= len(view)
    if not fits or type(nbytes) is not int or nbytes != count * dtype.itemsize:
        raise ArtefactError(f"tensor {name!r} of shape {shape} and {nbytes!r} bytes does not fit the weights")
    if type(row["offset"]) is not int or row["offset"] != offset:
        raise ArtefactError(f"tensor {name!r} lies at {row['offset']!r}, not at {offset} behind the one before")
    if count == 0:
        return torch.empty(shape, dtype=dtype), offset
    return torch.frombuffer(view, dtype=dtype, count=count, offset=offset).view(shape), offset + nbytes
