"""The pages that are made from docstrings are those of the docstrings, and no page has a link that leads nowhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from docs.pages import pages

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted(DOCS.rglob("*.md"))


def test_pages_are_those_of_the_docstrings() -> None:
    kept = {path.name: path.read_text(encoding="utf-8") for path in (DOCS / "passes").glob("*.md")}
    assert kept == pages(), "python docs/pages.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        assert link.startswith("http") or (page.parent / link).exists(), link
