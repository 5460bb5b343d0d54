"""What the matrix of `matrix` says, as it is kept: `python tests/compose/kept.py` finds it anew (half an hour of one core) and
writes elision/passes/COMPOSITION.md, the same as JSON, which the tests compare with what the compiler does, and a picture."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "raise"), str(ROOT / "tests" / "ir")]

from tests.compose import matrix  # noqa: E402
from tests.compose.matrix import SUBJECTS, Labels, canonical, texts  # noqa: E402
from tests.compose.picture import picture  # noqa: E402
from tests.compose.settings import SETTINGS  # noqa: E402

KEPT = ROOT / "elision" / "passes" / "composition.json"
PAGE = ROOT / "elision" / "passes" / "COMPOSITION.md"
PICTURE = ROOT / "docs" / "composition.svg"
AGAIN = "python tests/compose/kept.py"
#: By model the verdicts of lists of one or two labels.
Table = dict[str, dict[Labels, str]]

KINDS = {
    "torch": "the logits of PyTorch's own forward of the model that the passes mean: fewer layers, stored weights",
    "model": "the logits of one pass alone, by the interpreter, on the model that the other means",
    "tokens": "natively the greedy tokens of the list without what drafts, drafts taken in every round",
    "orders": "natively the logits of the interpreter with the passes given in the other order",
    "native": "natively the logits of the interpreter; the compiler has one order for the two",
    "order": "natively the logits of the interpreter; given the other way round it is refused, or means something else",
}


def lists() -> list[Labels]:
    return [(a,) for a in SETTINGS] + [(a, b) for a in SETTINGS for b in SETTINGS]


def read() -> Table:
    """The table that is kept: for each model and first label the second labels by verdict ("" for none)."""
    found: Table = {}
    for name, rows in json.loads(KEPT.read_text(encoding="utf-8")).items():
        found[name] = {}
        for first, verdicts in rows.items():
            for verdict, seconds in verdicts.items():
                found[name] |= {(first, second) if second else (first,): verdict for second in seconds}
    return found


def write(table: Table, reasons: Mapping[str, Mapping[str, Labels]]) -> None:
    models: list[str] = []
    for name, cells in table.items():
        rows: list[str] = []
        for first in SETTINGS:
            verdicts: dict[str, list[str]] = {}
            for labels in [(first,), *((first, second) for second in SETTINGS)]:
                verdicts.setdefault(cells[labels], []).append(labels[1] if labels[1:] else "")
            rows.append(f"  {json.dumps(first)}: {json.dumps(verdicts)}")
        models.append(f" {json.dumps(name)}: {{\n" + ",\n".join(rows) + "\n }")
    KEPT.write_text("{\n" + ",\n".join(models) + "\n}\n", encoding="utf-8")
    PICTURE.write_text(picture(table["decoder"], "A decoder"), encoding="utf-8")
    PAGE.write_text(page(table, reasons), encoding="utf-8")


def page(table: Table, reasons: Mapping[str, Mapping[str, Labels]]) -> str:
    lines = [
        "# What composes with what",
        "",
        f"Every ordered pair of passes, compiled and run on two tiny models: `{AGAIN}`. A pair is refused, by a rule of legality",
        "or by one of the passes, or it computes what it should. `composition.json` has every cell; tests compare all of it.",
        "",
        "![the matrix](../../docs/composition.svg)",
        "",
        "| verdict | decoder | encoder | |",
        "| --- | --- | --- | --- |",
    ]
    counts = {name: Counter(_kind(v) for labels, v in cells.items() if labels[1:]) for name, cells in table.items()}
    for kind, means in [*KINDS.items(), ("rule", "refused by a rule of legality"), ("says", "refused by one of the passes")]:
        lines.append(f"| *{kind}* | {counts['decoder'][kind]} | {counts['encoder'][kind]} | {means} |")
    lines += [
        f"| all | {sum(counts['decoder'].values())} | {sum(counts['encoder'].values())} | |",
        "",
        "What each oracle is and what is checked besides (caches filled with a number before the run, an effect of every pass",
        "that is not exact, quality) is said in `tests/compose/matrix.py`; the settings are in `tests/compose/settings.py`.",
        "",
        "## Who refuses what, and why",
        "",
        "On the decoder, of passes that are legal alone there: one message of each kind.",
        "",
        "| by | message | for example |",
        "| --- | --- | --- |",
    ]
    for by, messages in sorted(reasons.items()):
        for said, labels in messages.items():
            lines.append(f"| {by} | {_cell(said)} | `{' '.join(texts(labels))}` |")
    return "\n".join([*lines, ""])


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _kind(verdict: str) -> str:
    return verdict.partition(" ")[0]


def why(cells: Mapping[Labels, str]) -> dict[str, dict[str, Labels]]:
    """By who refuses on the decoder the messages, one for each that is not refused alone, each with the first list."""
    found: dict[str, dict[str, Labels]] = {}
    for labels, verdict in cells.items():
        alone = any(_refused(cells[(label,)]) for label in labels if labels[1:])
        if _refused(verdict) and not alone and (refused := matrix.refused("decoder", canonical(labels))):
            seen = found.setdefault(verdict, {})
            if not any(_words(refused.said) == _words(said) for said in seen):
                seen[refused.said] = labels
    return found


def _refused(verdict: str) -> bool:
    return _kind(verdict) in ("rule", "says")


def _words(said: str) -> str:
    return " ".join(word for word in said.split() if word.isalpha())


def main() -> None:
    from rich.progress import track

    table: Table = {}
    for name in SUBJECTS:
        table[name] = {labels: matrix.verdict(name, labels) for labels in track(lists(), name)}
    write(table, why(table["decoder"]))
    print(PAGE)


if __name__ == "__main__":
    main()
