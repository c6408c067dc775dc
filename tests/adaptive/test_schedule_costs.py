"""Seconds that a check schedule is weighed by: from prescribed costs, and measured."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from adaptive import Policy, Threshold, _schedule_costs, get_exits
from adaptive._costs import Costs, costs_of
from adaptive._schedule_costs import schedule_costs, seconds_of_stages
from adaptive.policies import MaxProbability, Mode, ProbeScore

FLAT = Costs((1, 2, 4, 8), (1.0,) * 4, (0.5,) * 4)
LINEAR = Costs((1, 2, 4, 8), (1.0, 2.0, 4.0, 8.0), (0.5,) * 4)
BETWEEN = Costs((1, 2, 4, 8), (1.0, 1.25, 1.75, 2.75), (0.5,) * 4)


@pytest.mark.parametrize(
    ("mode", "costs", "expected"),
    [
        ("propagate", FLAT, [2.5, 4.5, 12.5]),
        ("propagate", LINEAR, [2.5, 4.5, 12.5]),
        ("exact", FLAT, [2.5, 4.5, 12.5]),  # one token more in a pass costs nothing
        ("exact", BETWEEN, [2.5 + 10 / 4, 4.5 + 8 / 4, 12.5]),  # a quarter of a layer
        ("exact", LINEAR, [12.5, 12.5, 12.5]),  # as much as at once: nothing is saved
    ],
)
def test_a_token_costs_its_layers_and_what_it_leaves_for_later(
    mode: Mode, costs: Costs, expected: list[float]
) -> None:
    found = seconds_of_stages(costs, (2, 4), layers=12, mode=mode)
    np.testing.assert_allclose(found, expected, rtol=2e-6)
    assert (np.diff(found) > 0).all()


@pytest.mark.parametrize("tier", ["native", "generic"])
def test_checks_are_measured_once_where_a_policy_asks(
    tier: Any, helpers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = helpers.tiny("llama")
    exits = get_exits(model)
    policy = Policy(ProbeScore(), Threshold(), stages=(0, 2))
    found = schedule_costs(model, exits, policy, tier=tier)
    assert found.stages.shape == (4,)
    assert (np.diff(found.stages) > 0).all()
    assert (found.checks > 0).tolist() == [True, False, True]
    monkeypatch.setattr(_schedule_costs, "_checks", lambda *_: pytest.fail("measured again"))
    assert schedule_costs(model, exits, policy, tier=tier).checks.tolist() == found.checks.tolist()


def test_a_check_that_reads_the_whole_head_costs_more(helpers: Any) -> None:
    model = helpers.tiny("llama", vocab_size=40_000, hidden_size=64)
    exits = get_exits(model)
    probe, head = (
        schedule_costs(model, exits, Policy(score, Threshold(), stages=(0, 1, 2)))
        for score in (ProbeScore(), MaxProbability())
    )
    assert head.checks.min() > 2 * probe.checks.max()
    # where a token stops, it has been read
    saved = probe.stages - head.stages
    np.testing.assert_allclose(saved, [costs_of(model).of_head(1)] * 3 + [0.0], rtol=1e-6)


@pytest.mark.parametrize("family", ["gpt2", "opt", "gemma2"])
def test_every_family_can_be_measured(family: str, helpers: Any) -> None:
    model = helpers.tiny(family)
    policy = Policy(ProbeScore(), Threshold(), stages=(0, 1, 2), mode="propagate")
    assert schedule_costs(model, get_exits(model), policy).checks.min() > 0
