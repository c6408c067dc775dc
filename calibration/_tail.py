"""Risk control of the tail: quantiles, mean of the worst share (CVaR), mean between quantiles."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from adaptive.calibration._bands import berk_jones_levels
from adaptive.calibration._certificate import Certificate
from adaptive.calibration._errors import InvalidArgumentError, InvalidTypeError, UnsupportedError
from adaptive.calibration._losses import LossColumns, Losses, groups_of, loss_columns
from adaptive.calibration._risk_test import INDEPENDENT
from adaptive.calibration._transformed_losses import TransformedLosses
from adaptive.calibration._validation import (
    check_count,
    check_positive,
    check_probability,
    float_matrix,
    require_at_most,
)

if TYPE_CHECKING:
    import pandas as pd

Array = NDArray[np.float64]


def quantile_rank(n: int, level: float, *, delta: float) -> int | None:
    r"""Rank of the order statistic that bounds a quantile from above.

    The smallest k with :math:`P(\mathrm{Bin}(n, \beta) \ge k) \le \delta`.

    Parameters
    ----------
    n : int
        Units.
    level : float
        Level :math:`\beta` of the quantile, in (0, 1).
    delta : float
        In (0, 1).

    Returns
    -------
    int or None
        1..n, or None if n units are too few for a bound below the largest possible value.

    Examples
    --------
    >>> quantile_rank(1000, 0.9, delta=0.05), quantile_rank(100, 0.9, delta=0.1)
    (916, 95)
    """
    check_count("n", n)
    check_probability("level", level)
    check_probability("delta", delta)
    ranks = np.arange(1, n + 1)
    small = np.flatnonzero(stats.binom.sf(ranks - 1, n, level) <= delta)
    return int(ranks[small[0]]) if small.size else None


class AbstractTailRisk(abc.ABC):
    """A functional of the loss distribution that has a distribution-free upper bound."""

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """What is bounded, in words."""

    @abc.abstractmethod
    def upper_bound(self, losses: ArrayLike, *, delta: float, bound: float = 1.0) -> Array:
        """Bound U per column with P(functional > U) <= delta, for independent units.

        Parameters
        ----------
        losses : array_like [n_units, n_columns] or [n_units]
            At most `bound`; negative values welcome.
        delta : float
            In (0, 1).
        bound : float
            Declared upper bound of the loss.

        Returns
        -------
        ndarray [n_columns]
        """


@dataclass(frozen=True)
class Quantile(AbstractTailRisk):
    """The loss that all but a share ``1 - level`` of units stay below or at.

    Examples
    --------
    >>> Quantile(0.9).upper_bound(np.arange(100) / 100, delta=0.1).tolist()
    [0.94]
    """

    level: float

    def __post_init__(self) -> None:
        check_probability("level", self.level)

    @property
    def name(self) -> str:
        """What is bounded, in words."""
        return f"{self.level:g}-quantile of the loss"

    def upper_bound(self, losses: ArrayLike, *, delta: float, bound: float = 1.0) -> Array:
        """Bound by one order statistic; see `quantile_rank`."""
        ordered, upper = _ordered(losses, bound)
        rank = quantile_rank(ordered.shape[0], self.level, delta=delta)
        return np.full(ordered.shape[1], upper) if rank is None else ordered[rank - 1].copy()


@dataclass(frozen=True)
class IntervalMean(AbstractTailRisk):
    r"""Mean of the quantiles between two levels: :math:`\int_a^b Q(p)\,dp / (b - a)`.

    ``IntervalMean(0, 1)`` is the mean, ``IntervalMean(0.25, 0.75)`` the interquartile mean.

    References
    ----------
    Snell, Zollo, Deng, Pitassi and Zemel (2023), Quantile risk control, ICLR, arXiv:2212.13629.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.low < self.high <= 1.0:
            raise InvalidArgumentError("low", (self.low, self.high), "0 <= low < high <= 1")

    @property
    def name(self) -> str:
        """What is bounded, in words."""
        return f"mean loss between quantiles {self.low:g} and {self.high:g}"

    def upper_bound(self, losses: ArrayLike, *, delta: float, bound: float = 1.0) -> Array:
        """Bound by the Berk-Jones band over the ranks that matter."""
        ordered, upper = _ordered(losses, bound)
        n = ordered.shape[0]
        first = min(max(1, math.ceil(n * self.low)), n)
        levels = berk_jones_levels(n, delta=delta, first=first)
        return mean_between(ordered, levels, low=self.low, high=self.high, bound=upper)


@dataclass(frozen=True)
class ConditionalValueAtRisk(AbstractTailRisk):
    """Mean of the worst share ``1 - level`` of losses (CVaR, expected shortfall).

    Examples
    --------
    >>> zeros = np.zeros(200)
    >>> bound = ConditionalValueAtRisk(0.9).upper_bound(zeros, delta=0.05)
    >>> bool(0.0 < bound[0] < 0.25)
    True
    """

    level: float

    def __post_init__(self) -> None:
        check_probability("level", self.level)

    @property
    def name(self) -> str:
        """What is bounded, in words."""
        return f"mean of the worst {1.0 - self.level:.6g} of losses"

    def upper_bound(self, losses: ArrayLike, *, delta: float, bound: float = 1.0) -> Array:
        """Bound by the Berk-Jones band over the ranks that matter."""
        return IntervalMean(self.level, 1.0).upper_bound(losses, delta=delta, bound=bound)


@dataclass(frozen=True, eq=False, repr=False)
class TailResult:
    """Outcome of `control_tail`.

    Parameters
    ----------
    index : int or None
        Last certified column; None means full computation is to be used.
    certified : ndarray of bool [n_columns]
        Column 0 is true: its loss is zero by construction.
    upper_bounds : ndarray [n_columns]
        Bound of each visited column, NaN elsewhere. Each holds at 1 - delta on its own.
    tail : AbstractTailRisk
    risk, delta, bound : float
    n : int
    certificate : Certificate
        What is promised, on what evidence.
    """

    index: int | None
    certified: NDArray[np.bool_]
    upper_bounds: Array
    tail: AbstractTailRisk
    risk: float
    delta: float
    bound: float
    n: int
    certificate: Certificate

    def statement(self) -> str:
        """Say in plain words what is promised."""
        return self.certificate.statement()

    def to_frame(self) -> pd.DataFrame:
        """One row per column."""
        import pandas as pd

        table = {"certified": self.certified, "upper_bound": self.upper_bounds}
        return pd.DataFrame(table).rename_axis("column")

    def __repr__(self) -> str:
        return f"TailResult(index={self.index}; {self.statement()})"


def control_tail(
    losses: Losses,
    *,
    tail: AbstractTailRisk,
    risk: float,
    delta: float = 0.05,
    bound: float = 1.0,
    n_columns: int | None = None,
    loss: str = "loss",
    unit: str = "unit",
) -> TailResult:
    """Certify columns in order while the bound on the tail risk is at most `risk`.

    Parameters
    ----------
    losses : array_like [n_units, n_columns], callable or curve
        As in `control_risk`: columns from safest to cheapest, column 0 full computation, or
        ``f(column) -> [n_units]`` with `n_columns`, or a curve of a trace without groups.
    tail : AbstractTailRisk
        `Quantile`, `ConditionalValueAtRisk` or `IntervalMean`.
    risk : float
        Promise for the tail risk, in (0, bound).
    delta : float
        In (0, 1).
    bound : float
        Declared upper bound of the loss.
    n_columns : int, optional
        For a callable.
    loss, unit : str
        Names for the certificate.

    Returns
    -------
    TailResult

    Notes
    -----
    Each column is tested at level delta by its upper bound and the first failure ends the
    sequence, so the chance of any false certificate is at most delta, for independent units.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> losses = rng.random((400, 3)) * [0.0, 0.1, 0.9]
    >>> control_tail(losses, tail=ConditionalValueAtRisk(0.9), risk=0.3).index
    1
    """
    check_probability("delta", delta)
    if not isinstance(tail, AbstractTailRisk):
        raise InvalidTypeError("tail", tail, "a Quantile, ConditionalValueAtRisk or IntervalMean")
    if isinstance(losses, Mapping | TransformedLosses):
        raise InvalidTypeError("losses", losses, "one loss, as it is")
    (source,) = loss_columns(
        losses, risk=risk, bound=bound, loss_type="bounded", n_columns=n_columns, name=loss
    )
    if groups_of((source,)) is not None:
        raise InvalidArgumentError("losses", "a trace with groups", "of units without groups")
    certified = np.zeros(source.n_columns, dtype=bool)
    certified[0] = True
    bounds = np.full(source.n_columns, np.nan)
    n = 0
    for column in range(1, source.n_columns):
        values = source.column(column)
        if n not in (0, values.size):
            raise InvalidArgumentError(
                "losses", f"{values.size} units in column {column}", f"{n} units in each"
            )
        n = values.size
        bounds[column] = tail.upper_bound(values, delta=delta, bound=source.bound)[0]
        if bounds[column] > source.risk:
            break
        certified[column] = True
    last = int(np.flatnonzero(certified)[-1])
    return TailResult(
        index=last or None,
        certified=certified,
        upper_bounds=bounds,
        tail=tail,
        risk=source.risk,
        delta=float(delta),
        bound=source.bound,
        n=n,
        certificate=_certificate(source, tail, bounds, last or None, n, delta=delta, unit=unit),
    )


def tail_from(values: Mapping[str, Any]) -> AbstractTailRisk:
    """Return the tail risk that a certificate's evidence names."""
    settings = dict(values)
    name = settings.pop("name")
    for kind in (Quantile, IntervalMean, ConditionalValueAtRisk):
        if kind.__name__ == name:
            return kind(**settings)
    raise UnsupportedError(f"cannot verify: this library has no tail risk named {name!r}")


def _certificate(
    source: LossColumns,
    tail: AbstractTailRisk,
    bounds: Array,
    index: int | None,
    n: int,
    *,
    delta: float,
    unit: str,
) -> Certificate:
    visited = [int(j) for j in np.flatnonzero(~np.isnan(bounds))]
    settings: dict[str, Any] = dataclasses.asdict(tail) if dataclasses.is_dataclass(tail) else {}
    name = tail.name.replace("loss", source.name)
    weak = (
        f"The {name} of the first column is only bounded by {bounds[1]:.6g}."
        if index is None
        else ""
    )
    return Certificate(
        holds=index is not None,
        risk=source.risk,
        delta=float(delta),
        loss=source.name,
        unit=unit,
        method="distribution-free bound",
        procedure="fixed-sequence",
        n=n,
        index=index,
        knob=None
        if index is None or source.curve is None
        else float(source.curve.thresholds[index]),
        evidence={
            "kind": "tail",
            "promise": f"{name} <= {source.risk:g}",
            "claim": f"the {name} at every certified column, {index} the last, is at most "
            f"{source.risk:g}",
            "tail": {"name": type(tail).__name__, **settings},
            "losses": [source.facts("distribution-free bound")],
            "n_columns": source.n_columns,
            "columns": visited,
            "certified": [j for j in visited if bounds[j] <= source.risk],
            "upper_bounds": [float(bounds[j]) for j in visited],
        },
        bound=source.bound,
        assumptions=(INDEPENDENT, f"no {source.name} exceeds {source.bound:g}"),
        split={"n_test": n},
        notes=(weak,) if weak else (),
    )


def mean_between(ordered: Array, levels: Array, *, low: float, high: float, bound: float) -> Array:
    r"""Upper bound on :math:`\int_a^b Q(p)\,dp / (b - a)` from a band.

    Where F(i-th smallest) >= b_i for all i, the quantile function is at most the i-th smallest
    loss on :math:`(b_{i-1}, b_i]` and at most `bound` above the last level.

    Parameters
    ----------
    ordered : ndarray [n, n_columns]
        Losses sorted along the first axis.
    levels : ndarray [n]
        Non-decreasing levels b of a band, such as `dkw_levels`.
    low, high : float
        The two levels a < b.
    bound : float
        Upper bound of the loss.

    Returns
    -------
    ndarray [n_columns]
    """
    share = np.clip((levels - low) / (high - low), 0.0, 1.0)
    weights = np.diff(share, prepend=0.0)
    found: Array = weights @ ordered + (1.0 - share[-1]) * bound
    return found


def _ordered(losses: ArrayLike, bound: float) -> tuple[Array, float]:
    matrix = float_matrix("losses", losses)
    upper = check_positive("bound", bound)
    require_at_most("losses", matrix, upper)
    return np.sort(matrix, axis=0), upper
