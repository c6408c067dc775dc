"""CALM: decaying thresholds over three scores, and its two sequence-level losses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from adaptive.calibration import InvalidArgumentError
from adaptive.policies._base import AbstractScore
from adaptive.policies._policy import Policy
from adaptive.policies._schedules import Decay, ScheduledThreshold

Text = Sequence[Hashable]


def calm_policy(
    score: AbstractScore, *, stages: tuple[int, ...], length: int, tau: float = 4.0
) -> Policy:
    """Return CALM as published: skipped layers get projected keys, thresholds decay with position.

    Parameters
    ----------
    score : AbstractScore
        One of CALM's three: :class:`Margin`, :class:`Saturation` or a :class:`LinearGate`.
    stages : tuple of int
        Exits at which it asks.
    length : int
        Largest number of generated tokens.
    tau : float
        Temperature of the decay.

    Returns
    -------
    Policy
        At threshold infinity, uncertified, in mode "propagate". Its sequence losses are
        :func:`textual_consistency` and :func:`risk_consistency`, taken between runs that really
        were generated: early tokens change all later inputs.
    """
    rule = ScheduledThreshold(Decay(tau=tau, length=length))
    return Policy(score=score, rule=rule, stages=stages, mode="propagate")


def textual_consistency(
    early: Sequence[Text],
    full: Sequence[Text],
    *,
    distance: Callable[[Text, Text], float],
) -> NDArray[np.float64]:
    """Distance of every early-exit text from the full model's: a loss in [0, 1] per unit.

    Parameters
    ----------
    early, full : sequence of token sequences [n_units]
        Generated with and without early exits.
    distance : callable
        :func:`rouge_l_distance`, :func:`token_f1_distance` or your own, in [0, 1].

    Returns
    -------
    ndarray of float64 [n_units]

    Raises
    ------
    InvalidArgumentError
        If there are not equally many texts.

    References
    ----------
    .. [1] Schuster et al., "Confident Adaptive Language Modeling", NeurIPS 2022.
    """
    if len(early) != len(full):
        raise InvalidArgumentError("early", f"{len(early)} texts", f"{len(full)}, as `full`")
    pairs = zip(early, full, strict=True)
    return np.array([distance(one, other) for one, other in pairs], dtype=np.float64)


def risk_consistency(early: ArrayLike, full: ArrayLike) -> NDArray[np.float64]:
    """How much worse the early run did: ``max(0, early - full)``, a loss per unit.

    From the same source as :func:`textual_consistency`.

    Parameters
    ----------
    early, full : array_like [n_units]
        Risk of each unit's text against a reference, on one scale.

    Returns
    -------
    ndarray of float64 [n_units]
    """
    found: NDArray[np.float64] = np.maximum(
        0.0, np.asarray(early, dtype=np.float64) - np.asarray(full, dtype=np.float64)
    )
    return found


def rouge_l_distance(first: Text, second: Text) -> float:
    """One minus ROUGE-L: the F1 of the longest common subsequence; two empty texts are equal.

    Examples
    --------
    >>> round(rouge_l_distance("the cat sat".split(), "the dog sat".split()), 4)
    0.3333
    """
    return 1.0 - _f1(_common_subsequence(first, second), len(first), len(second))


def token_f1_distance(first: Text, second: Text) -> float:
    """One minus the F1 of the shared tokens, order ignored; two empty texts are equal.

    Examples
    --------
    >>> token_f1_distance("a b".split(), "b a".split())
    0.0
    """
    shared = sum((Counter(first) & Counter(second)).values())
    return 1.0 - _f1(shared, len(first), len(second))


def _f1(shared: int, first: int, second: int) -> float:
    return 1.0 if first + second == 0 else 2.0 * shared / (first + second)


def _common_subsequence(first: Text, second: Text) -> int:
    """Length of the longest common subsequence, one row of its table at a time."""
    codes: dict[Hashable, int] = {}
    numbered = [[codes.setdefault(item, len(codes)) for item in text] for text in (first, second)]
    target = np.asarray(numbered[1], dtype=np.int64)
    row = np.zeros(target.size + 1, dtype=np.int64)
    for code in numbered[0]:
        taken = np.where(target == code, row[:-1] + 1, 0)
        row[1:] = np.maximum.accumulate(np.maximum(taken, row[1:]))
    return int(row[-1])
