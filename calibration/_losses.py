"""Loss columns: arrays, lazy providers and mappings of them, read one checked column at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from adaptive.calibration._curve_losses import Curve, origin_of
from adaptive.calibration._errors import InvalidArgumentError, InvalidTypeError
from adaptive.calibration._risk_curve import DepartureCurve, RiskCurve
from adaptive.calibration._transformed_losses import TransformedLosses
from adaptive.calibration._validation import (
    check_choice,
    check_count,
    check_risk,
    check_word,
    group_codes,
    label_array,
    numeric,
    require_at_most,
    require_binary,
    require_finite,
)

Array = NDArray[np.float64]
Provider = Callable[[int], ArrayLike]
Single = ArrayLike | Provider | Curve | TransformedLosses
Losses = Single | Mapping[str, Single]


@dataclass(frozen=True)
class LossColumns:
    """One loss: its declared facts, and its columns on demand.

    Parameters
    ----------
    name : str
        Name of the loss in the certificate.
    risk, bound : float
        Level promised and declared upper bound.
    loss_type : str
        "binary" or "bounded", as declared.
    n_columns : int
        Number of configurations.
    read : callable
        `read(column) -> [n_units]`.
    select : ndarray of bool or None
        Units that belong to the population tested, where it is a part of all.
    codes : ndarray of int or None
        Cluster of each unit, where the cluster is the unit.
    curve : RiskCurve, DepartureCurve or None
        Where the columns come from, if from the trace of a threshold policy.
    assumptions, notes : tuple of str
        Sentences for the certificate, where the losses were rewritten for the test.
    """

    name: str
    risk: float
    bound: float
    loss_type: str
    n_columns: int
    read: Provider
    select: NDArray[np.bool_] | None = None
    codes: NDArray[np.intp] | None = None
    curve: Curve | None = None
    assumptions: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def facts(self, test: str) -> dict[str, Any]:
        """Return what a certificate records of the loss, and of the test it goes through."""
        declared = {name: getattr(self, name) for name in ("name", "risk", "bound", "loss_type")}
        origin = {} if self.curve is None else {"origin": origin_of(self.curve)}
        return {**declared, "test": test, **origin}

    @property
    def test_type(self) -> str:
        """The loss type that is tested: means over clusters of 0/1 losses are not 0/1."""
        averaged = self.codes is not None and self.codes.size > int(self.codes.max()) + 1
        return "bounded" if averaged else self.loss_type

    def column(self, column: int) -> Array | NDArray[np.bool_]:
        """Return one column [n_units], checked, in the order the units came in.

        Binary losses come as booleans, others (means over clusters among them) as float64.

        Raises
        ------
        InvalidArgumentError
            If a loss is not finite, above the bound, or not 0/1 where declared so.
        """
        values = numeric("losses", self.read(column))
        if values.ndim != 1 or values.size == 0:
            raise InvalidArgumentError(
                "losses", f"shape {values.shape} for column {column}", "[n_units] per column"
            )
        if values.dtype != np.bool_:
            values = self._checked(values, column)
        kind = np.bool_ if self.loss_type == "binary" else np.float64
        return self._reduce(values.astype(kind, copy=False))

    def cluster(self, groups: ArrayLike) -> LossColumns:
        """Return the same loss with the cluster as the unit: its mean over the cluster."""
        labels = label_array(groups)
        codes, _ = group_codes(labels, labels.size)
        return dataclasses.replace(self, codes=codes)

    def within(self, select: NDArray[np.bool_]) -> LossColumns:
        """Return the same loss on the selected units only."""
        return dataclasses.replace(self, select=select)

    def _checked(self, values: NDArray[Any], column: int) -> Array:
        matrix = np.ascontiguousarray(values, dtype=np.float64)[:, None]
        require_finite("losses", matrix, first_column=column)
        if self.loss_type == "binary":
            require_binary("losses", matrix, first_column=column)
        require_at_most("losses", matrix, self.bound, first_column=column)
        return matrix[:, 0]

    def _reduce(self, values: NDArray[Any]) -> NDArray[Any]:
        if self.select is not None:
            _same_length(self.select, values)
            return values[self.select]
        if self.codes is not None:
            _same_length(self.codes, values)
            totals = np.bincount(self.codes, weights=values)
            means = totals / np.bincount(self.codes)
            return means if self.test_type == "bounded" else means.astype(values.dtype)
        return values


def loss_columns(
    losses: Losses, *, risk: Any, bound: Any, loss_type: Any, n_columns: int | None, name: str
) -> tuple[LossColumns, ...]:
    """Return one `LossColumns` per loss; settings are shared, or mappings with the same names.

    Raises
    ------
    InvalidArgumentError
        If names, column counts, levels or bounds do not fit.
    """
    if not isinstance(losses, Mapping):
        for argument, value in (("risk", risk), ("bound", bound), ("loss_type", loss_type)):
            if isinstance(value, Mapping):
                raise InvalidTypeError(argument, value, "a single value for a single loss")
        return (_one(name, losses, risk, bound, loss_type, n_columns),)
    if not losses:
        raise InvalidArgumentError("losses", losses, "a non-empty mapping")
    sources = tuple(
        _one(
            key,
            losses[key],
            _pick("risk", risk, key, losses),
            _pick("bound", bound, key, losses),
            _pick("loss_type", loss_type, key, losses),
            n_columns,
        )
        for key in losses
    )
    counts = {source.name: source.n_columns for source in sources}
    if len(set(counts.values())) > 1:
        raise InvalidArgumentError("losses", counts, "arrays with the same number of columns")
    return sources


def groups_of(sources: tuple[LossColumns, ...]) -> NDArray[Any] | None:
    """Return the groups of the units, where the losses come from a trace that has them."""
    curves = (source.curve for source in sources if source.curve is not None)
    return next((c.trace.groups for c in curves if c.trace.groups is not None), None)


def _one(
    name: str, losses: Any, risk: Any, bound: Any, loss_type: Any, n_columns: int | None
) -> LossColumns:
    if isinstance(losses, TransformedLosses):
        return _transformed(name, losses, risk, bound, loss_type)
    check_word("loss", name)
    level, upper = check_risk(risk, bound)
    kind = check_choice("loss_type", loss_type, ("bounded", "binary"))
    if kind == "binary" and upper != 1.0:
        raise InvalidArgumentError("bound", upper, "1 for a binary loss")
    if isinstance(losses, RiskCurve | DepartureCurve):
        origin_of(losses)
        count = check_count("n_columns", losses.thresholds.size, least=2)
        return LossColumns(name, level, upper, kind, count, losses.unit_losses, curve=losses)
    if callable(losses):
        if n_columns is None:
            raise InvalidArgumentError("n_columns", None, "given when `losses` is a callable")
        return LossColumns(
            name, level, upper, kind, check_count("n_columns", n_columns, least=2), losses
        )
    array = numeric("losses", losses)
    if array.ndim != 2 or array.shape[0] < 1 or array.shape[1] < 2:
        expected = "[n_units, n_columns] with column 0 for full computation and one more"
        raise InvalidArgumentError("losses", f"shape {array.shape}", expected)
    if n_columns is not None and check_count("n_columns", n_columns) != array.shape[1]:
        raise InvalidArgumentError("n_columns", n_columns, f"{array.shape[1]}, as in `losses`")
    return LossColumns(name, level, upper, kind, array.shape[1], lambda column: array[:, column])


def _transformed(
    name: str, losses: TransformedLosses, risk: Any, bound: Any, loss_type: Any
) -> LossColumns:
    if bound not in (1.0, losses.bound):
        raise InvalidArgumentError("bound", bound, f"left out or {losses.bound:g}, as transformed")
    if losses.risk is not None and risk != losses.risk:
        raise InvalidArgumentError("risk", risk, f"{losses.risk:g}, as the losses were made for")
    source = _one(name, losses.losses, risk, losses.bound, loss_type, None)
    return dataclasses.replace(source, assumptions=losses.assumptions, notes=losses.notes)


def _pick(argument: str, value: Any, key: str, names: Mapping[str, Any]) -> Any:
    if not isinstance(value, Mapping):
        return value
    if set(value) != set(names):
        raise InvalidArgumentError(argument, sorted(value), f"given for each of {sorted(names)}")
    return value[key]


def _same_length(labels: NDArray[Any], values: NDArray[Any]) -> None:
    if labels.size != values.size:
        raise InvalidArgumentError("groups", f"{labels.size} labels", f"{values.size} labels")
