"""Generation equals transformers' `generate`: greedy tokens, shapes, padding, ends, streaming, chunks, threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from queue import Queue
from typing import Any

import pytest
import torch
from transformers import TextIteratorStreamer

from elision.runtime import session
from tests.runtime.conftest import EOS, PAD, Pair

Batch = tuple[torch.Tensor, torch.Tensor]


def original(pair: Pair, ids: torch.Tensor, mask: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
    mask = torch.ones_like(ids) if mask is None else mask
    found = pair.original.generate(ids, attention_mask=mask, **{"do_sample": False, **options})
    assert isinstance(found, torch.Tensor)
    return found


def ends(pair: Pair, batch: Batch, new: int = 12) -> list[int]:
    """Two token ids that end some rows of the batch early, at different places, and not all of them."""
    free = original(pair, *batch, max_new_tokens=new, eos_token_id=-1)[:, batch[0].shape[1] :]
    assert len(set(free.flatten().tolist())) > 8  # not one loop
    found = [int(free[0, 2]), int(free[1, 6])]
    assert any(not set(found) & set(row.tolist()) for row in free)
    return found


def test_greedy_equals_transformers_one_by_one(llama: Pair, prompts: list[list[int]]) -> None:
    for prompt in prompts:
        ids = torch.tensor([prompt])
        assert torch.equal(llama.compiled.generate(ids, max_new_tokens=16), original(llama, ids, max_new_tokens=16))


def test_greedy_equals_transformers_as_a_ragged_batch(llama: Pair, padded: Batch) -> None:
    found = llama.compiled.generate(*padded, max_new_tokens=16)
    assert found.dtype == torch.int64 and torch.equal(found, original(llama, *padded, max_new_tokens=16))


def test_rows_that_end_are_filled_with_the_pad_token(llama: Pair, padded: Batch) -> None:
    eos = ends(llama, padded)
    found = llama.compiled.generate(*padded, max_new_tokens=12, eos_token_id=eos)
    assert torch.equal(found, original(llama, *padded, max_new_tokens=12, eos_token_id=eos))
    assert found[0, -1] == PAD and found[0, padded[0].shape[1] + 2] == eos[0]
    assert set(llama.compiled.stats.finish) == {"eos", "length"}  # type: ignore[union-attr]


def test_the_result_is_as_long_as_the_longest_row(llama: Pair, prompts: list[list[int]]) -> None:
    ids = torch.tensor([prompts[0]])
    eos = int(original(llama, ids, max_new_tokens=6)[0, -1])
    found = llama.compiled.generate(ids, max_new_tokens=12, eos_token_id=eos)
    assert torch.equal(found, original(llama, ids, max_new_tokens=12, eos_token_id=eos))
    assert found.shape[1] <= len(prompts[0]) + 6


def test_no_eos_token_never_ends_at_a_token(llama: Pair, padded: Batch) -> None:
    llama.compiled.defaults["eos_token_id"] = ends(llama, padded)
    try:
        found = llama.compiled.generate(*padded, max_new_tokens=12, eos_token_id=[])
        assert "eos" in (llama.compiled.generate(*padded, max_new_tokens=12), llama.compiled.stats.finish)[1]  # type: ignore[union-attr]
    finally:
        llama.compiled.defaults["eos_token_id"] = EOS
    assert torch.equal(found, original(llama, *padded, max_new_tokens=12, eos_token_id=-1))


@pytest.mark.parametrize("least", [1, 5, 12])
def test_min_new_tokens_puts_eos_off(llama: Pair, padded: Batch, least: int) -> None:
    eos = ends(llama, padded)
    options: dict[str, Any] = {"max_new_tokens": 12, "min_new_tokens": least, "eos_token_id": eos}
    found = llama.compiled.generate(*padded, **options)
    assert torch.equal(found, original(llama, *padded, **options))
    if least > 3:
        assert not torch.equal(found, llama.compiled.generate(*padded, **{**options, "min_new_tokens": 0}))


@pytest.mark.parametrize("penalty", [0.7, 1.5])
def test_repetition_penalty_equals_transformers(llama: Pair, prompts: list[list[int]], penalty: float) -> None:
    changed = False
    for prompt in prompts:
        ids = torch.tensor([prompt])
        found = llama.compiled.generate(ids, max_new_tokens=16, repetition_penalty=penalty)
        assert torch.equal(found, original(llama, ids, max_new_tokens=16, repetition_penalty=penalty))
        changed |= not torch.equal(found, llama.compiled.generate(ids, max_new_tokens=16))
    assert changed


def test_padding_is_not_part_of_the_history_that_is_penalised(llama: Pair, padded: Batch, prompts: list[list[int]]) -> None:
    together = llama.compiled.generate(*padded, max_new_tokens=16, repetition_penalty=0.5, eos_token_id=[])
    for row, prompt in zip(together, prompts, strict=True):
        alone = llama.compiled.generate(torch.tensor([prompt]), max_new_tokens=16, repetition_penalty=0.5, eos_token_id=[])
        assert row[-16:].tolist() == alone[0, -16:].tolist()


def test_num_return_sequences_come_one_prompt_after_the_other(llama: Pair, padded: Batch) -> None:
    options: dict[str, Any] = {"max_new_tokens": 5, "num_return_sequences": 2, "do_sample": True, "seed": 4}
    found = llama.compiled.generate(*padded, **options)
    ids = padded[0]
    assert found.shape == (8, ids.shape[1] + 5) and torch.equal(found[:, : ids.shape[1]], ids.repeat_interleave(2, 0))
    assert not torch.equal(found[0], found[1])


def test_temperature_and_do_sample_say_whether_to_sample(llama: Pair, padded: Batch) -> None:
    def run(**options: Any) -> list[list[int]]:
        return llama.compiled.generate(*padded, max_new_tokens=8, **options).tolist()  # type: ignore[no-any-return]

    greedy = run()
    assert run(temperature=0) == run(do_sample=False) == run(do_sample=False, temperature=0.8) == run(top_k=5) == greedy
    assert run(temperature=0.8) == run(temperature=0.8, do_sample=True) != greedy
    assert run(do_sample=True, top_k=1) == greedy


def test_generation_config_gives_the_defaults(llama: Pair, padded: Batch) -> None:
    kept = dict(llama.compiled.defaults)
    explicit = llama.compiled.generate(
        *padded, max_new_tokens=6, do_sample=True, temperature=1.4, top_k=9, repetition_penalty=1.2
    )
    try:
        llama.compiled.defaults.update(max_new_tokens=6, do_sample=True, temperature=1.4, top_k=9, repetition_penalty=1.2)
        assert torch.equal(llama.compiled.generate(*padded), explicit)
        greedy = llama.compiled.generate(*padded, temperature=0, repetition_penalty=1.0)
    finally:
        llama.compiled.defaults = kept
    assert torch.equal(greedy, llama.compiled.generate(*padded, max_new_tokens=6))


def test_context_limit_shortens_a_row_and_no_other(llama: Pair) -> None:
    ids = torch.arange(3, 63)[None]  # 60 of 64 positions
    batch = torch.cat((ids, torch.full_like(ids, PAD).index_copy(1, torch.tensor([58, 59]), torch.tensor([[7, 9]]))))
    mask = (batch != PAD).long()
    found = llama.compiled.generate(batch, mask, max_new_tokens=20, eos_token_id=[])
    assert llama.compiled.stats.finish == ["length", "length"]  # type: ignore[union-attr]
    assert torch.equal(found[:1, :64], original(llama, ids, max_new_tokens=4, eos_token_id=-1))
    assert found[0, 64:].tolist() == [PAD] * 16
    assert torch.equal(found[1, 60:], original(llama, torch.tensor([[7, 9]]), max_new_tokens=20, eos_token_id=-1)[0, 2:])


def test_without_a_length_generation_goes_to_the_context_limit(llama: Pair, prompts: list[list[int]]) -> None:
    found = llama.compiled.generate(torch.tensor(prompts[:1]), eos_token_id=[])
    assert found.shape[1] == llama.compiled.max_context == 64


@pytest.mark.parametrize("chunk", [1, 3, 512])
def test_prefill_in_chunks_equals_prefill_at_once(
    llama: Pair, padded: Batch, prompts: list[list[int]], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = session.Session(llama.compiled._interpreter, len(prompts), 20)
    logits = run.prefill(prompts, chunk)
    assert run.committed == [len(p) for p in prompts]
    want = llama.original(*padded, position_ids=(padded[1].cumsum(1) - 1).clamp(min=0)).logits[:, -1]
    torch.testing.assert_close(logits, want, rtol=0, atol=1e-5)
    found = llama.compiled.generate(*padded, max_new_tokens=8)
    monkeypatch.setattr(session.Session.prefill, "__defaults__", (chunk,))
    assert torch.equal(llama.compiled.generate(*padded, max_new_tokens=8), found)


def test_concurrent_calls_equal_calls_one_after_the_other(llama: Pair, padded: Batch) -> None:
    jobs: list[dict[str, Any]] = [
        {"max_new_tokens": 10 + i, "seed": i, "temperature": 0.9 if i % 2 else 0, "min_p": i / 20} for i in range(8)
    ]

    def run(job: dict[str, Any]) -> list[list[int]]:
        return llama.compiled.generate(*padded, **job).tolist()  # type: ignore[no-any-return]

    want = [run(job) for job in jobs]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(run, jobs)) == want


def test_statistics_of_a_call(llama: Pair, padded: Batch) -> None:
    llama.compiled.generate(*padded, max_new_tokens=9, eos_token_id=[])
    stats = llama.compiled.stats
    assert stats is not None
    assert (stats.prompt_tokens, stats.new_tokens, stats.rounds) == (int(padded[1].sum()), 36, 8)
    assert (stats.drafted, stats.accepted) == (0, 0)
    assert stats.time_to_first_token > 0 and stats.tokens_per_second == pytest.approx(32 / stats.decode_time)
    assert stats.state_bytes >= 2 * 2 * 2 * 8 * 8 * 4 * (12 + 8)  # layers, k and v, heads, dim, bytes, rows, positions


# --- text ---


def spelled(prompt: list[int]) -> str:
    return " ".join(f"t{t:03}" for t in prompt)


def test_text_in_gives_the_new_text(llama: Pair, padded: Batch, prompts: list[list[int]]) -> None:
    rows = original(llama, *padded, max_new_tokens=6, eos_token_id=-1)[:, -6:].tolist()
    want = [spelled(row) for row in rows]
    texts = [spelled(p) for p in prompts]
    assert llama.compiled.generate(texts, max_new_tokens=6, eos_token_id=[]) == want
    assert llama.compiled.generate(texts[0], max_new_tokens=6, eos_token_id=[]) == want[0]
    assert llama.compiled.generate(texts[:1], max_new_tokens=6, eos_token_id=[]) == want[:1]
    assert llama.compiled.generate(texts[0], max_new_tokens=6, eos_token_id=[], num_return_sequences=2) == [want[0]] * 2


def test_the_end_token_is_not_in_the_text(llama: Pair, prompts: list[list[int]]) -> None:
    text = spelled(prompts[0])
    # A seed with which the special token is drawn early.
    for seed in range(200):
        found = llama.compiled.generate(torch.tensor([prompts[0]]), max_new_tokens=20, temperature=2.0, seed=seed)[0, 7:].tolist()
        if found[-1] == EOS and len(found) > 2:
            break
    assert found[-1] == EOS
    assert llama.compiled.generate(text, max_new_tokens=20, temperature=2.0, seed=seed) == spelled(found[:-1])


def test_stop_strings_are_cut_from_text_and_kept_in_tokens(llama: Pair, prompts: list[list[int]]) -> None:
    ids = torch.tensor([prompts[0]])
    new = original(llama, ids, max_new_tokens=10, eos_token_id=-1)[0, -10:].tolist()
    at = next(i for i in range(1, 9) if new[i : i + 2] not in [new[j : j + 2] for j in range(i)])
    stop = spelled(new[at : at + 2])[1:] + " "  # within words: needs the next one to be complete
    options: dict[str, Any] = {"max_new_tokens": 10, "eos_token_id": [], "stop": ["no such", stop]}
    assert llama.compiled.generate(spelled(prompts[0]), **options) == (spelled(new).split(stop)[0] if at < 8 else spelled(new))
    found = llama.compiled.generate(ids, **options)
    assert found[0, len(prompts[0]) :].tolist() == new[: at + 3]
    assert llama.compiled.stats.finish == ["stop"]  # type: ignore[union-attr]


# --- streaming ---


class Recorder:
    """A streamer as transformers defines them."""

    def __init__(self) -> None:
        self.put_values: list[torch.Tensor] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        self.put_values.append(value)

    def end(self) -> None:
        self.ended += 1


def test_a_streamer_gets_what_transformers_gives_it(llama: Pair, prompts: list[list[int]]) -> None:
    ids, ours, theirs = torch.tensor([prompts[0]]), Recorder(), Recorder()
    llama.compiled.generate(ids, max_new_tokens=6, streamer=ours)
    original(llama, ids, max_new_tokens=6, streamer=theirs)
    assert [v.tolist() for v in ours.put_values] == [v.tolist() for v in theirs.put_values] and ours.ended == 1


def test_text_iterator_streamer_of_transformers_works(llama: Pair, prompts: list[list[int]]) -> None:
    tokenizer = llama.compiled.tokenizer
    streamer: Any = TextIteratorStreamer(tokenizer, skip_prompt=True)  # type: ignore[arg-type]
    streamer.text_queue = Queue()
    llama.compiled.generate(torch.tensor([prompts[0]]), max_new_tokens=6, eos_token_id=[], streamer=streamer)
    want = llama.compiled.generate(spelled(prompts[0]), max_new_tokens=6, eos_token_id=[])
    assert "".join(streamer) == want


def test_a_function_gets_rows_tokens_and_text(llama: Pair, padded: Batch) -> None:
    seen: dict[int, tuple[list[int], str]] = {r: ([], "") for r in range(4)}

    def on_tokens(row: int, tokens: list[int], text: str) -> None:
        seen[row] = (seen[row][0] + tokens, seen[row][1] + text)

    found = llama.compiled.generate(*padded, max_new_tokens=6, eos_token_id=[], streamer=on_tokens)[:, -6:].tolist()
    assert seen == {r: (row, spelled(row)) for r, row in enumerate(found)}


def test_a_function_that_returns_false_ends_its_row_alone(llama: Pair, padded: Batch) -> None:
    count = [0] * 4

    def on_tokens(row: int, tokens: list[int], text: str) -> bool:
        count[row] += 1
        return not (row == 2 and count[row] == 3)

    free = llama.compiled.generate(*padded, max_new_tokens=8, eos_token_id=[])
    found = llama.compiled.generate(*padded, max_new_tokens=8, eos_token_id=[], streamer=on_tokens)
    assert count == [8, 8, 3, 8]
    assert llama.compiled.stats.finish == ["length", "length", "cancelled", "length"]  # type: ignore[union-attr]
    want = free.clone()
    want[2, -5:] = PAD
    assert torch.equal(found, want)
