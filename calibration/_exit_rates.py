"""Thresholds that give a wanted exit rate, with the rank that makes the rate a guarantee."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from adaptive.calibration._errors import InvalidArgumentError
from adaptive.calibration._trace import Trace
from adaptive.calibration._validation import as_floats, check_count, check_probability

Array = NDArray[np.float64]


def exit_rate_rank(n: int, rate: float, *, delta: float | None = None) -> int:
    r"""Rank of the calibration score to use as a threshold, so that enough units exit.

    With distinct scores, the share of traffic below the k-th smallest of n scores is
    :math:`\mathrm{Beta}(k, n - k + 1)`.

    Parameters
    ----------
    n : int
        Calibration scores.
    rate : float
        Wanted exit rate, in (0, 1).
    delta : float, optional
        Without it: the largest rank whose *expected* share of units that do not exit,
        ``k / (n + 1)``, is at most ``1 - rate``. With it: the largest rank with
        ``P(share that does not exit > 1 - rate) <= delta`` over calibration draws.

    Returns
    -------
    int
        1..n, or 0 if no rank will do: then every unit must exit.

    References
    ----------
    Vovk, Gammerman and Shafer (2005), Algorithmic learning in a random world; Wilks (1941),
    doi:10.1214/aoms/1177731788, for the Beta law.

    Examples
    --------
    >>> exit_rate_rank(200, 0.3)
    140
    """
    check_count("n", n)
    stay = 1.0 - check_probability("rate", rate)
    if delta is None:
        return min(n, math.floor((n + 1) * stay + 1e-9))
    check_probability("delta", delta)
    below = stats.binom.cdf(np.arange(n), n, stay)
    return int(np.searchsorted(below, delta, side="right"))


def exit_rate_threshold(scores: ArrayLike, rate: float, *, delta: float | None = None) -> float:
    """Threshold that at least a share `rate` of traffic reaches (``score >= threshold``).

    Parameters
    ----------
    scores : array_like [n_units]
        Scores of independent units; no NaN.
    rate, delta
        As in `exit_rate_rank`: in expectation, or with probability 1 - delta. Ties only raise
        the exit rate.

    Returns
    -------
    float
        A score that occurred, or ``-inf`` if only letting every unit exit will do.
    """
    values = _scores("scores", scores, 1)
    rank = exit_rate_rank(values.size, rate, delta=delta)
    return float(np.partition(values, rank - 1)[rank - 1]) if rank else -math.inf


def marginal_thresholds(
    scores: ArrayLike, rates: ArrayLike, *, delta: float | None = None
) -> Array:
    """One threshold per exit, from each exit's own scores: safe for the budget, not exact.

    Exit ``l`` alone would stop a share ``rates[0] + ... + rates[l]``. The share of units that go
    on beyond exit ``l`` is then at most ``1 - (rates[0] + ... + rates[l])``, hence the mean cost
    is at most that of the wanted rates where costs increase. Units that exit early often score
    high later too, so the realised budget is usually well below the allowed one.

    Parameters
    ----------
    scores : array_like [n_units, n_exits]
    rates : array_like [n_exits]
        Wanted share of units to stop at each exit, non-negative, sum at most 1.
    delta : float, optional
        As in `exit_rate_rank`, for each exit.

    Returns
    -------
    ndarray [n_exits]
        ``inf`` where the cumulative rate is zero, ``-inf`` where it is one.

    References
    ----------
    EERO, UAI 2025, PMLR 286:4290-4308, theorem 3.12; the conformal rank replaces its
    ``C / sqrt(N)`` term.
    """
    table, shares = _table_and_rates(scores, rates)
    cumulative = np.cumsum(shares)
    return np.array(
        [
            _threshold_at(table[:, exit_], total, delta)
            for exit_, total in enumerate(cumulative.tolist())
        ]
    )


def survivor_thresholds(scores: ArrayLike, rates: ArrayLike) -> Array:
    """One threshold per exit, each from the units that are still running: exact on the sample.

    Exit ``l`` takes the ``floor(n * rates[l])`` most confident units that have not left yet, so
    with distinct scores the realised counts on these units are exactly those. The rates carry
    over to new units only approximately; certify what must be promised with `control_risk`.

    Parameters
    ----------
    scores, rates
        As in `marginal_thresholds`.

    Returns
    -------
    ndarray [n_exits]
        ``inf`` where no unit is to stop.

    References
    ----------
    Dynamic Perceiver (ICCV 2023) and MSDNet (ICLR 2018), budgeted batch classification.

    Examples
    --------
    >>> survivor_thresholds([[0.9, 0.1], [0.8, 0.7], [0.3, 0.6], [0.2, 0.5]], [0.25, 0.5])
    array([0.9, 0.6])
    """
    table, shares = _table_and_rates(scores, rates)
    thresholds = np.full(shares.size, np.inf)
    running = np.ones(table.shape[0], dtype=bool)
    for exit_, share in enumerate(shares):
        left = np.sort(table[running, exit_])
        wanted = min(math.floor(table.shape[0] * share + 1e-9), left.size)
        if wanted:
            thresholds[exit_] = left[left.size - wanted]
            running &= table[:, exit_] < thresholds[exit_]
    return thresholds


def consistency_threshold(trace: Trace, *, risk: float, loss: str = "disagreement") -> float:
    r"""Shared threshold under which a unit departs from full computation at most at rate `risk`.

    With :math:`M_i` the highest score at which unit i would stop wrongly (over all its tokens and
    exits, ``-inf`` if there is none), the threshold lies just above the
    :math:`\lceil (n + 1)(1 - \alpha) \rceil`-th smallest :math:`M_i`.

    Parameters
    ----------
    trace : Trace
        Without groups: units of one cluster are not exchangeable with the next cluster's.
    risk : float
        Level, in (0, 1).
    loss : str
        A token stops wrongly where this loss is not zero.

    Returns
    -------
    float
        In float32 steps, for ``score >= threshold``; ``inf`` if the units are too few.

    Raises
    ------
    InvalidArgumentError
        If the trace has groups or no such loss, or `risk` is not in (0, 1).

    Notes
    -----
    Guarantee, for exchangeable units: P(the next unit departs) <= risk, over calibration draw and
    unit together; an expectation, as in `conformal_risk_control`. Departures are judged on the
    full model's own prefix, which for greedy decoding with exact caches decides whether the
    free-running text departs.

    References
    ----------
    Schuster, Fisch, Jaakkola and Barzilay (2021), Consistent accelerated inference via confident
    adaptive transformers, arXiv:2104.08803. There only units with a wrong exit are counted; with
    the others at ``-inf`` the guarantee is the same and the threshold never higher.
    """
    level = check_probability("risk", risk)
    if loss not in trace.losses:
        raise InvalidArgumentError("loss", loss, f"one of {', '.join(map(repr, trace.losses))}")
    if trace.groups is not None:
        raise InvalidArgumentError("trace", "a trace with groups", "of units without groups")
    wrong = np.where(np.asarray(trace.losses[loss]) != 0, trace.scores, np.float32(-np.inf))
    highest = np.sort(np.maximum.reduceat(wrong.max(axis=1), trace.offsets[:-1]))
    rank = math.ceil((trace.n_units + 1) * (1.0 - level) - 1e-9)
    if rank > trace.n_units:
        return math.inf
    return float(np.nextafter(highest[rank - 1], np.float32(np.inf)))


def _threshold_at(column: Array, total: float, delta: float | None) -> float:
    if total <= 0.0:
        return math.inf
    if total >= 1.0 - 1e-12:
        return -math.inf
    return exit_rate_threshold(column, total, delta=delta)


def _table_and_rates(scores: ArrayLike, rates: ArrayLike) -> tuple[Array, Array]:
    table = _scores("scores", scores, 2)
    shares = np.asarray(rates, dtype=np.float64)
    if shares.shape != (table.shape[1],):
        raise InvalidArgumentError("rates", f"shape {shares.shape}", f"({table.shape[1]},)")
    if not (shares >= 0.0).all() or shares.sum() > 1.0 + 1e-9:
        raise InvalidArgumentError("rates", rates, "non-negative with sum at most 1")
    return table, shares


def _scores(name: str, scores: ArrayLike, ndim: int) -> Array:
    values = as_floats(name, scores)
    if values.ndim != ndim or values.size == 0:
        raise InvalidArgumentError(name, f"shape {values.shape}", f"non-empty with {ndim} axes")
    if np.isnan(values).any():
        raise InvalidArgumentError(name, "NaN", "free of NaN")
    return values
