"""Every block of code in the README and the docs runs, and every link leads somewhere."""

from __future__ import annotations

import doctest
import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from documents import (
    NOT_CODE,
    PAGES,
    ROOT,
    RUN,
    anchors,
    blocks,
    indented,
    links,
    page_name,
    put_what_readers_bring,
)

FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
MOST_REASONS = 8


def run_commands(text: str, folder: Path) -> None:
    """Run the lines of a console block that begin with a prompt, as a shell would."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    for line in text.splitlines():
        if line.startswith("$ "):
            ran = subprocess.run(
                line.removeprefix("$ "),
                shell=True,
                cwd=folder,
                env=os.environ | {"PATH": path, "PYTHONSAFEPATH": "1"},
                capture_output=True,
                text=True,
                check=False,
            )
            assert ran.returncode == 0, f"{line}\n{ran.stdout}\n{ran.stderr}"


def run_examples(text: str, names: dict[str, object], page: str, line: int) -> dict[str, object]:
    """Run an interpreter session and compare what it prints."""
    examples = doctest.DocTestParser().get_doctest(text, names, page, page, line)
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    assert runner.run(examples, clear_globs=False).failed == 0
    return examples.globs


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_blocks_run(page: Path, tmp_path, monkeypatch) -> None:
    """The blocks of one page share their names, as a reader would type them one after another."""
    monkeypatch.chdir(tmp_path)
    if "my-model" in page.read_text():
        put_what_readers_bring(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.kind not in RUN or block.reason is not None:
            continue
        if block.kind == "python":
            padded = "\n" * block.line + block.text  # errors then name the page's own line
            exec(compile(padded, page_name(page), "exec", dont_inherit=True), names)
        elif block.kind == "pycon":
            names = run_examples(block.text, names, page.name, block.line)
        else:
            run_commands(block.text, tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_no_block_is_passed_over_in_silence(page: Path) -> None:
    """A block is run, or is no code, or says in front of it why it is not run."""
    assert indented(page) == [], "fence it, and say what it is"
    unknown = [
        f"line {block.line}: {block.kind or 'no language'}"
        for block in blocks(page)
        if block.reason is None and block.kind not in RUN | NOT_CODE
    ]
    assert unknown == []


def test_few_blocks_are_not_run() -> None:
    """Reasons are for what needs a network or a whole machine: they stay few, and are sentences."""
    reasons = [
        (page_name(page), block.line, block.reason)
        for page in PAGES
        for block in blocks(page)
        if block.reason is not None
    ]
    assert len(reasons) <= MOST_REASONS, reasons
    assert [said for said in reasons if len(str(said[2]).split()) < 4] == []


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_lead_somewhere(page: Path) -> None:
    """Files and anchors exist; addresses elsewhere are well formed (nobody is asked)."""
    broken = []
    for link in links(page):
        to = urlsplit(link)
        if to.scheme or to.netloc:
            sound = to.scheme in ("https", "mailto") and re.fullmatch(r"\S+\.\S+", link)
            broken += [] if sound else [link]
            continue
        target = page if not to.path else page.parent / unquote(to.path)
        missing = not target.exists()
        lost = bool(to.fragment) and not missing and to.fragment not in anchors(target)
        broken += [link] if missing or lost else []
    assert broken == []


def test_every_page_of_the_docs_is_in_a_table_of_contents() -> None:
    listed = {
        (page.parent / line).with_suffix(".md")
        for page in PAGES
        for block in blocks(page)
        if block.kind == "{toctree}"
        for line in block.text.splitlines()
        if line and not line.startswith(":")
    }
    pages = set((ROOT / "docs").rglob("*.md")) - {ROOT / "docs" / "index.md"}
    assert {page_name(p) for p in pages - listed} == set()


def test_the_table_of_least_units_is_what_the_planner_says() -> None:
    from adaptive.calibration import minimum_units

    page = (ROOT / "docs" / "guarantees.md").read_text()
    rows = re.findall(r"^\| (0\.\d+) \| (\d+) \| (\d+) \| (\d+) \|$", page, re.MULTILINE)
    assert len(rows) == 5
    for risk, *counts in rows:
        for delta, n in zip((0.1, 0.05, 0.01), counts, strict=True):
            assert minimum_units(float(risk), delta, loss_type="binary") == int(n)
            assert minimum_units(float(risk), delta) == int(n)
