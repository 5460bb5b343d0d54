"""The cost model against counts by hand, for the shape of SmolLM2-135M."""

from __future__ import annotations

from dataclasses import replace

import pytest

from elision.errors import BadInput
from elision.ir.cost import Row, cost, floor, total
from elision.ir.mask import Mask
from elision.ir.op import Sizes
from elision.ir.program import Program
from elision.ir.states import Int, Segment
from elision.ir.value import Value
from elision.passes.cache import InsertCache
from tests.ir.programs import tiny_llama, tiny_scorer

LAYERS, HIDDEN, INTER, HEADS, KV_HEADS, DIM, VOCAB = 30, 576, 1536, 9, 3, 64, 49152
BLOCK = HIDDEN * (2 * HEADS + 2 * KV_HEADS) * DIM + 3 * HIDDEN * INTER  # weights of matrices in a layer
NORMS = (2 * LAYERS + 1) * HIDDEN
WEIGHTS = LAYERS * BLOCK + NORMS + VOCAB * HIDDEN
CONTEXT = 100


@pytest.fixture(scope="module")
def smol() -> Program:
    return tiny_llama(LAYERS, HIDDEN, HEADS, KV_HEADS, VOCAB, INTER, dtype="f32", random=False)[0]


def test_the_shape_is_that_of_smollm2() -> None:
    assert WEIGHTS == 134_515_008


def test_one_decoded_token(smol: Program) -> None:
    found = total(cost(smol, "step", Sizes(tokens=1, rows=1, context=CONTEXT)))
    matrices = LAYERS * BLOCK + VOCAB * HIDDEN
    attention = LAYERS * CONTEXT * HEADS * DIM * 4
    assert found.flops == pytest.approx(2 * matrices + attention, rel=1e-2)  # the rest is pointwise
    assert found.flops > 2 * matrices + attention
    # one row of the embedding, the tied table once for the head, and 32 rotation frequencies at two sites a layer
    assert found.weight_bytes == 4 * (WEIGHTS + HIDDEN + LAYERS * 2 * DIM // 2)
    assert found.state_bytes == CONTEXT * LAYERS * 2 * KV_HEADS * DIM * 4


def test_rows_name_the_block(smol: Program) -> None:
    rows = cost(smol, "step", Sizes(tokens=1, context=CONTEXT))
    attends = [r for r in rows if r.op == "attend"]
    assert [r.label for r in attends] == [f"{i}.attn" for i in range(LAYERS)]
    assert all(r.flops == CONTEXT * HEADS * DIM * 4 for r in attends)
    assert {r.op for r in rows} & {"call", "input", "param", "item"} == set()


def test_prefill_pays_for_the_head_once_per_row(smol: Program) -> None:
    rows = cost(smol, "prefill", Sizes(tokens=2 * CONTEXT, rows=2, context=CONTEXT))
    head = next(r for r in reversed(rows) if r.op == "linear")
    assert head.flops == 2 * 2 * VOCAB * HIDDEN
    mlp = total(r for r in rows if r.label == "0.mlp" and r.op == "linear")
    assert mlp.flops == 2 * 2 * CONTEXT * 3 * HIDDEN * INTER
    assert mlp.weight_bytes == 4 * 3 * HIDDEN * INTER  # once for all tokens


def test_weights_do_not_depend_on_tokens_and_states_not_on_weights(smol: Program) -> None:
    one = total(cost(smol, "step", Sizes(tokens=1, context=CONTEXT)))
    many = total(cost(smol, "step", Sizes(tokens=8, context=CONTEXT)))
    longer = total(cost(smol, "step", Sizes(tokens=1, context=2 * CONTEXT)))
    assert many.weight_bytes == one.weight_bytes + 7 * 4 * HIDDEN  # more rows of the embedding
    assert longer.state_bytes == 2 * one.state_bytes and longer.weight_bytes == one.weight_bytes


def test_an_int8_cache_is_read_by_its_encoded_bytes() -> None:
    program, _ = tiny_scorer(1, hidden=128, heads=2, kv_heads=1)
    InsertCache().apply(program)
    eight = program.copy()
    encoding = Int(8, "channel", 32)

    def rule(b: object, v: Value, args: tuple[Value, ...]) -> Value | None:
        if v.op == "input" and v.is_state:
            segments = tuple(Segment(s.slots, encoding, encoding) for s in v.type.segments)  # type: ignore[union-attr]
            return b.input(v.attr("name"), replace(v.type, segments=segments))  # type: ignore[attr-defined, no-any-return, type-var]
        return None

    eight.rewrite(rule, "step")  # type: ignore[arg-type]
    wide, narrow = (total(cost(p, "step", Sizes(tokens=1, context=CONTEXT))) for p in (program, eight))
    assert wide.state_bytes == CONTEXT * 2 * 64 * 8
    assert narrow.state_bytes == CONTEXT * 2 * (64 + 2 * 4)  # codes, and a scale for each group of 32


def test_a_window_bounds_what_attention_reads() -> None:
    program, _ = tiny_llama(mask=Mask("window", 16))
    near, far = (total(cost(program, "step", Sizes(tokens=1, context=n))) for n in (16, 500))
    assert near == far


def test_the_round_costs_its_step_and_the_commit() -> None:
    program, _ = tiny_llama()
    step = total(cost(program, "step", Sizes(tokens=1, context=CONTEXT)))
    whole = total(cost(program, "round", Sizes(tokens=1, context=CONTEXT)))
    assert whole.flops == step.flops and whole.weight_bytes == step.weight_bytes
    assert whole.state_bytes > step.state_bytes  # the accepted row moves out of Scratch


def test_unknown_entry() -> None:
    with pytest.raises(BadInput, match="no entry 'decode'; there are attn, mlp, score"):
        cost(tiny_llama()[0], "decode", Sizes(tokens=1))


def test_floor_is_the_longer_of_memory_and_arithmetic() -> None:
    row = Row("total", "", flops=100.0, weight_bytes=30.0, state_bytes=10.0, activation_bytes=1e9, write_bytes=1e9)
    assert floor(row, bandwidth=20.0, flops=1000.0) == 2.0
    assert floor(row, bandwidth=1000.0, flops=20.0) == 5.0
