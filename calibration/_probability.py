"""Maps from scores to probabilities: temperature, Platt, isotonic, Beta, histogram.

Each `fit_...` function returns a frozen map of plain numbers that is called on scores. Fit on units
that are used for nothing else: a map that saw the test units voids a certificate earned on them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, special

from adaptive.calibration._beta_mixture import clipped_unit_interval
from adaptive.calibration._errors import InvalidArgumentError
from adaptive.calibration._validation import as_floats, check_count, check_positive

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Temperature:
    """``softmax(logits / temperature)`` over the last axis.

    Parameters
    ----------
    temperature : float
        Positive; above 1 softens.

    Examples
    --------
    >>> Temperature(2.0)([2.0, 0.0]).round(4).tolist()
    [0.7311, 0.2689]
    """

    temperature: float

    def __post_init__(self) -> None:
        check_positive("temperature", self.temperature)

    def __call__(self, logits: ArrayLike) -> Array:
        """Probabilities [..., n_classes] of logits [..., n_classes]."""
        found: Array = special.softmax(as_floats("logits", logits) / self.temperature, axis=-1)
        return found


@dataclass(frozen=True)
class Platt:
    """``1 / (1 + exp(-(slope * score + intercept)))``.

    Parameters
    ----------
    slope, intercept : float
        From `fit_platt`.
    """

    slope: float
    intercept: float

    def __call__(self, scores: ArrayLike) -> Array:
        """Probability of label 1, shape of `scores`."""
        found: Array = special.expit(self.slope * np.asarray(scores, float) + self.intercept)
        return found


@dataclass(frozen=True)
class BetaCalibration:
    """``logit(p) = a ln(s) - b ln(1 - s) + c`` for scores s in [0, 1]; identity at (1, 1, 0).

    Parameters
    ----------
    a, b, c : float
        From `fit_beta_calibration`; non-decreasing where a and b are not negative.

    References
    ----------
    Kull, Silva Filho and Flach (2017), Beta calibration, AISTATS, PMLR 54:623-631.
    """

    a: float
    b: float
    c: float

    def __call__(self, scores: ArrayLike) -> Array:
        """Probability of label 1, shape of `scores`."""
        s = clipped_unit_interval("scores", scores)
        found: Array = special.expit(self.a * np.log(s) - self.b * np.log1p(-s) + self.c)
        return found


@dataclass(frozen=True)
class Isotonic:
    """Non-decreasing and piecewise linear between knots, constant outside them.

    Parameters
    ----------
    knots : tuple of float [n_knots]
        Increasing scores.
    values : tuple of float [n_knots]
        Probability at each knot.
    """

    knots: tuple[float, ...]
    values: tuple[float, ...]

    def __call__(self, scores: ArrayLike) -> Array:
        """Probability of label 1, shape of `scores`."""
        found: Array = np.interp(np.asarray(scores, float), self.knots, self.values)
        return found


@dataclass(frozen=True)
class Histogram:
    """One probability per bin of scores.

    Parameters
    ----------
    edges : tuple of float [n_bins - 1]
        Inner edges, increasing; a score on an edge belongs to the bin above.
    values : tuple of float [n_bins]
        Probability in each bin.
    counts : tuple of int [n_bins]
        Units that the probability was estimated from.
    """

    edges: tuple[float, ...]
    values: tuple[float, ...]
    counts: tuple[int, ...]

    def __call__(self, scores: ArrayLike) -> Array:
        """Probability of label 1, shape of `scores`."""
        bins = np.searchsorted(self.edges, np.asarray(scores, float), side="right")
        return np.asarray(self.values)[bins]


def fit_temperature(logits: ArrayLike, labels: ArrayLike) -> Temperature:
    """Temperature of least negative log likelihood.

    Parameters
    ----------
    logits : array_like [n, n_classes]
        Finite.
    labels : array_like of int [n]
        In 0..n_classes-1.

    Returns
    -------
    Temperature
        Searched in [1e-3, 1e3]: perfectly separated labels give the lower end, labels that the
        logits contradict the upper one.

    References
    ----------
    Guo, Pleiss, Sun and Weinberger (2017), On calibration of modern neural networks, ICML.
    """
    table = as_floats("logits", logits)
    classes = np.asarray(labels)
    if table.ndim != 2 or table.size == 0 or not np.isfinite(table).all():
        raise InvalidArgumentError("logits", f"shape {table.shape}", "finite [n, n_classes]")
    if classes.shape != table.shape[:1] or classes.dtype.kind not in "iu":
        raise InvalidArgumentError("labels", labels, f"integers of shape {table.shape[:1]}")
    if classes.min() < 0 or classes.max() >= table.shape[1]:
        raise InvalidArgumentError("labels", labels, f"in 0..{table.shape[1] - 1}")
    centred = table - table.max(axis=1, keepdims=True)
    chosen = np.take_along_axis(centred, classes[:, None], axis=1).mean()

    def loss(log_temperature: float) -> float:
        inverse = np.exp(-log_temperature)
        return float(special.logsumexp(centred * inverse, axis=1).mean() - chosen * inverse)

    limit = np.log(1e3)
    found = optimize.minimize_scalar(loss, bounds=(-limit, limit), method="bounded")
    return Temperature(float(np.exp(found.x)))


def fit_platt(scores: ArrayLike, labels: ArrayLike, *, weights: ArrayLike | None = None) -> Platt:
    """Logistic map of least negative log likelihood with Platt's smoothed targets.

    Parameters
    ----------
    scores : array_like [n]
        Finite.
    labels : array_like [n]
        0 or 1.
    weights : array_like [n], optional
        Non-negative.

    Returns
    -------
    Platt
        Targets ``(n_1 + 1) / (n_1 + 2)`` and ``1 / (n_0 + 2)`` keep it finite for separated or
        one-sided labels.

    References
    ----------
    Platt (1999), Probabilistic outputs for support vector machines; Lin, Lin and Weng (2007),
    doi:10.1007/s10994-007-5018-6.
    """
    s, y, w = _checked(scores, labels, weights)
    centre, scale = float(s.mean()), float(s.std()) or 1.0
    design = np.stack([(s - centre) / scale, np.ones_like(s)], axis=1)
    slope, intercept = _logistic(design, _smoothed(y, w), w, [(None, None)] * 2)
    return Platt(slope / scale, intercept - slope * centre / scale)


def fit_beta_calibration(
    scores: ArrayLike, labels: ArrayLike, *, weights: ArrayLike | None = None
) -> BetaCalibration:
    """Beta map of least negative log likelihood, non-decreasing (``a, b >= 0``).

    Parameters
    ----------
    scores : array_like [n]
        In [0, 1]; moved into [1e-4, 1 - 1e-4].
    labels, weights
        As in `fit_platt`; the same smoothed targets are used.

    Returns
    -------
    BetaCalibration

    References
    ----------
    Kull, Silva Filho and Flach (2017), Beta calibration, AISTATS, PMLR 54:623-631.
    """
    s, y, w = _checked(clipped_unit_interval("scores", scores), labels, weights)
    design = np.stack([np.log(s), -np.log1p(-s), np.ones_like(s)], axis=1)
    a, b, c = _logistic(design, _smoothed(y, w), w, [(0.0, None), (0.0, None), (None, None)])
    return BetaCalibration(a, b, c)


def fit_isotonic(
    scores: ArrayLike, labels: ArrayLike, *, weights: ArrayLike | None = None
) -> Isotonic:
    """Isotonic regression of labels on scores (scikit-learn's pool-adjacent-violators).

    Parameters as in `fit_platt`.

    Returns
    -------
    Isotonic
        Constant beyond the smallest and the largest score seen.

    References
    ----------
    Zadrozny and Elkan (2002), doi:10.1145/775047.775151.
    """
    from sklearn.isotonic import IsotonicRegression

    s, y, w = _checked(scores, labels, weights)
    model = IsotonicRegression(y_min=0.0, y_max=1.0, out_of_bounds="clip")
    model.fit(s, y, sample_weight=w)
    return Isotonic(tuple(model.X_thresholds_.tolist()), tuple(model.y_thresholds_.tolist()))


def fit_histogram(scores: ArrayLike, labels: ArrayLike, *, n_bins: int = 10) -> Histogram:
    """Share of label 1 in bins that hold equally many scores.

    Parameters
    ----------
    scores, labels
        As in `fit_platt`.
    n_bins : int
        At most so many: ties never straddle two bins, so there may be fewer.

    Returns
    -------
    Histogram

    References
    ----------
    Zadrozny and Elkan (2001), Obtaining calibrated probability estimates, ICML.
    """
    s, y, _ = _checked(scores, labels, None)
    edges = equal_mass_edges(s, n_bins)
    bins = np.searchsorted(edges, s, side="right")
    counts = np.bincount(bins, minlength=edges.size + 1)
    values = np.bincount(bins, y, minlength=edges.size + 1) / counts
    return Histogram(tuple(edges.tolist()), tuple(values.tolist()), tuple(counts.tolist()))


def equal_mass_edges(values: Array, n_bins: int) -> Array:
    """Inner edges of at most `n_bins` non-empty bins that hold about equally many values."""
    check_count("n_bins", n_bins)
    ordered = np.sort(values)
    cuts = ordered[np.arange(1, n_bins) * values.size // n_bins]
    return np.unique(cuts[cuts > ordered[0]])


def _smoothed(labels: Array, weights: Array) -> Array:
    """Platt's targets, a little inside 0 and 1: separated labels have a finite map too."""
    ones, zeros = float(weights @ labels), float(weights @ (1.0 - labels))
    return np.where(labels == 1.0, (ones + 1.0) / (ones + 2.0), 1.0 / (zeros + 2.0))


def _logistic(
    design: Array, target: Array, weights: Array, bounds: list[tuple[float | None, float | None]]
) -> list[float]:
    share = weights / weights.sum()

    def objective(coefficients: Array) -> tuple[float, Array]:
        logit = design @ coefficients
        loss = share @ (np.logaddexp(0.0, logit) - target * logit)
        return float(loss), design.T @ (share * (special.expit(logit) - target))

    start = np.zeros(design.shape[1])
    options = {"ftol": 1e-15, "gtol": 1e-10, "maxiter": 1000}
    found = optimize.minimize(
        objective, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options
    )
    return [float(value) for value in found.x]


def _checked(
    scores: ArrayLike, labels: ArrayLike, weights: ArrayLike | None
) -> tuple[Array, Array, Array]:
    s = np.asarray(scores, dtype=np.float64)
    y = np.asarray(labels, dtype=np.float64)
    if s.ndim != 1 or s.size == 0 or not np.isfinite(s).all():
        raise InvalidArgumentError("scores", f"shape {s.shape}", "a non-empty vector, finite")
    if y.shape != s.shape or not np.isin(y, (0.0, 1.0)).all():
        raise InvalidArgumentError("labels", labels, f"0 or 1, of shape {s.shape}")
    w = np.ones_like(s) if weights is None else np.asarray(weights, dtype=np.float64)
    if w.shape != s.shape or not (np.isfinite(w) & (w >= 0.0)).all() or w.sum() == 0.0:
        raise InvalidArgumentError("weights", weights, f"non-negative, of shape {s.shape}")
    return s, y, w
