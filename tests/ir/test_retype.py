"""Other encodings for the weights of a program: its templates follow, its text says so, and what cannot be is refused."""

from __future__ import annotations

import pytest
import torch

from elision.errors import BadInput, IllegalProgram
from elision.ir.interp import run_entry
from elision.ir.parser import parse_program
from elision.ir.printer import print_program
from elision.ir.program import Program, Tick
from elision.ir.retype import convert, encodable, store
from elision.ir.tokens import Tokens
from elision.ir.types import Axis, Tensor
from elision.ir.value import Builder
from elision.ir.verifier import verify
from elision.ir.weights import Blocks, Int4, Int8, WeightEncoding
from tests.ir.programs import tiny_llama

MATRICES = [f"{layer}.{name}" for layer in range(3) for name in ("q", "k", "v", "o", "gate", "up", "down")]


def program() -> Program:
    return tiny_llama(layers=3, dtype="f32")[0]


def test_what_can_be_encoded() -> None:
    """Operands of linear and embed, tied ones too; no norms and no frequencies."""
    assert list(encodable(program())) == ["embed", *MATRICES]
    twice = program()
    b = Builder("tick_0", twice.targets)
    x = b.input("x", Tensor((Axis("b"), 32, 32), "f32"))
    numbers = b.add("map", x, b.param("0.q", twice.params["0.q"]), expr="x0 + x1")
    twice.ticks = (Tick(4, b.build(numbers)),)
    assert "0.q" not in encodable(twice) and "1.q" in encodable(twice)


def test_templates_follow_and_split() -> None:
    done = program()
    encodings: dict[str, WeightEncoding] = dict.fromkeys(MATRICES, Int4(32)) | {"2.down": Int8(None), "embed": Blocks("Q8_0")}
    store(done, encodings)
    verify(done)
    assert list(done.templates) == ["attn", "mlp", "mlp_1"]
    for entry in ("score", "prefill", "step"):
        targets = [v.attr("target") for v in done.entries[entry].calls()]
        assert targets == ["attn", "mlp", "attn", "mlp", "attn", "mlp_1"]
    types = {done.templates["mlp_1"].names[v]: str(v.type) for v in done.templates["mlp_1"].inputs}
    assert types["down"] == "f32[32, 64] in int8(group=row)" and types["up"] == "f32[64, 32] in int4(group=32)"
    text = print_program(done)
    assert "param('embed', f32[64, 32] in Q8_0)" in text
    assert parse_program(text) == done and print_program(parse_program(text)) == text


def test_what_only_a_tick_calls_stays() -> None:
    done = program()
    inner = Builder("scale")
    x, w = inner.input("x", Tensor((Axis("b"), 32), "f32")), inner.input("w", Tensor((32, 32), "f32"))
    done.templates["scale"] = inner.build(inner.add("linear", x, w))
    done.params["extra"] = Tensor((32, 32), "f32")
    b = Builder("tick_0", done.targets)
    given = b.input("x", Tensor((Axis("b"), 32), "f32"))
    done.ticks = (Tick(4, b.build(b.add("call", given, b.param("extra", done.params["extra"]), target="scale"))),)
    store(done, {"extra": Int8(32), "0.q": Int8(32)})
    assert str(done.templates["scale"].inputs[1].type) == "f32[32, 32] in int8(group=32)"
    assert parse_program(print_program(done)) == done


def test_again_and_back() -> None:
    """One encoding after the other gives what all at once give; the program that it was made from stays."""
    first, once = program(), program()
    text = print_program(first)
    left = first.copy()
    store(left, {"0.q": Int8(32)})
    store(left, {"1.down": Int4(32), "embed": Int8(None)})
    store(once, {"embed": Int8(None), "0.q": Int8(32), "1.down": Int4(32)})
    assert print_program(left) == print_program(once)
    assert print_program(first) == text


def test_numbers_are_those_of_the_decoded_weights() -> None:
    done, weights = tiny_llama(layers=3, dtype="f32")
    before = dict(done.params)
    plain = done.copy()
    kinds: list[WeightEncoding] = [Int4(32), Int8(32), Int8(None), Blocks("BF16")]
    store(done, {name: kinds[i % 4] for i, name in enumerate(encodable(done))})
    found = convert(weights, before, done.params)
    decoded = {n: t.encoding.decode(found[n], t.row) if (t := done.params[n]).encoding else found[n] for n in found}
    for name, type in done.params.items():
        assert (tuple(found[name].shape), found[name].dtype) == type.storage
    ids, at = torch.arange(9), Tokens.chunk([5, 4], [0, 0])
    result = run_entry(done, found, "score", ids, at, {})
    assert torch.equal(result, run_entry(plain, decoded, "score", ids, at, {}))
    assert not torch.equal(result, run_entry(plain, weights, "score", ids, at, {}))


def test_what_cannot_be_stored_so_is_refused() -> None:
    done = program()
    for encodings, says in (
        ({"norm": Int8(None)}, "is no weight"),
        ({"0.q": Int4(64)}, "a row of 32 is not whole blocks"),
        ({"0.q": Blocks("Q4_K")}, "a row of 32 is not whole blocks"),
    ):
        with pytest.raises(BadInput, match=says):
            store(program(), encodings)  # type: ignore[arg-type]
    done.params["0.q"] = done.params["0.q"].stored(Int8(32))
    with pytest.raises(IllegalProgram, match=r"the program declares f32\[32, 32\] in int8\(group=32\)"):
        verify(done)


@pytest.mark.parametrize(
    ("type", "says"),
    [
        ("f32[8, 32] in q4", "unknown encoding 'q4'"),
        ("f32[8, 33] in Q4_1", "a row of 33 is not whole blocks"),
        ("f32[8, 0] in int8(group=row)", "expected at least 1"),
        ("i64[8, 32] in Q4_1", "is no weight"),
        ("f32[t, 32] in Q4_1", "is no weight"),
        ("f32[32] in Q4_1", "is no weight"),
        ("f32[()] in Q4_1", "."),
        ("f32[8, 32] in Q4_1 in Q4_1", "is not an attribute or a type"),
        ("(f32[8, 32] in Q4_1) in Q4_1", "is not a tensor type"),
        ("3 in Q4_1", "is not a tensor type"),
        ("f32[8, 32] in int8(group=__import__('os'))", "unknown encoding"),
    ],
)
def test_text_that_says_something_impossible(type: str, says: str) -> None:
    head = "program(name='p', version=1, quality='exact', applied=(), meta=())\n"
    parse_program(head + "param('w', f32[8, 32] in Q4_1)")
    with pytest.raises(BadInput, match=rf"line 2: .*{says}"):
        parse_program(head + f"param('w', {type})")
