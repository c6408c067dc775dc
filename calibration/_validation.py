"""Checks of arguments shared by the ground floor; each raises with the argument's name."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from adaptive.calibration._errors import InvalidArgumentError, InvalidTypeError

Rng = int | np.random.Generator | None


def check_probability(name: str, value: object) -> float:
    """Return `value` as a float strictly between 0 and 1."""
    number = check_number(name, value)
    if not 0.0 < number < 1.0:
        raise InvalidArgumentError(name, value, "in (0, 1)")
    return number


def check_number(name: str, value: object) -> float:
    """Return `value` as a finite float."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real | np.number):
        raise InvalidTypeError(name, value, "a real number")
    number = float(value)
    if not math.isfinite(number):
        raise InvalidArgumentError(name, value, "finite")
    return number


def check_positive(name: str, value: object) -> float:
    """Return `value` as a finite float above zero."""
    number = check_number(name, value)
    if number <= 0.0:
        raise InvalidArgumentError(name, value, "positive")
    return number


def check_count(name: str, value: object, *, least: int = 1) -> int:
    """Return `value` as an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral | np.integer):
        raise InvalidTypeError(name, value, "an integer")
    count = int(value)
    if count < least:
        raise InvalidArgumentError(name, value, f"at least {least}")
    return count


def check_choice(name: str, value: object, choices: Sequence[str]) -> str:
    """Return `value` if it is one of the words in `choices`."""
    if not isinstance(value, str):
        raise InvalidTypeError(name, value, f"one of {', '.join(map(repr, choices))}")
    if value not in choices:
        raise InvalidArgumentError(name, value, f"one of {', '.join(map(repr, choices))}")
    return value


def check_risk(risk: object, bound: object) -> tuple[float, float]:
    """Return `(risk, bound)` with `0 < risk < bound`."""
    upper = check_positive("bound", bound)
    level = check_positive("risk", risk)
    if level >= upper:
        raise InvalidArgumentError("risk", risk, f"in (0, {upper:g})")
    return level, upper


def float_matrix(name: str, value: ArrayLike) -> NDArray[np.float64]:
    """Return `value` as a float64 array [n_units, n_columns], one column for a vector.

    Raises
    ------
    InvalidArgumentError
        If the array is empty, has more than two axes or holds NaN or an infinity.
    """
    array = _numeric(name, value)
    if array.ndim == 1:
        array = array[:, None]
    if array.ndim != 2:
        raise InvalidArgumentError(name, f"shape {array.shape}", "[n_units, n_columns]")
    require_finite(name, array)
    return array


def require_finite(name: str, array: NDArray[np.float64], *, first_column: int = 0) -> None:
    """Raise if `array` [n_units, n_columns] holds NaN or an infinity; name the place."""
    if array.size and not (math.isfinite(array.min()) and math.isfinite(array.max())):
        unit, column = np.argwhere(~np.isfinite(array))[0]
        place = f"{array[unit, column]} at unit {unit}, column {column + first_column}"
        raise InvalidArgumentError(name, place, "finite numbers")


def require_at_most(
    name: str, array: NDArray[np.float64], bound: float, *, first_column: int = 0
) -> None:
    """Raise if a value of `array` [n_units, n_columns] exceeds `bound`; name the place."""
    if array.size and array.max() > bound:
        unit, column = np.argwhere(array > bound)[0]
        place = f"{array[unit, column]:.17g} at unit {unit}, column {column + first_column}"
        raise InvalidArgumentError(name, place, f"at most `bound` = {bound:g}")


def require_at_least(
    name: str, array: NDArray[np.float64], least: float, *, reason: str, first_column: int = 0
) -> None:
    """Raise if a value of `array` [n_units, n_columns] is below `least`; name the place."""
    if array.size and array.min() < least:
        unit, column = np.argwhere(array < least)[0]
        place = f"{array[unit, column]:.17g} at unit {unit}, column {column + first_column}"
        raise InvalidArgumentError(name, place, f"at least {least:g} ({reason})")


def require_binary(name: str, array: NDArray[np.float64], *, first_column: int = 0) -> None:
    """Raise if a value of `array` [n_units, n_columns] is neither 0 nor 1; name the place."""
    wrong = (array != 0.0) & (array != 1.0)
    if wrong.any():
        unit, column = np.argwhere(wrong)[0]
        place = f"{array[unit, column]:.17g} at unit {unit}, column {column + first_column}"
        raise InvalidArgumentError(name, place, "0 or 1 for a binary loss")


def as_generator(rng: Rng) -> np.random.Generator:
    """Return a generator: seed 0 for None, a fresh one for an integer, a generator as it is."""
    if rng is None:
        return np.random.default_rng(0)
    if isinstance(rng, np.random.Generator):
        return rng
    return np.random.default_rng(check_count("rng", rng, least=0))


def group_codes(groups: ArrayLike, n_units: int) -> tuple[NDArray[np.intp], NDArray[Any]]:
    """Return `(codes, names)`: an integer per unit, names in order of first appearance."""
    labels = np.asarray(groups)
    if labels.shape != (n_units,):
        raise InvalidArgumentError("groups", f"shape {labels.shape}", f"of shape ({n_units},)")
    names, first, codes = np.unique(labels, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(order.size)
    return rank[codes], names[order]


def as_floats(name: str, value: ArrayLike) -> NDArray[np.float64]:
    """Return `value` as a float64 array of any shape, or say that it is none."""
    try:
        return np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InvalidTypeError(name, value, "an array of real numbers") from error


def _numeric(name: str, value: ArrayLike) -> NDArray[np.float64]:
    array = as_floats(name, value)
    if array.size == 0:
        raise InvalidArgumentError(name, f"shape {array.shape}", "non-empty")
    return array
