"""The tests that risk control can use: one final class each, behind one small interface."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from adaptive.calibration._betting import (
    agrapa_log_p,
    agrapa_upper_bound,
    star_log_p,
    star_upper_bound,
    wsr_log_p,
    wsr_upper_bound,
)
from adaptive.calibration._binomial import binomial_log_p, binomial_upper_bound
from adaptive.calibration._errors import InvalidArgumentError, InvalidTypeError
from adaptive.calibration._validation import require_binary

Array = NDArray[np.float64]
_INDEPENDENT = "units are independent draws from one distribution"


class AbstractRiskTest(abc.ABC):
    """A test of H: E L > risk on losses of independent units, and its upper confidence bound.

    Attributes
    ----------
    name : str
        Word by which `control_risk(method=...)` knows the test.
    least : float
        Smallest loss allowed, -inf where negative losses are welcome.
    ordered : bool
        Whether the evidence depends on the order of the units.
    asymptotic : bool
        Whether the guarantee holds only in the limit of many units.
    """

    name: ClassVar[str]
    least: ClassVar[float]
    ordered: ClassVar[bool]
    asymptotic: ClassVar[bool]

    @abc.abstractmethod
    def log_p_values(self, losses: Array, *, risk: float, delta: float, bound: float) -> Array:
        """Return ln p per column of `losses` [n_units, n_columns], at most 0.

        `delta` is the level that the test aims at; p is valid at every level.
        """

    @abc.abstractmethod
    def upper_bounds(self, losses: Array, *, delta: float, bound: float) -> Array:
        """Return U per column with P(E L > U) <= delta."""

    @abc.abstractmethod
    def assumptions(self, bound: float) -> tuple[str, ...]:
        """Return the assumptions of the guarantee as sentences."""


@dataclass(frozen=True)
class ExactBinomial(AbstractRiskTest):
    """Exact binomial test and Clopper-Pearson bound, for losses of 0 and 1."""

    name: ClassVar[str] = "binomial"
    least: ClassVar[float] = 0.0
    ordered: ClassVar[bool] = False
    asymptotic: ClassVar[bool] = False

    def log_p_values(self, losses: Array, *, risk: float, delta: float, bound: float) -> Array:
        """Return ln P(Bin(n, risk) <= errors) per column."""
        return binomial_log_p(_errors(losses, bound), losses.shape[0], risk=risk)

    def upper_bounds(self, losses: Array, *, delta: float, bound: float) -> Array:
        """Return the Clopper-Pearson bound per column."""
        return binomial_upper_bound(_errors(losses, bound), losses.shape[0], delta=delta)

    def assumptions(self, bound: float) -> tuple[str, ...]:
        """Return the assumptions of the guarantee as sentences."""
        return (_INDEPENDENT, "the loss is 0 or 1")


@dataclass(frozen=True)
class TargetBets(AbstractRiskTest):
    """Bets that recalculate the distance to 1/delta after every unit (STaR-style)."""

    name: ClassVar[str] = "star"
    least: ClassVar[float] = -np.inf
    ordered: ClassVar[bool] = True
    asymptotic: ClassVar[bool] = False

    def log_p_values(self, losses: Array, *, risk: float, delta: float, bound: float) -> Array:
        """Return minus the largest log wealth per column."""
        return star_log_p(losses, risk=risk, delta=delta, bound=bound)

    def upper_bounds(self, losses: Array, *, delta: float, bound: float) -> Array:
        """Return the bound by inversion on a grid of 1000 steps."""
        return star_upper_bound(losses, delta=delta, bound=bound)

    def assumptions(self, bound: float) -> tuple[str, ...]:
        """Return the assumptions of the guarantee as sentences."""
        return _betting_assumptions(bound)


@dataclass(frozen=True)
class PredictableBets(AbstractRiskTest):
    """Predictable plug-in bets of Waudby-Smith and Ramdas."""

    name: ClassVar[str] = "wsr"
    least: ClassVar[float] = -np.inf
    ordered: ClassVar[bool] = True
    asymptotic: ClassVar[bool] = False

    def log_p_values(self, losses: Array, *, risk: float, delta: float, bound: float) -> Array:
        """Return minus the largest log wealth per column."""
        return wsr_log_p(losses, risk=risk, delta=delta, bound=bound)

    def upper_bounds(self, losses: Array, *, delta: float, bound: float) -> Array:
        """Return the bound by inversion in the level."""
        return wsr_upper_bound(losses, delta=delta, bound=bound)

    def assumptions(self, bound: float) -> tuple[str, ...]:
        """Return the assumptions of the guarantee as sentences."""
        return _betting_assumptions(bound)


@dataclass(frozen=True)
class GrowthBets(AbstractRiskTest):
    """Approximately growth-optimal bets (aGRAPA)."""

    name: ClassVar[str] = "agrapa"
    least: ClassVar[float] = -np.inf
    ordered: ClassVar[bool] = True
    asymptotic: ClassVar[bool] = False

    def log_p_values(self, losses: Array, *, risk: float, delta: float, bound: float) -> Array:
        """Return minus the largest log wealth per column."""
        return agrapa_log_p(losses, risk=risk, delta=delta, bound=bound)

    def upper_bounds(self, losses: Array, *, delta: float, bound: float) -> Array:
        """Return the bound by inversion on a grid of 1000 steps."""
        return agrapa_upper_bound(losses, delta=delta, bound=bound)

    def assumptions(self, bound: float) -> tuple[str, ...]:
        """Return the assumptions of the guarantee as sentences."""
        return _betting_assumptions(bound)


TESTS: tuple[type[AbstractRiskTest], ...] = (ExactBinomial, TargetBets, PredictableBets, GrowthBets)
_STAR_LIMIT = 20_000


def choose_test(
    method: str | AbstractRiskTest, *, loss_type: str, n_units: int, fixed_level: bool
) -> AbstractRiskTest:
    """Return the test for declared facts; the losses are never looked at.

    `"auto"` takes the exact binomial test for binary losses, target-recalculating bets where each
    test has one level known beforehand (`fixed_level`) and at most 20,000 units, WSR bets
    elsewhere (their cost is a cumulative sum, and the difference in power has then vanished).
    """
    if isinstance(method, AbstractRiskTest):
        return method
    if not isinstance(method, str):
        raise InvalidTypeError("method", method, "a name or an instance of AbstractRiskTest")
    if method == "auto":
        if loss_type == "binary":
            return ExactBinomial()
        return TargetBets() if fixed_level and n_units <= _STAR_LIMIT else PredictableBets()
    for test in TESTS:
        if test.name == method:
            return test()
    names = ", ".join(repr(name) for name in ("auto", *(test.name for test in TESTS)))
    raise InvalidArgumentError("method", method, f"one of {names}")


def _errors(losses: Array, bound: float) -> NDArray[np.intp]:
    if bound != 1.0:
        raise InvalidArgumentError("bound", bound, "1 for the exact binomial test")
    require_binary("losses", losses)
    return np.count_nonzero(losses, axis=0)


def _betting_assumptions(bound: float) -> tuple[str, ...]:
    return (
        _INDEPENDENT,
        f"no loss exceeds {bound:g} (negative losses are allowed)",
        "the order of the units was fixed by a seed before the losses were looked at",
    )
