"""An upper curve of expected loss given the score, valid after a finite calibration."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from adaptive.calibration._errors import InvalidArgumentError
from adaptive.calibration._inversion import invert_log_p
from adaptive.calibration._probability import equal_mass_edges
from adaptive.calibration._state_io import read_settings
from adaptive.calibration._unit_tables import (
    cut_points,
    set_aside,
    unit_codes,
    unit_shares,
    vector,
)
from adaptive.calibration._validation import (
    Rng,
    as_floats,
    check_count,
    check_number,
    check_probability,
)

Array = NDArray[np.float64]
_SHARES = np.geomspace(0.01, 0.99, 24)


@dataclass(frozen=True)
class ExpectedLossCurve:
    r"""One upper limit of the expected loss per bin of scores, all of them valid at once.

    For bin b of a unit with T tokens, N of them in the bin with mean loss U, the limit is an upper
    confidence bound on the ratio :math:`E[(N/T)\,U] / E[N/T]`, so that the unit's excess

    .. math:: \frac1T \sum_{i=1}^{T} (X_i - g(s_i))

    has a mean of at most 0 for a fresh unit of the calibration traffic.

    Parameters
    ----------
    edges : tuple of float [n_bins - 1]
        Inner edges, increasing; a score on an edge belongs to the bin above.
    values : tuple of float [n_bins]
        Upper limits, in (lower, upper].
    confidence : float
        P(all limits hold). What is left, 1 - confidence, is added to the false-alarm probability
        of a monitor that bets on the excess over this curve.
    n_units : int
        Units behind the limits.
    lower, upper : float
        Ends of the loss.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> scores = rng.random(4000)
    >>> curve = ExpectedLossCurve.fit(scores, rng.random(4000) < 0.2 * (1 - scores), bins=4)
    >>> curve([0.1, 0.9]).round(3).tolist()
    [0.223, 0.033]
    """

    edges: tuple[float, ...]
    values: tuple[float, ...]
    confidence: float
    n_units: int
    lower: float = 0.0
    upper: float = 1.0

    def __post_init__(self) -> None:
        cut_points(self.edges)
        if len(self.values) != len(self.edges) + 1:
            raise InvalidArgumentError("values", self.values, f"{len(self.edges) + 1} numbers")
        _range(vector("values", self.values), self.lower, self.upper, name="values")
        check_probability("confidence", self.confidence)
        check_count("n_units", self.n_units)

    def __call__(self, scores: ArrayLike) -> Array:
        """Upper limits of the expected loss, in the shape of `scores`; `upper` where NaN."""
        s = as_floats("scores", scores)
        bins = np.searchsorted(self.edges, s, side="right")
        return np.where(np.isnan(s), self.upper, np.asarray(self.values)[bins])

    @classmethod
    def fit(
        cls,
        scores: ArrayLike,
        losses: ArrayLike,
        unit_ids: ArrayLike | None = None,
        *,
        confidence: float = 0.95,
        bins: int = 5,
        edges: ArrayLike | None = None,
        lower: float = 0.0,
        upper: float = 1.0,
        rng: Rng = None,
    ) -> ExpectedLossCurve:
        """Fit on calibration units that the monitored policy was not tuned on.

        Parameters
        ----------
        scores, losses : array_like [n_tokens]
            Scores that the policy's decision was based on, and losses in [lower, upper].
        unit_ids : array_like [n_tokens], optional
            Which unit a token is of; every token its own unit if left out.
        confidence : float
            Of all bins together, each of them at ``1 - (1 - confidence) / bins``.
        bins : int
            At most so many, holding equally many tokens of the fifth of the units, drawn by
            `rng`, that is set aside to choose the edges. More bins follow the curve closer, with
            wider limits.
        edges : array_like, optional
            Edges fixed beforehand: nothing is set aside.

        Raises
        ------
        InvalidArgumentError
            For NaN, losses out of range, wrong shapes or fewer than 10 units.

        Notes
        -----
        Exact for independent units, however the tokens of one unit depend on each other (betting,
        inverted). Betting token by token also needs that a token's expected loss depends on the
        past through its score only: no data can show that for you.
        """
        check_probability("confidence", confidence)
        check_count("bins", bins)
        s, x = vector("scores", scores), vector("losses", losses)
        if x.shape != s.shape:
            raise InvalidArgumentError("losses", f"shape {x.shape}", f"of shape {s.shape}")
        low, high = _range(x, lower, upper)
        codes = unit_codes(unit_ids, s.size)
        if edges is None:
            aside = set_aside(codes, rng)
            cuts = equal_mass_edges(s[aside], bins)
            s, x, codes = s[~aside], x[~aside], np.unique(codes[~aside], return_inverse=True)[1]
        else:
            cuts = cut_points(edges)
        n_bins = cuts.size + 1
        where = np.searchsorted(cuts, s, side="right")
        shares, means = unit_shares(where, (x - low) / (high - low), codes, n_bins)
        limits = _ratio_limits(shares, means, (1.0 - confidence) / n_bins)
        values = low + (high - low) * limits
        return cls(
            tuple(cuts.tolist()),
            tuple(values.tolist()),
            float(confidence),
            shares.shape[0],
            low,
            high,
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data, exact to the last bit."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ExpectedLossCurve:
        """Curve from `to_dict`."""
        return cls(**read_settings(cls, data, tuples=("edges", "values")))


def _ratio_limits(shares: Array, means: Array, delta: float) -> Array:
    """Upper confidence bounds [n_bins] on E[share * mean] / E[share], for means in [0, 1]."""
    columns = zip(shares.T, means.T, strict=True)
    return np.array([_ratio_limit(share, mean, delta) for share, mean in columns])


def _ratio_limit(share: Array, mean: Array, delta: float) -> float:
    """One bin's bound; units that are alike are counted, not repeated."""
    used = share > 0.0
    rows = np.stack([share[used], mean[used]], axis=1)
    alike, counts = np.unique(rows, axis=0, return_counts=True)
    bets = _SHARES[:, None] * alike[:, 0]

    def log_p(level: Array, _: NDArray[np.intp]) -> Array:
        gains = np.log1p(bets * ((1.0 - alike[:, 1]) / (1.0 - level) - 1.0))
        return np.atleast_1d(math.log(_SHARES.size) - np.logaddexp.reduce(gains @ counts))

    return float(invert_log_p(log_p, np.zeros(1), math.log(delta))[0])


def _range(
    losses: Array, lower: float, upper: float, *, name: str = "losses"
) -> tuple[float, float]:
    """Return (lower, upper), checked against each other and against the losses."""
    low, high = check_number("lower", lower), check_number("upper", upper)
    if not low < high:
        raise InvalidArgumentError("upper", upper, f"above `lower` = {low:g}")
    wrong = (losses < low) | (losses > high)
    if wrong.any():
        place = int(np.argmax(wrong))
        found = f"{losses[place]} at position {place}"
        raise InvalidArgumentError(name, found, f"in [{low:g}, {high:g}]")
    return low, high
