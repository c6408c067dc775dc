"""Losses between texts against brute force, and how losses are read off runs."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive import InvalidArgumentError
from adaptive._losses import edit_loss, rouge_l_loss, token_f1_loss, unit_loss
from adaptive._run import Run

texts = st.lists(st.integers(0, 4), max_size=7).map(tuple)
ALL = {"rouge_l": rouge_l_loss, "token_f1": token_f1_loss, "edit": edit_loss}


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Longest common subsequence by looking at all of them."""
    for size in range(min(len(a), len(b)), 0, -1):
        if set(itertools.combinations(a, size)) & set(itertools.combinations(b, size)):
            return size
    return 0


@functools.cache
def _distance(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Levenshtein distance by its recursion."""
    if not a or not b:
        return len(a) + len(b)
    same = _distance(a[1:], b[1:]) + (a[0] != b[0])
    return min(same, _distance(a[1:], b) + 1, _distance(a, b[1:]) + 1)


def _f(common: int, a: Sequence[int], b: Sequence[int]) -> float:
    """F-measure from precision and recall."""
    if not common:
        return 0.0
    precision, recall = common / len(a), common / len(b)
    return 2 * precision * recall / (precision + recall)


@given(texts, texts)
def test_rouge_l_is_brute_force(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    expected = 0.0 if a == b else 1.0 - _f(_common(a, b), a, b)
    assert rouge_l_loss(a, b) == pytest.approx(expected)


@given(texts, texts)
def test_token_f1_is_brute_force(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    rest, common = list(b), 0
    for token in a:
        if token in rest:
            rest.remove(token)
            common += 1
    expected = 0.0 if a == b else 1.0 - _f(common, a, b)
    assert token_f1_loss(a, b) == pytest.approx(expected)


@given(texts, texts)
def test_edit_is_brute_force(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    assert edit_loss(a, b) == pytest.approx(_distance(a, b) / max(1, len(a), len(b)))


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=50)
@given(texts, texts)
def test_losses_are_symmetric_and_bounded(
    name: str, a: tuple[int, ...], b: tuple[int, ...]
) -> None:
    loss = ALL[name]
    assert 0.0 <= loss(a, b) <= 1.0
    assert loss(a, b) == pytest.approx(loss(b, a))
    assert loss(a, a) == 0.0
    if not set(a) & set(b) and a != b:
        assert loss(a, b) == 1.0


@given(texts, texts)
def test_order_costs(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    """A bag of tokens forgives what a sequence does not."""
    assert token_f1_loss(a, b) <= rouge_l_loss(a, b) + 1e-12


@pytest.mark.parametrize("name", ALL)
def test_empty_texts(name: str) -> None:
    assert ALL[name]((), ()) == 0.0
    assert ALL[name]((), (1,)) == ALL[name]((1,), ()) == 1.0


# -- runs -----------------------------------------------------------------------------------------


def _runs() -> list[Run]:
    agreement = ([1, 1, 1, 1], [1, 0, 1, 0], [1])
    return [
        Run(
            tuple(range(len(a))),
            np.zeros(len(a), dtype=np.int64),
            np.array(a, dtype=np.int8),
            np.zeros(len(a), dtype=np.float32),
        )
        for a in agreement
    ]


def test_token_losses_are_shares_of_a_run() -> None:
    found = unit_loss("disagreement", bound=None)
    assert not found.binary
    assert found.of(_runs(), None, (None,) * 3).tolist() == [0.0, 0.5, 0.0]
    assert [run.disagreement for run in _runs()] == [0.0, 0.5, 0.0]


def test_departure_is_binary() -> None:
    found = unit_loss("departure", bound=None)
    assert found.binary
    assert found.of(_runs(), None, (None,) * 3).tolist() == [0.0, 1.0, 0.0]


def test_named_losses_compare_texts() -> None:
    full = [(0, 1, 2, 3), (0, 1, 9, 3), (4,)]
    found = unit_loss("edit", bound=None)
    assert found.of(_runs(), full, (None,) * 3).tolist() == [0.0, 0.25, 1.0]
    assert not found.binary
    assert "edit" in found.name


def test_callables_see_early_full_and_reference() -> None:
    seen: list[Any] = []

    def gain(early: Any, full: Any, reference: Any) -> float:
        seen.append((early, full, reference))
        return -0.5

    found = unit_loss(gain, bound=2)
    assert found.bound == 2.0
    assert found.name == "gain loss"
    values = found.of(_runs(), [(7,)] * 3, [(1,), None, (2,)])
    assert values.tolist() == [-0.5] * 3
    assert seen[0] == ((0, 1, 2, 3), (7,), (1,))
    assert seen[1][2] is None


@pytest.mark.parametrize("loss", ["rouge", "", 3, None])
def test_unknown_losses_are_named(loss: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="`loss` must be one of disagreement, departure"):
        unit_loss(loss, bound=None)


def test_a_callable_needs_its_bound() -> None:
    with pytest.raises(InvalidArgumentError, match="`bound` must be the largest value"):
        unit_loss(rouge_l_loss, bound=None)
