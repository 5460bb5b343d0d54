"""A line chart as SVG, with a logarithmic vertical axis."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 400, 70, 150, 20, 50
COLOURS = ("#777777", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00")


def chart(across: str, up: str, lines: Mapping[str, Mapping[float, float]]) -> str:
    """The lines by name, each from x to y (y above 0)."""
    xs = [x for line in lines.values() for x in line]
    ys = [math.log10(y) for line in lines.values() for y in line.values()]
    low, high, most = math.floor(min(ys)), math.ceil(max(ys)), max(xs)

    def place(x: float, y: float) -> tuple[float, float]:
        share = (math.log10(y) - low) / max(high - low, 1)
        return LEFT + x / most * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    def text(x: float, y: float, words: str, anchor: str = "middle", more: str = "") -> str:
        return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {more}>{escape(words)}</text>'

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for power in range(low, high + 1):
        for step in (1, 2, 5) if power < high else (1,):
            (x, y), (end, _) = place(0, step * 10**power), place(most, 1)
            parts.append(f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{end:.1f}" y2="{y:.1f}" stroke="#dddddd"/>')
            parts.append(text(x - 6, y + 4, f"{step * 10**power:g}", "end"))
    for tick in sorted({round(x) for x in xs}):
        x, y = place(tick, 10**low)
        parts.append(text(x, y + 16, f"{tick}"))
    for (name, line), colour in zip(lines.items(), COLOURS * len(lines), strict=False):
        points = [place(x, y) for x, y in sorted(line.items())]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points]
        at = TOP + 18 * (1 + list(lines).index(name))
        start = WIDTH - RIGHT + 12
        parts.append(f'<line x1="{start}" y1="{at - 4}" x2="{start + 24}" y2="{at - 4}" stroke="{colour}" stroke-width="2"/>')
        parts.append(text(WIDTH - RIGHT + 42, at, name, "start"))
    middle = TOP + (HEIGHT - TOP - BOTTOM) / 2
    parts.append(text(LEFT + (WIDTH - LEFT - RIGHT) / 2, HEIGHT - 12, across))
    parts.append(text(16, middle, up, more=f'transform="rotate(-90 16 {middle:.0f})"'))
    return "\n".join([*parts, "</svg>", ""])
