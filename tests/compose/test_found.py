"""What the matrix and the fuzzing found, each once more."""

from __future__ import annotations

import pytest
from programs import tiny_scorer

from elision.errors import BadInput, IllegalProgram, UnsupportedModel
from elision.ir.mask import Mask
from elision.passes import from_text
from elision.passes.pipeline import named, run
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


def test_a_refusal_stays_of_its_kind() -> None:
    """A drafter's model that cannot be raised was bad input once it had the name of its pass."""
    with pytest.raises(UnsupportedModel, match="^spec-sampling: it has no attention"), named(from_text("spec-sampling:model=x")):
        raise UnsupportedModel("it has no attention")


@pytest.mark.parametrize("kept", ["kivi:bits=2,group=16,residual=16", "gear:bits=2,block=16,rank=1", "quest:budget=32,page=8"])
def test_holes_in_a_cache_whose_entries_are_counted_are_refused(kept: str) -> None:
    """The tail of blocks ran full while generating; pages were refused without the name of a pass."""
    with pytest.raises(IllegalProgram, match="validity.*without some tokens"):
        decoder().transformed([kept, "calm:exits=2,fill=mask"])


@pytest.mark.parametrize("first", ["fastv", "g-search"])
def test_the_last_tokens_of_a_prompt_are_those_of_the_prompt(first: str) -> None:
    """Natively the last tokens that a layer still had were taken for the last ones of the prompt."""
    assert verdict("decoder", (first, "snapkv")) == "native"


@pytest.mark.parametrize("draft", ["spectr:exit=2", "layer-skip-draft:layers=1", "dyspec:exit=1", "del:exits=1+2"])
def test_what_a_model_drafts_with_its_own_layers_is_not_held(draft: str) -> None:
    """Drafted tokens were held as if they had left there, and run late: other tokens, or a state that ran full."""
    with pytest.raises(IllegalProgram, match="validity.*a draft writes into held_1"):
        decoder().transformed(["calm:exits=2,threshold=0.035,rule=softmax,fill=defer", draft])
