"""The look-up table equals binary search at every edge."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from adaptive.calibration._threshold_counts import threshold_counter

FLOATS = st.floats(width=32, allow_nan=False)


@given(
    hnp.arrays(
        np.float32, st.integers(1, 30), elements=st.one_of(FLOATS, st.floats(0, 1, width=32))
    ),
    hnp.arrays(np.float32, 20, elements=FLOATS),
)
def test_counts_equal_binary_search(thresholds, scores):
    ascending = np.sort(thresholds)
    up, down = np.float32(np.inf), np.float32(-np.inf)
    with np.errstate(over="ignore", under="ignore"):
        edges = [ascending, np.nextafter(ascending, up), np.nextafter(ascending, down), [up, down]]
    values = np.concatenate([scores, *edges]).astype(np.float32)
    np.testing.assert_array_equal(
        threshold_counter(ascending)(values), np.searchsorted(ascending, values, side="right")
    )


@pytest.mark.parametrize("size", [2, 100, 1000, 20_000])
def test_grids_of_any_size(size, rng):
    ascending = np.linspace(0, 1, size, dtype=np.float32)
    scores = rng.random(5000, dtype=np.float32)
    np.testing.assert_array_equal(
        threshold_counter(ascending)(scores), np.searchsorted(ascending, scores, side="right")
    )
