"""A picture of a program: the stream as a line, its blocks as boxes by template, states beside them, what was left out
as ghosts."""

from __future__ import annotations

from html import escape

from elision.ir.layout import nbytes, row_bytes
from elision.ir.program import Program
from elision.ir.states import KV, Array, Float, Segment
from elision.ir.value import Value

COLOURS = ("#4878a8", "#d08c3c", "#5a9367", "#a05a7c", "#7a6fb0", "#8a8a5a")
WIDTH, ROW, TOP, LEFT, STATE = 760, 26, 92, 150, 320


def picture(program: Program, before: Program | None = None) -> str:
    """SVG of the stream of ``program``; blocks of ``before`` that are not in it are drawn as ghosts."""
    entry = "step" if "step" in program.entries else "score"
    blocks = {v.attr("label"): v for v in program.entries[entry].calls()}
    labels = [v.attr("label") for v in (before or program).entries[entry].calls()]
    templates = list(dict.fromkeys(v.attr("target") for v in (before or program).entries[entry].calls()))
    colours = {t: COLOURS[i % len(COLOURS)] for i, t in enumerate(templates)}
    height = TOP + ROW * (len(labels) + 2) + 40
    most = max((len(_states(block)) for block in blocks.values()), default=0)
    width = WIDTH + STATE * max(most - 1, 0)
    parts = [_head(program, len(labels) - len(blocks), width, height), _legend(colours)]
    parts.append(f'<line x1="{LEFT}" y1="{TOP - 8}" x2="{LEFT}" y2="{height - 40}" stroke="#444" stroke-width="3"/>')
    parts.append(_text(LEFT - 14, TOP + 6, "tokens", anchor="end"))
    for i, label in enumerate(labels):
        y = TOP + ROW * (i + 1)
        block = blocks.get(label)
        parts.append(_ghost(y, label) if block is None else _block(program, block, label, y, colours))
    parts.append(_text(LEFT - 14, TOP + ROW * (len(labels) + 1) + 12, "logits", anchor="end"))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _head(program: Program, gone: int, width: int, height: int) -> str:
    passes = ", ".join(program.applied) or "no passes"
    left_out = f", {gone} block{'s' if gone > 1 else ''} left out" if gone else ""
    states = sum(row_bytes(t) for t in program.states.values() if isinstance(t, KV))
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
            'font-family="sans-serif" font-size="12">',
            f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
            _text(
                20, 28, f"{program.name}: {len(program.layers)} layers{left_out}, quality {program.quality}", size=17, bold=True
            ),
            _text(20, 48, f"{passes}; {states:.0f} bytes of cache per token", colour="#666"),
        ]
    )


def _legend(colours: dict[str, str]) -> str:
    parts = []
    for i, (template, colour) in enumerate(colours.items()):
        x = 20 + 110 * i
        parts.append(f'<rect x="{x}" y="60" width="14" height="14" rx="3" fill="{colour}"/>')
        parts.append(_text(x + 20, 72, template))
    x = 20 + 110 * len(colours)
    parts.append(f'<rect x="{x}" y="60" width="14" height="14" rx="3" fill="none" stroke="#999" stroke-dasharray="3 2"/>')
    parts.append(_text(x + 20, 72, "left out"))
    return "\n".join(parts)


def _block(program: Program, block: Value, label: str, y: int, colours: dict[str, str]) -> str:
    template = block.attr("target")
    env = ", ".join(f"{k} {v}" for k, v in block.attr("env", ()))
    parts = [
        f'<line x1="{LEFT}" y1="{y}" x2="{LEFT + 30}" y2="{y}" stroke="#444"/>',
        f'<rect x="{LEFT + 30}" y="{y - 9}" width="120" height="19" rx="4" fill="{colours[template]}"/>',
        _text(LEFT + 90, y + 5, label, anchor="middle", colour="#fff"),
        _text(LEFT + 162, y + 5, env, colour="#666"),
    ]
    for i, state in enumerate(_states(block)):
        x = LEFT + 290 + STATE * i
        text = f"{state.attr('name')}: {_contents(state.type)}"
        parts.append(f'<rect x="{x}" y="{y - 9}" width="{STATE - 10}" height="19" rx="9" fill="#eef2f6" stroke="#9ab"/>')
        parts.append(_text(x + 155, y + 5, text, anchor="middle", size=11))
    return "\n".join(parts)


def _states(block: Value) -> list[Value]:
    return [a for a in block.args if a.is_state and a.op == "input"]


def _contents(type: object) -> str:
    """The shape of a state, how it is stored, and its bytes."""
    if isinstance(type, Array):
        return f"{'×'.join(map(str, type.shape))} {type.dtype}, {nbytes(type, 1, 1)} B"
    assert isinstance(type, KV)
    segments = " + ".join(f"{_encodings(s)} {s.slots.__class__.__name__}" for s in type.segments)
    return f"{type.heads}×{type.dim}, {segments}, {row_bytes(type):.0f} B/token"


def _encodings(segment: Segment) -> str:
    """``f32``, or ``int4/int8`` where keys and values differ."""
    names = [e.dtype if isinstance(e, Float) else f"int{e.bits}" for e in (segment.k, segment.v)]
    return "/".join(dict.fromkeys(names))


def _ghost(y: int, label: str) -> str:
    return "\n".join(
        [
            f'<rect x="{LEFT + 30}" y="{y - 9}" width="120" height="19" rx="4" fill="none" stroke="#999" '
            'stroke-dasharray="4 3"/>',
            _text(LEFT + 90, y + 5, label, anchor="middle", colour="#999"),
        ]
    )


def _text(
    x: float, y: float, text: str, *, anchor: str = "start", size: int = 12, colour: str = "#222", bold: bool = False
) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="{size}" fill="{colour}"{weight}>{escape(text)}</text>'
