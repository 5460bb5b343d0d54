"""Rows of launches: arguments with their types, kernels by what is fixed in them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from types import MappingProxyType
from typing import Any

from elision.codegen.planner import Planner, Ref
from elision.codegen.refusal import need
from elision.codegen.triton.configs import Tile
from elision.codegen.triton.templates import TEMPLATES
from elision.ir.encoding import code_dtype
from elision.ir.launch import Kernel
from elision.ir.planes import PlaneForm, plane_form
from elision.ir.states import KV, Float, Int
from elision.ir.types import DTYPES, NAMES
from elision.ir.value import Value

#: Triton's names of element types.
TYPES = {"f32": "fp32", "f16": "fp16", "bf16": "bf16", "i64": "i64", "i32": "i32", "i8": "i8", "u8": "u8", "bool": "u8"}


@dataclass(frozen=True)
class Arg:
    """An operand of a row and the type of the parameter that it goes to."""

    operand: tuple[Any, ...]
    type: str


def integer(n: int) -> Arg:
    return Arg(("int", n), "i32:16" if n and n % 16 == 0 else "i32")


def real(x: float) -> Arg:
    return Arg(("float", x), "fp32")


def axis(i: int, array: str) -> Arg:
    return Arg(("axis", i, array), "*i64")


def count(i: int) -> Arg:
    return Arg(("count", i), "i32")


ROWS = Arg(("rows", ""), "i32")


def size(state: str, what: str) -> Arg:
    return Arg(("size", state, what), "i32")


def on_round(array: str) -> Arg:
    return Arg(("round", array), "*i64")


def cache(state: str, type: KV, array: str) -> Arg | None:
    """An array of a cache (``older_``: of the segment before the one that is appended to); None for one that it does not have."""
    segment = type.main[0 if array.startswith("older_") else -1]
    plain = array.removeprefix("draft_").removeprefix("older_")
    encoding = segment.k if plain.startswith("k") else segment.v
    if plain in ("k", "v"):
        dtype = NAMES[code_dtype(encoding)]
    elif plain in ("k_scale", "v_scale", "k_low", "v_low"):
        if not isinstance(encoding, Int) or plain.endswith("low") and not encoding.zero:
            return None
        dtype = "f32"
    elif array == "summary":
        dtype = encoding.dtype if isinstance(encoding := segment.k, Float) else "f32"
    else:
        dtype = {"pos": "i32", "node_pos": "i32", "node_live": "u8"}.get(array, "f32" if array in _SCORES else "i64")
    aligned = ":16" if plain not in ("len_k", "len_v", "count") else ""
    return Arg(("state", state, array), f"*{TYPES[dtype]}{aligned}")


_SCORES = ("score", "local", "waiting", "waiting_nodes", "waiting_norm")


def weight(value: Value) -> tuple[list[Arg | None], PlaneForm]:
    """The planes of a weight (codes, scales, minima), and how they are read. A weight without such a form is decoded when it is
    loaded."""
    need(value.op == "param", f"{value.op} in the place of a weight")
    type, name = value.tensor, value.attr("name")
    form = plane_form(type.encoding, type.row)
    if form is None:
        return [Arg(("weight", name, -1), f"*{TYPES[type.dtype]}:16"), None, None], PlaneForm(None)
    if type.encoding is None:
        code = TYPES[type.dtype]
    else:
        code = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}.get(str(type.encoding), TYPES[NAMES[form.code]])
    planes: list[Arg | None] = [Arg(("weight", name, 0), f"*{code}:16")]
    planes += [Arg(("weight", name, 1 + i), "*fp16:16") if i < form.numbers else None for i in range(2)]
    return planes, form


def plain(value: Value) -> Arg:
    """A weight that is not encoded, such as a gain."""
    need(value.op == "param" and value.tensor.encoding is None, "an operand that is encoded")
    return Arg(("weight", value.attr("name"), 0), f"*{TYPES[value.tensor.dtype]}:16")


class Kernels:
    """Kernels by key, each once. ``tiles``: those that were measured (`elision.codegen.triton.tuned`); ``asked``: all that there
    could be, as the table has them, and in ``places`` the entries and classes of shapes that ask."""

    def __init__(self, tiles: Mapping[str, Tile] = MappingProxyType({})) -> None:
        self.tiles, self.asked, self.places = tiles, dict[str, Tile](), defaultdict[str, set[tuple[str, str]]](set)
        self.kernels: dict[str, Kernel] = {}
        self._names: dict[str, str] = {}

    def add(self, kernel: Kernel) -> str:
        """The name of the kernel."""
        key = repr(kernel)
        if key not in self._names:
            self._names[key] = f"{kernel.template}_{len(self.kernels)}"
            self.kernels[self._names[key]] = kernel
        return self._names[key]


class Launches:
    """The launches of one plan, for a class of shapes. A buffer has its tokens without gaps: ``widths`` says how wide they
    are."""

    def __init__(self, kernels: Kernels, plan: Planner, shape: str) -> None:
        self.kernels, self.plan, self.shape = kernels, plan, shape
        self.widths: dict[int, int] = {}  # elements of a token
        self.users = plan.graph.users()
        self.lse: dict[Value, int] = {}  # buffers with the log-sum-exp of attention, by its queries
        self.kept: dict[Value, int] = {}  # and with its logits
        self.counted: set[int] = set()  # axes whose tokens are found on the device
        self.places: dict[Value, int] = {}  # buffers that say where tokens are on such an axis, by what makes it

    def launch(
        self, template: str, grid: Sequence[Any], args: Mapping[str, Arg | None], constants: Mapping[str, Any],
        reads: Sequence[Any] = (), writes: Sequence[Any] = (), warps: int = 4, stages: int = 3,
    ) -> None:  # fmt: skip
        """Add a row that launches ``template`` with these arguments; None means that a parameter is not used."""
        fixed = dict(constants) | {name: None for name, arg in args.items() if arg is None}
        given = {name: arg for name, arg in args.items() if arg is not None}
        order = [n for n in TEMPLATES[template].arg_names if n not in fixed]
        assert sorted(order) == sorted(given), f"{template}: {sorted({*order} ^ {*given})}"
        name = self.kernels.add(Kernel(template, {n: given[n].type for n in order}, fixed, warps, stages))
        self.plan.launch(name, [("grid", tuple(grid)), *(given[n].operand for n in order)], reads, writes)

    def tile(self, template: str, key: str, first: Tile) -> Tile:
        """How the kernel is cut into programs: as the table says, ``first``, unless another tile was measured for ``key``, which
        says all that a tile must suit. ``m`` is always the table's."""
        key = f"{template} {self.shape} {key}"
        self.kernels.asked.setdefault(key, first)
        self.kernels.places[key].add((self.plan.graph.name, self.shape))
        return replace(self.kernels.tiles.get(key, first), m=first.m)

    def new(self, value: Value) -> Ref:
        """A buffer for a value."""
        ref = self.plan.new(value)
        self.widths[ref.buffer] = max(1, prod(ref.shape))
        return ref

    def scratch(self, axis: int, elements: int, itemsize: int = 4) -> int:
        """A buffer of so many elements for each token of an axis."""
        buffer = self.plan.buffer(axis, elements * itemsize)
        self.widths[buffer] = elements
        return buffer

    def tensor(self, value: Value, ref: Ref | None = None) -> tuple[Arg, Arg]:
        """A value's address and the elements from token to token. Raises NotNative if a token has gaps."""
        ref = self.plan.ref(value) if ref is None else ref
        need(ref.contiguous, "an operand with gaps")
        dtype = value.tensor.dtype
        need(dtype in TYPES, f"{dtype} values")
        item, stride = DTYPES[dtype].itemsize, self.widths.get(ref.buffer, 1)
        aligned = ref.offset * item % 16 == 0 and stride * item % 16 == 0
        return Arg(("tensor", ref.buffer, ref.offset * item), f"*{TYPES[dtype]}{':16' if aligned else ''}"), integer(stride)

    def is_whole(self, value: Value) -> bool:
        """Whether its tokens lie one after the other."""
        ref = self.plan.ref(value)
        return ref.offset == 0 and ref.contiguous and self.widths.get(ref.buffer, 1) == max(1, prod(ref.shape))

    def whole(self, value: Value) -> Arg:
        """A value whose tokens lie one after the other. Raises NotNative for a part of something wider."""
        need(self.is_whole(value), "a part of something wider")
        return self.tensor(value)[0]


def piece(buffer: int, dtype: str = "f32") -> Arg:
    """A buffer of the plan's own."""
    return Arg(("tensor", buffer, 0), f"*{TYPES[dtype]}:16")
