"""The promise P(true risk <= risk) >= 1 - delta, calibration by calibration, on hard laws.

Each case simulates 2000 calibrations and compares the number that broke the promise with the exact
99.9 % binomial limit. The same check is applied to deliberately wrong variants, and must fail.
"""

from __future__ import annotations

import numpy as np
import pytest

from adaptive.calibration import binomial_log_p, control_risk
from adaptive.calibration.conformance import (
    SCENARIOS,
    check_control,
    violation_limit,
    violations,
)

pytestmark = pytest.mark.statistical
REPLICATES = 2000
SETTINGS = ((100, 0.1, 0.1), (150, 0.05, 0.05), (400, 0.05, 0.2))
BY_NAME = {scenario.name: scenario for scenario in SCENARIOS}


@pytest.fixture(autouse=True)
def _no_forced_collection(monkeypatch):
    """statsmodels collects garbage on every call: 70 ms each with a large heap."""
    monkeypatch.setattr("gc.collect", lambda *_: 0)


def per_unit(losses):
    """The loss of a unit is the mean over its tokens."""
    return losses.mean(axis=1) if losses.ndim == 3 else losses


def is_binary(losses):
    return losses.ndim == 2 and bool(np.isin(losses, (0.0, 1.0)).all())


def certified(losses, risk, delta, **settings):
    return control_risk(per_unit(losses), risk=risk, delta=delta, **settings).index


def default_control(losses, risk, delta):
    kind = "binary" if is_binary(losses) else "bounded"
    return certified(losses, risk, delta, loss_type=kind)


def bets_control(losses, risk, delta):
    return certified(losses, risk, delta)


def keeps_the_promise(control, scenario, setting, replicates=REPLICATES):
    """The one check that right procedures pass and wrong ones fail."""
    n, risk, delta = setting
    wrong = violations(
        control, scenario, n_units=n, risk=risk, delta=delta, replicates=replicates, rng=2
    )
    return wrong <= violation_limit(replicates, delta)


CASES = [
    *((scenario, SETTINGS[i % len(SETTINGS)]) for i, scenario in enumerate(SCENARIOS)),
    *((SCENARIOS[0], setting) for setting in SETTINGS[1:]),
    (BY_NAME["gains pay for harm"], SETTINGS[0]),
]


@pytest.mark.parametrize(
    ("scenario", "setting"), CASES, ids=lambda part: getattr(part, "name", part)
)
def test_default_calibration_keeps_its_promise(scenario, setting):
    assert keeps_the_promise(default_control, scenario, setting)


@pytest.mark.parametrize(
    "scenario",
    [s for s in SCENARIOS if s.name in ("flat path just above the promise", "not monotone")],
    ids=lambda scenario: scenario.name,
)
def test_bets_keep_the_promise_on_binary_losses_too(scenario):
    assert keeps_the_promise(bets_control, scenario, SETTINGS[0], 500)


@pytest.mark.parametrize(
    "settings",
    [
        {"procedure": "bonferroni", "loss_type": "binary"},
        {"procedure": "upper-bound", "loss_type": "binary"},
        {"starts": (1, 4), "loss_type": "binary"},
        {"method": "hoeffding-bentkus"},
        {"method": "wsr"},
    ],
    ids=str,
)
def test_other_procedures_keep_the_promise(settings):
    def control(losses, risk, delta):
        here = dict(settings)
        if "starts" in here:  # some checks have fewer columns
            here["starts"] = tuple(s for s in here["starts"] if s < losses.shape[1])
        return certified(losses, risk, delta, **here)

    scenarios = [BY_NAME["flat path just above the promise"], BY_NAME["not monotone"]]
    report = check_control(
        control, scenarios=scenarios, settings=SETTINGS[:1], replicates=300, rng=3
    )
    assert report.passed, str(report)


def test_joint_promises_hold_jointly():
    """Two groups, each at its exact null: the chance that either is certified is at most delta."""
    n, risk, delta, replicates, wrong = 200, 0.1, 0.1, 1000, 0
    rng = np.random.default_rng(4)
    groups = np.arange(n) % 2
    for _ in range(replicates):
        losses = (rng.random((n, 2)) < [0.0, risk]).astype(float)
        result = control_risk(
            losses, risk=risk, delta=delta, loss_type="binary", groups=groups, per_group=True
        )
        wrong += any(part.index is not None for part in result.groups.values())
    assert wrong <= violation_limit(replicates, delta)


def test_clusters_keep_the_promise_where_their_members_would_not():
    n, risk, delta = 60, 0.1, 0.1
    scenario = BY_NAME["tokens share their fate"]
    groups = np.repeat(np.arange(n), scenario.tokens)

    def control(losses, risk, delta, **settings):
        flat = losses.reshape(-1, losses.shape[-1])
        return control_risk(flat, risk=risk, delta=delta, loss_type="binary", **settings).index

    def clustered(losses, risk, delta):
        return control(losses, risk, delta, groups=groups)

    assert keeps_the_promise(clustered, scenario, (n, risk, delta), 500)
    assert not keeps_the_promise(control, scenario, (n, risk, delta), 500)


# --- wrong on purpose -------------------------------------------------------------------------


def first_failing(losses, risk, delta):
    """The member at which testing stopped, which several public codes return."""
    result = control_risk(per_unit(losses), risk=risk, delta=delta, loss_type="binary")
    last = losses.shape[1] - 1
    return min((result.index or 0) + 1, last)


def same_units_for_tuning_and_testing(losses, risk, delta):
    """Order the members by their loss on the very units that test them; take the cheapest."""
    order = np.argsort(losses[:, 1:].mean(axis=0), kind="stable") + 1
    result = control_risk(
        losses[:, np.insert(order, 0, 0)], risk=risk, delta=delta, loss_type="binary"
    )
    return None if result.index is None else int(order[result.index - 1])


def tokens_as_units(losses, risk, delta):
    flat = losses.reshape(-1, losses.shape[-1])
    return control_risk(flat, risk=risk, delta=delta, loss_type="binary").index


def cheapest_that_passes_alone(losses, risk, delta):
    """Every member at the full level, the cheapest passing one: no multiplicity."""
    log_p = binomial_log_p(losses.sum(axis=0), losses.shape[0], risk=risk)
    passing = np.flatnonzero(log_p[1:] <= np.log(delta)) + 1
    return int(passing[-1]) if passing.size else None


def best_of_twenty_orders(losses, risk, delta):
    """Re-drawing the order of the units until the bets win."""
    found = (control_risk(per_unit(losses), risk=risk, delta=delta, rng=s).index for s in range(20))
    return max((index for index in found if index is not None), default=None)


def naive(losses, risk, delta):
    """The cheapest member whose mean loss is below the promise."""
    passing = np.flatnonzero(per_unit(losses).mean(axis=0) <= risk)
    return int(passing[-1])


@pytest.mark.parametrize(
    ("wrong", "scenario", "replicates"),
    [
        (first_failing, "steep step", 500),
        (first_failing, "first column just above the promise", 500),
        (same_units_for_tuning_and_testing, "flat path just above the promise", 500),
        (tokens_as_units, "tokens share their fate", 500),
        (cheapest_that_passes_alone, "flat path just above the promise", 500),
        (best_of_twenty_orders, "first column just above the promise", 100),
        (naive, "fine path, dependent along it", 500),
    ],
)
def test_wrong_variants_are_caught(wrong, scenario, replicates):
    assert not keeps_the_promise(wrong, BY_NAME[scenario], SETTINGS[0], replicates)
