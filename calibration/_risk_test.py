"""The interface of a test of "the mean loss is above the level"."""

from __future__ import annotations

import abc
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
INDEPENDENT = "units are independent draws from one distribution"


class AbstractRiskTest(abc.ABC):
    """A test of H: E L > risk on losses of independent units, and its upper confidence bound.

    Attributes
    ----------
    name : str
        Word by which `control_risk(method=...)` knows the test.
    least : float
        Smallest loss allowed, -inf where negative losses are welcome.
    ordered : bool
        Whether the evidence depends on the order of the units.
    asymptotic : bool
        Whether the guarantee holds only in the limit of many units.
    """

    name: ClassVar[str]
    least: ClassVar[float]
    ordered: ClassVar[bool]
    asymptotic: ClassVar[bool]

    @abc.abstractmethod
    def log_p_values(self, losses: Array, *, risk: float, delta: float, bound: float) -> Array:
        """Return ln p per column of `losses` [n_units, n_columns], at most 0.

        `delta` is the level that the test aims at; p is valid at every level.
        """

    @abc.abstractmethod
    def upper_bounds(self, losses: Array, *, delta: float, bound: float) -> Array:
        """Return U per column with P(E L > U) <= delta."""

    @abc.abstractmethod
    def assumptions(self, bound: float) -> tuple[str, ...]:
        """Return the assumptions of the guarantee as sentences."""
