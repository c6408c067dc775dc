"""The sequential and tail procedures and the mean bound from a band, through the public suite."""

from __future__ import annotations

import pytest

from adaptive.calibration import IntervalMean, control_sequentially, control_tail
from adaptive.calibration.conformance import check_control, check_upper_bound

pytestmark = pytest.mark.statistical


def unit_losses(losses):
    """Mean over the parts of a unit, where it has parts."""
    return losses.mean(axis=1) if losses.ndim == 3 else losses


def sequential(losses, risk, delta):
    table = unit_losses(losses)
    return control_sequentially(
        lambda column, first, last: table[first:last, column],
        n_columns=table.shape[1],
        risk=risk,
        delta=delta,
        max_units=table.shape[0],
        batch=table.shape[0],
        least=-1.0,
    ).index


def by_band(losses, risk, delta):
    return control_tail(
        unit_losses(losses), tail=IntervalMean(0.0, 1.0), risk=risk, delta=delta
    ).index


@pytest.mark.parametrize("control", [sequential, by_band])
def test_control_keeps_its_promise_in_every_scenario(control):
    report = check_control(control, name=control.__name__, replicates=600)
    assert report.passed, str(report)


def test_the_mean_from_the_band_is_an_upper_bound():
    report = check_upper_bound(
        lambda losses, delta: IntervalMean(0.0, 1.0).upper_bound(losses, delta=delta),
        name="band mean",
        batched=True,
        laws="signed",
    )
    assert report.passed, str(report)
