"""The model called as m(...): transformers' logits, with padding and explicit positions; other arguments are named."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from elision.errors import BadInput
from tests.runtime.conftest import Pair, pair

Batch = tuple[torch.Tensor, torch.Tensor]


def close(found: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(found, want, rtol=0, atol=1e-5)


@torch.no_grad()
def logits(pair: Pair, *args: Any, **options: Any) -> torch.Tensor:
    found = pair.original(*args, **options).logits
    assert isinstance(found, torch.Tensor)
    return found


def test_logits_equal_transformers(llama: Pair) -> None:
    ids = torch.randint(3, 128, (3, 11), generator=torch.Generator().manual_seed(1))
    found = llama.compiled(ids)
    close(found.logits, logits(llama, ids))
    assert list(found) == ["logits"] and found["logits"] is found.logits is found[0]
    assert found.logits.dtype == torch.float32 and found.logits.shape == (3, 11, 128)
    with pytest.raises(AttributeError, match="hidden_states.*logits"):
        _ = found.hidden_states


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_of_a_padded_batch_equal_transformers(llama: Pair, padded: Batch, side: str) -> None:
    ids, mask = padded if side == "left" else tuple(x.flip(1) for x in padded)
    found, keep = llama.compiled(input_ids=ids, attention_mask=mask).logits, mask.bool()
    close(found[keep], logits(llama, ids, attention_mask=mask)[keep])
    assert not found[~keep].any()


def test_explicit_positions_equal_transformers(llama: Pair, padded: Batch) -> None:
    ids, mask = padded
    positions = (mask.cumsum(1) - 1).clamp(min=0) + torch.tensor([[0], [30], [7], [2]])
    want = logits(llama, ids, attention_mask=mask, position_ids=positions)
    found = llama.compiled(ids, mask, position_ids=positions).logits
    close(found[mask.bool()], want[mask.bool()])
    gaps = torch.tensor([[0, 1, 5, 9, 10]])  # one line for all rows; its distances are not those of the indices
    close(llama.compiled(ids[:, -5:], position_ids=gaps).logits, logits(llama, ids[:, -5:], torch.ones(4, 5), position_ids=gaps))
    with pytest.raises(AssertionError):
        close(llama.compiled(ids[:, -5:]).logits, llama.compiled(ids[:, -5:], position_ids=gaps).logits)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)], ids=["f64", "f16", "bf16"]
)
def test_models_of_other_dtypes_are_raised_whole(dtype: torch.dtype, tolerance: float) -> None:
    """The casts to float32 inside their norms belong to the norms."""
    model = pair(32, dtype=dtype)
    ids = torch.randint(3, 32, (2, 9), generator=torch.Generator().manual_seed(1))
    found, want = model.compiled(ids).logits, logits(model, ids)
    assert found.dtype == dtype and float((found - want).abs().max()) <= tolerance * float(want.abs().max())
    assert model.compiled.coverage["opaque"] == {} and model.compiled.coverage["sites"]["norm"] == 5


def test_arguments_that_ask_for_what_is_done_anyway_are_taken(llama: Pair) -> None:
    ids = torch.tensor([[5, 6]])
    plain = llama.compiled(ids).logits
    found = llama.compiled(
        ids, use_cache=False, output_attentions=False, return_dict=True, logits_to_keep=0, past_key_values=None
    )
    assert torch.equal(found.logits, plain)


@pytest.mark.parametrize(
    "given", [{"labels": torch.tensor([[5, 6]])}, {"output_attentions": True}, {"return_dict": False}, {"bogus": 1, "other": 2}]
)
def test_other_arguments_are_named(llama: Pair, given: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=", ".join(given) + ".*expected input_ids, attention_mask, position_ids"):
        llama.compiled(torch.tensor([[5, 6]]), **given)


@pytest.mark.parametrize(
    ("ids", "more", "message"),
    [
        (torch.tensor([[5, 6]]), {"position_ids": torch.tensor([0, 1])}, r"position_ids: .*\[1, 2\].*got torch.int64 \[2\]"),
        (torch.tensor([[5, 6]]), {"position_ids": torch.tensor([[0.0, 1.0]])}, r"LongTensor.*got torch.float32 \[1, 2\]"),
        (torch.tensor([[5, 6]]), {"position_ids": torch.tensor([[1, 1]])}, "position_ids: .*increase along every row"),
        (torch.tensor([[5, 6]]), {"position_ids": torch.tensor([[-1, 0]])}, "position_ids: .*from 0"),
        (torch.tensor([[5, 6]]), {"position_ids": torch.tensor([[63, 64]])}, "65 positions.*has 64"),
        (torch.tensor([[5, 6]]), {"attention_mask": torch.tensor([[0, 0]])}, "no token"),
        (torch.tensor([[5, 6]]), {"attention_mask": torch.ones(1, 1, 2, 2)}, r"attention_mask \[1, 1, 2, 2\].*\[1, 2\]"),
        (torch.tensor([[5.0]]), {}, "LongTensor.*got torch.float32"),
        (torch.tensor([[128]]), {}, "token id 128.*0 to 127"),
        (torch.full((1, 65), 5), {}, "65 positions.*has 64"),
    ],
)  # fmt: skip
def test_bad_input_says_what_was_given_and_what_is_possible(
    llama: Pair, ids: torch.Tensor, more: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        llama.compiled(ids, **more)
