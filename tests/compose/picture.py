"""The matrix as SVG: a square for every ordered pair, coloured by how it is known to be right or by who refuses it."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from itertools import groupby

from tests.compose.settings import SETTINGS

CELL, GAP, LEFT, TOP = 15, 7, 150, 172
#: Verdict (its first word) to colour and what the legend says.
KINDS = {
    "torch": ("#08519c", "equal to PyTorch's forward of the model that is meant"),
    "model": ("#3182bd", "equal to one pass alone on the model that the other means"),
    "tokens": ("#31a354", "the same tokens as without what drafts"),
    "orders": ("#6baed6", "equal to the interpreter in the other order"),
    "native": ("#9ecae1", "equal to the interpreter; there is one order"),
    "order": ("#c6dbef", "equal to the interpreter; the order matters"),
    "rule": ("#fd8d3c", "refused by a rule of legality"),
    "says": ("#e0e0e0", "refused by one of the passes"),
}
#: Of the rules that refuse, what stands in their squares.
LETTERS = {"retract": "R", "validity": "V", "axis": "A", "address": "D", "encoding": "E", "demand": "M", "rotation": "O"}


def picture(cells: Mapping[tuple[str, ...], str], title: str) -> str:
    """``cells``: the verdicts of pairs of labels (`matrix`)."""
    at = _places()
    size = max(at.values()) + CELL
    width, height = LEFT + size + 20, TOP + size + 30 + 20 * (len(KINDS) // 2 + 1)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        _text(12, 22, f"{title}: the pass of the row, then the pass of the column", "start", 'font-size="15"'),
        _text(12, 40, "the diagonal: given twice; tome, evit and zero-tprune are for encoders", "start", 'fill="#666666"'),
    ]
    for label, place in at.items():
        middle = place + CELL / 2 + 4
        parts.append(_text(LEFT - 6, TOP + middle, label, "end"))
        x = LEFT + middle
        parts.append(_text(x, TOP - 6, label, "start", f'transform="rotate(-60 {x:.1f} {TOP - 6})"'))
    for first, down in at.items():
        for second, across in at.items():
            verdict = cells[first, second]
            kind, _, by = verdict.partition(" ")
            x, y = LEFT + across, TOP + down
            said = f"{first}, {second}: {verdict}"
            square = f'x="{x}" y="{y}" width="{CELL - 1}" height="{CELL - 1}" fill="{KINDS[kind][0]}"'
            parts.append(f"<rect {square}><title>{escape(said)}</title></rect>")
            if kind == "rule":
                parts.append(_text(x + CELL / 2 - 0.5, y + CELL - 4, LETTERS.get(by, "?"), "middle", 'font-size="10"'))
    rules = sorted({v.partition(" ")[2] for v in cells.values() if v.startswith("rule ")})
    for number, (kind, (colour, words)) in enumerate(KINDS.items()):
        x, y = 12 + number % 2 * 430, TOP + size + 28 + number // 2 * 20
        more = f": {', '.join(f'{LETTERS[r]} {r}' for r in rules)}" if kind == "rule" else ""
        parts.append(f'<rect x="{x}" y="{y - 11}" width="14" height="14" fill="{colour}"/>')
        parts.append(_text(x + 20, y, words + more, "start"))
    return "\n".join([*parts, "</svg>", ""])


def _places() -> dict[str, int]:
    """Where the labels are, families side by side."""
    found: dict[str, int] = {}
    place = 0
    for _, labels in groupby(SETTINGS, key=lambda label: SETTINGS[label].family):
        for label in labels:
            found[label] = place
            place += CELL
        place += GAP
    return found


def _text(x: float, y: float, words: str, anchor: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {more}>{escape(words)}</text>'
