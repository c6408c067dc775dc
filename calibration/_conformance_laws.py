"""Laws of losses with known means, chosen to be hard for tests and for calibrations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Draw = Callable[[np.random.Generator, tuple[int, ...], float], Array]


@dataclass(frozen=True)
class Law:
    """Losses of at most 1 with mean `level`: `draw(rng, shape, level)`."""

    name: str
    draw: Draw


def _bernoulli(rng: np.random.Generator, shape: tuple[int, ...], level: float) -> Array:
    return (rng.random(shape) < level).astype(np.float64)


def _beta(rng: np.random.Generator, shape: tuple[int, ...], level: float) -> Array:
    return rng.beta(0.4 * level, 0.4 * (1.0 - level), shape)


def _uniform(rng: np.random.Generator, shape: tuple[int, ...], level: float) -> Array:
    return rng.random(shape) * 2.0 * level


def _near_level(rng: np.random.Generator, shape: tuple[int, ...], level: float) -> Array:
    """Just below the level nearly always, and rarely far above it."""
    rare = 0.02
    usual = (level - rare) / (1.0 - rare)
    return np.where(rng.random(shape) < rare, 1.0, usual)


def _nearly_one(rng: np.random.Generator, shape: tuple[int, ...], level: float) -> Array:
    """Errors that count a little less than 1: a total rounded down loses a whole one."""
    return np.where(rng.random(shape) < level / 0.98, 0.98, 0.0)


def _coin(rng: np.random.Generator, shape: tuple[int, ...], level: float) -> Array:
    return np.where(rng.random(shape) < 0.5 * (1.0 + level), 1.0, -1.0)


def _gains(rng: np.random.Generator, shape: tuple[int, ...], level: float) -> Array:
    """Small gains on most units that pay for rare harm: the average is the level."""
    harm = 2.0 * level
    return np.where(rng.random(shape) < harm, 1.0, -level / (1.0 - harm))


_BINARY = (Law("Bernoulli", _bernoulli),)
_BOUNDED = (
    *_BINARY,
    Law("Beta, nearly 0/1", _beta),
    Law("uniform", _uniform),
    Law("rare large losses", _near_level),
    Law("nothing or 0.98", _nearly_one),
)
LAWS: dict[str, tuple[Law, ...]] = {
    "binary": _BINARY,
    "bounded": _BOUNDED,
    "signed": (*_BOUNDED, Law("signed coin", _coin), Law("gains pay for harm", _gains)),
}


@dataclass(frozen=True)
class Scenario:
    """Losses along a path of configurations whose true risks are known multiples of the promise.

    Parameters
    ----------
    name : str
        Name in reports.
    multiples : tuple of float
        True risk of each column in units of the promise; the first is 0.
    law : Law
        Law of one unit's loss given its mean.
    shared : float
        Share of units whose losses along the path come from one common draw.
    tokens : int
        Parts per unit; above 1 losses have shape [n_units, n_tokens, n_columns].
    """

    name: str
    multiples: tuple[float, ...]
    law: Law
    shared: float = 0.0
    tokens: int = 1

    def true_risks(self, risk: float) -> Array:
        """Return the true risk of every column [n_columns]."""
        return risk * np.asarray(self.multiples)

    def draw(self, rng: np.random.Generator, n_units: int, risk: float) -> Array:
        """Draw the losses of one calibration."""
        if self.tokens > 1:
            return self._draw_tokens(rng, n_units, risk)
        losses = np.zeros((n_units, len(self.multiples)))
        state = rng.bit_generator.state
        common = rng.random(n_units) < self.shared
        for j, mean in enumerate(self.true_risks(risk)):
            if mean > 0.0:
                fresh = self.law.draw(rng, (n_units,), float(mean))
                if self.shared:
                    again = np.random.Generator(type(rng.bit_generator)())
                    again.bit_generator.state = state
                    fresh = np.where(common, self.law.draw(again, (n_units,), float(mean)), fresh)
                losses[:, j] = fresh
        return losses

    def _draw_tokens(self, rng: np.random.Generator, n_units: int, risk: float) -> Array:
        """Tokens of a unit share their fate: all of them are wrong at the same rate, or none."""
        losses = np.zeros((n_units, self.tokens, len(self.multiples)))
        for j, mean in enumerate(self.true_risks(risk)):
            if mean > 0.0:
                rate = np.where(rng.random(n_units) < min(1.0, 2.0 * mean), 0.5, 0.0)
                if mean > 0.5:
                    rate = np.full(n_units, mean)
                losses[:, :, j] = rng.random((n_units, self.tokens)) < rate[:, None]
        return losses


_B, _RARE, _GAIN = Law("", _bernoulli), Law("", _near_level), Law("", _gains)
_STEEP = (0.0, 0.2, 0.3, 2.0, 3.0)
_FINE = (0.0, *np.linspace(0.5, 1.4, 19).tolist())
_FLAT = (0.0, *([1.0 + 1e-6] * 8))
SCENARIOS: tuple[Scenario, ...] = (
    Scenario("first column just above the promise", (0.0, 1.0 + 1e-6, 1.2), _B),
    Scenario("flat path just above the promise", _FLAT, _B),
    Scenario("steep step", _STEEP, _B),
    Scenario("fine path, dependent along it", _FINE, _B, shared=1.0),
    Scenario("fine path, half dependent", _FINE, _B, shared=0.5),
    Scenario("not monotone", (0.0, 0.3, 1.05, 0.2, 1.5, 0.1, 1.05), _B),
    Scenario("rare large losses", (0.0, 1.0 + 1e-6, 1.3), _RARE),
    Scenario("gains pay for harm", (0.0, 1.0 + 1e-6, 1.3), _GAIN),
    Scenario("tokens share their fate", (0.0, 1.0 + 1e-6, 1.3), _B, tokens=15),
)
