"""Threshold from a mixture of two Beta laws, of scores that agree and scores that do not: FREE."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from adaptive.calibration import (
    BetaMixtureModel,
    InvalidArgumentError,
    InvalidTypeError,
    Trace,
    beta_from_moments,
    fit_beta_mixture,
    fit_labelled_mixture,
    maximise_beta_mixture,
)
from adaptive.policies._base import AbstractRule, Features, State
from adaptive.policies._labels import exit_losses
from adaptive.policies._statistic import knob_path

#: Mixing weights, alpha and beta of the two components, by increasing mean.
Shapes = tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True)
class BetaMixtureThreshold(AbstractRule):
    """Stop above the smallest score from which P(agrees | score) stays at or above a target.

    Every exit has a mixture of two Beta laws, one of tokens that agree with the full model and
    one of those that do not. The knob is the target posterior: one value means the same at every
    exit, whatever the scale of its scores. Equality with the threshold goes on, as in FREE.

    Parameters
    ----------
    mixtures : tuple of shapes
        One per exit: ``(weights, alpha, beta)``.
    target : float
        Posterior, in (0, 1) (FREE uses 0.4); ``inf`` never stops early.
    weighted : bool
        Use the mixing weights, that is the prior of agreeing. FREE leaves them out.

    Notes
    -----
    Differs from the released code on purpose: the posterior uses the prior weights, the threshold
    is a root and not one of ten grid points, and it is the point *above which* the posterior
    holds, which a count of passing grid points is only where the posterior is monotone. The rule
    promises nothing by itself; calibration certifies a member of the family.

    References
    ----------
    .. [1] Bae et al., "Fast and robust early-exiting framework for autoregressive language models
       with synchronized parallel decoding", EMNLP 2023.

    Examples
    --------
    >>> rule = BetaMixtureThreshold((((0.5, 0.5), (2.0, 8.0), (3.0, 2.0)),), target=0.4)
    >>> round(rule.thresholds()[0], 4)
    0.5961
    """

    per_exit: ClassVar[tuple[str, ...]] = ("mixtures",)

    mixtures: tuple[Shapes, ...]
    target: float = math.inf
    weighted: bool = True

    def __post_init__(self) -> None:
        if not self.target > 0.0:
            raise InvalidArgumentError("target", self.target, "positive")
        if not self.mixtures or any(len(_mixture(shapes).weights) != 2 for shapes in self.mixtures):
            raise InvalidArgumentError("mixtures", self.mixtures, "two components per exit")

    @classmethod
    def fit(
        cls,
        trace: Trace,
        *,
        loss: str = "disagreement",
        estimator: Any = beta_from_moments,
        weighted: bool = True,
    ) -> Self:
        """Fit every exit's mixture to the labelled scores of the fit split, in [0, 1].

        Parameters
        ----------
        trace : Trace
        loss : str
            The column that is zero where the exit was right.
        estimator : callable
            `beta_from_moments` or `beta_from_likelihood`.
        weighted : bool

        Warns
        -----
        UserWarning
            For an exit with fewer than 10 tokens of either label, which then never stops.
        """
        if not callable(estimator):
            expected = "a function such as beta_from_likelihood"
            raise InvalidTypeError("estimator", estimator, expected)
        right = exit_losses(trace, loss) == 0
        mixtures = [
            _labelled(np.asarray(scores), labels, exit=exit, estimator=estimator)
            for exit, (scores, labels) in enumerate(zip(trace.scores.T, right.T, strict=True))
        ]
        return cls(mixtures=tuple(mixtures), weighted=weighted)

    @classmethod
    def fit_unlabelled(cls, trace: Trace, *, weighted: bool = True) -> Self:
        """Fit every exit's mixture to the scores alone, in [0, 1], by maximum likelihood.

        Expectation-maximisation with moments gives the start only: by itself it can end with a
        posterior that falls again at high scores.
        """
        columns = [np.asarray(scores) for scores in trace.scores.T]
        for one in columns:
            _check_range(one[np.isfinite(one)])
        fitted = [maximise_beta_mixture(one, start=fit_beta_mixture(one)) for one in columns]
        return cls(mixtures=tuple(map(_shapes, fitted)), weighted=weighted)

    def thresholds(self) -> tuple[float, ...]:
        """Threshold of every exit at the target; ``inf`` where the posterior never stays above."""
        if self.target >= 1.0:
            return (math.inf,) * len(self.mixtures)
        found = (_mixture(shapes) for shapes in self.mixtures)
        return tuple(one.crossing(self.target, weighted=self.weighted) for one in found)

    def init(self, batch_size: int, *, device: torch.device) -> State:
        """Thresholds, on the device."""
        return {"knob": torch.tensor(self.thresholds(), dtype=torch.float32, device=device)}

    def decide(self, features: Features, score: Tensor, state: State) -> tuple[Tensor, State]:
        """Compare strictly, in float32; NaN never stops."""
        return score > state["knob"][features.stage], state

    def with_knob(self, knob: float) -> Self:
        """Return the rule at another target posterior."""
        changes: dict[str, Any] = {"target": float(knob)}
        return replace(self, **changes)

    def knobs(self, trace: Trace, *, size: int) -> tuple[float, ...]:
        """Infinity, then quantiles of the posteriors at which the tokens just stop."""
        scores = np.asarray(trace.scores, dtype=np.float64)
        held = [self._posterior_from(exit, scores[:, exit]) for exit in range(scores.shape[1])]
        best = np.max(held, axis=0)
        return knob_path(best[(best > 0.0) & (best < 1.0)], size=size)

    def _posterior_from(self, exit: int, scores: NDArray[Any]) -> NDArray[np.float64]:
        """Least posterior at or above each score, clipped into [0, 1]."""
        grid = np.linspace(1e-4, 1 - 1e-4, 4001)
        posterior = _mixture(self.mixtures[exit]).posterior(grid, weighted=self.weighted)
        least = np.minimum.accumulate(posterior[::-1])[::-1]
        found: NDArray[np.float64] = np.interp(
            np.where(np.isfinite(scores), scores, 0), grid, least
        )
        return np.where(np.isfinite(scores), found, -np.inf)


@dataclass(frozen=True)
class BetaMixtureTracker:
    """FREE's way of deploying: refit across units from the agreement labels that settling gives.

    State in, state out: :meth:`observe` returns a new tracker. Labels of a unit arrive when the
    unit has ended, and members change only between units.

    Parameters
    ----------
    target : float
        Posterior aimed at, in (0, 1).
    window : int
        Most recent labelled tokens kept per exit, at least 20: bounded, unlike the release.
    scores, agree : tuple of tuple of float or bool [n_exits, <= window]
        What is kept.

    Notes
    -----
    No (risk, delta) certificate covers a rule that is refitted on what it caused: the labels come
    from the tracker's own choices, and the data that fit it are the data it runs on. Settled
    labels at exits that were asked are unbiased for the traffic so far and say nothing of drift.
    """

    target: float
    window: int = 4096
    scores: tuple[tuple[float, ...], ...] = ()
    agree: tuple[tuple[bool, ...], ...] = ()

    def __post_init__(self) -> None:
        if not 0.0 < self.target < 1.0:
            raise InvalidArgumentError("target", self.target, "in (0, 1)")
        if self.window < 20:
            raise InvalidArgumentError("window", self.window, "an integer >= 20")

    def observe(self, scores: ArrayLike, agree: ArrayLike) -> Self:
        """Add the labelled tokens of one finished unit.

        Parameters
        ----------
        scores : array_like [n_tokens, n_exits]
            In [0, 1]; NaN where the exit was not asked.
        agree : array_like of bool [n_tokens, n_exits]

        Raises
        ------
        InvalidArgumentError
            If the shapes differ from each other or from what was observed before.
        """
        given = np.asarray(scores, dtype=np.float64)
        label = np.asarray(agree, dtype=bool)
        if given.ndim != 2 or (self.scores and given.shape[1] != len(self.scores)):
            exits = len(self.scores) or "n_exits"
            raise InvalidArgumentError("scores", f"shape {given.shape}", f"[n_tokens, {exits}]")
        if label.shape != given.shape:
            raise InvalidArgumentError("agree", f"shape {label.shape}", f"of shape {given.shape}")
        before = self.scores or ((),) * given.shape[1]
        labels = self.agree or ((),) * given.shape[1]
        known = np.isfinite(given)
        changes: dict[str, Any] = {
            "scores": tuple(
                (*old, *map(float, given[known[:, exit], exit]))[-self.window :]
                for exit, old in enumerate(before)
            ),
            "agree": tuple(
                (*old, *map(bool, label[known[:, exit], exit]))[-self.window :]
                for exit, old in enumerate(labels)
            ),
        }
        return replace(self, **changes)

    def rule(self) -> BetaMixtureThreshold:
        """Return the rule for the next unit, uncertified; exits with too few labels never stop.

        Raises
        ------
        InvalidArgumentError
            If nothing has been observed yet: until then it is not known how many exits there are.
            Run the first unit at full depth.
        """
        if not self.scores:
            expected = "observed once before there is a rule: run the first unit at full depth"
            raise InvalidArgumentError("tracker", "no observations", expected)
        mixtures = [
            _labelled(np.array(scores), np.array(labels), exit=None, estimator=beta_from_moments)
            for scores, labels in zip(self.scores, self.agree, strict=True)
        ]
        return BetaMixtureThreshold(tuple(mixtures), target=self.target)

    def statement(self) -> str:
        """Say in plain words what is promised: nothing."""
        return (
            f"Tracking a posterior of {self.target:g} on the last {self.window} labelled tokens "
            f"per exit. This is an estimate that follows the traffic, not a guarantee: no risk and "
            f"no confidence level is certified."
        )


#: All mass on "disagrees": the posterior is 0 everywhere, so that the exit never stops.
_NEVER: Shapes = ((1.0, 0.0), (1.0, 2.0), (2.0, 1.0))
_LEAST = 10


def _labelled(
    scores: NDArray[Any], labels: NDArray[Any], *, exit: int | None, estimator: Any
) -> Shapes:
    finite = np.isfinite(scores)
    given, label = scores[finite], labels[finite].astype(bool)
    _check_range(given)
    if min(label.sum(), (~label).sum()) < _LEAST:
        if exit is not None:
            text = f"exit {exit} has fewer than {_LEAST} tokens of one label: it never stops"
            warnings.warn(text, UserWarning, stacklevel=3)
        return _NEVER
    return _shapes(fit_labelled_mixture(given, label, estimator=estimator))


def _check_range(scores: NDArray[Any]) -> None:
    if scores.size and not 0.0 <= scores.min() <= scores.max() <= 1.0:
        got = f"scores in [{scores.min():g}, {scores.max():g}]"
        expected = "of a score in [0, 1], such as `Margin` or a `Calibrated` one"
        raise InvalidArgumentError("trace", got, expected)


def _shapes(mixture: BetaMixtureModel) -> Shapes:
    return mixture.weights, mixture.alpha, mixture.beta


def _mixture(shapes: Shapes) -> BetaMixtureModel:
    weights, alpha, beta = shapes
    return BetaMixtureModel(weights=weights, alpha=alpha, beta=beta)
