"""Ways of testing many columns, as `control_risk` uses them: one final class each."""

from __future__ import annotations

import abc
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike

from adaptive.calibration._errors import InvalidArgumentError, InvalidTypeError
from adaptive.calibration._testing import (
    Evaluate,
    Tested,
    check_graph,
    walk_all,
    walk_fixed_sequence,
    walk_graph,
)
from adaptive.calibration._validation import check_count


class AbstractProcedure(abc.ABC):
    """A multiple test of columns 1..n_columns-1; column 0 is never tested.

    Attributes
    ----------
    name : str
        Word by which `control_risk(procedure=...)` knows the procedure.
    fixed_level : bool
        Whether the level of each test is known before any p-value is.
    """

    name: ClassVar[str]
    fixed_level: ClassVar[bool]

    @abc.abstractmethod
    def aim(self, delta: float, n_columns: int) -> float:
        """Return the level that the bets of a single test should aim at."""

    @abc.abstractmethod
    def run(self, evaluate: Evaluate, *, n_columns: int, delta: float) -> Tested:
        """Test columns, asking `evaluate(column)` for log p-values of the visited ones."""

    @abc.abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Return the settings that `procedure_of` needs to rebuild the procedure."""


@dataclass(frozen=True)
class FixedSequence(AbstractProcedure):
    """Columns in order until the first failure, from one or several starts."""

    name: ClassVar[str] = "fixed-sequence"
    fixed_level: ClassVar[bool] = True

    starts: tuple[int, ...] = (1,)

    def aim(self, delta: float, n_columns: int) -> float:
        """Return delta over the number of starts."""
        return delta / len(self.starts)

    def run(self, evaluate: Evaluate, *, n_columns: int, delta: float) -> Tested:
        """Walk the columns from each start to its first failure."""
        _refuse_column_zero(self.starts)
        return walk_fixed_sequence(evaluate, count=n_columns, starts=self.starts, delta=delta)

    def to_dict(self) -> dict[str, Any]:
        """Return the starts."""
        return {"starts": list(self.starts)}


@dataclass(frozen=True)
class UpperBoundWalk(AbstractProcedure):
    """RCPS: the last column up to which every upper confidence bound is at most the promise.

    A named view of the fixed sequence: U <= r exactly where the test at r passes. The result has
    the bounds of all visited columns; the risk need not be monotone for the guarantee to hold.

    References
    ----------
    Bates et al. (2021), doi:10.1145/3478535.
    """

    name: ClassVar[str] = "upper-bound"
    fixed_level: ClassVar[bool] = False

    starts: tuple[int, ...] = (1,)

    def aim(self, delta: float, n_columns: int) -> float:
        """Return delta."""
        return delta

    def run(self, evaluate: Evaluate, *, n_columns: int, delta: float) -> Tested:
        """Walk the columns from the one start to the first failure."""
        _refuse_column_zero(self.starts)
        if len(self.starts) != 1:
            raise InvalidArgumentError("starts", self.starts, "a single column for upper bounds")
        return walk_fixed_sequence(evaluate, count=n_columns, starts=self.starts, delta=delta)

    def to_dict(self) -> dict[str, Any]:
        """Return the start."""
        return {"starts": list(self.starts)}


@dataclass(frozen=True)
class Bonferroni(AbstractProcedure):
    """All columns, each at delta over their number."""

    name: ClassVar[str] = "bonferroni"
    fixed_level: ClassVar[bool] = True

    def aim(self, delta: float, n_columns: int) -> float:
        """Return delta over the number of columns tested."""
        return delta / (n_columns - 1)

    def run(self, evaluate: Evaluate, *, n_columns: int, delta: float) -> Tested:
        """Test all columns."""
        return walk_all(evaluate, first=1, count=n_columns, delta=delta, rule="bonferroni")

    def to_dict(self) -> dict[str, Any]:
        """Return nothing: there are no settings."""
        return {}


@dataclass(frozen=True)
class Holm(AbstractProcedure):
    """All columns by Holm's step-down rule."""

    name: ClassVar[str] = "holm"
    fixed_level: ClassVar[bool] = False

    def aim(self, delta: float, n_columns: int) -> float:
        """Return the first step's level, delta over the number of columns tested."""
        return delta / (n_columns - 1)

    def run(self, evaluate: Evaluate, *, n_columns: int, delta: float) -> Tested:
        """Test all columns."""
        return walk_all(evaluate, first=1, count=n_columns, delta=delta, rule="holm")

    def to_dict(self) -> dict[str, Any]:
        """Return nothing: there are no settings."""
        return {}


@dataclass(frozen=True)
class Graph(AbstractProcedure):
    """A graphical procedure with the user's graph over columns; column 0 has no part in it.

    Parameters
    ----------
    weights : tuple of float, [n_columns]
        Shares of delta, the first of them 0.
    transitions : tuple of tuples of float, [n_columns, n_columns]
        Where the share of a certified column goes; first row and column 0.
    """

    name: ClassVar[str] = "graphical"
    fixed_level: ClassVar[bool] = False

    weights: tuple[float, ...]
    transitions: tuple[tuple[float, ...], ...]

    @classmethod
    def of(cls, weights: ArrayLike, transitions: ArrayLike) -> Graph:
        """Return the procedure for arrays [n_columns] and [n_columns, n_columns]."""
        weight = np.asarray(weights, dtype=np.float64)
        weight, edges = check_graph(weight, transitions, weight.size)
        if weight[0] or edges[0].any() or edges[:, 0].any():
            raise InvalidArgumentError("weights", weight, "zero for column 0, as its edges")
        return cls(tuple(weight.tolist()), tuple(map(tuple, edges.tolist())))

    def aim(self, delta: float, n_columns: int) -> float:
        """Return the smallest level that a column starts with."""
        return delta * min((weight for weight in self.weights if weight > 0.0), default=1.0)

    def run(self, evaluate: Evaluate, *, n_columns: int, delta: float) -> Tested:
        """Test columns as weight reaches them."""
        weight, edges = check_graph(self.weights, self.transitions, n_columns)
        if not weight[1:].any():
            raise InvalidArgumentError("weights", self.weights, "positive for some column but 0")
        return walk_graph(evaluate, weights=weight, transitions=edges, delta=delta)

    def to_dict(self) -> dict[str, Any]:
        """Return weights and transitions."""
        return {"weights": list(self.weights), "transitions": [list(r) for r in self.transitions]}


NAMES = ("fixed-sequence", "upper-bound", "bonferroni", "holm", "graphical")


def procedure_of(
    procedure: str | AbstractProcedure, *, starts: Sequence[int] = (1,), **settings: Any
) -> AbstractProcedure:
    """Return a procedure by name, or the given one as it is."""
    first = _starts(starts)
    if isinstance(procedure, AbstractProcedure):
        if first != (1,):
            raise InvalidArgumentError("starts", starts, "left out where `procedure` is an object")
        return procedure
    if not isinstance(procedure, str):
        raise InvalidTypeError("procedure", procedure, "a name or an AbstractProcedure")
    if procedure == "fixed-sequence":
        return FixedSequence(first)
    if procedure == "upper-bound":
        return UpperBoundWalk(first)
    if procedure == "graphical" and settings:
        return Graph.of(**settings)
    if first != (1,):
        raise InvalidArgumentError("starts", starts, f"left out for procedure {procedure!r}")
    if procedure == "bonferroni":
        return Bonferroni()
    if procedure == "holm":
        return Holm()
    names = ", ".join(map(repr, NAMES[:-1]))
    raise InvalidArgumentError("procedure", procedure, f"one of {names} or a `Graph`")


def _starts(starts: Sequence[int]) -> tuple[int, ...]:
    if isinstance(starts, str) or not isinstance(starts, Iterable):
        raise InvalidTypeError("starts", starts, "a sequence of columns")
    return tuple(check_count("starts", start, least=-sys.maxsize) for start in starts)


def _refuse_column_zero(starts: tuple[int, ...]) -> None:
    if starts and min(starts) < 1:
        raise InvalidArgumentError("starts", starts, "at least 1: column 0 is not tested")
