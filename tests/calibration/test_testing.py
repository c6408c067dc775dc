"""Multiple testing: known answers, special cases of graphs, and exact family-wise error."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from adaptive.calibration import (
    Bonferroni,
    FixedSequence,
    Graph,
    Holm,
    InvalidArgumentError,
    bonferroni,
    control_risk,
    fixed_sequence,
    graphical,
    holm,
)
from adaptive.calibration._testing import walk_graph

P = (0.001, 0.008, 0.012, 0.02, 0.04, 0.3, 0.011)
p_values = st.lists(st.floats(0.0, 1.0), min_size=1, max_size=8)


@pytest.fixture(autouse=True, scope="module")
def _no_forced_collection():
    """statsmodels collects garbage on every call: 70 ms each with a large heap."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gc.collect", lambda *_: 0)
        yield


def chosen(mask):
    return set(np.flatnonzero(mask).tolist())


def complete_graph(n):
    if n == 1:
        return np.ones(1), np.zeros((1, 1))
    edges = np.full((n, n), 1.0 / (n - 1))
    np.fill_diagonal(edges, 0.0)
    return np.full(n, 1.0 / n), edges


def test_known_answers():
    assert chosen(bonferroni(P, delta=0.1)) == {0, 1, 2, 6}
    assert chosen(holm(P, delta=0.1)) == {0, 1, 2, 3, 4, 6}
    assert chosen(fixed_sequence(P, delta=0.1)) == {0, 1, 2, 3, 4}
    assert chosen(bonferroni(P, delta=0.05)) == {0}
    assert chosen(holm(P, delta=0.05)) == {0, 1}


TRIANGLE = ([0.5, 0.5, 0.0], [[0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]])


@pytest.mark.parametrize(
    ("p", "rejected"),
    [
        ((0.01, 0.07, 0.03), {0, 1, 2}),
        ((0.01, 0.076, 0.03), {0}),
        ((0.01, 0.076, 0.02), {0, 1, 2}),
        ((0.06, 0.01, 0.2), {0, 1}),
    ],
)
def test_graph_known_answers(p, rejected):
    weights, transitions = TRIANGLE
    found = graphical(p, delta=0.1, weights=weights, transitions=transitions)
    assert chosen(found) == rejected


def test_graph_weights_after_one_rejection():
    weights, transitions = (np.array(part, dtype=float) for part in TRIANGLE)
    log_p = np.log([0.01, 0.076, 0.03])
    tested = walk_graph(log_p.__getitem__, weights=weights, transitions=transitions, delta=0.1)
    assert tested.levels[1] == pytest.approx(0.075)
    assert tested.levels[2] == pytest.approx(0.025)


def test_fallback_is_a_graph():
    found = graphical(
        (0.04, 0.2, 0.03, 0.01), delta=0.1, weights=(0.5, 0, 0.5, 0), transitions=np.eye(4, k=1)
    )
    assert chosen(found) == {0, 2, 3}


@given(p_values, st.floats(0.01, 0.3))
def test_holm_is_the_complete_graph(p, delta):
    weights, edges = complete_graph(len(p))
    found = graphical(p, delta=delta, weights=weights, transitions=edges)
    boundary = [abs(q * k - delta) < 1e-9 for q in p for k in range(1, len(p) + 1)]
    if not any(boundary):
        np.testing.assert_array_equal(found, holm(p, delta=delta))


@given(p_values, st.floats(0.01, 0.3))
def test_fixed_sequence_is_the_chain(p, delta):
    n = len(p)
    found = graphical(p, delta=delta, weights=np.eye(n)[0], transitions=np.eye(n, k=1))
    np.testing.assert_array_equal(found, fixed_sequence(p, delta=delta))


@given(p_values, st.floats(0.01, 0.3), st.data())
def test_several_starts_are_a_chain_with_several_weights(p, delta, data):
    n = len(p)
    starts = data.draw(st.sets(st.integers(0, n - 1), min_size=1))
    weights = np.isin(np.arange(n), list(starts)) / len(starts)
    found = graphical(p, delta=delta, weights=weights, transitions=np.eye(n, k=1))
    expected = fixed_sequence(p, delta=delta, starts=tuple(starts))
    close = [abs(q * len(starts) - delta * k) < 1e-9 for q in p for k in range(1, len(starts) + 1)]
    if not any(close):
        np.testing.assert_array_equal(found, expected)


@given(p_values, st.floats(0.01, 0.3))
def test_nan_is_one(p, delta):
    with_nan, with_one = [*p, np.nan], [*p, 1.0]
    for rule in (bonferroni, holm, fixed_sequence):
        np.testing.assert_array_equal(rule(with_nan, delta=delta), rule(with_one, delta=delta))
    weights, edges = complete_graph(len(with_one))
    a, b = (
        graphical(q, delta=delta, weights=weights, transitions=edges) for q in (with_nan, with_one)
    )
    np.testing.assert_array_equal(a, b)


@given(p_values, st.floats(0.01, 0.2))
def test_more_delta_never_rejects_less(p, delta):
    for rule in (bonferroni, holm, fixed_sequence):
        small, large = rule(p, delta=delta), rule(p, delta=2 * delta)
        assert (large | ~small).all()


def test_an_undefined_test_does_not_end_the_others_silently():
    # a public library certifies nothing with Holm as soon as one p-value is NaN
    p = [np.nan, 0.001, 0.002]
    assert chosen(holm(p, delta=0.1)) == {1, 2}


@pytest.mark.parametrize("k", [2, 3])
def test_exact_family_wise_error_on_all_outcomes(k):
    """All p-values independent and exactly discrete: enumerate every joint outcome."""
    n, risk, delta = 6, 0.45, 0.2
    counts = np.arange(n + 1)
    p = stats.binom.cdf(counts, n, risk)
    mass = stats.binom.pmf(counts, n, risk)
    rules = {
        "bonferroni": lambda q: bonferroni(q, delta=delta),
        "holm": lambda q: holm(q, delta=delta),
        "fixed": lambda q: fixed_sequence(q, delta=delta),
        "starts": lambda q: fixed_sequence(q, delta=delta, starts=(0, k - 1)),
        "graph": lambda q: graphical(
            q, delta=delta, weights=complete_graph(k)[0], transitions=complete_graph(k)[1]
        ),
    }
    error = dict.fromkeys(rules, 0.0)
    for outcome in itertools.product(counts, repeat=k):
        weight = np.prod(mass[list(outcome)])
        for name, rule in rules.items():
            error[name] += weight * rule(p[list(outcome)]).any()
    assert all(value <= delta + 1e-12 for value in error.values())
    assert error["fixed"] == pytest.approx(p[p <= delta].max())  # one null is fully used


def losses(rates, n=600, seed=3):
    return (np.random.default_rng(seed).random((n, len(rates))) < rates).astype(float)


def test_procedures_inside_control_risk_agree_with_p_values():
    table = losses((0, 0.005, 0.01, 0.06, 0.02, 0.2))
    log_p = control_risk(
        table, risk=0.05, delta=0.1, loss_type="binary", procedure="bonferroni"
    ).log_p_values[1:]
    graph = Graph.of([0, 0.5, 0, 0.5, 0, 0], np.pad(np.eye(5, k=1), ((1, 0), (1, 0))))
    expected = {
        "bonferroni": (Bonferroni(), bonferroni(np.exp(log_p), delta=0.1)),
        "holm": (Holm(), holm(np.exp(log_p), delta=0.1)),
        "sequence": (
            FixedSequence((1, 4)),
            fixed_sequence(np.exp(log_p), delta=0.1, starts=(0, 3)),
        ),
        "graph": (
            graph,
            graphical(
                np.exp(log_p),
                delta=0.1,
                weights=[0.5, 0, 0.5, 0, 0],
                transitions=np.eye(5, k=1),
            ),
        ),
    }
    for procedure, mask in expected.values():
        result = control_risk(table, risk=0.05, delta=0.1, loss_type="binary", procedure=procedure)
        np.testing.assert_array_equal(result.certified[1:], mask)
        assert result.certificate.verify(table)


@pytest.mark.parametrize("loss_type", ["binary", "bounded"])
def test_upper_bounds_and_fixed_sequence_are_one_procedure(loss_type):
    table = losses((0, 0.005, 0.02, 0.03, 0.02, 0.2))
    walk = control_risk(table, risk=0.05, loss_type=loss_type, procedure="upper-bound")
    method = walk.certificate.method
    sequence = control_risk(table, risk=0.05, loss_type=loss_type, method=method)
    np.testing.assert_array_equal(walk.certified, sequence.certified)
    visited = list(walk.visited)
    np.testing.assert_array_equal(walk.bounds[visited] <= 0.05, walk.certified[visited])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"procedure": "holm", "starts": (2,)}, "`starts` must be left out"),
        ({"procedure": "upper-bound", "starts": (1, 2)}, "a single column"),
        ({"procedure": Graph((0.5, 0.5), ((0, 0), (0, 0)))}, "6 non-negative numbers"),
    ],
)
def test_refusals(arguments, text):
    with pytest.raises(InvalidArgumentError, match=text):
        control_risk(losses((0,) * 6), risk=0.05, **arguments)


def test_graphs_are_checked():
    with pytest.raises(InvalidArgumentError, match="`transitions` must be"):
        graphical([0.1, 0.1], delta=0.1, weights=[0.5, 0.5], transitions=np.ones((2, 2)))
    with pytest.raises(InvalidArgumentError, match="zero for column 0"):
        Graph.of([0.5, 0.5], np.zeros((2, 2)))
    with pytest.raises(InvalidArgumentError, match="`p_values` must be"):
        holm([-0.1], delta=0.1)
