"""Every Python block of the README and the docs runs, and gives what it says."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(python|pycon)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?://|#)([^)#]+)[^)]*\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_run(page: Path, tmp_path, monkeypatch) -> None:
    """The blocks of one page share their names, as a reader would type them one after another."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": page.stem}
    for kind, block in BLOCK.findall(page.read_text()):
        if kind == "python":
            exec(compile(block, page.name, "exec"), names)
        else:
            examples = doctest.DocTestParser().get_doctest(block, names, page.name, page.name, 0)
            runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
            assert runner.run(examples, clear_globs=False).failed == 0
            names = examples.globs


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_lead_somewhere(page: Path) -> None:
    assert [to for to in LINK.findall(page.read_text()) if not (page.parent / to).exists()] == []


def test_the_table_of_least_units_is_what_the_planner_says() -> None:
    from adaptive.calibration import minimum_units

    page = (ROOT / "docs" / "guarantees.md").read_text()
    rows = re.findall(r"^\| (0\.\d+) \| (\d+) \| (\d+) \| (\d+) \|$", page, re.MULTILINE)
    assert len(rows) == 5
    for risk, *counts in rows:
        for delta, n in zip((0.1, 0.05, 0.01), counts, strict=True):
            assert minimum_units(float(risk), delta, loss_type="binary") == int(n)
            assert minimum_units(float(risk), delta) == int(n)
