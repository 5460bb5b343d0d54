"""Caches natively: append, attention over every kind of mask and group, trees, commit; against the interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bench import Bench, Maker, close
from hypothesis import given, settings
from hypothesis import strategies as st

from elision.ir import tree
from elision.ir.layout import LANES
from elision.ir.mask import Mask
from elision.ir.pages import summarise
from elision.ir.states import KV, Budget, Dense, Encoding, Float, Gumbel, Int, Scores, Scratch, Segment, Summary
from elision.ir.store import KVStore
from elision.ir.tokens import Tokens
from elision.ir.value import Value
from elision.llvm.processor import LEVELS, host_features, needs

FEW = settings(max_examples=max(1, settings.default.max_examples // 12))  # type: ignore[union-attr]
ROWS, CAPACITY = 4, 200
PLAIN = {"heads": 2, "group": 2, "dim": 16, "vdim": 24, "mask": Mask(), "softcap": None, "extras": (), "keyed_by": "position",
         "observed": None, "keep": "per_layer"}  # fmt: skip
FLOATS = {"k": "f32", "v": "f32"}
INT8 = {**PLAIN, "k": "i8", "v": "i8"}
masks = st.one_of(
    st.just(Mask()), st.just(Mask("full")), st.builds(Mask, st.just("window"), st.integers(1, 40)),
    st.builds(Mask, st.just("chunk"), st.integers(1, 40)),
    st.builds(Mask, st.just("window"), st.integers(1, 40), st.integers(0, 9)),
)  # fmt: skip
observed = st.tuples(st.sampled_from([1.0, 0.9]), st.just(0)) | st.tuples(st.just(1.0), st.integers(1, 40))  # decay, last


@st.composite
def sites(draw: st.DrawFn) -> dict[str, Any]:
    scored = draw(st.none() | observed)
    return {
        "heads": draw(st.integers(1, 3)),
        "group": draw(st.integers(1, 9)),
        "dim": draw(st.sampled_from([1, 6, 16, 20])),
        "vdim": draw(st.sampled_from([8, 16, 40])),
        "k": draw(st.sampled_from(["f32", "bf16", "f16", "i8", "i8"])),
        "v": draw(st.sampled_from(["f32", "bf16", "f16", "i8", "i8"])),
        "mask": Mask() if scored else draw(masks),
        "observed": scored,
        "keep": draw(st.sampled_from(["per_layer", "per_head"])),
        "softcap": draw(st.sampled_from([None, None, 1.5])),
        "extras": draw(st.sampled_from([(), ("sinks",), ("slopes",)])),
        "keyed_by": "explicit" if scored else draw(st.sampled_from(["position", "explicit"])),
    }


def encoding(form: str, dim: int) -> Encoding:
    return Int(8, "channel", dim) if form == "i8" else Float(form)


def attention(site: dict[str, Any]) -> Any:
    def make(m: Maker) -> tuple[Value, ...]:
        heads, dim, vdim = site["heads"], site["dim"], site["vdim"]
        k, v = encoding(site["k"], dim), encoding(site["v"], vdim)
        decay, last = site["observed"] or (1.0, 0)
        scores = Scores(site["group"], 64, decay, site.get("gumbel"), site.get("local", 0.0)) if site["observed"] else None
        slots = Budget(CAPACITY) if scores else Dense()
        segments = (Segment(slots, k, v), Segment(Scratch(64), k, v))
        page, summary = site.get("page", 0), Summary(site["page"]) if site.get("page", 0) > 1 else None
        type = KV(heads, dim, vdim, segments, keyed_by=site["keyed_by"], keep=site["keep"], scores=scores, summary=summary)
        queries, keys, values = m.x(heads * site["group"], dim), m.x(heads, dim), m.x(heads, vdim)
        state = m("append", m.state(type), keys, values)
        extra = [m.weight(name, heads * site["group"]) for name in site["extras"]]
        softcap = {"softcap": site["softcap"]} if site["softcap"] else {}
        how = {"mask": site["mask"], "scale": 0.3, "extras": site["extras"], **softcap}
        if page and m.axis.draft:
            open = max(page, LANES)
            pages = m("pick", queries, state, n=site["n"], page=page, open=open, room=CAPACITY, first=1)
            how["extras"] = (*site["extras"], "pages")
            return m("attend", queries, state, *extra, pages, **how, page=page, open=open), pages, state
        found = m("attend", queries, state, *extra, **how)
        if scores:
            state = m("observe", state, queries, *extra, **how, last=last)
        return found, state

    return make


def nodes(trees: dict[int, tree.Tree], committed: list[int]) -> Tokens:
    row, pos, parent, anc = tree.pack(list(trees.values()), [committed[r] for r in trees])
    return Tokens(torch.tensor(list(trees))[row], pos, ROWS, parent, anc)


def chain(n: int) -> tree.Tree:
    return tree.Tree((-1, *range(n - 1)))


def scenario(
    bench: Bench, lengths: list[list[int]], trees: list[dict[int, tree.Tree]], threads: int, capacity: int = CAPACITY
) -> None:
    """Chunks of prefill, then rounds that draft, commit part of every tree, or take the root alone in one call, and go on."""
    fast, slow = bench.stores(ROWS, capacity)
    committed = [0] * ROWS
    prefill = [e for e in bench.program.entries if e.startswith("prefill")]
    step = [e for e in bench.program.entries if e.startswith("step")]
    decode = [e for e in bench.program.entries if e.startswith("decode")]

    def each(entries: list[str], at: Tokens, what: str) -> None:
        for entry in entries:
            for found, want in bench.run(entry, at, threads, bench.inputs(entry, len(at)), (fast, slow)):
                close(found, want, 1e-4, f"{entry} {what} {threads} threads")

    for part in lengths:
        each(prefill, Tokens.chunk(part, committed), f"prefill {part}")
        committed = [a + b for a, b in zip(committed, part, strict=True)]
        same(fast, slow)
        for store in (*fast.values(), *slow.values()):
            thin(store)
            close_pages(store)
    for drafted in trees:
        each(step, nodes(drafted, committed), f"trees {drafted}")
        paths = [drafted[r].path(len(drafted[r].parent) // 2) if r in drafted else [] for r in range(ROWS)]
        names = bench.engines[threads].schedules["commit"].states
        bench.engines[threads].commit([fast[n] for n in names], paths)
        for store in slow.values():
            store.commit(paths)
        for store in (*fast.values(), *slow.values()):
            close_pages(store)
        committed = [a + len(p) for a, p in zip(committed, paths, strict=True)]
        same(fast, slow)
        rows = torch.tensor([r for r in range(ROWS) if r not in drafted or len(drafted) == ROWS], dtype=torch.int64)
        each(decode, Tokens(rows, torch.tensor(committed)[rows], ROWS), f"roots of {rows.tolist()}")
        for store in (*fast.values(), *slow.values()):
            close_pages(store)
        committed = [n + (r in rows) for r, n in enumerate(committed)]
        same(fast, slow)


def thin(store: KVStore) -> None:
    """Evict about a third of a cache that allows it, other entries of each of its lists."""
    if store.type.keyed_by == "explicit":
        n = store.pos.shape[2]
        there = torch.arange(n) < store.totals()[..., None]
        lost = (store.pos * 7919 + torch.arange(len(store.groups))[:, None] * 31) % 3 == 0
        kept = torch.where(there & ~lost, torch.arange(n), n).sort(-1).values
        store.select(torch.where(kept == n, -1, kept))


def close_pages(store: KVStore) -> None:
    if store.type.summary is not None:
        summarise(store, torch.arange(store.rows))


def stored(store: KVStore, what: str, n: int) -> dict[str, torch.Tensor]:
    """Codes, and scales if there are some, of the first ``n`` slots: ``[B, H, n, width]``."""
    type = store.type
    b, h = torch.arange(store.rows)[:, None, None], torch.arange(type.heads)[:, None]
    found = store.segments[0].planes[what]._get(b, h, torch.arange(n))
    assert ("scale" in found.beside) == isinstance(getattr(type.main[0], what), Int)
    return {"codes": found.codes, **found.beside}


def same(fast: Any, slow: Any) -> None:
    """What is stored is equal, code by code."""
    for name, a in fast.items():
        b = slow[name]
        assert torch.equal(a.lengths(), b.lengths()), name
        n = int(a.lengths().max())
        assert torch.equal(a.positions(), b.positions()), name
        there = (torch.arange(n) < a.lengths()[..., None])[..., None]
        for what in "kv":
            have, want = stored(a, what, n), stored(b, what, n)
            assert have.keys() == want.keys()
            for array in have:
                zero = torch.zeros((), dtype=have[array].dtype)
                pair = [torch.where(there, x[array], zero) for x in (have, want)]
                assert torch.equal(*pair), f"{name}: {array} of {what}"
        if a.type.scores is not None:
            for which in a.type.scores.arrays:
                have, want = (torch.where(there[..., 0], x.index[which][..., :n], 0) for x in (a, b))
                close(have, want, 1e-3, f"{name}: {which}")


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_attention(threads: int) -> None:
    @FEW
    @given(st.lists(sites(), min_size=5, max_size=5), st.randoms(use_true_random=False))
    def run(found: list[dict[str, Any]], rng: Any) -> None:
        bench = Bench()
        for site in found:
            bench.add(attention(site))
        bench.compile()
        lengths = [[rng.choice([0, 1, 5, 17, 70]) for _ in range(ROWS)] for _ in range(3)]
        lengths[0][0] = 150 if rng.random() < 0.5 else 9  # many blocks
        lengths[1][0] = lengths[2][0] = 3
        lengths[2] = [1, 0, 2, 0]
        lengths = [[min(n, 70) if r else n for r, n in enumerate(part)] for part in lengths]
        trees = [
            {0: tree.Tree((-1, 0, 0, 1, 1, 2, 5)), 2: chain(12)},
            {r: chain(1) for r in range(ROWS)},
            {1: tree.Tree((-1, *(rng.randrange(i) for i in range(1, 20)))), 3: chain(2)},
            {0: chain(1)},
        ]
        scenario(bench, lengths, trees, threads)

    run()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_scores_of_entries(threads: int) -> None:
    bench = Bench()
    forms = (("f32", {"extras": ("sinks",)}), ("bf16", {"extras": ("slopes",), "group": 7}), ("i8", {"softcap": 1.5}))
    for decay, last, keep in ((1.0, 0, "per_head"), (0.9, 0, "per_layer"), (1.0, 7, "per_layer")):
        for form, more in forms:
            how = {"k": form, "v": form, "keyed_by": "explicit", "observed": (decay, last), "keep": keep}
            bench.add(attention({**PLAIN, "group": 3, **how, **more}))
    for keep in ("per_head", "per_layer"):
        noisy = {"observed": (0.9, 0), "gumbel": Gumbel(7, 1.0, 0.8, 2.0, 12), "keyed_by": "explicit", "keep": keep}
        bench.add(attention({**PLAIN, **FLOATS, "group": 3, **noisy}))
        bench.add(attention({**PLAIN, **FLOATS, "group": 3, **noisy, "observed": (1.0, 0), "gumbel": None, "local": 0.8}))
    bench.compile()
    trees = [{0: chain(1), 2: chain(1)}, {0: tree.Tree((-1, 0, 0, 1, 1, 2, 5)), 3: chain(12)}, {1: chain(1)}]
    scenario(bench, [[120, 0, 17, 2], [3, 40, 1, 0]], trees, threads)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_chosen_pages(threads: int) -> None:
    """The pages of every token and head, and attention over them; trees that begin anywhere in a page, and leave it."""
    bench = Bench()
    for form, page, more in (
        ("f32", 16, {"group": 3, "n": 2}), ("bf16", 16, {"group": 7, "n": 5, "softcap": 1.5}),
        ("i8", 16, {"group": 1, "heads": 3, "n": 3, "extras": ("sinks",)}), ("f16", 32, {"n": 2, "dim": 13}),
        ("f32", 48, {"group": 13, "n": 1, "vdim": 40}), ("bf16", 1, {"group": 3, "n": 7}), ("i8", 1, {"n": 40, "softcap": 1.5}),
    ):  # fmt: skip
        bench.add(attention({**PLAIN, "k": form, "v": form, "page": page, **more}))
    bench.compile()
    trees = [
        {r: chain(1) for r in range(ROWS)}, {0: tree.Tree((-1, 0, 0, 1, 1, 2, 5)), 2: chain(12)},
        {1: chain(40), 3: chain(2)}, {0: chain(1), 1: chain(1)},
    ]  # fmt: skip
    scenario(bench, [[120, 0, 17, 2], [33, 46, 15, 0]], trees, threads)


@pytest.mark.parametrize("level", [x for x in LEVELS if host_features().issuperset(needs(x))][1:])
def test_lesser_processors(level: str) -> None:
    bench = Bench()
    for form in ("f32", "bf16", "i8"):
        bench.add(attention({**PLAIN, "group": 7, "k": form, "v": form, "mask": Mask("window", 30), "softcap": 1.5}))
        bench.add(attention({**PLAIN, "group": 7, "k": form, "v": form, "page": 16, "n": 3}))
    bench.compile(level=level)
    scenario(bench, [[90, 0, 17, 2], [40, 1, 0, 33]], [{0: chain(9), 3: chain(1)}], 2)


def test_of_equal_bounds_the_first_are_read() -> None:
    """Whole numbers have few different products, some of which the last page that is read shares with others."""
    bench = Bench()
    for page, n in ((1, 40), (1, 17), (16, 3)):
        bench.add(attention({**PLAIN, **FLOATS, "dim": 4, "vdim": 8, "page": page, "n": n}))
    bench.compile()
    fast, slow = bench.stores(ROWS, CAPACITY)

    def each(kind: str, at: Tokens) -> None:
        for entry in (e for e in bench.program.entries if e.startswith(kind)):
            given = {name: x.round() for name, x in bench.inputs(entry, len(at)).items()}
            for found, want in bench.run(entry, at, 2, given, (fast, slow)):
                close(found, want, 1e-4, entry)

    each("prefill", Tokens.chunk([150, 97, 64, 130], [0] * ROWS))
    for store in (*fast.values(), *slow.values()):
        close_pages(store)
    each("decode", Tokens(torch.arange(ROWS), torch.tensor([150, 97, 64, 130]), ROWS))


def test_a_long_cache() -> None:
    """Chunks that all queries see whole, that some see part of, and that none sees."""
    bench = Bench()
    for mask in (Mask(), Mask("window", 300), Mask("chunk", 256)):
        for keyed_by in ("position", "explicit"):
            bench.add(attention({**PLAIN, **FLOATS, "group": 3, "dim": 8, "vdim": 8, "mask": mask, "keyed_by": keyed_by}))
    bench.compile()
    scenario(bench, [[700, 0, 5, 0], [90, 300, 0, 1]], [{0: chain(1), 1: chain(3)}], 2, 1000)


def test_a_tree_of_64_nodes() -> None:
    bench = Bench()
    for mask in (Mask(), Mask("window", 5), Mask("chunk", 4)):
        for form in ("f32", "i8"):
            bench.add(attention({**PLAIN, "dim": 8, "k": form, "v": form, "mask": mask}))
    bench.compile()
    wide = tree.Tree((-1, *(i // 2 for i in range(63))))
    for threads in (1, 2):
        scenario(bench, [[9, 0, 3, 1]], [{0: wide, 3: chain(64)}, {1: chain(3)}], threads)


@pytest.mark.parametrize("drafted", [False, True], ids=["prefill", "step"])
@pytest.mark.parametrize("dim", [1, 13, 24])
def test_bytes_are_rounded_as_the_reference_does(drafted: bool, dim: int) -> None:
    """Ties, zeros, the ends of float32's range, and what is not finite: codes and scales to the bit."""
    bench = Bench()
    bench.add(attention({**INT8, "heads": 1, "dim": dim}))
    bench.compile()
    generator = torch.Generator().manual_seed(dim)
    n = 24
    ties = torch.randint(-127, 127, (n, 1, 24), generator=generator) + 0.5
    ties[:, :, 0] = 127.0  # a scale of one
    rows = [ties, ties * 3.7e-44, ties * 1e-40, ties * 2.6e36, ties * 0, ties * 1e-45]
    rows += [torch.randn(n, 1, 24, generator=generator) * 10.0**e for e in (-38, -3, 0, 30)]
    rows += [torch.full((n, 1, 24), x) for x in (float("inf"), -float("inf"), float("nan"))]
    mixed = torch.randn(n, 1, 24, generator=generator)
    mixed[::2, :, -1], mixed[1::2, :, dim // 2] = float("inf"), float("nan")
    for x in (*rows, mixed):
        (fast,), (slow,) = (s.values() for s in bench.stores(ROWS, CAPACITY))
        inputs = {"x1": torch.zeros(n, 2, dim), "x2": x[..., :dim].contiguous(), "x3": x}
        at = nodes({0: chain(n)}, [0] * ROWS) if drafted else Tokens.chunk([n, 0, 0, 0], [0] * ROWS)
        bench.run("step.0" if drafted else "prefill.0", at, 2, inputs, ({"kv_0": fast}, {"kv_0": slow}))
        if drafted:
            bench.engines[2].commit([fast], [list(range(n)), [], [], []])
            slow.commit([list(range(n)), [], [], []])
        for what in "kv":
            have, want = stored(fast, what, n), stored(slow, what, n)
            assert torch.equal(have["scale"].nan_to_num(-1), want["scale"].nan_to_num(-1)), f"scales of {what}: {x[0, 0]}"
            assert torch.equal(have["codes"], want["codes"]), f"codes of {what}: {x[0, 0]}"


@pytest.mark.parametrize(
    ("encoding", "why"),
    [
        (Int(8, "channel", 8), "values as 8-bit codes in groups of 8 channels"),
        (Int(4, "channel", 1), "keys as 4-bit codes in groups of 1 channels"),
        (Float("f64"), "a cache of f64"),
    ],
    ids=str,
)
def test_other_encodings_run_on_the_host(encoding: Encoding, why: str) -> None:
    def make(m: Maker) -> tuple[Value, ...]:
        state = m.state(KV(1, 16, 16, (Segment(Dense(), encoding, encoding), Segment(Scratch(64), encoding, encoding))))
        state = m("append", state, m.x(1, 16), m.x(1, 16))
        return m("attend", m.x(2, 16), state, mask=Mask(), scale=0.3), state

    bench = Bench()
    bench.add(make)
    bench.compile({"append", "attend"})
    assert all(why in reason for _, reason in bench.hosts) and "commit" not in bench.engines[1].schedules
    at = Tokens.chunk([5, 0, 2, 1], [0] * ROWS)
    for found, want in bench.run("prefill.0", at, 2, bench.inputs("prefill.0", len(at)), bench.stores(ROWS, CAPACITY)):
        close(found, want, 1e-6, "on the host")
