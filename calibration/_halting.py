"""Thresholds per stage, with the risk held among the units that stop by each stage."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from adaptive.calibration._binomial import binomial_log_p
from adaptive.calibration._certificate import Certificate
from adaptive.calibration._errors import InvalidArgumentError
from adaptive.calibration._risk_test import INDEPENDENT
from adaptive.calibration._validation import as_floats, check_probability, require_binary

if TYPE_CHECKING:
    import pandas as pd

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class HaltTimeResult:
    """Outcome of `certify_halting`.

    Parameters
    ----------
    thresholds : ndarray [n_exits]
        What to use: ``inf`` (never stop) before `first_exit`, the screened values from there on.
    first_exit : int or None
        First exit that may stop; None if nothing is certified.
    log_p_values : ndarray [n_exits]
        Largest log p-value when stopping is allowed from each exit on; NaN where not tested.
    risk, delta : float
    n : int
        Units of the test split.
    certificate : Certificate
        What is promised, on what evidence; its `index` is `first_exit`.
    """

    thresholds: Array
    first_exit: int | None
    log_p_values: Array
    risk: float
    delta: float
    n: int
    certificate: Certificate

    def statement(self) -> str:
        """Say in plain words what is promised."""
        return self.certificate.statement()

    def to_frame(self) -> pd.DataFrame:
        """One row per exit."""
        import pandas as pd

        return pd.DataFrame(
            {"threshold": self.thresholds, "log_p_value": self.log_p_values}
        ).rename_axis("exit")


def screen_halting(scores: ArrayLike, losses: ArrayLike, *, risk: float) -> Array:
    """Lowest threshold per exit, from the first on, that keeps the observed error rate in bounds.

    For each exit in turn, with earlier thresholds fixed: the lowest score at which the share of
    errors among the units stopped so far is at most `risk`. The screening half of the procedure;
    it promises nothing. Screening below the promised level leaves room for the test.

    Parameters
    ----------
    scores : array_like [n_units, n_exits]
        No NaN. One decision sequence per unit.
    losses : array_like [n_units, n_exits]
        0/1 loss of stopping the unit at each exit.
    risk : float
        Level aimed at, in (0, 1).

    Returns
    -------
    ndarray [n_exits]
        ``inf`` where no threshold will do.
    """
    check_probability("risk", risk)
    table, wrong = _checked(scores, losses)
    running = np.ones(table.shape[0], dtype=bool)
    stopped = errors = 0
    thresholds = np.full(table.shape[1], np.inf)
    for exit_ in range(table.shape[1]):
        order = np.argsort(-table[running, exit_], kind="stable")
        values = table[running, exit_][order]
        total_errors = errors + np.cumsum(wrong[running, exit_][order])
        total = stopped + np.arange(1, values.size + 1)
        last_of_tie = np.append(values[1:] < values[:-1], True)[: values.size]
        allowed = np.flatnonzero((total_errors <= risk * total) & last_of_tie)
        if allowed.size:
            thresholds[exit_] = values[allowed[-1]]
            stopped, errors = int(total[allowed[-1]]), int(total_errors[allowed[-1]])
            running &= table[:, exit_] < thresholds[exit_]
    return thresholds


def certify_halting(
    scores: ArrayLike,
    losses: ArrayLike,
    *,
    thresholds: ArrayLike,
    risk: float,
    delta: float,
    loss: str = "error",
    unit: str = "unit",
) -> HaltTimeResult:
    r"""Certify the error rate *given that the unit stopped by exit k*, for every k at once.

    Stopping is allowed from the last exit on, then from the one before, and so on. A step passes
    if for every exit k the exact binomial test of
    :math:`P(\text{error} \mid \text{stopped by } k) > r` rejects at level delta; the first step
    that fails ends the procedure, and the last passing one is returned.

    Parameters
    ----------
    scores, losses
        As in `screen_halting`, of **other** units than those the thresholds were screened on.
    thresholds : array_like [n_exits]
        From `screen_halting`; the policy stops at the first exit with ``score >= threshold``.
    risk : float
        Promise, in (0, 1).
    delta : float
        Error probability, in (0, 1).
    loss, unit : str
        Names for the certificate.

    Returns
    -------
    HaltTimeResult

    Notes
    -----
    Family-wise error at most delta in finite samples for independent units: the steps form a
    fixed sequence, and a step's p-value is the largest of its exits' (intersection-union), each
    exact given the number of units that stopped. An exit by which no unit *can* stop, all its
    thresholds being ``inf``, needs no test; one by which none happened to stop has p = 1.

    References
    ----------
    Ringel, Cohen, Freedman, Elad and Romano (2024), Early time classification with accumulated
    accuracy gap control, ICML, arXiv:2402.00857.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> scores, losses = rng.random((400, 2)), np.zeros((400, 2))
    >>> certify_halting(scores, losses, thresholds=[0.5, 0.5], risk=0.05, delta=0.05).first_exit
    0
    """
    check_probability("risk", risk)
    check_probability("delta", delta)
    table, wrong = _checked(scores, losses)
    values = np.asarray(thresholds, dtype=np.float64)
    n_exits = table.shape[1]
    if values.shape != (n_exits,) or np.isnan(values).any():
        raise InvalidArgumentError("thresholds", thresholds, f"{n_exits} numbers without NaN")
    log_p = np.full(n_exits, np.nan)
    first: int | None = None
    for start in range(n_exits - 1, -1, -1):
        log_p[start] = _largest_log_p(table[:, start:], wrong[:, start:], values[start:], risk)
        if not log_p[start] <= math.log(delta):
            break
        first = start
    used = np.full(n_exits, np.inf)
    if first is not None:
        used[first:] = values[first:]
    stopping = np.flatnonzero(used < np.inf)
    first = int(stopping[0]) if stopping.size else None
    return HaltTimeResult(
        thresholds=used,
        first_exit=first,
        log_p_values=log_p,
        risk=float(risk),
        delta=float(delta),
        n=table.shape[0],
        certificate=_certificate(
            values, log_p, first, table.shape[0], risk=risk, delta=delta, loss=loss, unit=unit
        ),
    )


def _certificate(
    screened: Array,
    log_p: Array,
    first: int | None,
    n: int,
    *,
    risk: float,
    delta: float,
    loss: str,
    unit: str,
) -> Certificate:
    promise = f"{loss} rate <= {risk:g} given the halt time"
    return Certificate(
        holds=first is not None,
        risk=float(risk),
        delta=float(delta),
        loss=loss,
        unit=unit,
        method="binomial",
        procedure="exits from the last to the first",
        n=n,
        index=first,
        evidence={
            "kind": "halting",
            "promise": promise,
            "claim": f"for every exit k from {first} on, the {loss} rate among {unit}s that stop "
            f"by exit k is at most {risk:g}",
            "screened": [str(float(value)) for value in screened],
            "log_p_values": [None if np.isnan(p) else max(float(p), -1e300) for p in log_p],
        },
        bound=1.0,
        assumptions=(INDEPENDENT, "thresholds were screened on other units"),
        split={"n_test": n},
    )


def _largest_log_p(table: Array, wrong: Array, thresholds: Array, risk: float) -> float:
    reached = table >= thresholds
    exit_ = np.where(reached.any(axis=1), reached.argmax(axis=1), table.shape[1])
    stopped = np.flatnonzero(exit_ < table.shape[1])
    at = np.bincount(exit_[stopped], minlength=table.shape[1])
    bad = np.bincount(
        exit_[stopped], wrong[stopped, exit_[stopped]], minlength=table.shape[1]
    ).astype(np.int64)
    log_p = binomial_log_p(np.cumsum(bad), np.cumsum(at), risk=risk)
    can_stop = np.maximum.accumulate(thresholds < np.inf)
    return float(log_p[can_stop].max(initial=-np.inf))


def _checked(scores: ArrayLike, losses: ArrayLike) -> tuple[Array, Array]:
    table = as_floats("scores", scores)
    wrong = as_floats("losses", losses)
    if table.ndim != 2 or table.size == 0 or np.isnan(table).any():
        raise InvalidArgumentError("scores", f"shape {table.shape}", "[n_units, n_exits], no NaN")
    if wrong.shape != table.shape:
        raise InvalidArgumentError("losses", f"shape {wrong.shape}", f"of shape {table.shape}")
    require_binary("losses", wrong)
    return table, wrong
