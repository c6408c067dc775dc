"""Patience: PABEE, LGViT, BEEM, and windows."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest

from adaptive.calibration import InvalidArgumentError, Trace
from adaptive.policies import (
    AbstractRule,
    AccumulatedConfidence,
    AllOf,
    Patience,
    Threshold,
    ValuePatience,
    Veto,
    WindowedPatience,
    exit_stages,
)


def stages(rule: AbstractRule, answers: np.ndarray, scores: np.ndarray | None = None) -> list[int]:
    """Exit of each row, given its answers [n_rows, n_exits]."""
    n, exits = answers.shape
    trace = Trace(
        scores=np.ones((n, exits)) if scores is None else scores,
        losses={"disagreement": np.zeros((n, exits), dtype=bool)},
        costs=np.arange(1.0, exits + 2),
        cost_quantity="layers",
        columns={"answers": answers},
    )
    found: list[int] = exit_stages(rule, trace).tolist()
    return found


def released_pabee(answers: list[int], patience: int) -> int:
    """PABEE's released loop: number of layers run (1-based exit layer)."""
    if patience == 0:
        return len(answers)
    counter, before = 0, None
    for layer, answer in enumerate(answers, start=1):
        counter = counter + 1 if answer == before else 0
        before = answer
        if counter == patience:
            return layer
    return len(answers)


def test_pabee_known_answer() -> None:
    """Predictions 1, 0, 0, 0, 1 with patience 2 leave at layer 4; patience 12 at the last."""
    answers = np.array([[1, 0, 0, 0]])  # the fifth layer is full computation: stage 4
    assert stages(Patience(2), answers) == [3]
    assert answers[0, 3] == 0
    assert stages(Patience(12), answers) == [4]


@pytest.mark.parametrize("patience", [1, 2, 3])
def test_pabee_is_the_released_loop(patience: int) -> None:
    answers = np.random.default_rng(0).integers(0, 2, (200, 6))
    expected = [min(released_pabee([*row, -5], patience), 7) - 1 for row in answers.tolist()]
    assert stages(Patience(patience), answers) == expected


def test_both_patience_conventions() -> None:
    """LGViT's threshold 7 means seven equal answers: PABEE's patience 6."""
    assert Patience.equal_answers(7) == Patience(6)
    answers = np.array([[3, 3, 3, 3, 3, 3, 3, 3]])
    assert stages(Patience.equal_answers(7), answers) == [6]


def test_patience_zero_is_not_full_computation() -> None:
    """PABEE special-cases 0 as "run everything"; here that has its own name."""
    with pytest.raises(InvalidArgumentError, match="inf never stops early"):
        Patience(0)
    assert stages(Patience(math.inf), np.zeros((1, 5), dtype=int)) == [5]


def test_regression() -> None:
    values = np.array([[1.0, 0.5, 0.45, 0.48, 0.9]])
    answers = np.zeros((1, 5), dtype=int)
    assert stages(ValuePatience(tolerance=0.1, patience=2), answers, values) == [3]
    assert stages(ValuePatience(tolerance=0.01, patience=1), answers, values) == [5]


def test_window() -> None:
    answers = np.array([[1, 2, 1, 3, 1, 1]])
    assert stages(WindowedPatience(window=4, agreeing=2), answers) == [4]
    assert stages(WindowedPatience(window=2, agreeing=2), answers) == [6]
    assert stages(WindowedPatience(window=4, agreeing=3), answers) == [6]
    assert stages(WindowedPatience(window=5, agreeing=3), answers) == [5]


def test_a_full_window_is_patience() -> None:
    answers = np.random.default_rng(1).integers(0, 2, (300, 7))
    for patience in (1, 2, 3):
        window = WindowedPatience(window=patience, agreeing=patience)
        assert stages(window, answers) == stages(Patience(patience), answers)


def test_accumulated_confidence() -> None:
    answers = np.array([[1, 1, 2, 2, 2]])
    scores = np.array([[0.6, 0.3, 0.5, 0.4, 0.3]])
    weights = (1.0,) * 5
    assert stages(AccumulatedConfidence(weights, 1.0), answers, scores) == [4]
    assert stages(AccumulatedConfidence(weights, 0.9), answers, scores) == [1]
    assert stages(AccumulatedConfidence((1.0, 1.0, 2.0, 1.0, 1.0), 1.0), answers, scores) == [2]
    answers = np.random.default_rng(1).integers(0, 2, (300, 5))
    plain = stages(AccumulatedConfidence(weights, 3.0), answers)
    assert plain == stages(Patience(2), answers)


def test_patient_and_confident() -> None:
    """LGViT: confident in two consecutive agreeing exits."""
    rule = AllOf((Threshold(0.5), Patience(1)))
    answers = np.array([[1, 1, 2, 2]])
    assert stages(rule, answers, np.array([[0.9, 0.4, 0.9, 0.6]])) == [3]


def test_equal_answers_and_no_hesitation() -> None:
    """Dynasor's server helper returns true at its end whether or not the answers agree."""

    def released(answers: list[int]) -> bool:
        for before, after in pairwise(answers):
            if before != after:
                break
        return True

    rule = Veto((Patience(2), Threshold(0.5)))  # the score is high where the text hesitates
    answers = np.array([[1, 1, 1], [1, 2, 1], [1, 1, 1]])
    hesitation = np.array([[0.1, 0.1, 0.1], [0.1, 0.1, 0.1], [0.1, 0.1, 0.9]])
    assert stages(rule, answers, hesitation) == [2, 3, 3]
    assert all(released(row) for row in answers.tolist())


def test_tokens_do_not_lend_each_other_patience() -> None:
    trace = Trace(
        scores=np.ones((3, 2)),
        losses={"disagreement": np.zeros((3, 2), dtype=bool)},
        costs=[1.0, 2.0, 3.0],
        cost_quantity="layers",
        lengths=[3],
        columns={"answers": np.array([[1, 1], [1, 2], [2, 2]])},
    )
    assert exit_stages(Patience(1), trace).tolist() == [1, 2, 1]


def test_pabee_theorem() -> None:
    """Binary, 12 classifiers, errors .2 and at the last .15: patience 3 errs .028, 6 errs .093."""
    rng = np.random.default_rng(0)
    n, layers, final = 200_000, 11, 0.15
    wrong = rng.uniform(size=(n, layers)) < 0.2
    last = rng.uniform(size=n) < final
    for patience, expected in ((3, 0.028), (6, 0.093)):
        where = np.array(stages(Patience(patience), wrong.astype(int)))
        chosen = np.concatenate([wrong, last[:, None]], axis=1)[np.arange(n), where]
        assert chosen.mean() == pytest.approx(expected, abs=0.003)
        assert chosen.mean() < final


def test_a_trace_without_answers_is_refused() -> None:
    trace = Trace(
        scores=np.ones((1, 1)),
        losses={"disagreement": [[0]]},
        costs=[1.0, 2.0],
        cost_quantity="layers",
    )
    with pytest.raises(InvalidArgumentError, match="no `answers` column"):
        exit_stages(Patience(1), trace)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ValuePatience(tolerance=0.0), "tolerance"),
        (lambda: WindowedPatience(window=0), "window"),
        (lambda: AccumulatedConfidence(()), "weights"),
        (lambda: AccumulatedConfidence((1.0,), math.nan), "threshold"),
    ],
)
def test_wrong_arguments_are_named(build, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"`{message}`"):
        build()
