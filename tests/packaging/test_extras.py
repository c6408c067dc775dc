"""Every optional dependency has an extra, and says so when it is missing."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from adaptive.calibration import AdaptiveError, MissingExtraError, UnsupportedError
from adaptive.calibration._extras import EXTRAS, optional

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("module", EXTRAS)
def test_the_extra_is_declared_and_brings_the_module(module: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    brought = project["optional-dependencies"][EXTRAS[module]]
    names = [re.split(r"[\[<>=;, ]", requirement)[0].replace("-", "_") for requirement in brought]
    assert module in names


def test_the_table_of_extras_is_whole() -> None:
    """Every extra for users is in the docs, beside what it brings."""
    page = (ROOT / "docs" / "ecosystem.md").read_text()
    rows = dict(re.findall(r"^\| `([\w-]+)` \| .+ \| (\w+) \|$", page, re.MULTILINE))
    assert rows == {extra: module for module, extra in EXTRAS.items()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(project["optional-dependencies"]) == set(rows) | {"test", "dev", "docs"}


@pytest.mark.parametrize("module", EXTRAS)
def test_a_missing_one_gives_the_pip_command(module: str, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, module, None)
    command = re.escape(f"pip install 'adaptive-control[{EXTRAS[module]}]'")
    with pytest.raises(MissingExtraError, match=command) as caught:
        optional(module)
    for kind in (AdaptiveError, UnsupportedError, ImportError):
        assert isinstance(caught.value, kind)


@pytest.mark.parametrize("module", EXTRAS)
def test_an_installed_one_is_imported(module: str) -> None:
    pytest.importorskip(module)
    assert optional(module).__name__ == module
