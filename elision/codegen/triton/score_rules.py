"""The launches of scores: what entries received of a prompt, of a decoded token, and of drafts that are accepted."""

from __future__ import annotations

from elision.codegen.refusal import need
from elision.codegen.triton.attention_rules import fixed_sizes, lists, nodes, readable
from elision.codegen.triton.configs import power
from elision.codegen.triton.launches import Arg, Launches, axis, cache, integer, on_round, piece, plain, real, size
from elision.ir.mask import Mask
from elision.ir.states import KV
from elision.ir.value import Value


def observe(to: Launches, value: Value) -> None:
    """After the attention that it observes. What drafts give waits until they are accepted."""
    cached, q, *extra = value.args
    plan, state, mask = to.plan, cached.type, value.attr("mask")
    assert isinstance(state, KV) and state.scores is not None and isinstance(mask, Mask)
    named = dict(zip(value.attr("extras") or (), extra, strict=True))
    readable(state)
    name, tokens = plan.state(cached), plan.axis(q)
    if plan.drafted(tokens):
        plan.follow(value, cached)
        return
    need(plan.axis(q) not in to.counted, "scores of a prompt that tokens have been left out of")
    need(q in to.lse and "sinks" not in named, "scores without the attention before them, or with sinks")
    plan.follow(value, cached)
    if value.attr("decoding"):
        _decoded(to, name, state, q)
        return
    queries, stride = to.tensor(q)
    per, heads = q.tensor.sizes[0] // state.heads, q.tensor.sizes[0]
    keys: dict[str, Arg | None] = {
        "q": queries, "q_stride": stride, "pos": axis(tokens, "pos"), "start": axis(tokens, "start"), "lse": piece(to.lse[q]),
        "slopes": plain(named["slopes"]) if "slopes" in named else None,
        **{n: cache(name, state, n) for n in ("k", "k_scale", "k_low")}, "entry_pos": cache(name, state, "pos"),
        "length": cache(name, state, "len_k"), "blocks": size(name, "blocks"), "entries": size(name, "entries"),
        "scale": real(float(value.attr("scale"))), "softcap": real(float(value.attr("softcap") or 0.0)),
        "size": integer(mask.size), "first_seen": integer(mask.sinks),
        **{n: v for n, v in _noise(state).items() if n in ("seed", "amplitude", "tau")},
    }  # fmt: skip
    fixed = {k: v for k, v in fixed_sizes(state).items() if k not in ("DV", "DVP", "FORM_V")} | dict(
        G=per, GP=power(per), MASK=mask.kind, SOFTCAP=bool(value.attr("softcap")), SLOPES="slopes" in named, PENDING=True,
        BM=max(32, power(per)), BN=64 if state.scores.gumbel is None else 32,
    )  # fmt: skip
    norm = to.scratch(tokens, heads) if state.scores.gumbel is not None else None
    if norm is not None:
        tiles = ("longest", tokens, fixed["BM"] // fixed["GP"])
        more = {"norm": piece(norm), "prompt": cache(name, state, "prompt")}
        to.launch("noisy_keys", (tiles, ("rows", state.heads)), keys | more, fixed, reads=[name], writes=[norm, name])
    for array, decay in state.scores.arrays.items():
        need(decay > 0, "scores that forget at once")
        args = keys | {
            "score": cache(name, state, array), "ahead": axis(tokens, "ahead"), "wide": size(name, "wide"),
            "decay": real(decay), "last": integer(value.attr("last", 0)), "norm": None if norm is None else piece(norm),
        }  # fmt: skip
        grid = (("entries", name, fixed["BN"]), ("rows", state.heads))
        reads = [name] if norm is None else [name, norm]
        to.launch("key_scores", grid, args, fixed | dict(ADD=True, NOISY=norm is not None), reads=reads, writes=[name])


def _noise(state: KV) -> dict[str, Arg | None]:
    """The operands that say which noise; None without."""
    noise = state.scores.gumbel if state.scores is not None else None
    if noise is None:
        return dict.fromkeys(("seed", "amplitude", "tau", "tau_end", "steps"))
    numbers = {"amplitude": noise.amplitude, "tau": noise.start, "tau_end": noise.end, "steps": noise.steps}
    return {"seed": Arg(("int", noise.seed), "i32"), **{n: real(float(x)) for n, x in numbers.items()}}


def _decoded(to: Launches, name: str, state: KV, q: Value) -> None:
    """Of a decoded token, from the logits that attention left."""
    assert state.scores is not None
    tokens, heads, noisy = to.plan.axis(q), q.tensor.sizes[0], state.scores.gumbel is not None
    args: dict[str, Arg | None] = {
        "kept": piece(to.kept[q]), "lse": piece(to.lse[q]), "length": cache(name, state, "len_k"),
        "entries": size(name, "entries"),
    }  # fmt: skip
    norm = to.scratch(tokens, heads) if noisy else None
    more: dict[str, Arg | None] = {
        "norm": None if norm is None else piece(norm), "pos": axis(tokens, "pos") if noisy else None,
        "entry_pos": cache(name, state, "pos") if noisy else None, "prompt": cache(name, state, "prompt") if noisy else None,
        **_noise(state),
    }  # fmt: skip
    fixed = dict(H=state.heads, G=heads // state.heads, LISTS=lists(state), PENDING=True)
    if norm is not None:
        given = args | more | {"row": axis(tokens, "row")}
        to.launch("noisy_kept", (("tokens", tokens, 1), heads), given, fixed | dict(BN=512), [name], [norm])
    for array, decay in state.scores.arrays.items():
        given = args | more | {
            "score": cache(name, state, array), "start": axis(tokens, "start"), "wide": size(name, "wide"), "decay": real(decay),
        }  # fmt: skip
        grid = (("entries", name, 128), ("rows", state.heads))
        to.launch("mass", grid, given, fixed | dict(ADD=True, NOISY=noisy, BN=128), reads=[name], writes=[name])


def credit(to: Launches, name: str, state: KV) -> None:
    """Of a round's drafts, from what waits in the cache, before they are counted."""
    assert state.scores is not None
    args: dict[str, Arg | None] = {
        "kept": cache(name, state, "waiting"), "kept_nodes": cache(name, state, "waiting_nodes"),
        "lse": cache(name, state, "waiting_norm"), "path": on_round("path"), "accepted": on_round("accepted"),
        "entry_pos": cache(name, state, "pos"), "node_pos": cache(name, state, "node_pos"),
        "length": cache(name, state, "len_k"), "entries": size(name, "entries"), "wide": size(name, "wide"),
        "prompt": cache(name, state, "prompt") if state.scores.gumbel is not None else None, **_noise(state),
    }  # fmt: skip
    group, most = state.scores.group, nodes(state)
    fixed = dict(H=state.heads, G=group, LISTS=lists(state), DEPTH=state.scores.depth, NODES=most)
    if state.scores.gumbel is not None:
        to.launch("noisy_waiting", (most, ("rows", state.heads * group)), args, fixed | dict(BN=512), reads=[name], writes=[name])
    for array, decay in state.scores.arrays.items():
        given = args | {"score": cache(name, state, array), "decay": real(decay)}
        grid = (("entries", name, 128), ("rows", state.heads))
        to.launch("credit", grid, given, fixed | dict(NOISY=state.scores.gumbel is not None, BN=128), reads=[name], writes=[name])
