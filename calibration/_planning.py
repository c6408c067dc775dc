"""How many units a promise needs: answered before any computation is spent."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable

import numpy as np
from scipy import stats

from adaptive.calibration._binomial import binomial_log_p
from adaptive.calibration._errors import InvalidArgumentError, UnsupportedError
from adaptive.calibration._methods import choose_test
from adaptive.calibration._risk_test import AbstractRiskTest
from adaptive.calibration._sum_tests import ExactBinomial
from adaptive.calibration._validation import (
    Rng,
    as_generator,
    check_choice,
    check_number,
    check_probability,
    check_risk,
)

_LARGEST = 10_000_000
_BLOCK = 20_000_000


def minimum_units(
    risk: float,
    delta: float,
    *,
    method: str | AbstractRiskTest = "auto",
    loss_type: str = "bounded",
    bound: float = 1.0,
) -> int:
    r"""Return the smallest number of units at which zero loss on all of them is certified.

    No valid test needs fewer than :math:`\ln\delta / \ln(1 - r)` units, with r in units of the
    bound; the exact test attains it.

    Parameters
    ----------
    risk : float
        Promise, in (0, bound).
    delta : float
        Error probability of one test; divide it by the number of columns for Bonferroni.
    method, loss_type, bound
        As in `control_risk`.

    Returns
    -------
    int

    Raises
    ------
    UnsupportedError
        For an asymptotic test: without spread it has no p-value.

    Examples
    --------
    >>> minimum_units(0.05, 0.05, loss_type="binary")
    59
    """
    level, upper = check_risk(risk, bound)
    check_probability("delta", delta)
    check_choice("loss_type", loss_type, ("bounded", "binary"))
    scaled = level / upper
    if choose_test(method, loss_type=loss_type, n_units=1, fixed_level=True).asymptotic:
        raise UnsupportedError("an asymptotic test has no least number of units")
    return _minimum(scaled, delta, method, loss_type)


@functools.lru_cache(maxsize=1024)
def _minimum(risk: float, delta: float, method: str | AbstractRiskTest, loss_type: str) -> int:
    def certified(n: int) -> bool:
        test = choose_test(method, loss_type=loss_type, n_units=n, fixed_level=True)
        if isinstance(test, ExactBinomial):
            return bool(binomial_log_p(0, n, risk=risk) <= math.log(delta))
        log_p = test.log_p_values(np.zeros((n, 1)), risk=risk, delta=delta, bound=1.0)
        return bool(log_p[0] <= math.log(delta))

    least = math.log(delta) / math.log1p(-risk) if risk > sys.float_info.min else math.inf
    if least > _LARGEST:
        raise InvalidArgumentError("risk", risk, f"certifiable with {_LARGEST} units")
    low = max(1, math.ceil(least) - 1)
    high = low
    while not certified(high):
        if high > _LARGEST:
            raise InvalidArgumentError("risk", risk, f"certifiable with {_LARGEST} units")
        low, high = high + 1, 2 * high
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if certified(middle) else (middle + 1, high)
    return low


def plan_units(
    risk: float,
    delta: float,
    *,
    true_risk: float | None = None,
    power: float = 0.9,
    method: str | AbstractRiskTest = "auto",
    loss_type: str = "bounded",
    bound: float = 1.0,
    replicates: int = 400,
    rng: Rng = None,
) -> int:
    """Return how many units certify, with the given power, a configuration of known true risk.

    The losses planned for are 0 or `bound`, the most spread-out law with that mean and therefore
    the hardest to certify; losses that are usually moderate need fewer units.

    Parameters
    ----------
    risk, delta, method, loss_type, bound
        As in `minimum_units`.
    true_risk : float, optional
        Mean loss of the configuration to be certified, below `risk`; half of it by default.
    power : float
        Probability of certifying it, in (0, 1).
    replicates : int
        Simulated calibrations per candidate number of units, for betting tests (the exact test's
        power is computed).
    rng : int, Generator or None
        Seed of the simulation.

    Returns
    -------
    int
        For the exact test the smallest such number (a few units more can lose a little power again:
        it moves in a saw-tooth); for the other tests by simulation, to about 2 %.

    Examples
    --------
    >>> plan_units(0.05, 0.1, true_risk=0.02, loss_type="binary")
    258
    """
    level, upper = check_risk(risk, bound)
    check_probability("delta", delta)
    check_probability("power", power)
    truth = level / 2 if true_risk is None else check_number("true_risk", true_risk)
    if not 0.0 <= truth < level:
        raise InvalidArgumentError("true_risk", true_risk, f"in [0, {level:g}), below `risk`")
    least = minimum_units(risk, delta, method=method, loss_type=loss_type, bound=bound)
    chosen = choose_test(method, loss_type=loss_type, n_units=least, fixed_level=True)
    if isinstance(chosen, ExactBinomial):
        return _plan_exact(level, delta, truth, power, least)
    seed = int(as_generator(rng).integers(2**32))

    def enough(n: int) -> bool:
        test = choose_test(method, loss_type=loss_type, n_units=n, fixed_level=True)
        share = _simulated_power(test, level / upper, delta, truth / upper, n, replicates, seed)
        return share >= power

    return _search(enough, least, power=power)


def _plan_exact(risk: float, delta: float, truth: float, power: float, least: int) -> int:
    start, block = least, max(least, 1000)
    while start <= _LARGEST:
        n = np.arange(start, start + block)
        allowed = stats.binom.ppf(delta, n, risk).astype(np.int64)
        allowed -= stats.binom.cdf(allowed, n, risk) > delta
        reached = np.flatnonzero(stats.binom.cdf(allowed, n, truth) >= power)
        if reached.size:
            return int(n[reached[0]])
        start, block = start + block, 2 * block
    raise InvalidArgumentError("power", power, f"reachable with {_LARGEST} units")


def _simulated_power(
    test: AbstractRiskTest,
    risk: float,
    delta: float,
    truth: float,
    n: int,
    replicates: int,
    seed: int,
) -> float:
    rng = np.random.default_rng(seed)
    passed, left = 0, replicates
    while left:
        block = min(left, max(1, _BLOCK // n))
        losses = (rng.random((n, block)) < truth).astype(np.float64)
        log_p = test.log_p_values(losses, risk=risk, delta=delta, bound=1.0)
        passed += int(np.count_nonzero(log_p <= math.log(delta)))
        left -= block
    return passed / replicates


def _search(enough: Callable[[int], bool], least: int, *, power: float) -> int:
    """Return about the fewest units that are enough, by doubling and then halving."""
    low = high = least
    while not enough(high):
        if high > _LARGEST:
            raise InvalidArgumentError("power", power, f"reachable with {_LARGEST} units")
        low, high = high, 2 * high
    while high - low > max(1, low // 50):
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
