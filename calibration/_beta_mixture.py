"""Beta mixtures on (0, 1): scores of tokens that agree with the full model, and that do not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, special

from adaptive.calibration._errors import InvalidArgumentError
from adaptive.calibration._validation import as_floats, check_count, check_number

Array = NDArray[np.float64]
CLIP = 1e-4
LEAST_CONCENTRATION = 1e-2
MOST_CONCENTRATION = 1e6
_STEPS = 200


class Estimator(Protocol):
    """Shapes of one Beta density from weighted values."""

    def __call__(
        self, values: ArrayLike, /, *, weights: ArrayLike | None = None
    ) -> tuple[float, float]: ...


@dataclass(frozen=True)
class BetaMixtureModel:
    r"""Density :math:`\sum_k w_k\, \mathrm{Beta}(x; a_k, b_k)`, components by increasing mean.

    Parameters
    ----------
    weights : tuple of float [n_components]
        Mixing weights, non-negative, summing to 1.
    alpha, beta : tuple of float [n_components]
        Shapes, positive.

    Raises
    ------
    InvalidArgumentError
        If lengths differ, a shape is not positive or the weights are not a distribution.
    """

    weights: tuple[float, ...]
    alpha: tuple[float, ...]
    beta: tuple[float, ...]

    def __post_init__(self) -> None:
        if not len(self.weights) == len(self.alpha) == len(self.beta) > 0:
            raise InvalidArgumentError("alpha", self.alpha, "as long as `beta` and `weights`")
        if not min(*self.alpha, *self.beta) > 0.0:
            raise InvalidArgumentError("alpha", (self.alpha, self.beta), "positive, like `beta`")
        if min(self.weights) < 0.0 or abs(sum(self.weights) - 1.0) > 1e-6:
            raise InvalidArgumentError("weights", self.weights, "non-negative, summing to 1")

    @property
    def means(self) -> Array:
        """Mean of each component [n_components]."""
        alpha, beta = np.asarray(self.alpha), np.asarray(self.beta)
        found: Array = alpha / (alpha + beta)
        return found

    def log_densities(self, values: ArrayLike) -> Array:
        """Log density of each component, without its weight [n_components, ...]."""
        x = clipped_unit_interval("values", values)
        shape = (-1,) + (1,) * x.ndim
        alpha = np.reshape(self.alpha, shape)
        beta = np.reshape(self.beta, shape)
        found: Array = (
            special.xlogy(alpha - 1, x)
            + special.xlog1py(beta - 1, -x)
            - special.betaln(alpha, beta)
        )
        return found

    def posterior(self, values: ArrayLike, *, weighted: bool = True) -> Array:
        """Probability that a value came from the last component (largest mean), shape of `values`.

        With ``weighted=False`` the mixing weights are taken as equal, as some published rules do.
        """
        with np.errstate(divide="ignore"):
            log_weights = np.log(np.asarray(self.weights))
        if not weighted:
            log_weights = np.zeros_like(log_weights)
        logs = self.log_densities(values)
        logs = logs + log_weights.reshape((-1,) + (1,) * (logs.ndim - 1))
        share: Array = np.exp(logs[-1] - np.logaddexp.reduce(logs, axis=0))
        return share

    def crossing(self, level: float, *, weighted: bool = True) -> float:
        """Smallest point from which the posterior stays at or above `level`.

        Parameters
        ----------
        level : float
            In (0, 1).
        weighted : bool
            As in `posterior`.

        Returns
        -------
        float
            In [0, 1]; 0 if the posterior is above `level` everywhere, ``inf`` if it ends below.
            The posterior need not be monotone: above this point it is never below `level` again.

        Examples
        --------
        >>> mixture = BetaMixtureModel((0.5, 0.5), (2.0, 8.0), (3.0, 2.0))
        >>> round(mixture.crossing(0.4), 4)
        0.5961
        """
        check_number("level", level)
        grid = np.linspace(CLIP, 1 - CLIP, 20_001)
        below = np.flatnonzero(self.posterior(grid, weighted=weighted) < level)
        if below.size == 0:
            return 0.0
        if below[-1] == grid.size - 1:
            return float("inf")
        low, high = grid[below[-1]], grid[below[-1] + 1]
        return float(
            optimize.brentq(
                lambda x: float(self.posterior(x, weighted=weighted)) - level, low, high
            )
        )

    def mean_log_likelihood(self, values: ArrayLike, *, weights: ArrayLike | None = None) -> float:
        """Weighted mean log density of the mixture at `values`."""
        x, w = _checked(values, weights)
        return float(np.average(np.logaddexp.reduce(self._joint(x), axis=0), weights=w))

    def _joint(self, x: Array) -> Array:
        with np.errstate(divide="ignore"):
            joint: Array = self.log_densities(x) + np.log(np.asarray(self.weights))[:, None]
        return joint


def beta_from_moments(
    values: ArrayLike, *, weights: ArrayLike | None = None
) -> tuple[float, float]:
    r"""Beta shapes from weighted mean and variance: :math:`a + b = m(1 - m)/v - 1`.

    Parameters
    ----------
    values : array_like [n]
        In [0, 1]; moved into [1e-4, 1 - 1e-4].
    weights : array_like [n], optional
        Non-negative.

    Returns
    -------
    (float, float)
        Defined for every sample: the concentration ``a + b`` is kept in [0.01, 1e6] (zero
        variance, ties or one value give 1e6 around their mean), and total weight zero gives the
        uniform (1, 1).

    Examples
    --------
    >>> tuple(round(shape, 9) for shape in beta_from_moments([0.2, 0.4, 0.6, 0.8]))
    (2.0, 2.0)
    >>> tuple(round(shape, 3) for shape in beta_from_moments([0.3, 0.3]))
    (300000.0, 700000.0)
    """
    x, w = _checked(values, weights)
    total = w.sum()
    if total <= 0.0:
        return 1.0, 1.0
    mean = float(w @ x / total)
    variance = float(w @ (x - mean) ** 2 / total)
    spread = mean * (1.0 - mean)
    concentration = spread / max(variance, spread / (MOST_CONCENTRATION + 1.0)) - 1.0
    concentration = min(max(concentration, LEAST_CONCENTRATION), MOST_CONCENTRATION)
    return mean * concentration, (1.0 - mean) * concentration


def beta_from_likelihood(
    values: ArrayLike, *, weights: ArrayLike | None = None
) -> tuple[float, float]:
    r"""Beta shapes of greatest weighted likelihood.

    Solves :math:`\psi(a) - \psi(a+b) = \overline{\ln x}`,
    :math:`\psi(b) - \psi(a+b) = \overline{\ln(1-x)}` by Newton steps in log shapes, from the
    moments.

    Parameters
    ----------
    values, weights
        As in `beta_from_moments`.

    Returns
    -------
    (float, float)
        As in `beta_from_moments` for samples that have no maximum (ties, one value, no weight).

    References
    ----------
    Gnanadesikan, Pinkham and Hughes (1967), doi:10.1080/00401706.1967.10490506.
    """
    x, w = _checked(values, weights)
    alpha, beta = beta_from_moments(x, weights=w)
    if w.sum() <= 0.0 or alpha + beta >= MOST_CONCENTRATION * (1.0 - 1e-9):
        return alpha, beta
    target = np.array([w @ np.log(x), w @ np.log1p(-x)]) / w.sum()
    found = optimize.minimize(
        _negative_log_likelihood, np.log([alpha, beta]), args=(target,), jac=True, method="BFGS"
    )
    log_shapes = found.x if np.isfinite(found.fun) else np.log([alpha, beta])
    concentration = float(np.exp(log_shapes).sum())
    scale = min(max(concentration, LEAST_CONCENTRATION), MOST_CONCENTRATION) / concentration
    return float(np.exp(log_shapes[0])) * scale, float(np.exp(log_shapes[1])) * scale


def fit_labelled_mixture(
    values: ArrayLike,
    labels: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    estimator: Estimator = beta_from_moments,
) -> BetaMixtureModel:
    """Two-component mixture where the component of each value is known.

    Parameters
    ----------
    values : array_like [n]
    labels : array_like [n]
        Boolean or 0/1; 1 belongs to the component that should have the larger mean (agreement).
    weights : array_like [n], optional
    estimator : callable
        `beta_from_moments` or `beta_from_likelihood`.

    Returns
    -------
    BetaMixtureModel
        Components in the order of the labels, 0 then 1, with mixing weights their shares. A label
        without values has weight 0 and the uniform density.
    """
    x, w = _checked(values, weights)
    y = np.asarray(labels)
    if y.shape != x.shape or not np.isin(y, (0, 1)).all():
        raise InvalidArgumentError("labels", labels, f"0 or 1, of shape {x.shape}")
    parts = [w * (y == label) for label in (0, 1)]
    shapes = [estimator(x, weights=part) for part in parts]
    return _mixture(np.array([part.sum() for part in parts]), shapes)


def fit_beta_mixture(
    values: ArrayLike,
    *,
    n_components: int = 2,
    weights: ArrayLike | None = None,
    estimator: Estimator = beta_from_moments,
    start: BetaMixtureModel | None = None,
    tolerance: float = 1e-8,
) -> BetaMixtureModel:
    """Mixture fitted to unlabelled values by expectation-maximisation.

    Parameters
    ----------
    values : array_like [n]
        In [0, 1].
    n_components : int
    weights : array_like [n], optional
        Non-negative.
    estimator : callable
        The M-step: `beta_from_moments`, fast, whose likelihood need not increase at every step,
        or `beta_from_likelihood`, EM proper.
    start : BetaMixtureModel, optional
        Where to begin; by default the values are cut into equal parts by rank.
    tolerance : float
        Stop when the mean log likelihood changes by less; at most 200 steps are taken.

    Returns
    -------
    BetaMixtureModel
        Sorted by mean. A component that loses all its weight stays, with weight 0 and the uniform
        density; ties give the capped concentration of `beta_from_moments`. Never NaN.

    References
    ----------
    Dempster, Laird and Rubin (1977), doi:10.1111/j.2517-6161.1977.tb01600.x. Schroder and Rahmann
    (2017), doi:10.1186/s13015-017-0112-1, for moments in the M-step.
    """
    check_count("n_components", n_components)
    x, w = _checked(values, weights)
    if w.sum() <= 0.0:
        raise InvalidArgumentError("weights", weights, "not all zero")
    if start is None:
        rank = np.empty(x.size, dtype=np.intp)
        rank[np.argsort(x, kind="stable")] = np.arange(x.size) * n_components // x.size
        shares = (rank == np.arange(n_components)[:, None]).astype(np.float64)
    else:
        shares = _responsibilities(start, x)[0]
    previous = -np.inf
    for _ in range(_STEPS):
        parts = shares * w
        mixture = _mixture(parts.sum(axis=1), [estimator(x, weights=part) for part in parts])
        shares, log_density = _responsibilities(mixture, x)
        current = float(np.average(log_density, weights=w))
        if abs(current - previous) < tolerance:
            break
        previous = current
    return _sorted(mixture)


def maximise_beta_mixture(
    values: ArrayLike, *, start: BetaMixtureModel, weights: ArrayLike | None = None
) -> BetaMixtureModel:
    """Mixture of locally greatest weighted likelihood, by quasi-Newton steps from `start`.

    Converges in tens of steps where EM needs thousands. Usual start: `fit_beta_mixture`.

    Parameters
    ----------
    values, weights
        As in `fit_beta_mixture`.
    start : BetaMixtureModel
        Components of weight 0 are left out.

    Returns
    -------
    BetaMixtureModel
        Sorted by mean, with shapes kept in [1e-4, 3e6]; `start` itself if no step improves on it.
    """
    x, w = _checked(values, weights)
    if w.sum() <= 0.0:
        raise InvalidArgumentError("weights", weights, "not all zero")
    share = w / w.sum()
    logs = np.stack([np.log(x), np.log1p(-x)])
    alive = np.flatnonzero(np.asarray(start.weights) > 0.0)

    def unpack(point: Array) -> BetaMixtureModel:
        shapes = np.exp(np.clip(point[: 2 * alive.size].reshape(2, -1), -9.0, 15.0))
        mixing = special.softmax(point[2 * alive.size :])
        return BetaMixtureModel(*(tuple(row.tolist()) for row in (mixing, *shapes)))

    def objective(point: Array) -> tuple[float, Array]:
        mixture = unpack(point)
        shares, log_density = _responsibilities(mixture, x)
        parts = shares * share
        mass = parts.sum(axis=1)
        shapes = np.array([mixture.alpha, mixture.beta])
        slope = logs @ parts.T - mass * (special.digamma(shapes) - special.digamma(shapes.sum(0)))
        gradient = np.concatenate([(slope * shapes).ravel(), mass - np.array(mixture.weights)])
        return -float(share @ log_density), -gradient

    first = np.log(np.array([start.alpha, start.beta, start.weights])[:, alive]).ravel()
    found = optimize.minimize(objective, first, jac=True, method="L-BFGS-B")
    return _sorted(unpack(found.x) if found.fun < objective(first)[0] else unpack(first))


def clipped_unit_interval(name: str, values: ArrayLike) -> Array:
    """`values` moved into [1e-4, 1 - 1e-4], after a check that they lie in [0, 1]."""
    x = as_floats(name, values)
    if not ((x >= 0.0) & (x <= 1.0)).all():
        raise InvalidArgumentError(name, values, "in [0, 1]")
    return np.clip(x, CLIP, 1.0 - CLIP)


def _responsibilities(mixture: BetaMixtureModel, x: Array) -> tuple[Array, Array]:
    """Posterior of each component [n_components, n] and log density of the mixture [n]."""
    logs = mixture._joint(x)
    log_density = np.logaddexp.reduce(logs, axis=0)
    shares: Array = np.exp(logs - log_density)
    return shares, log_density


def _sorted(mixture: BetaMixtureModel) -> BetaMixtureModel:
    order = np.argsort(mixture.means, kind="stable")
    return BetaMixtureModel(
        *(tuple(getattr(mixture, name)[k] for k in order) for name in ("weights", "alpha", "beta"))
    )


def _mixture(totals: Array, shapes: list[tuple[float, float]]) -> BetaMixtureModel:
    share = totals / totals.sum()
    alpha, beta = zip(*shapes, strict=True)
    return BetaMixtureModel(tuple(share.tolist()), tuple(alpha), tuple(beta))


def _negative_log_likelihood(log_shapes: Array, target: Array) -> tuple[float, Array]:
    shapes = np.exp(np.clip(log_shapes, -30.0, 30.0))
    value = special.betaln(shapes[0], shapes[1]) - (shapes - 1.0) @ target
    gradient = special.digamma(shapes) - special.digamma(shapes.sum()) - target
    return float(value), gradient * shapes


def _checked(values: ArrayLike, weights: ArrayLike | None) -> tuple[Array, Array]:
    x = clipped_unit_interval("values", values)
    if x.ndim != 1 or x.size == 0:
        raise InvalidArgumentError("values", f"shape {x.shape}", "a non-empty vector")
    w = np.ones_like(x) if weights is None else np.asarray(weights, dtype=np.float64)
    if w.shape != x.shape or not (np.isfinite(w) & (w >= 0.0)).all():
        raise InvalidArgumentError("weights", weights, f"non-negative, of shape {x.shape}")
    return x, w
