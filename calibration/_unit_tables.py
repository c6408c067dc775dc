"""Tokens summed up by unit: shares of cells and means, and units set aside to choose cells."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from adaptive.calibration._errors import InvalidArgumentError
from adaptive.calibration._validation import Rng, as_floats, as_generator, group_codes

Array = NDArray[np.float64]
Codes = NDArray[np.intp]
_SHARE = 0.2
_LEAST_UNITS = 10
LARGEST_VALUE = 1e100  # squares and cubes of it are still finite


def vector(name: str, values: ArrayLike) -> Array:
    """Return `values` as a non-empty vector of finite numbers."""
    array = as_floats(name, values)
    if array.ndim != 1 or array.size == 0:
        raise InvalidArgumentError(name, f"shape {array.shape}", "a non-empty vector")
    wrong = ~np.isfinite(array)
    if wrong.any():
        place = int(np.argmax(wrong))
        raise InvalidArgumentError(name, f"{array[place]} at position {place}", "finite")
    return array


def bounded_vector(name: str, values: ArrayLike) -> Array:
    """Return `values` as a non-empty vector of numbers whose cubes are finite."""
    array = vector(name, values)
    wrong = np.abs(array) > LARGEST_VALUE
    if wrong.any():
        place = int(np.argmax(wrong))
        raise InvalidArgumentError(name, f"{array[place]} at position {place}", "up to 1e+100")
    return array


def cut_points(edges: ArrayLike) -> Array:
    """Return `edges` as finite, increasing cut points; there may be none."""
    cuts = as_floats("edges", edges)
    if cuts.ndim != 1 or not np.isfinite(cuts).all() or (np.diff(cuts) <= 0.0).any():
        raise InvalidArgumentError("edges", edges, "a vector, finite and increasing")
    return cuts


def unit_codes(unit_ids: ArrayLike | None, n: int) -> Codes:
    """Return the unit of each of n tokens as 0, 1, ... in order of first appearance."""
    return np.arange(n) if unit_ids is None else group_codes(unit_ids, n)[0]


def set_aside(codes: Codes, rng: Rng) -> NDArray[np.bool_]:
    """Return which tokens are of the fifth of the units that only choose cells."""
    n_units = int(codes.max()) + 1
    if n_units < _LEAST_UNITS:
        raise InvalidArgumentError("unit_ids", f"{n_units} units", "at least 10 units")
    chosen = as_generator(rng).permutation(n_units) < math.ceil(_SHARE * n_units)
    return np.asarray(chosen[codes])


def unit_shares(cells: Codes, values: Array, codes: Codes, n_cells: int) -> tuple[Array, Array]:
    """Share of each unit's tokens in each cell, and their mean value; [n_units, n_cells] each."""
    n_units = int(codes.max()) + 1
    places = codes * n_cells + cells
    counts = np.bincount(places, minlength=n_units * n_cells).reshape(n_units, n_cells)
    sums = np.bincount(places, values, minlength=n_units * n_cells).reshape(n_units, n_cells)
    return counts / counts.sum(axis=1, keepdims=True), sums / np.maximum(counts, 1)
