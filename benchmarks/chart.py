"""A line chart as SVG, with a logarithmic or a linear vertical axis."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 680, 400, 70, 190, 20, 50
DASHES = ("", 'stroke-dasharray="6 3"', 'stroke-dasharray="2 3"')
COLOURS = ("#777777", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00")


def chart(across: str, up: str, lines: Mapping[str, Mapping[float, float]], linear: bool = False) -> str:
    """The lines by name, each from x to y (above 0, unless ``linear``)."""
    xs = [x for line in lines.values() for x in line]
    ys = [y if linear else math.log10(y) for line in lines.values() for y in line.values()]
    step = 10.0 ** math.floor(math.log10(max(ys) - min(ys))) / 2 if linear else 1.0
    low, high = step * math.floor(min(ys) / step), step * math.ceil(max(ys) / step)
    least, most = (min(xs), max(xs)) if linear else (0.0, max(xs))

    def place(x: float, y: float) -> tuple[float, float]:
        share = ((y if linear else math.log10(y)) - low) / max(high - low, 1e-9)
        return LEFT + (x - least) / (most - least) * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    def text(x: float, y: float, words: str, anchor: str = "middle", more: str = "") -> str:
        return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {more}>{escape(words)}</text>'

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    if linear:
        levels = [low + step * i for i in range(round((high - low) / step) + 1)]
        wide = 10.0 ** math.floor(math.log10(most - least))
        wide = wide if most - least > 4 * wide else wide / 5
        ticks = [wide * i for i in range(math.ceil(least / wide), math.floor(most / wide) + 1)]
    else:
        levels = [m * 10.0**power for power in range(round(low), round(high)) for m in (1, 2, 5)] + [10.0**high]
        ticks = [float(x) for x in sorted({round(x) for x in xs})]
    for y in levels:
        (left, height), (right, _) = place(least, y), place(most, y)
        parts.append(f'<line x1="{left:.1f}" y1="{height:.1f}" x2="{right:.1f}" y2="{height:.1f}" stroke="#dddddd"/>')
        parts.append(text(left - 6, height + 4, f"{y:.4g}", "end"))
    for x in ticks:
        parts.append(text(place(x, levels[0])[0], HEIGHT - BOTTOM + 16, f"{x:.3g}"))
    for number, (name, line) in enumerate(lines.items()):
        colour, dash = COLOURS[number % len(COLOURS)], DASHES[number // len(COLOURS) % len(DASHES)]
        points = [place(x, y) for x, y in sorted(line.items())]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2" {dash}/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points]
        at = TOP + 18 * (1 + number)
        start = WIDTH - RIGHT + 12
        stroke = f'stroke="{colour}" stroke-width="2" {dash}'
        parts.append(f'<line x1="{start}" y1="{at - 4}" x2="{start + 24}" y2="{at - 4}" {stroke}/>')
        parts.append(text(WIDTH - RIGHT + 42, at, name, "start"))
    middle = TOP + (HEIGHT - TOP - BOTTOM) / 2
    parts.append(text(LEFT + (WIDTH - LEFT - RIGHT) / 2, HEIGHT - 12, across))
    parts.append(text(16, middle, up, more=f'transform="rotate(-90 16 {middle:.0f})"'))
    return "\n".join([*parts, "</svg>", ""])
