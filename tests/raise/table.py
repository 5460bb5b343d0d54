"""What the compiler found in each family, read off its raised program. `python tests/raise/table.py` writes the table that is
kept in elision/frontend/FAMILIES.md; `test_families.py` and `test_encoders.py` compare its rows."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import elision  # noqa: E402
from elision.errors import ElisionError  # noqa: E402
from elision.ir.expr import compiled, operands  # noqa: E402
from elision.ir.mask import Mask  # noqa: E402
from elision.ir.states import KV  # noqa: E402
from elision.ir.value import Graph, Value  # noqa: E402
from elision.ir.walk import Site, sites  # noqa: E402
from elision.runtime.model import Model  # noqa: E402

KEPT = ROOT / "elision" / "frontend" / "FAMILIES.md"
COLUMNS = ("family", "attention", "masks", "norms", "positions", "feed-forward", "coverage", "status")
AGAIN = "python tests/raise/table.py"
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "SiLU": F.silu,
    "GELU": F.gelu,
    "GELU (tanh)": lambda x: F.gelu(x, approximate="tanh"),
    "ReLU": F.relu,
    "ReLU squared": lambda x: F.relu(x) ** 2,
}
Row = tuple[str, ...]


def row(family: str, model: Model) -> Row:
    """The family's row, from nothing but the compiled model."""
    found = list(sites(model.program, model.program.entries["score"]))
    raised, opaque = sum(model.coverage["sites"].values()), model.coverage["opaque"]
    left = "; opaque: " + ", ".join(f"{n} ({c})" for n, c in opaque.items()) if opaque else ""
    coverage = f"{raised - sum(opaque.values())} of {raised}{left}"
    shown = (_attention(found), _masks(found), _norms(found), _positions(found), _feed_forward(found))
    return (family, *shown, coverage, "raised" + ("" if model.program.meta["causal"] else ", encoder"))


def told(family: str, error: ElisionError) -> Row:
    return (family, *[""] * (len(COLUMNS) - 2), " ".join(str(error).split()).replace("|", "/"))


def _attention(found: list[Site]) -> str:
    """Heads of queries and of keys and values, and what else is in the product."""
    kinds: Counter[str] = Counter()
    for site in _attends(found):
        query, cache = site.value.args[0].tensor, site.value.args[1].type
        assert isinstance(cache, KV)
        heads = query.axes[1]
        kind = "MHA" if heads == cache.heads else "MQA" if cache.heads == 1 else "GQA"
        text = [f"{kind} {heads}" if heads == cache.heads else f"{kind} {heads}/{cache.heads}"]
        q, k, v = _operands(site)
        if _depth(k) > 1:
            text.append(f"latent, keys {cache.dim}, values {cache.vdim}")
        norms = [n for n in _path(q, "linear") if n.op == "norm"]
        if norms:
            text.append(f"q/k norm ({_norm(norms[0])}{'' if len(norms[0].tensor.axes) == 3 else ', all heads'})")
        if cap := site.attr("softcap"):
            text.append(f"softcap {cap:g}")
        text += [name for name in site.attr("extras") or () if name != "slopes"]
        if any(n.op == "positions" for n in _path(q)):
            text.append("queries scaled by position")
        kinds[", ".join(text)] += 1
    return _counted(kinds)


def _masks(found: list[Site]) -> str:
    masks = [m for s in _attends(found) if isinstance(m := s.attr("mask"), Mask)]
    return _counted(Counter(map(str, masks)))


def _norms(found: list[Site]) -> str:
    """Kind, and where in the block: before it (pre), after it (post), on the stream itself between blocks (stream)."""
    places: dict[str, list[str]] = {}
    for graph in _templates(found):
        stream = graph.inputs[0]
        for value in graph.values:
            if value.op == "norm" and len(value.tensor.axes) == 2:
                if all(v is stream or v.op in ("map", "reduce") for v in _path(value.args[0])):
                    place = "pre"
                elif value is graph.outputs[0] or _added(graph, value):
                    place = "post"
                else:
                    continue
                places.setdefault(_norm(value), []).append(place)
    return "; ".join(f"{kind}, {'+'.join(sorted(set(p), key=['pre', 'post'].index))}" for kind, p in places.items()) or "none"


def _positions(found: list[Site]) -> str:
    kinds: Counter[str] = Counter()
    for site in _attends(found):
        q, _, _ = _operands(site)
        ropes = [n for n in _path(q, "linear") if n.op == "rope"]
        if ropes:
            inv_freq, dim = ropes[0].args[1].tensor.axes[0], q.tensor.axes[-1]
            assert isinstance(inv_freq, int) and isinstance(dim, int)
            part = "" if 2 * inv_freq == dim else f" {2 * inv_freq} of {dim}"
            scale = f" x {ropes[0].attr('scale'):.3g}" if ropes[0].attr("scale", 1.0) != 1.0 else ""
            kinds[f"RoPE {ropes[0].attr('style')}{part}{scale}"] += 1
        elif "slopes" in (site.attr("extras") or ()):
            kinds["ALiBi"] += 1
        else:
            kinds["none"] += 1
    embeds = [s.value for s in found if s.value.op == "embed" and not s.frame.label]
    learned = any(n.op == "positions" for v in embeds for n in _path(v.args[0]))
    tables = {s.frame.source(s.value.args[1])[1] for s in found if s.value.op == "rope"}
    text = _counted(kinds) if not learned or set(kinds) != {"none"} else ""
    more = [f"{len(tables)} tables"] if len(tables) > 1 else []
    return ", ".join(filter(None, ["learned" if learned else "", text, *more]))


def _feed_forward(found: list[Site]) -> str:
    """The pointwise function between the products, or the experts; parallel if it shares a block with attention."""
    kinds: Counter[str] = Counter()
    for graph, times in Counter(s.frame.graph for s in _firsts(found)).items():
        experts = [v for v in graph.values if v.op == "experts"]
        attends = any(v.op == "attend" for v in graph.values)
        gates = [v for v in graph.values if v.op == "map" and _between_products(graph, v)]
        for value in experts:
            count, route = value.args[3].tensor.axes[0], _origin(value.args[2])
            text = f"{count} experts, {value.args[1].tensor.axes[-1]} a token ({route.attr('kind') or route.op})"
            kinds[f"{text}, {_function(value.attr('expr'))}{', and a shared one' if gates else ''}"] += times
        if gates and not experts:
            kinds[f"{_function(gates[0].attr('expr'))}{', parallel to attention' if attends else ''}"] += times
    return _counted(kinds)


# --- walking ---


def _attends(found: list[Site]) -> list[Site]:
    return [s for s in found if s.value.op == "attend"]


def _operands(site: Site) -> tuple[Value, Value, Value]:
    """Queries, keys and values of an attention site."""
    written = site.value.args[1]
    assert written.op in ("append", "fresh")
    return site.value.args[0], *written.args[-2:]  # type: ignore[return-value]


def _path(value: Value, until: str = "") -> Iterator[Value]:
    """The values that this one is made of, back to (and without) the nearest of an op."""
    stack, seen = [value], set()
    while stack:
        v = stack.pop()
        if v not in seen and v.op != until:
            seen.add(v)
            yield v
            stack.extend(a for a in v.args if not a.is_state)


def _depth(value: Value) -> int:
    """The most linears on a way back from here."""
    own = int(value.op == "linear")
    return own + max((_depth(a) for a in value.args[:1] if not a.is_state), default=0)


def _origin(value: Value) -> Value:
    return value.args[0] if value.op == "item" else value


def _templates(found: list[Site]) -> list[Graph]:
    return list(dict.fromkeys(s.frame.graph for s in found if s.frame.label))


def _firsts(found: list[Site]) -> list[Site]:
    """One site of every call of a template."""
    return list({id(s.frame): s for s in found if s.frame.label}.values())


def _added(graph: Graph, value: Value) -> bool:
    """The value is added to the stream as it is, or scaled."""
    ends = [o for o in graph.outputs if not o.is_state]
    return any(o.op == "map" and value in o.args for o in ends)


def _between_products(graph: Graph, value: Value) -> bool:
    """A pointwise function of products alone that feeds another product."""
    users = [v for v in graph.values if value in v.args]
    reads = [a.op for a in value.args]
    return bool(reads) and set(reads) <= {"linear", "slice", "item"} and any(u.op == "linear" for u in users)


def _norm(value: Value) -> str:
    offset = " (1 + w)" if value.attr("offset") else ""
    centred = " of x - mean" if any(v.op == "reduce" for v in value.args[0].args) else ""
    return f"{value.attr('kind')}{centred}{offset}{'' if len(value.args) > 1 else ' without weight'}"


def _function(expr: str) -> str:
    """The usual name of a pointwise function, found by evaluating it; else the expression."""
    n = operands(expr)
    x = [torch.linspace(-3, 3, 61, dtype=torch.float64) * (i + 1) - i for i in range(n)]
    found = compiled(expr)(*x)
    gated = len(x) == 2
    for name, f in ACTIVATIONS.items():
        wants = [f(x[0]) * x[1], f(x[1]) * x[0]] if gated else [f(x[0])]
        if any(torch.allclose(found, want, rtol=0, atol=1e-9) for want in wants):
            return f"{name}, gated" if gated else name
    return expr


def _counted(kinds: Counter[str]) -> str:
    """``3 x window(8); 1 x causal``; without the count where there is one kind."""
    if len(kinds) < 2:
        return next(iter(kinds), "")
    return "; ".join(f"{n} x {kind}" for kind, n in kinds.items())


# --- the file ---


def read() -> dict[str, Row]:
    """The rows that are kept."""
    lines = [line for line in KEPT.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    rows = (tuple(cell.strip() for cell in line.strip().strip("|").split("|")) for line in lines)
    return {cells[0]: cells for cells in rows if cells[0] not in (COLUMNS[0], "---")}


def text(rows: Iterable[Row]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (COLUMNS, ("---",) * len(COLUMNS), *rows)]
    head = [
        "# Families",
        "",
        f"Read off the raised programs of tiny models by `{AGAIN}`, not written by hand; tests compare every row,",
        "and every decoder's tokens with those of transformers. Heads are of tiny models; `2 x` counts the",
        "layers where they differ; coverage counts operators. For every other causal LM of transformers see",
        "[the sweep](../../benchmarks/results/2026-11-21-sweep.md).",
        "",
    ]
    return "\n".join([*head, *lines, ""])


def rows(families: dict[str, Callable[[], Any]], done: Callable[[], None] = lambda: None) -> Iterator[Row]:
    for family, make in families.items():
        try:
            yield row(family, elision.compile(make()))
        except ElisionError as error:
            yield told(family, error)
        done()


def main() -> None:
    import functools

    from encoders import IMAGES, TEXTS, encoder
    from families import DECODERS, decoder
    from rich.progress import Progress

    makers: dict[str, Callable[[], Any]] = {name: functools.partial(decoder, name) for name in DECODERS}
    makers |= {name: functools.partial(encoder, name) for name in (*TEXTS, *IMAGES)}
    with Progress() as progress:
        task = progress.add_task("raising", total=len(makers))
        KEPT.write_text(text(list(rows(makers, lambda: progress.advance(task)))), encoding="utf-8")
    print(KEPT)


if __name__ == "__main__":
    main()
