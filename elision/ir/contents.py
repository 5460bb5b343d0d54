"""What a state of one sequence holds, as arrays: to begin many sequences with, and to keep in a file."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from elision.errors import BadInput
from elision.ir.array_store import ArrayStore
from elision.ir.layout import Spec, array_spec, index_spec, segment_specs, slot_count
from elision.ir.states import KV, Paged, StateType
from elision.ir.store import KVStore

Contents = dict[str, torch.Tensor]
_DRAFTS = ("node_", "waiting")  # beginnings of the names of arrays that matter within a round only


def contents(store: KVStore | ArrayStore) -> Contents:
    """The arrays of a state of one sequence, by name; not copied."""
    if isinstance(store, ArrayStore):
        return {"value": store.value}
    return {name: array for name, array in _arrays(store).items() if not name.startswith(_DRAFTS)}


def begin_with(store: KVStore | ArrayStore, given: Mapping[str, torch.Tensor]) -> None:
    """Every sequence of an empty state begins as a copy of what ``given`` (`contents`) holds. Raises BadInput without room."""
    if isinstance(store, ArrayStore):
        store.value.copy_(given["value"].expand_as(store.value))
        store.checkpoint()
        return
    lengths = given["len_k"][:, 0].amax(-1).tolist()
    if any(n > rows.slots for n, rows in zip(lengths, store.segments, strict=False)):
        raise BadInput(f"a prefix of {sum(lengths)} entries does not fit {[s.slots for s in store.segments]} slots")
    for name, array in _arrays(store).items():
        if name in given:
            source, sequences = given[name], 1 if name.startswith("len_") else 0
            shape = [slice(min(a, b)) for a, b in zip(array.shape, source.shape, strict=True)]
            shape[sequences] = slice(None)
            array[tuple(shape)] = source[tuple(shape)]


def check(type: StateType, length: int, given: Mapping[str, torch.Tensor]) -> None:
    """Raises BadInput unless ``given`` can be what a state of this type holds after ``length`` tokens of a prompt (with room for
    one more)."""
    want: Spec
    if isinstance(type, KV):
        want = {n: s for n, s in index_spec(type, 1, length + 1, None).items() if not n.startswith(_DRAFTS)}
        for i, segment in enumerate(type.main):
            for what, spec in zip("kv", segment_specs(type, segment, 1, length + 1, None), strict=False):
                want |= {f"{i}.{what}.{name}": s for name, s in spec.items()}
    else:
        want = {"value": array_spec(type, 1)["value"]}
    if {n: (tuple(a.shape), a.dtype) for n, a in given.items()} != want:
        raise BadInput(f"its arrays are not those of {length} tokens in {type}")
    if isinstance(type, KV):
        slots = torch.tensor([slot_count(segment.slots, length + 1, None) for segment in type.main])
        for what in ("len_k", "len_v"):
            if bool((given[what] < 0).any()) or bool((given[what] > slots[:, None, None]).any()):
                raise BadInput(f"its {what} says more entries than there are")
        if bool((given["pos"] < 0).any()) or bool((given["pos"] >= max(length, 1)).any()):
            raise BadInput("its positions are not those of its tokens")


def _arrays(store: KVStore) -> Contents:
    found = dict(store.index)
    for i, (segment, rows) in enumerate(zip(store.type.main, store.segments, strict=False)):
        if isinstance(segment.slots, Paged) or segment.shared:
            raise BadInput(f"{segment}: pages and shared segments cannot begin other sequences")
        found |= {f"{i}.{what}.{name}": a for what, plane in rows.planes.items() for name, a in plane.arrays.items()}
    return found

