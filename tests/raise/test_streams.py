"""Models of several streams: what is found in them, and that they are told and not raised wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as T
from encoders import IMAGE, TEXT, images, randomised

import elision
from elision.errors import UnsupportedModel
from elision.frontend.streams import survey

IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
T5 = dict(vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=4, num_heads=4)
WHISPER = {
    **IDS, "vocab_size": 99, "d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_mel_bins": 16, "max_source_positions": 20,
    "max_target_positions": 40, "decoder_start_token_id": 1,
}  # fmt: skip


def clip() -> Any:
    return randomised(T.CLIPModel(T.CLIPConfig(text_config={**TEXT, **IDS}, vision_config=IMAGE, projection_dim=24)))


def llava() -> Any:
    text = T.LlamaConfig(**{**TEXT, **IDS, "num_key_value_heads": 2})
    config = T.LlavaConfig(text_config=text, vision_config=T.CLIPVisionConfig(**IMAGE), image_token_index=98)
    return randomised(T.LlavaForConditionalGeneration(config))


MODELS = {
    "t5": lambda: randomised(T.T5ForConditionalGeneration(T.T5Config(**T5))),
    "whisper": lambda: randomised(T.WhisperForConditionalGeneration(T.WhisperConfig(**WHISPER))),
    "clip": clip,
    "llava": llava,
}
FOUND = {
    "t5": [
        "4 layers (12 blocks of 3 templates) from decoder_input_ids, where 4 blocks attend to another stream",
        "2 layers (4 blocks of 2 templates) from input_ids",
    ],
    "whisper": [
        "3 layers (9 blocks of 3 templates) from decoder_input_ids, where 3 blocks attend to another stream",
        "2 layers (4 blocks of 2 templates) from input_features",
    ],
    "clip": [
        "3 layers (6 blocks of 2 templates) from pixel_values",
        "3 layers (6 blocks of 2 templates) from input_ids",
    ],
    # The image features are the result of the last layer but one.
    "llava": [
        "3 layers (6 blocks of 2 templates) from input_ids and pixel_values",
        "2 layers (4 blocks of 2 templates) from pixel_values",
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_the_streams_of_a_model(name: str) -> None:
    assert [str(s) for s in survey(MODELS[name]())] == FOUND[name]


@pytest.mark.parametrize("name", ["t5", "whisper", "clip"])
def test_a_model_of_two_streams_is_told(name: str) -> None:
    with pytest.raises(UnsupportedModel) as told:
        elision.compile(MODELS[name]())
    text = str(told.value)
    assert text.startswith(f"{name} cannot be raised: it has 2 streams: {FOUND[name][0]}; {FOUND[name][1]}. A program has one")


def test_a_tower_is_raised_alone() -> None:
    tower = clip().vision_model
    found = elision.compile(tower)(pixel_values=images(2))
    with torch.no_grad():
        want = tower(pixel_values=images(2))
    assert list(found) == list(want)
    for name in found:
        torch.testing.assert_close(found[name], want[name], rtol=0, atol=1e-5 * float(want[name].abs().max()))


def test_text_with_images_is_compiled_for_text_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = llava()
    compiled = elision.compile(model)
    assert "left out: pixel_values" in caplog.text
    ids = torch.randint(3, 98, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = model(input_ids=ids).logits
    torch.testing.assert_close(compiled(ids).logits, want, rtol=0, atol=1e-5 * float(want.abs().max()))
    with pytest.raises(elision.BadInput, match="pixel_values are not supported"):
        compiled(ids, pixel_values=images(2))


def test_a_learned_bias_is_told() -> None:
    with pytest.raises(UnsupportedModel, match="adds a learned bias by position to the scores"):
        elision.compile(randomised(T.T5EncoderModel(T.T5Config(**T5))))
