"""The API reference has every public name once, and every name on it has a docstring."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections import Counter
from pathlib import Path

import pytest

import adaptive

PAGES = Path(__file__).parents[1] / "docs" / "api"
MODULE = re.compile(r"^\.\. (currentmodule|automodule):: (\S+)$")
MEMBERS = re.compile(r"^ +:members:(.*)$")
NAME = re.compile(r"^\.\. (?:autofunction|autoclass|autoexception|autodata|py:data):: (\w+)$")


def public_modules() -> list[str]:
    """Every module of the package whose name has no underscore."""
    # in a clone the root's path has the clone's own folder too, where the package lies again
    found = pkgutil.walk_packages(adaptive.__path__[:1], "adaptive.", onerror=lambda _: None)
    names = ["adaptive", *(info.name for info in found), "adaptive.calibration"]
    spaces = (adaptive.calibration, adaptive.policies)
    for space in spaces:
        names.append(space.__name__)
        names += [i.name for i in pkgutil.walk_packages(space.__path__, f"{space.__name__}.")]
    return sorted({name for name in names if "._" not in name})


def public_names() -> list[tuple[str, str]]:
    """(Module that documents it, name): what the root hands on belongs to its own floor."""
    pairs = set()
    for module in public_modules():
        for name in importlib.import_module(module).__all__:
            home = adaptive._HOMES.get(name, module) if module == "adaptive" else module
            pairs.add(("adaptive" if "._" in home else home, name))
    handed_on = {("adaptive", name) for name in (*adaptive._FLOORS, "__version__")}
    return sorted(pairs - handed_on)


def members_of(module: str) -> list[str]:
    """Names that an automodule renders: Sphinx finds no docstring beside imported data."""
    space = importlib.import_module(module)
    return [
        name
        for name in space.__all__
        if inspect.isroutine(v := getattr(space, name)) or inspect.isclass(v)
    ]


def documented() -> Counter[tuple[str, str]]:
    """(Module, name) of every directive on the pages; an automodule stands for its names."""
    found: Counter[tuple[str, str]] = Counter()
    for page in PAGES.glob("*.md"):
        module, whole = "", False
        for line in page.read_text().splitlines():
            if match := MODULE.match(line):
                module = match[2]
                whole = match[1] == "automodule"
            elif whole and (match := MEMBERS.match(line)):
                listed = match[1].replace(",", " ").split()
                found.update((module, name) for name in listed or members_of(module))
                whole = False
            elif match := NAME.match(line):
                found[module, match[1]] += 1
    return +found


def test_the_reference_has_every_public_name_once() -> None:
    on_pages = documented()
    assert sorted(set(public_names()) - set(on_pages)) == [], "missing: add to docs/api/*.md"
    assert sorted(set(on_pages) - set(public_names())) == [], "on the page, but not public"
    assert [pair for pair, count in on_pages.items() if count > 1] == []


@pytest.mark.parametrize("module", public_modules())
def test_every_public_callable_has_a_docstring_of_its_own(module: str) -> None:
    space = importlib.import_module(module)
    values = {name: getattr(space, name) for name in space.__all__}
    named = {
        name: value
        for name, value in values.items()
        if inspect.isroutine(value) or inspect.isclass(value)
    }
    bare = [name for name, value in named.items() if not (value.__doc__ or "").strip()]
    generated = [
        name for name, value in named.items() if (value.__doc__ or "").startswith(f"{name}(")
    ]
    assert bare + generated == []
