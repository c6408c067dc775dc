"""Tests from counts, sums and variances as `control_risk` uses them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from adaptive.calibration._bernstein import (
    maurer_pontil_log_p,
    maurer_pontil_upper_bound,
    normal_log_p,
    normal_upper_bound,
)
from adaptive.calibration._binomial import binomial_log_p, binomial_upper_bound
from adaptive.calibration._errors import InvalidArgumentError
from adaptive.calibration._hoeffding import (
    bentkus_log_p,
    bentkus_upper_bound,
    hoeffding_bentkus_log_p,
    hoeffding_bentkus_upper_bound,
    kl_hoeffding_log_p,
    kl_hoeffding_upper_bound,
)
from adaptive.calibration._inversion import invert_log_p
from adaptive.calibration._mixture import beta_mixture_log_p
from adaptive.calibration._risk_test import INDEPENDENT, AbstractRiskTest, Array
from adaptive.calibration._validation import require_binary


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
        return (INDEPENDENT, "the loss is 0 or 1")


@dataclass(frozen=True)
class BetaMixture(AbstractRiskTest):
    """Anytime-valid test of 0/1 losses by a uniform prior on rates below the level."""

    name: ClassVar[str] = "beta-mixture"
    least: ClassVar[float] = 0.0
    ordered: ClassVar[bool] = False
    asymptotic: ClassVar[bool] = False

    def log_p_values(self, losses: Array, *, risk: float, delta: float, bound: float) -> Array:
        """Return ln p per column; valid at every stopping time."""
        return beta_mixture_log_p(_errors(losses, bound), losses.shape[0], risk=risk)

    def upper_bounds(self, losses: Array, *, delta: float, bound: float) -> Array:
        """Return the bound by inversion."""
        errors = _errors(losses, bound).astype(np.float64)
        n = losses.shape[0]
        return invert_log_p(
            lambda level, place: beta_mixture_log_p(errors[place], n, risk=level),
            errors / n,
            math.log(delta),
        )

    def assumptions(self, bound: float) -> tuple[str, ...]:
        """Return the assumptions of the guarantee as sentences."""
        return (INDEPENDENT, "the loss is 0 or 1")


@dataclass(frozen=True)
class KLHoeffding(AbstractRiskTest):
    """Hoeffding's inequality in relative-entropy form."""

    name: ClassVar[str] = "kl-hoeffding"
    least: ClassVar[float] = 0.0
    ordered: ClassVar[bool] = False
    asymptotic: ClassVar[bool] = False

    def log_p_values(self, losses: Array, *, risk: float, delta: float, bound: float) -> Array:
        """Return ln p per column."""
        log_p = kl_hoeffding_log_p(*_sums(losses), risk=risk, bound=bound)
        return np.minimum(log_p, 0.0)

    def upper_bounds(self, losses: Array, *, delta: float, bound: float) -> Array:
        """Return the bound by inversion."""
        return kl_hoeffding_upper_bound(*_sums(losses), delta=delta, bound=bound)

    def assumptions(self, bound: float) -> tuple[str, ...]:
        """Return the assumptions of the guarantee as sentences."""
        return _range_assumptions(bound)


@dataclass(frozen=True)
class Bentkus(AbstractRiskTest):
    """Bentkus' inequality."""

    name: ClassVar[str] = "bentkus"
    least: ClassVar[float] = 0.0
    ordered: ClassVar[bool] = False
    asymptotic: ClassVar[bool] = False

    def log_p_values(self, losses: Array, *, risk: float, delta: float, bound: float) -> Array:
        """Return ln p per column."""
        log_p = bentkus_log_p(*_sums(losses), risk=risk, bound=bound)
        return np.minimum(log_p, 0.0)

    def upper_bounds(self, losses: Array, *, delta: float, bound: float) -> Array:
        """Return the bound by inversion."""
        return bentkus_upper_bound(*_sums(losses), delta=delta, bound=bound)

    def assumptions(self, bound: float) -> tuple[str, ...]:
        """Return the assumptions of the guarantee as sentences."""
        return _range_assumptions(bound)


@dataclass(frozen=True)
class HoeffdingBentkus(AbstractRiskTest):
    """The smaller of the Hoeffding and Bentkus p-values."""

    name: ClassVar[str] = "hoeffding-bentkus"
    least: ClassVar[float] = 0.0
    ordered: ClassVar[bool] = False
    asymptotic: ClassVar[bool] = False

    def log_p_values(self, losses: Array, *, risk: float, delta: float, bound: float) -> Array:
        """Return ln p per column."""
        log_p = hoeffding_bentkus_log_p(*_sums(losses), risk=risk, bound=bound)
        return np.minimum(log_p, 0.0)

    def upper_bounds(self, losses: Array, *, delta: float, bound: float) -> Array:
        """Return the bound by inversion."""
        return hoeffding_bentkus_upper_bound(*_sums(losses), delta=delta, bound=bound)

    def assumptions(self, bound: float) -> tuple[str, ...]:
        """Return the assumptions of the guarantee as sentences."""
        return _range_assumptions(bound)


@dataclass(frozen=True)
class MaurerPontil(AbstractRiskTest):
    """Empirical Bernstein inequality of Maurer and Pontil."""

    name: ClassVar[str] = "maurer-pontil"
    least: ClassVar[float] = 0.0
    ordered: ClassVar[bool] = False
    asymptotic: ClassVar[bool] = False

    def log_p_values(self, losses: Array, *, risk: float, delta: float, bound: float) -> Array:
        """Return ln p per column."""
        return maurer_pontil_log_p(losses, risk=risk, bound=bound)

    def upper_bounds(self, losses: Array, *, delta: float, bound: float) -> Array:
        """Return the bound in closed form."""
        return maurer_pontil_upper_bound(losses, delta=delta, bound=bound)

    def assumptions(self, bound: float) -> tuple[str, ...]:
        """Return the assumptions of the guarantee as sentences."""
        return _range_assumptions(bound)


@dataclass(frozen=True)
class NormalApproximation(AbstractRiskTest):
    """Normal approximation: asymptotic, no finite-sample guarantee."""

    name: ClassVar[str] = "normal"
    least: ClassVar[float] = -np.inf
    ordered: ClassVar[bool] = False
    asymptotic: ClassVar[bool] = True

    def log_p_values(self, losses: Array, *, risk: float, delta: float, bound: float) -> Array:
        """Return the asymptotic ln p per column."""
        return normal_log_p(losses, risk=risk, bound=bound)

    def upper_bounds(self, losses: Array, *, delta: float, bound: float) -> Array:
        """Return the asymptotic bound."""
        return normal_upper_bound(losses, delta=delta, bound=bound)

    def assumptions(self, bound: float) -> tuple[str, ...]:
        """Return the assumptions of the guarantee as sentences."""
        return (INDEPENDENT, "the mean of the losses is close to normal (asymptotic)")


def _sums(losses: Array) -> tuple[Array, int]:
    return losses.sum(axis=0), losses.shape[0]


def _errors(losses: Array, bound: float) -> NDArray[np.intp]:
    if bound != 1.0:
        raise InvalidArgumentError("bound", bound, "1 for the exact binomial test")
    if losses.dtype != np.bool_:
        require_binary("losses", losses)
    return np.asarray(np.count_nonzero(losses, axis=0))


def _range_assumptions(bound: float) -> tuple[str, ...]:
    return (INDEPENDENT, f"losses lie in [0, {bound:g}]")
