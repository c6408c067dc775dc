"""Measured costs, the inbox they choose, and the number of drafts worth making."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive import _costs, generate, get_exits
from adaptive._costs import Costs, costs_of, pays_apart
from adaptive._draft_length import DraftLength
from adaptive._timing import stage_seconds
from adaptive.policies import Threshold

FLAT = Costs((1, 2, 4, 8, 16, 32), (1.0,) * 6, (0.5,) * 6)
LINEAR = Costs((1, 2, 4, 8, 16, 32), (1.0, 2.0, 4.0, 8.0, 16.0, 32.0), (0.5,) * 6)


def test_an_efficient_pass_is_the_smallest_that_is_as_good_as_any() -> None:
    assert FLAT.efficient == 32
    assert LINEAR.efficient == 1
    bent = Costs((1, 2, 4, 8, 16), (4.0, 4.0, 4.0, 8.0, 16.0), (1.0,) * 5)
    assert bent.efficient == 4


@pytest.mark.parametrize(("picked", "together"), [(5.0, False), (8.0, True), (11.0, True)])
def test_rows_go_apart_only_where_fewer_rows_take_less(
    picked: float, together: bool, helpers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass over all rows takes 8.5: half of them must take clearly less to be worth it."""
    calls: list[str] = []

    def timed(executor: Any, work: Any) -> float:
        work()  # the pass that is timed can be made
        calls.append(work.func.__name__)
        return picked if calls[-1] == "run_tokens" else 8.5

    monkeypatch.setattr(_costs, "_fastest", timed)
    model = helpers.tiny("llama")
    assert pays_apart(model, 5) is not together
    assert pays_apart(model, 5) is not together
    assert calls == ["run", "run_tokens"]  # measured once
    assert not pays_apart(model, 5, tier="generic")


def test_costs_between_and_beyond_what_was_measured() -> None:
    costs = Costs((1, 2, 4), (1.0, 3.0, 5.0), (2.0, 2.0, 2.0))
    assert costs.of_layer(3) == 4.0
    assert costs.of_layer(6) == 7.0  # the last piece goes on
    assert costs.of_head(100) == 2.0


def test_a_table_of_one_entry_is_flat() -> None:
    costs = Costs((1,), (3.0,), (2.0,))
    assert costs.of_layer(1) == costs.of_layer(7) == 3.0
    assert costs.of_head(7) == 2.0
    assert costs.efficient == 1


@pytest.mark.parametrize("tier", ["native", "generic"])
@pytest.mark.parametrize("mode", ["exact", "propagate", "verify"])
@pytest.mark.parametrize("positions", [3, 8, 9, 10])
def test_models_with_few_positions(mode: Any, tier: Any, positions: int, helpers: Any) -> None:
    """There is no room to time several tokens at once, or even one."""
    model = helpers.tiny("gpt2", n_positions=positions)
    ids = helpers.prompts((2, 2))[0]
    settings = {"max_new_tokens": positions - 2, "do_sample": False}
    never = helpers.never(mode)
    early = replace(never, rule=Threshold(0.05))
    generate(model, ids, policy=early, tier=tier, **settings)
    text = generate(model, ids, policy=never, tier=tier, **settings)
    assert torch.equal(text, model.generate(ids, **settings))
    assert stage_seconds(model, get_exits(model), tier=tier)[0] > 0


@pytest.mark.parametrize("tier", ["native", "generic"])
def test_costs_are_measured_once_and_rise(
    tier: Any, helpers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = helpers.tiny("llama")
    costs = costs_of(model, tier=tier)
    for seconds in (costs.layer, costs.head):
        assert min(seconds) > 0
        assert (np.diff(seconds) >= 0).all()
    monkeypatch.setattr(_costs, "measure", lambda *_: pytest.fail("measured again"))
    assert costs_of(model, tier=tier) is costs


@pytest.mark.parametrize("mode", ["exact", "verify"])
@pytest.mark.parametrize("costs", [FLAT, LINEAR], ids=["flat", "linear"])
def test_costs_change_no_token(
    mode: Any, costs: Costs, helpers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = helpers.shared("llama")
    policy = helpers.mixed(model, mode)
    ids, mask = helpers.prompts((11, 7, 10))
    given = {"attention_mask": mask, "policy": policy, "max_new_tokens": 24, "pad_token_id": 0}
    fixed = generate(model, ids, max_pending=3, **given)
    monkeypatch.setattr("adaptive._stacking.costs_of", lambda *_, **__: costs)
    assert torch.equal(generate(model, ids, **given), fixed)


def _drafts(costs: Costs, acceptance: float, *, seen: int = 4000) -> DraftLength:
    length = DraftLength(costs, layers=12, rows=1, most=32)
    accepted = round(acceptance * seen)
    depths = [4.0] * seen
    length.observe(accepted=accepted, rejected=False, depths=depths)
    for _ in range(seen - accepted):
        length.observe(accepted=0, rejected=True, depths=[])
    return length


def test_drafts_that_are_never_accepted_are_confirmed_at_once() -> None:
    assert _drafts(FLAT, 0.0).best() == 1


def test_drafts_that_are_always_accepted_wait_for_the_largest_pass() -> None:
    assert _drafts(FLAT, 1.0).best() == 32


def test_nothing_waits_where_waiting_saves_nothing() -> None:
    # a pass over k tokens takes k times as long: any wrong draft is pure loss
    assert _drafts(LINEAR, 0.7).best() <= 2


@settings(max_examples=15, deadline=None)
@given(acceptance=st.floats(0.05, 0.98), seed=st.integers(0, 2**32 - 1))
def test_the_best_number_of_drafts_is_the_fastest_when_played(acceptance: float, seed: int) -> None:
    """Play rounds of drafting and confirming; no other number is faster beyond the noise."""
    rng = np.random.default_rng(seed)
    length = _drafts(FLAT, acceptance)
    rounds, depth, layers = 4000, 4.0, 12

    def pace(count: int) -> float:
        right = rng.uniform(size=(rounds, count)) < length.acceptance
        tokens = np.minimum(np.cumprod(right, axis=1).sum(axis=1) + 1, count).sum()
        step = depth * FLAT.of_layer(1) + FLAT.of_head(1)
        once = count * step + (layers - depth) * FLAT.of_layer(count) + FLAT.of_head(count)
        return float(tokens / (rounds * once))

    best = pace(length.best())
    assert all(pace(count) < best * 1.06 for count in (1, 2, 4, 8, 16, 32))
    assert pace(32 if length.best() <= 4 else 1) < best * 0.98  # another number would be slower


def test_acceptance_is_learned_in_the_loop(helpers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the loop reports equals what a text of its own says about its drafts."""
    seen: list[tuple[int, bool, int]] = []

    class Listening(DraftLength):
        def observe(self, *, accepted: int, rejected: bool, depths: list[float]) -> None:
            seen.append((accepted, rejected, len(depths)))
            super().observe(accepted=accepted, rejected=rejected, depths=depths)

    monkeypatch.setattr("adaptive._generate.DraftLength", Listening)
    monkeypatch.setattr("adaptive._stacking.costs_of", lambda *_, **__: FLAT)
    model = helpers.shared("llama")
    ids, mask = helpers.prompts((11,))
    output = generate(
        model,
        ids,
        attention_mask=mask,
        policy=helpers.mixed(model, "verify"),
        max_new_tokens=40,
        pad_token_id=0,
        return_dict_in_generate=True,
    )
    early = int((output.exit_stages[0] < len(get_exits(model).layers)).sum())
    assert sum(accepted for accepted, _, _ in seen) == early  # accepted drafts kept their exit
    assert any(rejected for _, rejected, _ in seen)
    assert all(accepted + rejected <= drafted for accepted, rejected, drafted in seen)
