"""The one-pass curves against a slow, obvious reference."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from adaptive.calibration import (
    InvalidArgumentError,
    Trace,
    control_risk,
    departure_curve,
    risk_curve,
    stop_stages,
)


@st.composite
def traces(draw):
    lengths = draw(st.lists(st.integers(1, 4), min_size=1, max_size=8))
    shape = (sum(lengths), draw(st.integers(1, 4)))
    scores = draw(
        hnp.arrays(np.float32, shape, elements=st.sampled_from([-np.inf, 0.1, 0.2, 0.5, 1]))
    )
    losses = draw(hnp.arrays(np.float64, shape, elements=st.sampled_from([0.0, 1.0, -0.5, 0.25])))
    weighted = draw(st.booleans())
    return Trace(
        scores=scores,
        losses={"disagreement": losses},
        costs=np.cumsum(np.arange(1.0, shape[1] + 2)),
        cost_quantity="FLOPs",
        lengths=lengths,
        weights=np.arange(1.0, len(lengths) + 1) if weighted else None,
    )


def slow(trace, threshold, warmup):
    """Token by token, stage by stage."""
    unit_losses, departs, cost = [], [], []
    start = 0
    for length in trace.lengths.tolist():
        losses = []
        for position in range(length):
            stage = trace.n_exits
            for exit_ in range(trace.n_exits):
                if position >= warmup and trace.scores[start + position, exit_] >= threshold:
                    stage = exit_
                    break
            full = stage == trace.n_exits
            table = trace.losses["disagreement"]
            losses.append(0.0 if full else float(table[start + position, stage]))
            cost.append(trace.costs[stage])
        unit_losses.append(np.mean(losses))
        departs.append(any(loss != 0.0 for loss in losses))
        start += length
    return np.array(unit_losses), np.array(departs), float(np.mean(cost))


@given(traces(), st.integers(0, 2), st.randoms(use_true_random=False))
def test_curves_equal_the_slow_reference(trace, warmup, random):
    thresholds = [np.inf, -np.inf, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1.0]
    random.shuffle(thresholds)
    thresholds = np.float32(thresholds)
    curve = risk_curve(trace, thresholds, warmup=warmup)
    departures = departure_curve(trace, thresholds, warmup=warmup)
    weights = np.ones(trace.n_units) if trace.weights is None else trace.weights
    for column, threshold in enumerate(thresholds):
        losses, departs, cost = slow(trace, threshold, warmup)
        np.testing.assert_allclose(
            curve.risk[column], np.average(losses, weights=weights), atol=1e-12
        )
        np.testing.assert_allclose(curve.cost[column], cost)
        np.testing.assert_allclose(curve.unit_losses(column), losses, atol=1e-12)
        np.testing.assert_allclose(
            departures.rate[column], np.average(departs, weights=weights), atol=1e-12
        )
        np.testing.assert_array_equal(departures.unit_losses(column), departs)


@given(traces())
def test_the_first_departure_is_the_highest_threshold_that_departs(trace):
    candidates = np.unique(trace.scores)[::-1]
    departs = np.array([slow(trace, t, 0)[1] for t in candidates])
    expected = np.where(departs.any(axis=0), candidates[departs.argmax(axis=0)], -np.inf)
    # A unit that departs only at -inf departs nowhere that a finite threshold could tell.
    np.testing.assert_array_equal(departure_curve(trace, [0.5]).first, expected)


def test_counts_are_exact_and_full_computation_is_exactly_zero(rng):
    n = 4000
    scores = rng.random((n, 4), dtype=np.float32)
    wrong = rng.random((n, 4)) < 0.3
    trace = Trace(
        scores=scores, losses={"disagreement": wrong}, costs=np.arange(1, 6), cost_quantity="s"
    )
    curve = risk_curve(trace, np.append(np.inf, np.linspace(1, 0, 50)))
    assert curve.risk[0] == 0.0
    counts = [curve.unit_losses(column).sum() for column in range(51)]
    assert curve.errors().tolist() == counts
    departures = departure_curve(trace, curve.thresholds)
    assert departures.errors().tolist() == counts


def test_counts_are_refused_where_they_are_not_counts():
    def trace(**changes):
        fields = {"scores": [[0.1], [0.2]], "losses": {"disagreement": [[1], [0]]}, **changes}
        return Trace(**fields, costs=[1, 2], cost_quantity="s")

    assert risk_curve(trace(), [0.0]).errors().tolist() == [1]
    for changes in (
        {"lengths": [2]},
        {"weights": [1.0, 2.0]},
        {"losses": {"disagreement": [[0.5], [0.0]]}},
    ):
        with pytest.raises(InvalidArgumentError, match="trace"):
            risk_curve(trace(**changes), [0.0]).errors()
    with pytest.raises(InvalidArgumentError, match="unweighted"):
        departure_curve(trace(weights=[1.0, 2.0]), [0.0]).errors()


def test_thresholds_are_compared_in_float32_as_the_rule_does():
    score = np.float32(0.1)
    trace = Trace(scores=[[score]], losses={"disagreement": [[1]]}, costs=[1, 2], cost_quantity="s")
    assert float(score) > 0.1
    assert risk_curve(trace, [0.1]).risk[0] == 1.0
    assert stop_stages(trace, 0.1)[0] == 0


def test_the_curve_feeds_the_one_door(rng):
    scores = rng.random((600, 2), dtype=np.float32)
    wrong = rng.random((600, 2)) > scores + 0.3
    trace = Trace(scores=scores, losses={"disagreement": wrong}, costs=[1, 2, 3], cost_quantity="s")
    curve = risk_curve(trace, np.append(np.inf, np.linspace(0.95, 0.0, 20)))
    lazy = control_risk(curve.unit_losses, risk=0.1, loss_type="binary", n_columns=21)
    table = np.stack([curve.unit_losses(j) for j in range(21)], axis=1)
    assert lazy.index == control_risk(table, risk=0.1, loss_type="binary").index
    assert lazy.index is not None
    assert len(curve.to_frame()) == 21
    assert len(departure_curve(trace, [0.5]).to_frame()) == 1


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"thresholds": [np.nan]}, "without NaN"),
        ({"thresholds": []}, "non-empty"),
        ({"thresholds": [0.5], "loss": "other"}, "'disagreement'"),
        ({"thresholds": [0.5], "warmup": -1}, "warmup"),
    ],
)
def test_wrong_arguments_are_named(arguments, text):
    trace = Trace(scores=[[0.1]], losses={"disagreement": [[1]]}, costs=[1, 2], cost_quantity="s")
    for function in (risk_curve, departure_curve):
        with pytest.raises(InvalidArgumentError, match=text):
            function(trace, **arguments)
