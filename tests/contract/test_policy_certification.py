"""Every deployable rule is certified the same way, and fresh traffic keeps the promise."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import policy_table as table
import pytest

from adaptive.calibration import Trace, control_risk, mixture_log_p
from adaptive.policies import exit_stages, oracle_stages, unit_costs, unit_losses

RISK, DELTA = 0.1, 0.05
DEPLOYABLE = [row for row in table.RULES if row.rule.scope == "row"]
FALSE_ALARM = 0.001 / len(DEPLOYABLE)


def traffic(seed: int, *, n_units: int) -> Trace:
    """Units of different difficulty; an exit that agrees keeps agreeing; scores tell, noisily."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 7, n_units)
    unit = np.repeat(np.arange(n_units), lengths)
    difficulty = rng.beta(1.0, 2.0, n_units)[unit]
    settles = rng.binomial(table.N_EXITS + 1, difficulty)
    agree = np.arange(table.N_EXITS) >= settles[:, None]
    scores = np.where(agree, rng.beta(6, 2, agree.shape), rng.beta(2, 4, agree.shape))
    answers = np.where(agree, 0, rng.integers(1, 4, agree.shape))
    return Trace(
        scores=np.clip(scores, 0.001, 0.999),
        losses={"disagreement": ~agree},
        costs=np.arange(1.0, table.N_EXITS + 2),
        cost_quantity="layers",
        lengths=lengths,
        columns={
            "answers": answers,
            "positions": np.concatenate([np.arange(1, length + 1) for length in lengths]),
        },
    )


FIT, TEST, FRESH = (traffic(seed, n_units=n) for seed, n in ((101, 500), (102, 1000), (103, 4000)))


@pytest.mark.statistical
@pytest.mark.parametrize("row", DEPLOYABLE, ids=[row.name for row in DEPLOYABLE])
def test_fresh_units_keep_the_promise(row: Any) -> None:
    """Fresh units do not reject "true risk <= promise" at level 0.001 / number of rules."""
    knobs = row.rule.knobs(FIT, size=16)
    family = [row.rule.with_knob(knob) for knob in knobs]
    assert knobs[0] == math.inf
    result = control_risk(
        lambda column: unit_losses(exit_stages(family[column], TEST), TEST),
        n_columns=len(family),
        risk=RISK,
        delta=DELTA,
    )
    chosen = family[result.index or 0]
    stages = exit_stages(chosen, FRESH)
    realised = unit_losses(stages, FRESH)
    log_p = float(np.asarray(mixture_log_p(1.0 - realised, risk=1.0 - RISK)).reshape(-1)[0])
    assert log_p > math.log(FALSE_ALARM)
    spent, best = unit_costs(stages, FRESH), unit_costs(oracle_stages(FRESH), FRESH)
    assert spent.mean() <= FRESH.costs[-1]
    if row.name in {"threshold", "beta mixture", "quantile exit", "evidence process"}:
        assert result.index is not None
        assert best.mean() < spent.mean() < 0.95 * FRESH.costs[-1]


@pytest.mark.statistical
def test_the_check_on_fresh_units_can_fail() -> None:
    """The cheapest member of a path breaks the promise, and fresh units show it."""
    rule = DEPLOYABLE[0].rule
    cheapest = rule.with_knob(rule.knobs(FIT, size=16)[-1])
    realised = unit_losses(exit_stages(cheapest, FRESH), FRESH)
    log_p = float(np.asarray(mixture_log_p(1.0 - realised, risk=1.0 - RISK)).reshape(-1)[0])
    assert log_p < math.log(FALSE_ALARM)
