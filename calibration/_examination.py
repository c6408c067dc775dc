"""Reading and testing the columns that a procedure asks for, and remembering what they gave."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaptive.calibration._bet_tests import GrowthBets, PredictableBets, TargetBets
from adaptive.calibration._errors import InvalidArgumentError
from adaptive.calibration._losses import LossColumns
from adaptive.calibration._methods import choose_test
from adaptive.calibration._procedures import AbstractProcedure, UpperBoundWalk
from adaptive.calibration._risk_test import AbstractRiskTest
from adaptive.calibration._sum_tests import ExactBinomial
from adaptive.calibration._validation import require_at_least


@dataclass(frozen=True)
class Settings:
    """What was decided before any loss was read."""

    delta: float
    method: str | AbstractRiskTest
    procedure: AbstractProcedure
    order_seed: int
    unit: str


@dataclass(frozen=True)
class Visit:
    """What one visited column gave: evidence, and one entry per loss of all else."""

    log_p: float
    means: tuple[float, ...]
    positive_means: tuple[float, ...]
    digests: tuple[str, ...]


class Examiner:
    """Reads columns as the procedure asks for them, orders their units, tests, remembers."""

    def __init__(self, sources: tuple[LossColumns, ...], settings: Settings) -> None:
        self.sources, self.settings = sources, settings
        self.visits: dict[int, Visit] = {}
        self.tests: tuple[AbstractRiskTest, ...] = ()
        self.order: NDArray[np.intp] = np.empty(0, dtype=np.intp)

    @property
    def n_units(self) -> int:
        """Independent units per column; 0 before the first is read."""
        return int(self.order.size)

    @property
    def by_bounds(self) -> bool:
        """Whether the result is told in upper confidence bounds."""
        return isinstance(self.settings.procedure, UpperBoundWalk)

    def read(self, i: int, column: int) -> NDArray[Any]:
        """Return one column [n_units, 1] of loss i, reordered by the seed if order matters."""
        values = self.sources[i].column(column)
        if not self.tests:
            self._begin(values.size)
        if values.size != self.n_units:
            raise InvalidArgumentError(
                "losses", f"{values.size} units in column {column}", f"{self.n_units} units in each"
            )
        test = self.tests[i]
        if not isinstance(test, ExactBinomial):
            values = values.astype(np.float64, copy=False)
        losses: NDArray[Any] = values[:, None]
        if values.dtype != np.bool_ and test.least > -np.inf:
            require_at_least(
                "losses", losses, test.least, reason=f"{test.name} test", first_column=column
            )
        return np.take(values, self.order)[:, None] if test.ordered else losses

    def visit(self, column: int) -> float:
        """Return the log p-value of one column, the largest over the losses."""
        aim = self.settings.procedure.aim(self.settings.delta, self.sources[0].n_columns)
        parts = []
        for i, source in enumerate(self.sources):
            losses = self.read(i, column)
            log_p = self.tests[i].log_p_values(
                losses, risk=source.risk, delta=aim, bound=source.bound
            )
            binary = losses.dtype == np.bool_
            mean = np.count_nonzero(losses) / losses.size if binary else losses.mean()
            signed = not binary and bool(losses.min() < 0.0)
            positive = np.maximum(losses, 0.0).mean() if signed else mean
            digest = f"{zlib.crc32(np.ascontiguousarray(losses).data):08x}"
            parts.append((float(log_p[0]), float(mean), float(positive), digest))
        log_ps, means, positives, digests = zip(*parts, strict=True)
        self.visits[column] = Visit(max(log_ps), means, positives, digests)
        return self.visits[column].log_p

    def upper_bounds(self, column: int) -> dict[str, float]:
        """Return pointwise upper bounds of the losses of one column at confidence 1 - delta."""
        bounds = {}
        for i, (source, test) in enumerate(zip(self.sources, self.tests, strict=True)):
            quick = isinstance(test, TargetBets | GrowthBets) and not self.by_bounds
            upper = (PredictableBets() if quick else test).upper_bounds(
                self.read(i, column), delta=self.settings.delta, bound=source.bound
            )
            bounds[source.name] = float(upper[0])
        return bounds

    def _begin(self, n_units: int) -> None:
        self.order = np.random.default_rng(self.settings.order_seed).permutation(n_units)
        self.tests = tuple(
            choose_test(
                self.settings.method,
                loss_type=source.test_type,
                n_units=n_units,
                fixed_level=self.settings.procedure.fixed_level,
            )
            for source in self.sources
        )
