"""Checks of arguments shared by the ground floor; each raises with the argument's name."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from adaptive.calibration._errors import InvalidArgumentError, InvalidTypeError

_LARGEST = 1e150
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


def check_active(active: ArrayLike | None, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Return which streams have a new value, as booleans of `shape`; all, if left out."""
    if active is None:
        return np.ones(shape, dtype=bool)
    on = np.asarray(active, dtype=bool)
    if on.shape != shape:
        raise InvalidArgumentError("active", f"shape {on.shape}", f"of shape {shape}")
    return on


def check_count(name: str, value: object, *, least: int = 1) -> int:
    """Return `value` as an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral | np.integer):
        raise InvalidTypeError(name, value, "an integer")
    count = int(value)
    if count < least:
        raise InvalidArgumentError(name, value, f"at least {least}")
    return count


def check_seed(name: str, value: object, *, below: int = 2**64) -> int:
    """Return `value` as an integer from 0 to `below` - 1; noise keyed by a seed repeats there."""
    seed = check_count(name, value, least=0)
    if seed >= below:
        raise InvalidArgumentError(name, value, f"less than {below}")
    return seed


def check_rng(rng: object) -> int:
    """Return `rng` as a seed that scikit-learn takes, too, and its successor."""
    return check_seed("rng", rng, below=2**32 - 1)


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


def column_costs(costs: ArrayLike, count: int) -> NDArray[np.float64]:
    """Return costs, one per column, as finite float64 [count]."""
    price = numeric("costs", costs).astype(np.float64)
    if price.shape != (count,):
        raise InvalidArgumentError("costs", f"shape {price.shape}", f"finite, of shape ({count},)")
    wrong = ~np.isfinite(price)
    if wrong.any():
        place = int(np.argmax(wrong))
        raise InvalidArgumentError("costs", f"{price[place]} at column {place}", "finite")
    return price


def require_finite(name: str, array: NDArray[np.float64], *, first_column: int = 0) -> None:
    """Raise if `array` [n_units, n_columns] holds NaN, an infinity or a number beyond 1e150.

    Squares of larger ones overflow. The error names the place.
    """
    if array.size and not (array.min() >= -_LARGEST and array.max() <= _LARGEST):
        unit, column = np.argwhere(~(np.abs(array) <= _LARGEST))[0]
        place = f"{array[unit, column]} at unit {unit}, column {column + first_column}"
        size = f" of size {_LARGEST:g} at most" if math.isfinite(array[unit, column]) else ""
        raise InvalidArgumentError(name, place, f"finite numbers{size}")


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


def check_word(name: str, value: object) -> str:
    """Return `value` if it is a string."""
    if not isinstance(value, str):
        raise InvalidTypeError(name, value, "a string")
    return value


def check_flag(name: str, value: object) -> bool:
    """Return `value` as a bool if it is one."""
    if not isinstance(value, bool | np.bool_):
        raise InvalidTypeError(name, value, "True or False")
    return bool(value)


def label_array(groups: object) -> NDArray[Any]:
    """Return labels [n_units] as an array; any hashable objects, none of them missing."""
    if isinstance(groups, list | tuple) and any(isinstance(g, tuple) for g in groups):
        labels = np.empty(len(groups), dtype=object)
        labels[:] = groups
    else:
        labels = np.asarray(groups)
    if labels.ndim != 1:
        raise InvalidArgumentError("groups", f"shape {labels.shape}", "one label per unit")
    if labels.dtype == object:
        missing = np.array([label is None or _undefined(label) for label in labels], dtype=bool)
    else:
        missing = labels != labels
    if np.any(missing):
        raise InvalidArgumentError(
            "groups", f"no label at unit {int(np.argmax(missing))}", "a label for every unit"
        )
    return labels


def group_codes(groups: object, n_units: int) -> tuple[NDArray[np.intp], NDArray[Any]]:
    """Return `(codes, names)`: an integer per unit, names in order of first appearance."""
    labels = label_array(groups)
    if labels.size != n_units:
        raise InvalidArgumentError("groups", f"shape {labels.shape}", f"of shape ({n_units},)")
    if labels.dtype == object:
        return _object_codes(labels)
    names, first, codes = np.unique(labels, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(order.size)
    return rank[codes], names[order]


def as_floats(name: str, value: ArrayLike) -> NDArray[np.float64]:
    """Return `value` as a float64 array of any shape, or say that it is none."""
    return numeric(name, value).astype(np.float64, copy=False)


def numeric(name: str, value: object) -> NDArray[Any]:
    """Return `value` as an array of booleans, integers or floats; nothing is read into text.

    Raises
    ------
    InvalidTypeError
        If it is complex, text, dates or objects that are no numbers.
    InvalidArgumentError
        If rows differ in length, or values are masked.
    """
    expected = "an array of real numbers"
    if np.ma.is_masked(value):
        raise InvalidArgumentError(name, "masked values", "without masked values")
    try:
        array = np.asarray(value)
        if array.dtype == object:
            array = array.astype(np.float64)
    except ValueError as error:
        if "inhomogeneous" in str(error):
            raise InvalidArgumentError(name, "rows of different lengths", expected) from error
        raise InvalidTypeError(name, value, expected) from error
    except (TypeError, RuntimeError, OverflowError) as error:
        raise InvalidTypeError(name, value, expected) from error
    if array.dtype.kind not in "biuf":
        raise InvalidTypeError(name, array, f"{expected}, not of {array.dtype}")
    return array


def _object_codes(labels: NDArray[Any]) -> tuple[NDArray[np.intp], NDArray[Any]]:
    seen: dict[Any, int] = {}
    try:
        codes = np.array([seen.setdefault(label, len(seen)) for label in labels], dtype=np.intp)
    except TypeError as error:
        raise InvalidTypeError("groups", labels, "hashable labels") from error
    names = np.empty(len(seen), dtype=object)
    names[:] = list(seen)
    return codes, names


def _undefined(label: object) -> bool:
    """Whether a label is NaN, NaT or NA: not equal to itself, or not even comparable."""
    try:
        return bool(label != label)
    except (TypeError, ValueError):
        return True


def _numeric(name: str, value: ArrayLike) -> NDArray[np.float64]:
    array = as_floats(name, value)
    if array.size == 0:
        raise InvalidArgumentError(name, f"shape {array.shape}", "non-empty")
    return array
