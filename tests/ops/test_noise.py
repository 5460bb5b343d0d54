"""Keyed noise: Philox's published vectors, uniformity, independence of rows, positions, seeds and streams."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from elision.ir.noise import RowKey, gumbel, gumbel_rows, philox, uniform, uniform_rows

ONES = 0xFFFFFFFF
#: Counter, key, result: the known-answer tests published with Random123 (philox4x32, 10 rounds).
VECTORS = [
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([ONES] * 4, [ONES] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_philox_gives_the_published_vectors(counter: list[int], key: list[int], expected: list[int]) -> None:
    found = philox(np.array(counter, dtype=np.uint64), np.array(key, dtype=np.uint64))
    assert found.tolist() == expected


def test_uniform_is_the_philox_of_its_key() -> None:
    seed, row, position = 0x299F31D0_A4093822, 0x13198A2E, 0x85A308D3
    stream_word = 0xA1252A43  # CRC-32 of b"verify"
    counter = np.array([1, position, row, stream_word], dtype=np.uint64)
    words = philox(counter, np.array([seed & ONES, seed >> 32], dtype=np.uint64))
    found = uniform(RowKey(seed, row), position, "verify", 8)
    assert found[4:].tolist() == ((words + 0.5) / 2.0**32).tolist()


@pytest.mark.parametrize("rows", [False, True], ids=["positions", "rows"])
def test_noise_is_uniform(rows: bool) -> None:
    m = 256
    keys = [RowKey(7, r if rows else 0) for r in range(m)]
    u = uniform_rows(keys, [3] * m if rows else list(range(m)), "verify", 1024)
    assert 0 < float(u.min()) and float(u.max()) < 1
    counts = torch.histc(u.flatten().float(), 64, 0, 1)
    assert stats.chisquare(counts.numpy().astype(float)).pvalue > 1e-4
    first = torch.histc(u[:, 0].float(), 16, 0, 1)  # across the keys, at one token
    assert stats.chisquare(first.numpy().astype(float)).pvalue > 1e-4


def dependence(a: torch.Tensor, b: torch.Tensor) -> float:
    """The p-value of two uniform samples being independent, by a table of 8 x 8 cells."""
    table = np.histogram2d(a.numpy(), b.numpy(), bins=8)[0]
    return float(stats.chi2_contingency(table).pvalue)


def test_keys_that_differ_in_one_part_give_independent_noise() -> None:
    n = 4096
    base = uniform(RowKey(1, 2), 3, "verify", n)
    others = {
        "seed": uniform(RowKey(2, 2), 3, "verify", n),
        "high seed": uniform(RowKey(1 + (1 << 32), 2), 3, "verify", n),
        "row": uniform(RowKey(1, 3), 3, "verify", n),
        "position": uniform(RowKey(1, 2), 4, "verify", n),
        "swapped": uniform(RowKey(1, 3), 2, "verify", n),
        "stream": uniform(RowKey(1, 2), 3, "draft", n),
    }
    for name, other in others.items():
        assert dependence(base, other) > 1e-4, name
        assert not torch.equal(base, other), name


def test_independence_test_sees_dependent_noise() -> None:
    base = uniform(RowKey(1, 2), 3, "verify", 4096)
    assert dependence(base, (base + 0.3 * uniform(RowKey(1, 3), 3, "verify", 4096)) / 1.3) < 1e-4


@given(
    keys=st.lists(
        st.tuples(st.integers(-(1 << 63), (1 << 64) - 1), st.integers(0, 1000), st.integers(0, 1 << 20)),
        min_size=1,
        max_size=4,
    ),
    n=st.integers(1, 20),
    more=st.integers(0, 20),
)
def test_noise_depends_on_its_key_alone(keys: list[tuple[int, int, int]], n: int, more: int) -> None:
    row_keys = [RowKey(seed, row) for seed, row, _ in keys]
    positions = [p for *_, p in keys]
    together = gumbel_rows(row_keys, positions, "verify", n)
    for line, key, position in zip(together, row_keys, positions, strict=True):
        assert torch.equal(line, gumbel(key, position, "verify", n + more)[:n])


def test_noise_neither_reads_nor_writes_the_random_state_of_torch() -> None:
    first = gumbel(RowKey(5, 0), 9, "verify", 16)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert torch.equal(first, gumbel(RowKey(5, 0), 9, "verify", 16))
    assert torch.equal(state, torch.get_rng_state())


def test_gumbel_has_the_gumbel_distribution() -> None:
    g = gumbel(RowKey(11, 0), 0, "verify", 20_000).numpy()
    assert stats.kstest(g, "gumbel_r").pvalue > 1e-4
    assert stats.kstest(-g, "gumbel_r").pvalue < 1e-4
