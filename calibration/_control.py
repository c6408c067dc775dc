"""The one door to risk control: losses in, a certified configuration and its certificate out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from adaptive.calibration._certificate import Certificate
from adaptive.calibration._certifying import certificate_of
from adaptive.calibration._errors import InvalidArgumentError, InvalidTypeError
from adaptive.calibration._examination import Examiner, Settings
from adaptive.calibration._losses import LossColumns, Losses, groups_of, loss_columns
from adaptive.calibration._procedures import AbstractProcedure, procedure_of
from adaptive.calibration._risk_test import AbstractRiskTest
from adaptive.calibration._testing import Tested, mask_of
from adaptive.calibration._validation import (
    Rng,
    as_generator,
    check_flag,
    check_probability,
    check_word,
    column_costs,
    group_codes,
    label_array,
)

Progress = Callable[[int, float], None]


@dataclass(frozen=True)
class RiskControlResult:
    """Outcome of `control_risk`.

    Parameters
    ----------
    index : int or None
        The last certified column; None means that full computation (column 0) is to be used.
    chosen : int or None
        The certified column with the least measured cost, where `costs` were given; None if none
        beats full computation. Equal to `index` without costs.
    certified : ndarray of bool, [n_columns]
        Columns that are certified together. Column 0 is true: its loss is zero by construction.
    visited : tuple of int
        Columns that were computed and tested, in that order.
    bounds : ndarray of float64, [n_columns]
        Upper confidence bounds on the risk at 1 - delta, each for its column alone: of all visited
        columns for the procedure "upper-bound", of the returned one otherwise; NaN elsewhere. For
        several risks, that of the first.
    log_p_values, levels, means : ndarray of float64, [n_columns]
        Natural log of the p-value, the level it was held against, and the mean loss; NaN where a
        column was not visited. For several risks the p-value is the largest of theirs and the mean
        is that of the first.
    certificate : Certificate
        What is promised, on what evidence.
    groups : dict
        One result per group where certificates per group were asked for.
    """

    index: int | None
    chosen: int | None
    certified: NDArray[np.bool_]
    visited: tuple[int, ...]
    log_p_values: NDArray[np.float64]
    bounds: NDArray[np.float64]
    levels: NDArray[np.float64]
    means: NDArray[np.float64]
    certificate: Certificate
    groups: dict[str, RiskControlResult] = field(default_factory=dict)

    @property
    def p_values(self) -> NDArray[np.float64]:
        """p-values [n_columns], NaN where not visited; may underflow to 0."""
        return np.exp(self.log_p_values)

    @property
    def evidence(self) -> NDArray[np.float64]:
        """Evidence against "the risk is above the promise" [n_columns]: -ln p, or log wealth."""
        return -self.log_p_values

    def to_frame(self) -> Any:
        """Return one row per column as a pandas DataFrame."""
        import pandas as pd

        return pd.DataFrame(
            {
                "certified": self.certified,
                "mean_loss": self.means,
                "log_p_value": self.log_p_values,
                "level": self.levels,
                "upper_bound": self.bounds,
            },
            index=pd.RangeIndex(self.certified.size, name="column"),
        )

    def __repr__(self) -> str:
        return (
            f"RiskControlResult(index={self.index}, chosen={self.chosen}, "
            f"certified={int(self.certified.sum())} of {self.certified.size} columns, "
            f"visited={len(self.visited)})\n  {self.certificate.summary}"
        )


def control_risk(
    losses: Losses,
    *,
    risk: float | Mapping[str, float],
    delta: float = 0.05,
    bound: float | Mapping[str, float] = 1.0,
    loss_type: str | Mapping[str, str] = "bounded",
    method: str | AbstractRiskTest = "auto",
    procedure: str | AbstractProcedure = "fixed-sequence",
    n_columns: int | None = None,
    starts: Sequence[int] = (1,),
    groups: ArrayLike | None = None,
    per_group: bool = False,
    costs: ArrayLike | None = None,
    rng: Rng = None,
    loss: str = "loss",
    unit: str = "unit",
    progress: Progress | None = None,
) -> RiskControlResult:
    r"""Certify the cheapest configuration whose true risk is at most `risk`.

    Columns are configurations ordered from safest to cheapest, rows are independent units. With
    probability at least 1 - delta over the draw of the units, **every** certified column j has
    :math:`E L_j \le risk`. Column 0 is full computation: its loss is zero by construction, it is
    neither tested nor computed. Testing stops at the first failure, and the last *passing* column
    is returned; how the risk varies along the columns is irrelevant to the guarantee.

    Parameters
    ----------
    losses : array_like [n_units, n_columns], callable, curve, or mapping from names to these
        Losses of at most `bound`; negative values (better than full computation) are welcome in
        the betting tests. A callable `f(column) -> [n_units]` is asked only for the columns that
        the procedure visits (give `n_columns`); units must come in the same order every time. A
        `RiskCurve` or `DepartureCurve` is read at its thresholds, the first of them inf; its
        trace's groups count as `groups`. `TransformedLosses` bring their own bound. A
        mapping controls several risks at once: a column passes if all of them do.
    risk : float or mapping
        Promise, in (0, bound); one per name for several risks.
    delta : float
        Error probability, in (0, 1).
    bound : float or mapping
        Declared upper bound of the loss; a larger loss is an error, never clipped.
    loss_type : {"bounded", "binary"} or mapping
        Declared, not inferred: "binary" means losses of 0 and 1 and selects the exact test.
    method : str or AbstractRiskTest
        "auto" decides by `loss_type`, the number of units, `delta` and `procedure` alone.
    procedure : str or AbstractProcedure
        How many columns are tested together: "fixed-sequence" visits columns in order up to the
        first failure; "upper-bound" is the same walk told by upper confidence bounds (RCPS);
        "bonferroni" and "holm" compute and test all columns; a `Graph` moves levels along edges.
    n_columns : int, optional
        Number of columns, required for a callable.
    starts : sequence of int
        First column of a sequence, or several: each then begins with an equal share of delta.
        Must be chosen without looking at these losses. Columns before the first are not certified.
    groups : array_like, [n_units], optional
        Cluster of each unit. The cluster is then the unit: its loss is the mean over its members,
        and the risk is the mean over clusters. With `per_group` instead the groups are populations.
    per_group : bool
        Certify separately within each group at delta / (number of groups), so that the promises
        hold together; `index` is then certified in every group and `groups` has each one's own.
    costs : array_like, [n_columns], optional
        Measured cost per column; `chosen` is the cheapest certified column if it beats column 0.
    rng : int, Generator or None
        Fixes the order of the units before any loss is read; None is seed 0.
    loss, unit : str
        Names of the loss and of the unit in the certificate.
    progress : callable, optional
        Called as `progress(column, log_p_value)` after each visited column.

    Returns
    -------
    RiskControlResult

    Raises
    ------
    InvalidArgumentError
        If a visited loss is NaN, infinite, above its bound, or not 0/1 where declared binary.

    Notes
    -----
    Guarantee: family-wise error at most delta in finite samples, for independent units. Units that
    are too few give `index` None and a certificate that says how many would do, not an error.

    References
    ----------
    Angelopoulos et al. (2025), Learn then test, doi:10.1214/24-AOAS1998. Bauer (1991) on fixed
    sequences. Tests: see `adaptive.calibration.wsr_log_p`, `star_log_p`, `binomial_log_p`.

    Examples
    --------
    >>> rng = np.random.default_rng(1)
    >>> losses = rng.random((500, 4)) < [0.0, 0.01, 0.02, 0.2]
    >>> control_risk(losses, risk=0.05, loss_type="binary").index
    2
    """
    delta = check_probability("delta", delta)
    check_word("unit", unit)
    if progress is not None and not callable(progress):
        raise InvalidTypeError("progress", progress, "a callable `progress(column, log_p_value)`")
    sources = loss_columns(
        losses, risk=risk, bound=bound, loss_type=loss_type, n_columns=n_columns, name=loss
    )
    if groups is None:
        groups = groups_of(sources)
    order_seed = int(as_generator(rng).integers(2**32))
    settings = Settings(
        delta=delta,
        method=method,
        procedure=procedure_of(procedure, starts=starts),
        order_seed=order_seed,
        unit="cluster" if groups is not None and not per_group else unit,
    )
    price = None if costs is None else column_costs(costs, sources[0].n_columns)
    if check_flag("per_group", per_group):
        if groups is None:
            raise InvalidArgumentError("groups", None, "given with `per_group`")
        return _control_per_group(sources, groups, settings, price, progress)
    if groups is not None:
        sources = tuple(source.cluster(groups) for source in sources)
    return _result(*_tested(sources, settings, progress), price)


def _tested(
    sources: tuple[LossColumns, ...], settings: Settings, progress: Progress | None
) -> tuple[Examiner, Tested]:
    """Run the procedure on the columns it asks for."""
    examiner = Examiner(sources, settings)

    def evaluate(column: int) -> float:
        log_p = examiner.visit(column)
        if progress is not None:
            progress(column, log_p)
        return log_p

    count = sources[0].n_columns
    return examiner, settings.procedure.run(evaluate, n_columns=count, delta=settings.delta)


def _result(
    examiner: Examiner, tested: Tested, price: NDArray[np.float64] | None
) -> RiskControlResult:
    index = tested.rejected[-1] if tested.rejected else None
    chosen = _cheapest(tested.rejected, price)
    wanted = tested.visited if examiner.by_bounds else tested.rejected[-1:]
    bounds = {j: _bounded(examiner, j, rejected=j in tested.rejected) for j in wanted}
    certificate = certificate_of(examiner, tested, bounds, price)
    count = examiner.sources[0].n_columns
    certified = mask_of(tested.rejected, count)
    certified[0] = True
    visits = examiner.visits
    return RiskControlResult(
        index=index,
        chosen=chosen,
        certified=certified,
        visited=tested.visited,
        log_p_values=_spread(count, {j: v.log_p for j, v in visits.items()}),
        bounds=_spread(count, {j: next(iter(b.values())) for j, b in bounds.items()}),
        levels=_spread(count, tested.levels),
        means=_spread(count, {j: v.means[0] for j, v in visits.items()}),
        certificate=certificate,
    )


def _bounded(examiner: Examiner, column: int, *, rejected: bool) -> dict[str, float]:
    """Upper bounds of a column's risks, at most the promise where the promise was certified.

    If the true risk is above the promise, certifying it errs with probability at most delta; if
    it is not, only the bound can err, with the same probability. So the smaller of the two errs no
    more often than either.
    """
    bounds = examiner.upper_bounds(column)
    if not rejected:
        return bounds
    return {source.name: min(bounds[source.name], source.risk) for source in examiner.sources}


def _control_per_group(
    sources: tuple[LossColumns, ...],
    groups: ArrayLike,
    settings: Settings,
    price: NDArray[np.float64] | None,
    progress: Progress | None,
) -> RiskControlResult:
    labels = label_array(groups)
    codes, names = group_codes(labels, labels.size)
    if len({str(name) for name in names}) < len(names):
        raise InvalidArgumentError("groups", names, "labels that also differ as text")
    shared = dataclasses.replace(settings, delta=settings.delta / len(names))
    examined = [
        _tested(tuple(source.within(codes == g) for source in sources), shared, progress)
        for g in range(len(names))
    ]
    results = tuple(_result(*each, price) for each in examined)
    parts = {str(name): part for name, part in zip(names, results, strict=True)}
    certified = np.logical_and.reduce([part.certified for part in results])
    indices = tuple(int(j) for j in np.flatnonzero(certified) if j > 0)
    index = indices[-1] if indices else None
    bounds = np.max([part.bounds for part in results], axis=0)
    if index is not None:  # a group may have gone on beyond it, and have its own bound there
        each = [_bounded(examiner, index, rejected=True) for examiner, _ in examined]
        bounds[index] = max(next(iter(bound.values())) for bound in each)
    worst = max(results, key=lambda part: -1 if part.index is None else -part.index)
    notes = (
        f"The promise holds jointly for each of the {len(names)} groups "
        f"({', '.join(parts)}), each tested at delta = {shared.delta:.6g}.",
        *(note for part in results if part.index is None for note in part.certificate.notes),
    )
    certificate = dataclasses.replace(
        worst.certificate,
        holds=index is not None,
        index=index,
        cost=None if index is None or price is None else float(price[index]),
        delta=settings.delta,
        n=sum(part.certificate.n for part in results),
        evidence={"groups": {name: part.certificate.to_dict() for name, part in parts.items()}},
        notes=tuple(dict.fromkeys(notes)),
    )
    return RiskControlResult(
        index=index,
        chosen=_cheapest(indices, price),
        certified=certified,
        visited=tuple(sorted({j for part in results for j in part.visited})),
        log_p_values=np.max([part.log_p_values for part in results], axis=0),
        bounds=bounds,
        levels=np.fmax.reduce([part.levels for part in results]),
        means=np.max([part.means for part in results], axis=0),
        certificate=certificate,
        groups=parts,
    )


def _cheapest(rejected: Sequence[int], price: NDArray[np.float64] | None) -> int | None:
    if not rejected:
        return None
    if price is None:
        return rejected[-1]
    best = min(rejected, key=lambda j: price[j])
    return best if price[best] < price[0] else None


def _spread(count: int, values: Mapping[int, float]) -> NDArray[np.float64]:
    out = np.full(count, np.nan)
    for j, value in values.items():
        out[j] = value
    return out
