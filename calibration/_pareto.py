"""Split fixed sequences: one part of the units orders the configurations, the other tests them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from adaptive.calibration._certificate import Certificate, Verification
from adaptive.calibration._control import RiskControlResult, control_risk
from adaptive.calibration._errors import InvalidArgumentError
from adaptive.calibration._losses import Losses, groups_of, loss_columns
from adaptive.calibration._methods import choose_test
from adaptive.calibration._risk_curve import DepartureCurve, RiskCurve
from adaptive.calibration._risk_test import AbstractRiskTest
from adaptive.calibration._transformed_losses import TransformedLosses
from adaptive.calibration._validation import (
    Rng,
    as_floats,
    as_generator,
    check_probability,
    column_costs,
)

Array = NDArray[np.float64]


@dataclass(frozen=True)
class SplitControlResult:
    """Outcome of `control_risk_split`.

    Parameters
    ----------
    configuration : int or None
        The certified configuration with the least cost; None is full computation.
    sequence : tuple of int
        Configurations in the order in which the test split was to test them.
    test_units : ndarray of int
        Rows of the losses in the test split.
    result : RiskControlResult
        Of the test split: its column k is configuration `sequence[k - 1]`.
    """

    configuration: int | None
    sequence: tuple[int, ...]
    test_units: NDArray[np.intp]
    result: RiskControlResult

    @property
    def certified(self) -> tuple[int, ...]:
        """Configurations that are certified together."""
        passed = np.flatnonzero(self.result.certified[1:])
        return tuple(self.sequence[k] for k in passed)

    @property
    def certificate(self) -> Certificate:
        """The certificate of the test split, with the sequence that the other split chose."""
        split = {"sequence": list(self.sequence), "configuration": self.configuration}
        certificate = self.result.certificate
        note = (
            f"Numbers are places in the sequence {', '.join(map(str, self.sequence))} of "
            f"configurations, which other units chose; configuration {self.configuration} is used."
        )
        return dataclasses.replace(
            certificate,
            split={**certificate.split, **split},
            notes=(*certificate.notes, note) if certificate.holds else certificate.notes,
        )

    def verify(self, losses: Losses) -> Verification:
        """Return whether all losses, as they were given, reproduce the test split's evidence."""
        return self.result.certificate.verify(_arranged(losses, self.sequence, self.test_units))


def pareto_front(objectives: ArrayLike) -> NDArray[np.intp]:
    """Return the rows of `objectives` [n, n_objectives] that no other dominates; less is better.

    Of equal rows only the first is kept.

    Examples
    --------
    >>> pareto_front([[0.1, 5.0], [0.2, 3.0], [0.3, 4.0], [0.4, 1.0]])
    array([0, 1, 3])
    """
    values = as_floats("objectives", objectives)
    if values.ndim != 2 or not np.isfinite(values).all():
        raise InvalidArgumentError("objectives", f"shape {values.shape}", "finite, [n, objectives]")
    kept: list[int] = []
    for row in map(int, np.lexsort(values.T[::-1])):
        if not any((values[k] <= values[row]).all() for k in kept):
            kept.append(row)
    return np.sort(np.array(kept, dtype=np.intp))


def control_risk_split(
    losses: Losses,
    *,
    costs: ArrayLike,
    risk: float | Mapping[str, float],
    delta: float = 0.05,
    bound: float | Mapping[str, float] = 1.0,
    loss_type: str | Mapping[str, str] = "bounded",
    method: str | AbstractRiskTest = "auto",
    tuning_share: float = 0.5,
    n_columns: int | None = None,
    rng: Rng = None,
    loss: str = "loss",
    unit: str = "unit",
) -> SplitControlResult:
    """Certify the cheapest of configurations that have no natural order (Pareto testing).

    The tuning split estimates risks, keeps the configurations on the Pareto front of risks and
    cost, and orders them from the most to the least convincing; the test split runs one fixed
    sequence in that order at the full delta. No unit does both.

    Parameters
    ----------
    losses, risk, delta, bound, loss_type, method, n_columns, loss, unit
        As in `control_risk`; columns may be any configurations (vectors of thresholds, say), in
        any order; column 0 is full computation.
    costs : array_like, [n_columns]
        Cost per configuration.
    tuning_share : float
        Share of the units that orders the configurations, in (0, 1).
    rng : int, Generator or None
        Fixes the split and the order of the units; None is seed 0.

    Returns
    -------
    SplitControlResult

    Notes
    -----
    Guarantee: as `control_risk`, over the draw of the test units, whatever the tuning units say.

    References
    ----------
    Laufer-Goldshtein et al. (2023), Efficiently controlling multiple risks with Pareto testing,
    arXiv:2210.07913.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> table = rng.random((600, 5)) < [0.0, 0.3, 0.01, 0.02, 0.2]
    >>> found = control_risk_split(
    ...     table, costs=[10, 2, 8, 5, 7], risk=0.05, loss_type="binary"
    ... )
    >>> found.configuration, found.sequence
    (3, (2, 3, 1))
    """
    check_probability("tuning_share", tuning_share)
    sources = loss_columns(
        losses, risk=risk, bound=bound, loss_type=loss_type, n_columns=n_columns, name=loss
    )
    if groups_of(sources) is not None:
        raise InvalidArgumentError("losses", "a trace with groups", "of units without groups")
    count = sources[0].n_columns
    price = column_costs(costs, count)
    generator = as_generator(rng)
    tables = [
        np.column_stack([s.column(j) for j in range(1, count)]).astype(np.float64) for s in sources
    ]
    order = generator.permutation(tables[0].shape[0])
    cut = round(tuning_share * order.size)
    if not 0 < cut < order.size:
        raise InvalidArgumentError("tuning_share", tuning_share, "so that both splits have units")
    tune, test = np.sort(order[:cut]), np.sort(order[cut:])
    parts = [table[tune] for table in tables]
    front = pareto_front(np.column_stack([*(part.mean(axis=0) for part in parts), price[1:]]))
    log_p = np.max(
        [
            choose_test(method, loss_type=s.test_type, n_units=cut, fixed_level=False).log_p_values(
                part[:, front], risk=s.risk, delta=delta, bound=s.bound
            )
            for s, part in zip(sources, parts, strict=True)
        ],
        axis=0,
    )
    convincing = np.lexsort((price[1:][front], log_p))
    sequence = tuple(int(j) + 1 for j in front[convincing])
    result = control_risk(
        _arranged(losses, sequence, test),
        risk=risk,
        delta=delta,
        bound=bound,
        loss_type=loss_type,
        method=method,
        n_columns=len(sequence) + 1,
        costs=price[[0, *sequence]],
        rng=generator,
        loss=loss,
        unit=unit,
    )
    chosen = None if result.chosen is None else sequence[result.chosen - 1]
    return SplitControlResult(chosen, sequence, test, result)


def _arranged(losses: Losses, sequence: tuple[int, ...], units: NDArray[np.intp]) -> Any:
    """Return providers of the sequence's columns on the given units; column 0 stays itself."""
    if isinstance(losses, Mapping):
        return {name: _arranged(part, sequence, units) for name, part in losses.items()}
    if isinstance(losses, TransformedLosses):
        columns = np.array([0, *sequence])
        return dataclasses.replace(losses, losses=losses.losses[units[:, None], columns])
    if isinstance(losses, RiskCurve | DepartureCurve):
        return _arranged(losses.unit_losses, sequence, units)

    def read(column: int) -> ArrayLike:
        place = sequence[column - 1]
        whole = losses(place) if callable(losses) else np.asarray(losses)[:, place]
        return np.asarray(whole)[units]

    return read
