"""What the matrix and the fuzzing found, each once more."""

from __future__ import annotations

import pytest
from programs import tiny_scorer

from elision.errors import BadInput, IllegalProgram
from elision.ir.mask import Mask
from elision.passes.pipeline import run
from tests.compose.matrix import verdict
from tests.compose.subjects import decoder


@pytest.mark.parametrize("second", ["tome:n=1", "evit:keep=0.5", "zero-tprune"])
@pytest.mark.parametrize("first", ["tome:n=1", "evit:keep=0.5", "zero-tprune"])
def test_the_tokens_of_an_encoder_are_reduced_by_one_method(first: str, second: str) -> None:
    """The second raised a ValueError, or did not know of how many tokens one is the mean."""
    with pytest.raises(BadInput, match=f"{second.partition(':')[0]}: another method reduces the tokens"):
        run(tiny_scorer(layers=3, mask=Mask("full"))[0], [first, second])


def test_a_refusal_names_its_pass() -> None:
    """shortgpt spoke as skip-layers; a half that is not there, and what a cache cannot be, were nobody's."""
    halves = ["evopress:share=0.25,attn=1", "skip-layers:layers=1,half=attn"]
    for texts, by in ((["shortgpt:share=0.25,layers=9"], "shortgpt"), (halves, "skip-layers")):
        with pytest.raises(BadInput, match=f"^{by}: "):
            decoder().transformed(texts)


@pytest.mark.parametrize("kept", ["kivi:bits=2,group=16,residual=16", "gear:bits=2,block=16,rank=1", "quest:budget=32,page=8"])
def test_holes_in_a_cache_whose_entries_are_counted_are_refused(kept: str) -> None:
    """The tail of blocks ran full while generating; pages were refused without the name of a pass."""
    with pytest.raises(IllegalProgram, match="validity.*without some tokens"):
        decoder().transformed([kept, "calm:exits=2,fill=mask"])


@pytest.mark.parametrize("first", ["fastv", "g-search"])
def test_the_last_tokens_of_a_prompt_are_those_of_the_prompt(first: str) -> None:
    """Natively the last tokens that a layer still had were taken for the last ones of the prompt."""
    assert verdict("decoder", (first, "snapkv")) == "native"
