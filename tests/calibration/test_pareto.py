"""Split fixed sequences: the front, the order, and no unit on both sides."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from adaptive.calibration import InvalidArgumentError, control_risk_split, pareto_front
from adaptive.calibration.conformance import SCENARIOS, check_control

COSTS = (10, 2, 8, 5, 7)


def table(n=600, rates=(0.0, 0.3, 0.01, 0.02, 0.2), seed=0):
    return (np.random.default_rng(seed).random((n, len(rates))) < rates).astype(float)


@given(arrays(np.int64, (7, 3), elements=st.integers(0, 4)))
def test_front_is_what_the_definition_says(values):
    front = set(pareto_front(values).tolist())
    for i, row in enumerate(values):
        dominated = any((o <= row).all() and (o < row).any() for o in values)
        earlier_twin = any((o == row).all() for o in values[:i])
        assert (i in front) == (not dominated and not earlier_twin)


def test_cheapest_certified_configuration_is_chosen_and_evidence_reproduced():
    losses = table()
    found = control_risk_split(losses, costs=COSTS, risk=0.05, loss_type="binary")
    assert found.configuration == 3
    assert set(found.certified) == {2, 3}
    assert found.certificate.split["configuration"] == 3
    assert found.verify(losses)
    assert not found.verify(1.0 - losses)


def test_tuning_units_have_no_part_in_the_evidence():
    losses = table()
    found = control_risk_split(losses, costs=COSTS, risk=0.05, loss_type="binary", rng=3)
    others = np.setdiff1d(np.arange(len(losses)), found.test_units)
    assert others.size == 300
    changed = losses.copy()
    changed[others] = 1.0 - changed[others]
    assert found.verify(changed)


def test_several_risks():
    a, b = table(), table(rates=(0.0, 0.01, 0.2, 0.01, 0.01), seed=1)
    found = control_risk_split({"a": a, "b": b}, costs=COSTS, risk=0.06, loss_type="binary")
    assert found.configuration == 3
    assert found.certified == (3,)


def test_nothing_certified_is_full_computation():
    found = control_risk_split(table(rates=(0, 0.3, 0.3, 0.3, 0.3)), costs=COSTS, risk=0.05)
    assert found.configuration is None
    assert not found.certificate.holds


@pytest.mark.parametrize(
    "change", [{"costs": (1, 2)}, {"tuning_share": 0.0}, {"tuning_share": 0.0001}]
)
def test_refusals(change):
    with pytest.raises(InvalidArgumentError, match=r"`costs`|`tuning_share`"):
        control_risk_split(table(), **{"costs": COSTS, "risk": 0.05, **change})


@pytest.mark.statistical
def test_ordering_on_other_units_keeps_the_promise():
    flat = [s for s in SCENARIOS if s.name == "flat path just above the promise"]

    def control(losses, risk, delta):
        costs = np.linspace(1.0, 0.5, losses.shape[1])
        found = control_risk_split(losses, costs=costs, risk=risk, delta=delta, loss_type="binary")
        return found.configuration

    report = check_control(
        control, scenarios=flat, settings=((200, 0.1, 0.1),), replicates=500, rng=1
    )
    assert report.passed, str(report)
