"""Charts as SVG: lines, with a logarithmic or a linear vertical axis, and groups of bars."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import FuncFormatter  # noqa: E402

MARKS = "osD^vP*X"


def chart(across: str, up: str, lines: Mapping[str, Mapping[float, float]], linear: bool = False) -> str:
    """The lines by name, each from x to y (above 0, unless ``linear``); the same bytes for the same lines."""
    with drawn() as (figure, axes, out):
        for number, (name, line) in enumerate(lines.items()):
            xs = sorted(line)
            mark, dashes = MARKS[number % len(MARKS)], "-" if number < 10 else "--"
            style: dict[str, Any] = {"color": f"C{number % 10}", "marker": mark, "linestyle": dashes}
            axes.plot(xs, [line[x] for x in xs], label=name, linewidth=1.5, markersize=4.5, **style)
        axes.set(xlabel=across, ylabel=up, yscale="linear" if linear else "log")
        if not linear:
            for ticks in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
                ticks(FuncFormatter(lambda y, _: f"{y:g}" if f"{y:.0e}"[0] in "125" else ""))
        figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    return written(out)


def bars(up: str, groups: Mapping[str, Mapping[str, float]], level: float) -> str:
    """Groups of bars by name, a bar for each of the same names; a line at ``level``."""
    with drawn() as (figure, axes, out):
        names = list(next(iter(groups.values())))
        width = 0.8 / len(names)
        for number, name in enumerate(names):
            xs = [g + (number - (len(names) - 1) / 2) * width for g in range(len(groups))]
            axes.bar(xs, [group[name] for group in groups.values()], width, label=name, color=f"C{number}")
        axes.axhline(level, color="black", linewidth=0.8)
        axes.set_xticks(range(len(groups)), list(groups))
        axes.set(ylabel=up)
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return written(out)


@contextmanager
def drawn() -> Iterator[tuple[Figure, Axes, io.StringIO]]:
    """A figure, its axes, and where its SVG is when they have been drawn."""
    with pyplot.rc_context({"svg.hashsalt": "elision", "font.size": 9, "svg.fonttype": "none"}):
        figure, axes = pyplot.subplots(figsize=(8.5, 4.6), layout="constrained")
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        out = io.StringIO()
        yield figure, axes, out
        figure.savefig(out, format="svg", metadata={"Date": None})
        pyplot.close(figure)


def written(svg: io.StringIO) -> str:
    return "\n".join(line.rstrip() for line in svg.getvalue().splitlines()) + "\n"
