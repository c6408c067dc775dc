"""Fingerprints of functions and estimators: the same for the same, another for another."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

from adaptive._code_fingerprint import code_fingerprint, estimator_fingerprint
from adaptive.calibration import UnsupportedError


def made(**names: Any) -> Callable[..., Any]:
    """Compile a function whose module has these names."""
    source = names.pop("source", "def stages(x, scale=2.0):\n    yield weight * x * scale\n")
    space = dict(names)
    exec(compile(source, "somewhere.py", "exec"), space)
    return space["stages"]


def closed(value: Any) -> Callable[[Any], Any]:
    def stages(x: Any) -> Any:
        yield value

    return stages


class Staged:
    """A callable object with a weight."""

    def __init__(self, weight: Any) -> None:
        self.weight = weight

    def __call__(self, x: Any) -> Any:
        yield x * self.weight

    def stages(self, x: Any) -> Any:
        yield x + self.weight


def linear(seed: int) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(2, 2)


def fitted(seed: int) -> LogisticRegression:
    rng = np.random.default_rng(seed)
    return LogisticRegression().fit(rng.normal(size=(20, 2)), np.arange(20) % 2)


#: name: (function, the same made again, another)
CASES: dict[str, tuple[Any, Any, Any]] = {
    "a number it reads": (made(weight=1.0), made(weight=1.0), made(weight=1.5)),
    "an array it reads": (
        made(weight=np.ones(3)),
        made(weight=np.ones(3)),
        made(weight=np.array([1.0, 1.0, 2.0])),
    ),
    "a tensor in its closure": (
        closed(torch.ones(2)),
        closed(torch.ones(2)),
        closed(torch.zeros(2)),
    ),
    "weights of a module": (closed(linear(0)), closed(linear(0)), closed(linear(1))),
    "a fitted estimator": (closed(fitted(0)), closed(fitted(0)), closed(fitted(1))),
    "a list of arrays": (
        closed([np.ones(2), np.zeros(2)]),
        closed([np.ones(2), np.zeros(2)]),
        closed([np.zeros(2), np.ones(2)]),
    ),
    "its code": (
        made(weight=1.0),
        made(weight=1.0),
        made(weight=1.0, source="def stages(x, scale=2.0):\n    yield weight + x * scale\n"),
    ),
    "its defaults": (
        made(weight=1.0),
        made(weight=1.0),
        made(weight=1.0, source="def stages(x, scale=3.0):\n    yield weight * x * scale\n"),
    ),
    "an object's attribute": (Staged(1.0), Staged(1.0), Staged(2.0)),
    "a method's object": (Staged(1.0).stages, Staged(1.0).stages, Staged(2.0).stages),
    "arguments bound beforehand": (
        functools.partial(closed, 1),
        functools.partial(closed, 1),
        functools.partial(closed, 2),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_a_function_refers_to_is_part_of_it(name: str) -> None:
    function, again, other = CASES[name]
    assert code_fingerprint(function) == code_fingerprint(again)
    assert code_fingerprint(function) != code_fingerprint(other)


def test_where_the_code_stands_does_not_matter() -> None:
    plain = "def stages(x, scale=2.0):\n    yield weight * x * scale\n"
    moved = "# a comment\n\n\n" + plain
    one, other = made(weight=1.0, source=plain), made(weight=1.0, source=moved)
    assert code_fingerprint(one) == code_fingerprint(other)


def test_weights_that_change_in_place_are_noticed() -> None:
    module = linear(0)
    function = closed(module)
    before = code_fingerprint(function)
    with torch.no_grad():
        module.weight[0, 0] += 1e-3
    assert code_fingerprint(function) != before


def test_an_estimator_that_is_fitted_again_is_noticed() -> None:
    estimator = fitted(0)
    before = estimator_fingerprint(estimator)
    assert estimator_fingerprint(estimator) == before
    rng = np.random.default_rng(1)
    estimator.fit(rng.normal(size=(20, 2)), np.arange(20) % 2)
    assert estimator_fingerprint(estimator) != before


@pytest.mark.slow
def test_other_processes_find_the_same(tmp_path: Path) -> None:
    """Sets of constants come in an order that differs from process to process."""
    (tmp_path / "mine.py").write_text(
        "from adaptive._code_fingerprint import code_fingerprint\n"
        "def stages(x):\n"
        "    return x in {'cat', 'dog', 'cow', 'hen', 'owl'}\n"
        "print(code_fingerprint(stages))\n"
    )
    found = {
        subprocess.run(
            [sys.executable, "-P", str(tmp_path / "mine.py")],
            env={"PYTHONHASHSEED": seed, "PATH": ""},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1


def test_an_estimator_that_cannot_be_told_from_others_is_refused() -> None:
    class Local:
        """Has no name in a module, so it cannot be pickled."""

        def predict_proba(self, rows: Any) -> Any: ...

    with pytest.raises(UnsupportedError, match=r"type Local cannot be pickled.*pass a function"):
        estimator_fingerprint(Local())
