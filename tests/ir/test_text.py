"""The printer and the parser are exact inverses, and the parser refuses everything else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elision.errors import BadInput
from elision.ir.parser import parse_graph, parse_program
from elision.ir.printer import print_graph, print_program
from elision.ir.program import Program
from elision.ir.types import Axis, Tensor
from elision.ir.value import Builder, Graph
from tests.ir.strategies import graphs, programs

GOLDEN = """\
param('w', f32[16, 16])
def block(h: f32[t, 16]):
    x = norm(h, eps=1e-05, kind='rms')  # f32[t, 16]
    a, b = linear(x, param('w'), splits=(4, 12))  # f32[t, 4], f32[t, 12]
    last = last(h, axis='last')  # i64[t/last]
    y = restrict(b, last)  # f32[t/last, 12]
    return a, y
"""


def golden() -> Graph:
    b = Builder("block")
    h = b.input("h", Tensor((Axis("t"), 16), "f32"))
    x = b.add("norm", h, kind="rms", eps=1e-5, name="x")
    first, second = b.add("linear", x, b.param("w", Tensor((16, 16), "f32")), splits=(4, 12))
    b.named(first, "a")
    b.named(second, "b")
    last = b.add("last", h, axis="last", name="last")
    return b.build(first, b.add("restrict", second, last, name="y"))


def test_golden_text() -> None:
    assert print_graph(golden()) == GOLDEN
    assert parse_graph(GOLDEN) == golden()


@given(graphs())
def test_graph_round_trip(graph: Graph) -> None:
    text = print_graph(graph)
    again = parse_graph(text)
    assert again == graph
    assert print_graph(again) == text


@given(programs())
def test_program_round_trip(program: Program) -> None:
    text = print_program(program)
    again = parse_program(text)
    assert print_program(again) == text
    assert again.graphs() == program.graphs()
    assert (again.states, again.params, again.applied, again.quality) == (
        program.states, program.params, program.applied, program.quality,
    )  # fmt: skip
    assert repr(sorted(again.meta.items())) == repr(sorted(program.meta.items()))  # repr: nan equals nan


def test_structure_is_told_apart() -> None:
    """Equality is not vacuous: another attribute, operand or output is another graph."""
    for old, new in (("1e-05", "1e-06"), ("restrict(b", "restrict(x"), ("return a, y", "return y, a"), ("h: f32[t", "h: f32[u")):
        assert parse_graph(GOLDEN.replace(old, new)) != golden()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("def g(h: f32[t, 4]):\n    x = nope(h)\n    return x", "line 2: unknown op 'nope'"),
        ("def g(h: f32[t, 4]):\n    return x", "line 2: x is not defined"),
        ("def g(h: f32[t, 4]):\n    x = view(h, shape=(3,))\n    return x", "line 2: view("),
        ("def g(h: f32[t, 4]):\n    x, y = view(h, shape=(2, 2))\n    return x", "line 2: expected a new name"),
        ("def g(h: f99[t, 4]):\n    return h", "line 1"),
        ("def g(h: f32[t, 4]):\n    import os\n    return h", "line 2: expected NAME"),
        ("def g(h: f32[t, 4]):\n    x = view(h, shape=__import__('os'))\n    return h", "line 2"),
        ("def g(h: f32[t, 4]):\n    x = map(h, expr='__import__(x0)')\n    return x", "line 2: map("),
        ("def g(h: f32[t, 4] = 3):\n    return h", "line 1: operands"),
        ("def g(h: f32[t, 4]):\n    h", "line 1: g does not end in return"),
        ("print('x')", "line 1: expected program"),
        ("x = KV(heads='a', dim=1, vdim=1, segments=())", "line 1: KV: heads='a'"),
        ("x = KV(heads=1)", "line 1: KV needs dim, vdim, segments"),
        ("x = Dense(1)", "line 1: unknown type 'Dense'"),
        ("def g(:", "line 1"),
        ("x = " + "(" * 5000 + ")" * 5000, "line 1"),
        ("\0", "line 1"),
    ],
)
def test_refused_with_its_line(text: str, says: str) -> None:
    with pytest.raises(BadInput) as caught:
        parse_graph(text)
    assert says in str(caught.value)


@given(st.data())
def test_damaged_text_is_refused_or_another_program(data: st.DataObject) -> None:
    """Any edit of a text gives BadInput or a program, never another exception."""
    text = print_program(data.draw(programs()))
    start = data.draw(st.integers(0, len(text) - 1))
    stop = data.draw(st.integers(start, min(len(text), start + 20)))
    edited = text[:start] + data.draw(st.text(max_size=4)) + text[stop:]
    try:
        parse_program(edited)
    except BadInput as err:
        assert str(err).startswith("line ")
