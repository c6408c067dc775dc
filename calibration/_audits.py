"""Which units are run to full depth for a label, and what such labels are worth."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize

from adaptive.calibration._edetector import Array, Flags, stream_flags
from adaptive.calibration._errors import InvalidArgumentError
from adaptive.calibration._unit_tables import vector
from adaptive.calibration._validation import (
    as_floats,
    check_count,
    check_number,
    check_probability,
)


class AbstractAudits(ABC):
    """Probability that a unit is audited, from what is known before its label is.

    Final classes: `UniformAudits`, `EvidenceAudits`, `ScoreAudits`.
    """

    @abstractmethod
    def probabilities(
        self,
        streams: int = 1,
        *,
        expected: ArrayLike | None = None,
        warned: ArrayLike | None = None,
    ) -> Array:
        """Probability of an audit for the next unit of every stream [n_streams].

        Parameters
        ----------
        streams : int
        expected : array_like [n_streams], optional
            Expected loss of the unit given its scores.
        warned : array_like of bool [n_streams], optional
            Whether the monitor's warning was on before this unit.
        """


@dataclass(frozen=True)
class UniformAudits(AbstractAudits):
    """The same probability for every unit.

    Parameters
    ----------
    rate : float
        In (0, 1].

    Examples
    --------
    >>> UniformAudits(0.05).probabilities(2).tolist()
    [0.05, 0.05]
    """

    rate: float

    def __post_init__(self) -> None:
        _check_rate("rate", self.rate)

    def probabilities(
        self,
        streams: int = 1,
        *,
        expected: ArrayLike | None = None,
        warned: ArrayLike | None = None,
    ) -> Array:
        """`rate` for every stream."""
        return np.full(check_count("streams", streams), float(self.rate))


@dataclass(frozen=True)
class EvidenceAudits(AbstractAudits):
    """Few audits while all is quiet, many while a warning is on.

    Valid for every monitor: the warning depends on the past only.

    Parameters
    ----------
    rate, warned_rate : float
        In (0, 1], without and with a warning.

    Notes
    -----
    Any flag from the past may serve as the warning: a monitor's, a `ScoreDrift`'s, a
    `SlowingDown`'s. A warning level far below a tenth of the threshold audits much of the quiet
    traffic, because the evidence of a Shiryaev-Roberts monitor rises by 1 with every unit that was
    not audited.
    """

    rate: float
    warned_rate: float

    def __post_init__(self) -> None:
        _check_rate("rate", self.rate)
        _check_rate("warned_rate", self.warned_rate)

    def probabilities(
        self,
        streams: int = 1,
        *,
        expected: ArrayLike | None = None,
        warned: ArrayLike | None = None,
    ) -> Array:
        """`warned_rate` where `warned`, else `rate`."""
        if warned is None:
            raise InvalidArgumentError("warned", None, "given: one flag per stream")
        flags = stream_flags("warned", warned, streams)
        return np.where(flags, float(self.warned_rate), float(self.rate))


@dataclass(frozen=True)
class ScoreAudits(AbstractAudits):
    r"""More audits where the expected loss is larger: :math:`p = \min(1, \max(f, c\sqrt{g}))`.

    Proportional to the standard deviation of a 0/1 loss with mean g, which makes the estimate of
    the mean loss (`corrected_losses`) the most precise at a given number of audits.

    Parameters
    ----------
    scale : float
        c, positive.
    floor : float
        f, in (0, 1]: no unit is audited more rarely, so that a failure where the curve expects none
        is found too.

    Notes
    -----
    With `expected` in the monitor, audited losses are fed as they are. Without it (a promise about
    the mean over all units) feed `corrected_losses` for every unit, audited or not, to a
    monitor whose `lower` and `upper` are those of `corrected_range`.
    """

    scale: float
    floor: float

    def __post_init__(self) -> None:
        if check_number("scale", self.scale) <= 0.0:
            raise InvalidArgumentError("scale", self.scale, "positive")
        _check_rate("floor", self.floor)

    @classmethod
    def fit(cls, expected: ArrayLike, *, rate: float, floor: float = 0.25) -> ScoreAudits:
        """Scale such that units with these expected losses are audited at a mean rate.

        Parameters
        ----------
        expected : array_like [n]
            Expected losses of calibration units, non-negative.
        rate : float
            Mean probability of an audit, in (0, 1).
        floor : float
            Least probability as a share of `rate`, in (0, 1).

        Examples
        --------
        >>> audits = ScoreAudits.fit([0.01, 0.04, 0.09], rate=0.1)
        >>> audits.probabilities(3, expected=[0.01, 0.04, 0.09]).round(3).tolist()
        [0.05, 0.1, 0.15]
        """
        check_probability("rate", rate)
        check_probability("floor", floor)
        roots = np.sqrt(_expected(expected))
        if not roots.any():
            raise InvalidArgumentError("expected", "only zeros", "positive somewhere")
        least = rate * floor

        def excess(log_scale: float) -> float:
            return float(np.clip(math.exp(log_scale) * roots, least, 1.0).mean()) - rate

        top = 1.0 / roots[roots > 0.0].min()
        if excess(math.log(top)) < 0.0:
            raise InvalidArgumentError("rate", rate, "reachable: fewer zeros in `expected`")
        bottom = rate / roots.max() * 0.5 * floor
        return cls(math.exp(optimize.brentq(excess, math.log(bottom), math.log(top))), least)

    def probabilities(
        self,
        streams: int = 1,
        *,
        expected: ArrayLike | None = None,
        warned: ArrayLike | None = None,
    ) -> Array:
        """Probabilities from `expected` [n_streams]."""
        if expected is None:
            raise InvalidArgumentError("expected", None, "given: one expected loss per stream")
        g = _expected(expected)
        if g.shape != (streams,):
            raise InvalidArgumentError("expected", f"shape {g.shape}", f"of shape ({streams},)")
        return np.clip(self.scale * np.sqrt(g), self.floor, 1.0)


def audit_coins(probabilities: ArrayLike, *, seed: int, unit: int) -> Flags:
    """Return whether each stream's unit is audited [n_streams]: a function of its arguments.

    The same seed and unit number give the same coins, in any process, so a run can be replayed
    and checked; different ones give independent coins.

    Examples
    --------
    >>> audit_coins([0.5, 0.5, 0.5, 1.0], seed=7, unit=12).tolist()
    [True, False, True, True]
    """
    p = as_floats("probabilities", probabilities)
    if not ((p >= 0.0) & (p <= 1.0)).all():
        raise InvalidArgumentError("probabilities", probabilities, "in [0, 1]")
    numbers = [check_count("seed", seed, least=0), check_count("unit", unit, least=0)]
    return np.asarray(np.random.default_rng(numbers).random(p.shape) < p)


def corrected_losses(
    losses: ArrayLike, *, expected: ArrayLike, audited: ArrayLike, probabilities: ArrayLike
) -> Array:
    r"""Return unbiased losses of all units from the audited ones.

    .. math:: Z = g + \frac{A}{p} (X - g), \qquad E[Z \mid \text{past, score}] = E[X \mid \dots]

    whatever g is (the control variate): a poor `expected` costs precision, not validity.

    Parameters
    ----------
    losses : array_like [n]
        Not read where `audited` is false.
    expected, audited, probabilities : array_like [n]
        Expected loss g, whether there is a label A, and the probability p that there would be.

    Examples
    --------
    >>> known = {"expected": [0.1, 0.1], "probabilities": [0.5, 0.5]}
    >>> corrected_losses([1.0, 0.0], audited=[True, False], **known).round(3).tolist()
    [1.9, 0.1]
    """
    g, p = _expected_and_probabilities(expected, probabilities)
    on = stream_flags("audited", audited, g.size)
    labels = as_floats("losses", losses)
    if labels.shape != g.shape:
        raise InvalidArgumentError("losses", f"shape {labels.shape}", f"of shape {g.shape}")
    x = np.where(on, labels, g)
    if not np.isfinite(x).all():
        raise InvalidArgumentError("losses", "NaN or infinity where audited", "finite")
    return np.asarray(g + (x - g) / p)


def corrected_range(
    expected: ArrayLike, probabilities: ArrayLike, *, lower: float = 0.0, upper: float = 1.0
) -> tuple[float, float]:
    """Return the least and the largest that `corrected_losses` can be.

    Parameters
    ----------
    expected, probabilities : array_like [n]
        Every expected loss that can occur (a curve's `values`), and its audit probability.
    lower, upper : float
        Ends of the loss.

    Examples
    --------
    >>> low, high = corrected_range([0.01, 0.25], [0.1, 0.5])
    >>> round(low, 3), round(high, 3)
    (-0.25, 9.91)
    """
    g, p = _expected_and_probabilities(np.ravel(expected), np.ravel(probabilities))
    low, high = check_number("lower", lower), check_number("upper", upper)
    if not low < high:
        raise InvalidArgumentError("upper", upper, f"above `lower` = {low:g}")
    if not ((g >= low) & (g <= high)).all():
        raise InvalidArgumentError("expected", expected, f"in [{low:g}, {high:g}]")
    ends = [g, g + (low - g) / p, g + (high - g) / p]
    return float(np.min(ends)), float(np.max(ends))


def _expected_and_probabilities(
    expected: ArrayLike, probabilities: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    g, p = vector("expected", expected), vector("probabilities", probabilities)
    if p.shape != g.shape:
        raise InvalidArgumentError("probabilities", f"shape {p.shape}", f"of shape {g.shape}")
    if not ((p > 0.0) & (p <= 1.0)).all():
        raise InvalidArgumentError("probabilities", probabilities, "in (0, 1]")
    return g, p


def _expected(values: ArrayLike) -> NDArray[np.float64]:
    g = as_floats("expected", values)
    if g.ndim != 1 or g.size == 0 or not (np.isfinite(g) & (g >= 0.0)).all():
        raise InvalidArgumentError("expected", values, "a non-empty vector, finite, not negative")
    return g


def _check_rate(name: str, value: float) -> None:
    if not 0.0 < check_number(name, value) <= 1.0:
        raise InvalidArgumentError(name, value, "in (0, 1]")
