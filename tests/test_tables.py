"""The tables of published methods and of the comparison lead to what they name."""

from __future__ import annotations

import importlib
import re

import pytest
from documents import ROOT

import adaptive.calibration
import adaptive.policies

METHODS = ROOT / "docs" / "methods.md"
COMPARISON = ROOT / "docs" / "comparison.md"
LINK = re.compile(r"^\[[^\]]+\]\(((?:\.\./tests/|#|[\w/-]+\.md)\S*)\)$")
ROW = re.compile(r"^\| (.+?) \| (.+?) \| `([\w.]+)` \| \[(test_\w+)\]\((\S+?)\) \| (.*?) ?\|$")
#: Cited for their arithmetic, not for a method of stopping or of guaranteeing.
NO_METHOD = {"keyed_noise", "log_betainc"}


def rows() -> list[tuple[str, ...]]:
    lines = METHODS.read_text().splitlines()
    body = [line for line in lines if line.startswith("| ") and not line.startswith("| published")]
    matches = [(line, ROW.match(line)) for line in body]
    assert [line for line, match in matches if match is None] == []
    return [match.groups() for _, match in matches if match]


@pytest.mark.parametrize("row", rows(), ids=lambda row: f"{row[2]}-{row[3]}")
def test_each_row_names_an_object_and_a_test(row: tuple[str, ...]) -> None:
    method, source, name, test, path, _ = row
    assert method
    assert source
    module, _, attribute = name.rpartition(".")
    assert getattr(importlib.import_module(module), attribute) is not None
    text = (METHODS.parent / path).read_text()
    assert re.search(rf"^def {test}\(", text, re.MULTILINE), f"no {test} in {path}"


@pytest.mark.parametrize("floor", [adaptive.policies, adaptive.calibration])
def test_whatever_cites_a_source_is_in_the_table(floor) -> None:
    citing = {
        name for name in floor.__all__ if "References\n" in (getattr(floor, name).__doc__ or "")
    }
    listed = {row[2].rpartition(".")[2] for row in rows()}
    assert sorted(citing - listed - NO_METHOD) == []


def comparison_rows() -> list[list[str]]:
    lines = COMPARISON.read_text().splitlines()
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines if line[:1] == "|"]
    return [row for row in cells if row[0] and set(row[0]) != {"-"}]


def test_the_comparison_has_its_peers() -> None:
    text = COMPARISON.read_text()
    peers = "MAPIE TorchCP RC-EENN LayerSkip EE-LLM FREE CALM river ewstools".split()
    assert [peer for peer in peers if peer not in text] == []
    assert text.count("| | adaptive |") == 2


@pytest.mark.parametrize("row", comparison_rows(), ids=lambda row: row[0])
def test_each_of_our_entries_leads_to_a_test_or_a_page(row: list[str]) -> None:
    """That the file and the anchor exist is checked for all links of all pages."""
    assert LINK.match(row[1]), row[1]
    assert all(row), "an empty entry says nothing"
