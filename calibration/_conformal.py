"""Conformal risk control: the mean risk over calibration draws, for losses that only grow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from adaptive.calibration._certificate import Certificate
from adaptive.calibration._errors import InvalidArgumentError
from adaptive.calibration._validation import check_risk, float_matrix, require_at_most

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, kw_only=True, eq=False)
class ConformalResult:
    """Outcome of `conformal_risk_control`.

    Parameters
    ----------
    index : int or None
        Last column before the first failing one; None means full computation is to be used.
    first_failing : int or None
        First column whose adjusted mean exceeds the risk; None if every column passes.
    adjusted : ndarray [n_columns]
        ``(n * mean + bound) / (n + 1)`` of the losses that were used, never decreasing.
    means : ndarray [n_columns]
        Mean of the losses as given.
    risk, bound : float
    n : int
        Units.
    monotonised : bool
        Whether each unit's losses were replaced by their running maximum.
    certificate : Certificate
        What is promised, on what evidence; its delta is 1, for there is no confidence.
    """

    index: int | None
    first_failing: int | None
    adjusted: NDArray[np.float64]
    means: NDArray[np.float64]
    risk: float
    bound: float
    n: int
    monotonised: bool

    certificate: Certificate

    def statement(self) -> str:
        """Say in plain words what is promised and what is not."""
        return self.certificate.statement()

    def to_frame(self) -> pd.DataFrame:
        """One row per column."""
        import pandas as pd

        return pd.DataFrame(
            {
                "mean_loss": self.means,
                "adjusted": self.adjusted,
                "passes": self.adjusted <= self.risk,
            }
        ).rename_axis("column")

    def __repr__(self) -> str:
        return f"ConformalResult(index={self.index}; {self.statement()})"


def conformal_risk_control(
    losses: ArrayLike,
    *,
    risk: float,
    bound: float = 1.0,
    monotonise: bool = False,
    loss: str = "loss",
    unit: str = "unit",
) -> ConformalResult:
    r"""Last column before the first one with :math:`(n \bar L_j + B) / (n + 1) > \alpha`.

    Parameters
    ----------
    losses : array_like [n_units, n_columns]
        Columns from safest to cheapest; at most `bound`, and for each unit never decreasing from
        column to column. May be negative.
    risk : float
        Level :math:`\alpha`, in (0, bound).
    bound : float
        Declared upper bound :math:`B` of the loss.
    monotonise : bool
        Replace each unit's losses by their running maximum over the columns, which controls the
        original loss too. Otherwise a decreasing loss is an error, never passed over: without
        monotone losses the guarantee does not hold.
    loss, unit : str
        Names for the certificate.

    Returns
    -------
    ConformalResult

    Raises
    ------
    InvalidArgumentError
        If a loss is NaN, above the bound, or decreases along the columns.

    Notes
    -----
    Guarantee: for exchangeable units, the *expected* loss at the chosen column, over the
    calibration draw and the next unit together, is at most `risk`. This is weaker than
    `control_risk`: it says nothing about the draw at hand, whose true risk exceeds the level in
    a large share of draws (measured on early-exit losses: 23-44%). Full computation, with zero
    loss, is what remains where no column passes; below ``bound / risk - 1`` units none can.

    References
    ----------
    Angelopoulos, Bates, Fisch, Lei and Schuster (2024), Conformal risk control, ICLR,
    arXiv:2208.02814, theorem 1.

    Examples
    --------
    >>> losses = np.repeat([[0.0, 0.025, 0.05, 0.075, 0.1]], 40, axis=0)
    >>> result = conformal_risk_control(losses, risk=0.1)
    >>> result.index, result.first_failing
    (3, 4)
    """
    level, upper = check_risk(risk, bound)
    table = float_matrix("losses", losses)
    require_at_most("losses", table, upper)
    used = np.maximum.accumulate(table, axis=1)
    if not monotonise and (used > table).any():
        row, column = np.argwhere(used > table)[0]
        raise InvalidArgumentError(
            "losses",
            f"a decrease at unit {row}, column {column}",
            "never decreasing along the columns of a unit (or pass `monotonise=True`, or use "
            "`control_risk`, which needs no monotone losses)",
        )
    n = table.shape[0]
    adjusted = (used.sum(axis=0) + upper) / (n + 1)
    failing = np.flatnonzero(adjusted > level)
    first = int(failing[0]) if failing.size else None
    last = table.shape[1] - 1 if first is None else first - 1
    index = last if last >= 0 else None
    evidence = {
        "kind": "conformal",
        "promise": f"mean {loss} <= {level:g}",
        "claim": f"Column {index} has mean {loss} <= {level:g}",
        "n_columns": table.shape[1],
        "monotonised": bool(monotonise),
        "first_failing": first,
        "adjusted": adjusted.tolist(),
        "means": table.mean(axis=0).tolist(),
    }
    certificate = _certificate(evidence, index, level, upper, n, loss=loss, unit=unit)
    return ConformalResult(
        index=index,
        first_failing=first,
        adjusted=adjusted,
        means=table.mean(axis=0),
        risk=level,
        bound=upper,
        n=n,
        monotonised=bool(monotonise),
        certificate=certificate,
    )


def _certificate(
    evidence: dict[str, Any],
    index: int | None,
    risk: float,
    bound: float,
    n: int,
    *,
    loss: str,
    unit: str,
) -> Certificate:
    enforced = " (enforced by their running maximum)" if evidence["monotonised"] else ""
    least = conformal_minimum_units(risk, bound=bound)
    few = f"With fewer than {least} {unit}s nothing can be."
    return Certificate(
        holds=index is not None,
        risk=risk,
        delta=1.0,
        loss=loss,
        unit=unit,
        method="conformal",
        procedure="first failing column",
        n=n,
        index=index,
        evidence=evidence,
        bound=bound,
        assumptions=(
            "units are exchangeable",
            f"losses never exceed {bound:g} and never decrease along the columns for any "
            f"{unit}{enforced}",
        ),
        split={"n_test": n},
        notes=(few,) if index is None and n < least else (),
    )


def conformal_minimum_units(risk: float, *, bound: float = 1.0) -> int:
    """Fewest units with which conformal risk control can pass a column of zero losses.

    Examples
    --------
    >>> [conformal_minimum_units(risk) for risk in (0.01, 0.02, 0.05, 0.1)]
    [99, 49, 19, 9]
    """
    level, upper = check_risk(risk, bound)
    n = max(1, round(upper / level) - 2)
    while upper / (n + 1) > level:
        n += 1
    return n
