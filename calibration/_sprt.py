"""Sequential probability ratio tests of a 0/1 rate, with error rates, over many streams."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from adaptive.calibration._errors import InvalidArgumentError
from adaptive.calibration._validation import check_active, check_count, check_probability

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class SPRTState:
    """State of a sequential test on many streams.

    Parameters
    ----------
    log_ratio : ndarray [n_streams]
        Log likelihood ratio of the alternative over the null.
    units : ndarray of int [n_streams]
        Units read; a decided stream reads no more.
    decision : ndarray of int8 [n_streams]
        1 for the alternative, -1 for the null, 0 while undecided.
    """

    log_ratio: Array
    units: NDArray[np.int64]
    decision: NDArray[np.int8]


@dataclass(frozen=True)
class OperatingCharacteristics:
    """What a truncated test does at one true rate.

    Parameters
    ----------
    accept_alternative, accept_null : float
        Probabilities, summing to 1.
    expected_units : float
        Mean number of units read.
    """

    accept_alternative: float
    accept_null: float
    expected_units: float


@dataclass(frozen=True)
class SPRT:
    r"""Test of rate `null` against rate `alternative` that stops as soon as it knows.

    Stops for the alternative when the log likelihood ratio reaches :math:`\ln(1/\alpha)`, for the
    null when it falls to :math:`\ln \beta`.

    Parameters
    ----------
    null, alternative : float
        Rates in (0, 1), different.
    alpha : float
        P(alternative accepted) at most `alpha` at the null rate, and at every rate further from
        the alternative.
    beta : float
        P(null accepted) at most `beta` at the alternative rate, and beyond.

    Notes
    -----
    These boundaries keep both error rates exactly (the likelihood ratio and its inverse are
    non-negative martingales from 1). Wald's ``(1 - beta)/alpha`` and ``beta/(1 - alpha)`` keep
    them only up to the overshoot. Independent 0/1 outcomes are assumed.

    References
    ----------
    Wald (1945), doi:10.1214/aoms/1177731118.

    Examples
    --------
    >>> test = SPRT(null=0.5, alternative=0.9, alpha=0.05, beta=0.05)
    >>> state = test.init(2)
    >>> for outcome in ([1, 0], [1, 0], [1, 1], [1, 1], [1, 1], [1, 1]):
    ...     state = test.update(state, outcome)
    >>> state.decision.tolist(), state.units.tolist()
    ([1, -1], [6, 2])
    """

    null: float
    alternative: float
    alpha: float
    beta: float

    def __post_init__(self) -> None:
        for name in ("null", "alternative", "alpha", "beta"):
            check_probability(name, getattr(self, name))
        if self.null == self.alternative:
            raise InvalidArgumentError("alternative", self.alternative, "different from `null`")

    def init(self, n_streams: int) -> SPRTState:
        """State before the first unit."""
        return _fresh(n_streams)

    def update(
        self, state: SPRTState, outcomes: ArrayLike, *, active: ArrayLike | None = None
    ) -> SPRTState:
        """State after one more outcome per stream.

        Parameters
        ----------
        state : SPRTState
        outcomes : array_like [n_streams]
            0 or 1.
        active : array_like of bool [n_streams], optional
            Streams that have a new outcome.
        """
        return _advance(self, state, outcomes, active)


@dataclass(frozen=True)
class TruncatedSPRT:
    """`SPRT` that decides after `max_units` at the latest.

    Parameters
    ----------
    null, alternative, alpha, beta
        As in `SPRT`. `alpha` is kept exactly; at the alternative, `characteristics` says what
        the truncation leaves of `beta`.
    max_units : int
        Then the alternative is accepted if the log likelihood ratio is at least `final`.
    final : float
        Set by `truncated_sprt`.
    """

    null: float
    alternative: float
    alpha: float
    beta: float
    max_units: int
    final: float

    def init(self, n_streams: int) -> SPRTState:
        """State before the first unit."""
        return _fresh(n_streams)

    def update(
        self, state: SPRTState, outcomes: ArrayLike, *, active: ArrayLike | None = None
    ) -> SPRTState:
        """State after one more outcome per stream; parameters as `SPRT.update`."""
        after = _advance(self, state, outcomes, active)
        last = (after.decision == 0) & (after.units >= self.max_units)
        verdict = np.where(after.log_ratio >= self.final - _SLACK, 1, -1).astype(np.int8)
        return SPRTState(
            after.log_ratio, after.units, np.where(last, verdict, after.decision).astype(np.int8)
        )

    def characteristics(self, rate: float) -> OperatingCharacteristics:
        """Exact error rates and mean number of units at a true rate in [0, 1].

        Cost: one pass over the lattice of counts, ``max_units ** 2`` additions.
        """
        early, null, running, expected = _lattice(self, rate, self.max_units)
        ratios = _log_ratios(self, self.max_units)
        late = float(running[ratios >= self.final - _SLACK].sum())
        return OperatingCharacteristics(early + late, null + float(running.sum()) - late, expected)


_SLACK = 1e-9


def truncated_sprt(
    null: float, alternative: float, *, alpha: float, beta: float, max_units: int
) -> TruncatedSPRT:
    """Design a truncated SPRT: the most powerful last decision that keeps `alpha` exactly.

    Parameters
    ----------
    null, alternative, alpha, beta
        As in `SPRT`.
    max_units : int
        At least 1.

    Returns
    -------
    TruncatedSPRT

    Examples
    --------
    >>> test = truncated_sprt(0.1, 0.02, alpha=0.1, beta=0.1, max_units=200)
    >>> test.characteristics(0.1).accept_alternative <= 0.1
    True
    """
    SPRT(null=null, alternative=alternative, alpha=alpha, beta=beta)
    check_count("max_units", max_units)
    draft = TruncatedSPRT(null, alternative, alpha, beta, max_units, math.inf)
    early, _, running, _ = _lattice(draft, null, max_units)
    ratios = _log_ratios(draft, max_units)
    order = np.argsort(-ratios, kind="stable")
    order = order[running[order] > 0.0]
    total = early + np.cumsum(running[order])
    allowed = np.flatnonzero(total <= alpha)
    final = float(ratios[order[allowed[-1]]]) if allowed.size else math.inf
    return TruncatedSPRT(null, alternative, alpha, beta, max_units, final)


def _fresh(n_streams: int) -> SPRTState:
    check_count("n_streams", n_streams)
    return SPRTState(
        np.zeros(n_streams), np.zeros(n_streams, np.int64), np.zeros(n_streams, np.int8)
    )


def _steps(test: SPRT | TruncatedSPRT) -> tuple[float, float]:
    """Change of the log ratio on a 0 and on a 1."""
    return (
        math.log1p(-test.alternative) - math.log1p(-test.null),
        math.log(test.alternative) - math.log(test.null),
    )


def _advance(
    test: SPRT | TruncatedSPRT,
    state: SPRTState,
    outcomes: ArrayLike,
    active: ArrayLike | None,
) -> SPRTState:
    x = np.asarray(outcomes)
    on = check_active(active, state.units.shape)
    if x.shape != on.shape:
        raise InvalidArgumentError("outcomes", f"shape {x.shape}", f"of shape {on.shape}")
    if not np.isin(x[on], (0, 1)).all():
        raise InvalidArgumentError("outcomes", outcomes, "0 or 1")
    on = on & (state.decision == 0)
    zero, one = _steps(test)
    log_ratio = state.log_ratio + np.where(on, np.where(x == 1, one, zero), 0.0)
    decision = state.decision.copy()
    decision[on & (log_ratio >= -math.log(test.alpha) - _SLACK)] = 1
    decision[on & (log_ratio <= math.log(test.beta) + _SLACK)] = -1
    return SPRTState(log_ratio, state.units + on, decision)


def _log_ratios(test: SPRT | TruncatedSPRT, n: int) -> Array:
    zero, one = _steps(test)
    ones = np.arange(n + 1)
    return ones * one + (n - ones) * zero


def _lattice(test: TruncatedSPRT, rate: float, n: int) -> tuple[float, float, Array, float]:
    """Probabilities of each early decision, of each count still undecided, and mean units."""
    alternative = null = expected = 0.0
    running = np.array([1.0])
    for unit in range(1, n + 1):
        expected += float(running.sum())
        longer = np.zeros(unit + 1)
        longer[:-1] += running * (1.0 - rate)
        longer[1:] += running * rate
        ratios = _log_ratios(test, unit)
        up = ratios >= -math.log(test.alpha) - _SLACK
        down = ratios <= math.log(test.beta) + _SLACK
        alternative += float(longer[up].sum())
        null += float(longer[down & ~up].sum())
        longer[up | down] = 0.0
        running = longer
    return alternative, null, running, expected
