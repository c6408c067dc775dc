"""Streams of losses with a known change, to put detectors on trial."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adaptive.calibration._errors import InvalidArgumentError
from adaptive.calibration._validation import (
    Rng,
    as_generator,
    check_count,
    check_number,
    check_positive,
    check_probability,
)

Array = NDArray[np.float64]


class AbstractStream(ABC):
    """A law of streams whose mean loss is `before`, and `after` from a unit of change on."""

    before: float
    after: float

    @abstractmethod
    def draw(self, units: int, change: int, *, streams: int = 1, rng: Rng = None) -> Array:
        """Losses [units, streams]; the change is before unit `change` (counted from 0)."""


@dataclass(frozen=True)
class BernoulliStream(AbstractStream):
    """Independent 0/1 losses.

    Examples
    --------
    >>> BernoulliStream(0.05, after=0.2).draw(10_000, 5_000, rng=0)[5_000:].mean().round(2)
    np.float64(0.2)
    """

    before: float
    after: float

    def __post_init__(self) -> None:
        _check_means(self)

    def draw(self, units: int, change: int, *, streams: int = 1, rng: Rng = None) -> Array:
        """See `AbstractStream.draw`."""
        means = _steps(self, units, change, streams)
        return (as_generator(rng).random((units, streams)) < means[:, None]).astype(np.float64)


@dataclass(frozen=True)
class BetaStream(AbstractStream):
    """Independent graded losses: Beta(c m, c (1 - m)) with mean m and concentration c."""

    before: float
    after: float
    concentration: float = 20.0

    def __post_init__(self) -> None:
        _check_means(self)
        check_positive("concentration", self.concentration)

    def draw(self, units: int, change: int, *, streams: int = 1, rng: Rng = None) -> Array:
        """See `AbstractStream.draw`."""
        means = _steps(self, units, change, streams)[:, None]
        c = self.concentration
        return as_generator(rng).beta(c * means, c * (1.0 - means), (units, streams))


@dataclass(frozen=True)
class RampStream(AbstractStream):
    """0/1 losses whose mean rises linearly over `length` units from the change on."""

    before: float
    after: float
    length: int = 2000

    def __post_init__(self) -> None:
        _check_means(self)
        check_count("length", self.length)

    def draw(self, units: int, change: int, *, streams: int = 1, rng: Rng = None) -> Array:
        """See `AbstractStream.draw`."""
        _check_sizes(units, change, streams)
        share = np.clip((np.arange(units) - change + 1) / self.length, 0.0, 1.0)
        means = self.before + (self.after - self.before) * share
        return (as_generator(rng).random((units, streams)) < means[:, None]).astype(np.float64)


@dataclass(frozen=True)
class BurstyStream(AbstractStream):
    """0/1 losses in bursts of difficulty: a two-state chain, a sixth of the units difficult.

    Difficult units lose with probability 5 times `before`, the others with a fifth of it, so that
    the mean is `before`; at the change both are multiplied by ``after / before``. The mean *given
    the past* is far above `before` inside a burst: a monitor of single units without their
    expected losses (`levels`) alarms, rightly, at every long burst.

    Parameters
    ----------
    before, after : float
        Below 1/5.
    length : int
        Mean length of a burst.
    """

    before: float
    after: float
    length: int = 20

    def __post_init__(self) -> None:
        _check_means(self)
        check_count("length", self.length)
        for name in ("before", "after"):
            if getattr(self, name) >= 0.2:
                raise InvalidArgumentError(name, getattr(self, name), "below 0.2")

    def draw(self, units: int, change: int, *, streams: int = 1, rng: Rng = None) -> Array:
        """See `AbstractStream.draw`."""
        return self.draw_with_levels(units, change, streams=streams, rng=rng)[0]

    def draw_with_levels(
        self, units: int, change: int, *, streams: int = 1, rng: Rng = None
    ) -> tuple[Array, Array]:
        """Losses and their expected values before the change, given difficulty."""
        shift = _steps(self, units, change, streams) / self.before
        generator = as_generator(rng)
        leave, enter = 1.0 / self.length, 0.2 / self.length
        coins = generator.random((units, streams))
        hard = np.empty((units, streams), dtype=bool)
        state = generator.random(streams) < 1.0 / 6.0
        for t in range(units):
            hard[t] = state
            state = np.where(state, coins[t] >= leave, coins[t] < enter)
        levels = np.where(hard, 5.0 * self.before, 0.2 * self.before)
        means = levels * shift[:, None]
        return (generator.random((units, streams)) < means).astype(np.float64), levels


def simulate_fold(
    units: int,
    *,
    start: float = 1.0,
    end: float = 0.0,
    noise: float = 0.1,
    substeps: int = 100,
    streams: int = 1,
    rng: Rng = None,
) -> Array:
    r"""Paths of :math:`dx = (r_t - x^2)\,dt + \sigma\,dW` on their way to the fold at r = 0.

    The stable state :math:`\sqrt r` meets the unstable one at r = 0 and both vanish; on the way
    the rate of return :math:`\kappa = 2\sqrt r` falls to 0, the variance
    :math:`\sigma^2/(2\kappa)` and the lag-1 autocorrelation :math:`e^{-\kappa}` rise.

    Parameters
    ----------
    units : int
        Samples, one per unit of time.
    start, end : float
        r falls linearly from `start` to `end` over the path.
    noise : float
        :math:`\sigma`.
    substeps : int
        Euler steps per sample.
    streams : int
        Paths.
    rng : int, Generator or None
        Seed.

    Returns
    -------
    ndarray [units, streams]
        NaN once a path has escaped (x < -1).

    Examples
    --------
    >>> path = simulate_fold(500, end=0.5, rng=0)
    >>> bool(path[-250:].mean() < path[:250].mean())
    True
    """
    check_count("units", units)
    check_count("streams", streams)
    check_positive("start", start)
    check_number("end", end)
    generator = as_generator(rng)
    step = 1.0 / check_count("substeps", substeps)
    scale = check_positive("noise", noise) * np.sqrt(step)
    r = np.linspace(start, end, units * substeps + 1)[1:].reshape(units, substeps)
    x = np.full(streams, np.sqrt(start))
    found = np.empty((units, streams))
    for t in range(units):
        for shock, level in zip(generator.normal(size=(substeps, streams)), r[t], strict=True):
            x = np.maximum(x + (level - x * x) * step + scale * shock, -2.0)
        x = np.where(x < -1.0, np.nan, x)
        found[t] = x
    return found


def simulate_ou(
    units: int,
    *,
    rate: float,
    noise: float = 0.1,
    mean: float = 0.0,
    streams: int = 1,
    rng: Rng = None,
) -> Array:
    r"""Stationary Ornstein-Uhlenbeck paths, sampled exactly once per unit of time.

    Parameters
    ----------
    units : int
        Samples, one per unit of time.
    rate, noise, mean : float
        :math:`\kappa`, :math:`\sigma` and the mean: standard deviation
        :math:`\sigma/\sqrt{2\kappa}`, autocorrelation :math:`e^{-\kappa}`.
    streams : int
        Paths.
    rng : int, Generator or None
        Seed.

    Returns
    -------
    ndarray [units, streams]
    """
    from scipy.signal import lfilter

    check_count("units", units)
    check_count("streams", streams)
    check_number("mean", mean)
    factor = float(np.exp(-check_positive("rate", rate)))
    spread = check_positive("noise", noise) / np.sqrt(2.0 * rate)
    shocks = spread * as_generator(rng).normal(size=(units, streams))
    shocks[1:] *= np.sqrt(1.0 - factor**2)
    return mean + np.asarray(lfilter([1.0], [1.0, -factor], shocks, axis=0))


def _check_means(stream: AbstractStream) -> None:
    for name in ("before", "after"):
        check_probability(name, check_number(name, getattr(stream, name)))


def _check_sizes(units: int, change: int, streams: int) -> None:
    check_count("streams", streams)
    if check_count("change", change, least=0) > check_count("units", units):
        raise InvalidArgumentError("change", change, f"at most {units}, the units")


def _steps(stream: AbstractStream, units: int, change: int, streams: int) -> Array:
    _check_sizes(units, change, streams)
    return np.where(np.arange(units) < change, stream.before, stream.after)
