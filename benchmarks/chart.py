"""A line chart as SVG, with a logarithmic or a linear vertical axis."""

from __future__ import annotations

import io
from collections.abc import Mapping

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot  # noqa: E402
from matplotlib.ticker import FuncFormatter  # noqa: E402

MARKS = "osD^vP*X"


def chart(across: str, up: str, lines: Mapping[str, Mapping[float, float]], linear: bool = False) -> str:
    """The lines by name, each from x to y (above 0, unless ``linear``); the same bytes for the same lines."""
    with pyplot.rc_context({"svg.hashsalt": "elision", "font.size": 9, "svg.fonttype": "none"}):
        figure, axes = pyplot.subplots(figsize=(8.5, 4.6), layout="constrained")
        for number, (name, line) in enumerate(lines.items()):
            xs = sorted(line)
            style = {"color": f"C{number % 10}", "marker": MARKS[number % len(MARKS)], "linestyle": "-" if number < 10 else "--"}
            axes.plot(xs, [line[x] for x in xs], label=name, linewidth=1.5, markersize=4.5, **style)
        axes.set(xlabel=across, ylabel=up, yscale="linear" if linear else "log")
        if not linear:
            for ticks in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
                ticks(FuncFormatter(lambda y, _: f"{y:g}" if f"{y:.0e}"[0] in "125" else ""))
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        figure.legend(loc="outside right upper", frameon=False, fontsize=8)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
        pyplot.close(figure)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"
