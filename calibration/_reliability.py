"""How well probabilities match what happens: error measures and the reliability curve."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from adaptive.calibration._binomial import binomial_upper_bound
from adaptive.calibration._errors import InvalidArgumentError
from adaptive.calibration._extras import optional
from adaptive.calibration._probability import equal_mass_edges
from adaptive.calibration._validation import as_floats

if TYPE_CHECKING:
    import pandas as pd

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class ReliabilityCurve:
    """Mean prediction and share of label 1 in bins of the prediction.

    Parameters
    ----------
    predicted, observed : ndarray [n_bins]
        Mean probability and share of label 1 in each non-empty bin.
    counts : ndarray of int [n_bins]
        Units per bin.
    """

    predicted: Array
    observed: Array
    counts: NDArray[np.int64]

    @property
    def error(self) -> float:
        """Expected calibration error: mean distance of observed and predicted, by counts."""
        return float(np.average(np.abs(self.observed - self.predicted), weights=self.counts))

    def intervals(self, *, delta: float = 0.05) -> tuple[Array, Array]:
        """Exact confidence limits of each bin's share, each at 1 - delta [n_bins] twice.

        For independent units; bins are looked at one by one (no correction for their number).
        """
        ones = np.rint(self.observed * self.counts).astype(np.int64)
        upper = binomial_upper_bound(ones, self.counts, delta=delta / 2)
        lower = 1.0 - binomial_upper_bound(self.counts - ones, self.counts, delta=delta / 2)
        return lower, upper

    def to_frame(self) -> pd.DataFrame:
        """One row per bin."""
        import pandas as pd

        return pd.DataFrame(
            {"predicted": self.predicted, "observed": self.observed, "count": self.counts}
        ).rename_axis("bin")

    def plot(self, ax: Any = None) -> Any:
        """Draw the curve with exact 95% limits over the diagonal; returns the matplotlib axes."""
        if ax is None:
            ax = optional("matplotlib.pyplot").gca()
        lower, upper = self.intervals()
        spread = np.abs(np.stack([self.observed - lower, upper - self.observed]))
        ax.plot([0, 1], [0, 1], color="0.7", linewidth=1)
        ax.errorbar(self.predicted, self.observed, yerr=spread, marker="o", capsize=2)
        ax.set(xlabel="predicted probability", ylabel="observed share", xlim=(0, 1), ylim=(0, 1))
        return ax


def reliability_curve(
    probabilities: ArrayLike, labels: ArrayLike, *, n_bins: int = 15, equal_mass: bool = False
) -> ReliabilityCurve:
    """Reliability of probabilities of label 1.

    Parameters
    ----------
    probabilities : array_like [n]
        In [0, 1]; of label 1, or of the predicted class being right.
    labels : array_like [n]
        0 or 1.
    n_bins : int
        Bins of equal width, empty ones left out.
    equal_mass : bool
        Bins of about equal counts instead.

    Returns
    -------
    ReliabilityCurve

    Examples
    --------
    >>> round(reliability_curve([0.9, 0.9, 0.1, 0.1], [1, 0, 0, 0]).error, 12)
    0.25
    """
    p, y = _checked(probabilities, labels)
    edges = equal_mass_edges(p, n_bins) if equal_mass else np.linspace(0, 1, n_bins + 1)[1:-1]
    bins = np.searchsorted(edges, p, side="right")
    counts = np.bincount(bins, minlength=edges.size + 1)
    full = counts > 0
    return ReliabilityCurve(
        predicted=np.bincount(bins, p, counts.size)[full] / counts[full],
        observed=np.bincount(bins, y, counts.size)[full] / counts[full],
        counts=counts[full],
    )


def expected_calibration_error(
    probabilities: ArrayLike, labels: ArrayLike, *, n_bins: int = 15
) -> float:
    """Mean distance between predicted and observed share over bins of equal width.

    Depends on the bins and is biased upwards on few units; parameters as `reliability_curve`.

    References
    ----------
    Guo, Pleiss, Sun and Weinberger (2017), On calibration of modern neural networks, ICML.
    """
    return reliability_curve(probabilities, labels, n_bins=n_bins).error


def brier_score(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Mean squared distance between probability and label, in [0, 1].

    Examples
    --------
    >>> round(brier_score([0.8, 0.4], [1, 0]), 12)
    0.1
    """
    p, y = _checked(probabilities, labels)
    return float(np.mean((p - y) ** 2))


def negative_log_likelihood(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Mean of ``-ln`` of the probability given to what happened, in nats; ``inf`` if it was 0."""
    p, y = _checked(probabilities, labels)
    with np.errstate(divide="ignore"):
        return float(-np.log(np.where(y == 1.0, p, 1.0 - p)).mean())


def _checked(probabilities: ArrayLike, labels: ArrayLike) -> tuple[Array, Array]:
    p = as_floats("probabilities", probabilities)
    y = np.asarray(labels, dtype=np.float64)
    if p.ndim != 1 or p.size == 0 or not ((p >= 0.0) & (p <= 1.0)).all():
        raise InvalidArgumentError("probabilities", probabilities, "a non-empty vector in [0, 1]")
    if y.shape != p.shape or not np.isin(y, (0.0, 1.0)).all():
        raise InvalidArgumentError("labels", labels, f"0 or 1, of shape {p.shape}")
    return p, y
