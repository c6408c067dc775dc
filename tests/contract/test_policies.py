"""The behavioural contract of scores and rules: every row of the table keeps every promise."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import policy_table as table
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from adaptive import policies
from adaptive.calibration import Trace, fit_isotonic, fit_platt
from adaptive.policies import Features, Policy, exit_stages, keyed_noise, unit_keys
from adaptive.policies._base import AbstractRule, AbstractSchedule, AbstractScore

each_rule = pytest.mark.parametrize("row", table.RULES, ids=[row.name for row in table.RULES])
each_score = pytest.mark.parametrize(
    "score", [score for _, score in table.SCORES], ids=[name for name, _ in table.SCORES]
)
each_device = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
)


def test_the_table_is_complete() -> None:
    """No score or rule of the package is without a row."""
    shown = {type(row.rule) for row in table.RULES} | {type(score) for _, score in table.SCORES}
    final = {
        value
        for value in vars(policies).values()
        if isinstance(value, type)
        and issubclass(value, AbstractRule | AbstractScore)
        and not value.__name__.startswith("Abstract")
    }
    assert final <= shown


def online(
    rule: AbstractRule,
    trace: Trace,
    order: list[int],
    *,
    batch_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> np.ndarray[Any, Any]:
    """Step a policy the way a loop does: batches, rows that finish, a break when none runs."""
    policy = Policy(table.Given(), rule, stages=tuple(range(trace.n_exits)))
    found = np.full(trace.n_tokens, trace.n_exits)
    keys = unit_keys(trace.unit_ids)
    for start in range(0, len(order), batch_size):
        units = order[start : start + batch_size]
        state = policy.init(len(units), device=device)
        for token in range(int(max(trace.lengths[units]))):
            alive = [token < trace.lengths[unit] for unit in units]
            rows = [trace.offsets[unit] + min(token, trace.lengths[unit] - 1) for unit in units]
            running = torch.tensor(alive, device=device)
            position = torch.from_numpy(trace.columns["positions"][rows]).to(device)
            for stage in range(trace.n_exits):
                features = Features(
                    stage=stage,
                    position=position,
                    probe=torch.from_numpy(trace.scores[rows, stage]).to(device, dtype),
                    answer=torch.from_numpy(trace.columns["answers"][rows, stage]).to(device),
                    noise=keyed_noise(keys[units].to(device), position),
                    running=running,
                )
                stop, _, state = policy.update(features, state)
                stop = stop & running
                for place, row in enumerate(rows):
                    if stop[place]:
                        found[row] = stage
                running = running & ~stop
                if not running.any():
                    break
            state = policy.advance(state)
    return found


@each_device
@each_rule
@settings(max_examples=8)
@given(
    seed=st.integers(0, 10_000),
    batch_size=st.integers(1, 9),
    ties=st.sampled_from([0, 3]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    data=st.data(),
)
def test_offline_is_online(
    row: Any, device: str, seed: int, batch_size: int, ties: int, dtype: torch.dtype, data: Any
) -> None:
    """`exit_stages` and `Policy.update` agree on every token, in any batch and dtype."""
    trace = table.make_trace(seed, levels=ties)
    rounded = torch.from_numpy(trace.scores.copy()).to(dtype).float().numpy()
    trace = Trace(**(vars(trace) | {"scores": rounded}))
    order = list(range(trace.n_units))
    if row.rule.scope == "row":
        order = data.draw(st.permutations(order))
    else:
        batch_size = trace.n_units
    stepped = online(
        row.rule, trace, order, batch_size=batch_size, dtype=dtype, device=torch.device(device)
    )
    np.testing.assert_array_equal(exit_stages(row.rule, trace), stepped)


@each_rule
@settings(max_examples=5)
@given(seed=st.integers(0, 10_000), size=st.integers(2, 12))
def test_path(row: Any, seed: int, size: int) -> None:
    """The path descends from infinity, starts at full depth, and is nested if it says so."""
    fit, test = table.make_trace(seed, n_units=40), table.make_trace(seed + 1, n_units=20)
    knobs = row.rule.knobs(fit, size=size)
    assert knobs[0] == math.inf
    assert 1 <= len(knobs) <= size
    assert all(later < earlier for earlier, later in pairwise(knobs))
    exits = [exit_stages(row.rule.with_knob(knob), test) for knob in knobs]
    assert (exits[0] == test.n_exits).all()
    if row.rule.nested:
        for safer, cheaper in pairwise(exits):
            assert (cheaper <= safer).all()


@each_rule
def test_the_row_is_informative(row: Any) -> None:
    """Some tokens stop and some do not, or the other tests would show nothing."""
    trace = table.make_trace(11, n_units=60 if row.rule.scope == "row" else 4)
    stages = exit_stages(row.rule, trace)
    assert (stages < trace.n_exits).any()
    assert np.unique(stages).size > 1 or row.name == "fixed stage"
    knobs = row.rule.knobs(table.FIT, size=6)
    assert len(knobs) >= 2
    assert (exit_stages(row.rule.with_knob(knobs[-1]), trace) < trace.n_exits).any()


@each_rule
def test_the_knob_is_all_that_moves(row: Any) -> None:
    knob = row.rule.knobs(table.FIT, size=4)[-1]
    assert row.rule.with_knob(math.inf).with_knob(knob) == row.rule.with_knob(knob)


@each_rule
def test_nan_never_stops(row: Any) -> None:
    if not row.reads_score:
        pytest.skip("stops for other reasons than the score")
    rule = row.rule.with_knob(row.rule.knobs(table.FIT, size=4)[-1])
    state = rule.init(3, device=table.CPU)
    for stage in range(table.N_EXITS):
        here = table.features_at(stage, 3)
        stop, state = rule.decide(here, torch.full((3,), math.nan), state)
        assert not stop.any()


@each_rule
def test_rule_survives_json(row: Any) -> None:
    for rule in (row.rule, row.rule.with_knob(math.inf)):
        policy = Policy(table.Given(), rule, stages=(0, 2))
        text = json.dumps(policy.to_dict(), allow_nan=False)
        assert Policy.from_dict(json.loads(text)) == policy


@each_score
def test_score_survives_json(score: AbstractScore, tmp_path: Path) -> None:
    policy = Policy(score, policies.Threshold(-0.5), stages=(0, 1))
    policy.save_pretrained(tmp_path)
    assert Policy.from_pretrained(tmp_path) == policy


def _parts(value: Any) -> set[str]:
    """Names of the classes that a score or rule is made of."""
    names = {type(value).__name__}
    for field in getattr(value, "__dataclass_fields__", {}):
        inner = getattr(value, field)
        for one in inner if isinstance(inner, tuple) else (inner,):
            if isinstance(one, AbstractRule | AbstractScore | AbstractSchedule):
                names |= _parts(one)
    return names


#: Public names that decide nothing in a loop: interfaces, builders of what is in the table, and
#: references and measures for offline use.
NOT_DEPLOYED = {
    *("AbstractRule", "AbstractSchedule", "AbstractScore", "AbstractStatisticRule"),
    *("FEATURES", "Features", "Mode", "Policy", "Scope", "State", "members"),
    *("agreement_thresholds", "certified_agreement_thresholds", "budget_thresholds"),
    *("exponential_weights", "geometric_allocation", "geometric_rates", "inflated_thresholds"),
    *("linear_programme", "two_stage_allocation", "calm_policy", "decaying_vocabulary"),
    *("wald_boundaries", "BetaMixtureTracker", "budget_certificate", "mean_cost_bound"),
    *("asked_at", "choose_stages", "expected_cost"),
    *("exit_stages", "unit_costs", "unit_keys", "unit_losses", "keyed_noise"),
    *("oracle_stages", "regret", "expected_readout", "halting_distribution"),
    *("truncated_distribution", "risk_consistency", "textual_consistency"),
    *("rouge_l_distance", "token_f1_distance"),
}


def test_every_public_name_is_in_the_table_or_decides_nothing() -> None:
    """A new policy cannot miss the contract: its name is in a row, or declared not deployed."""
    shown: set[str] = set()
    for value in [*(row.rule for row in table.RULES), *(score for _, score in table.SCORES)]:
        shown |= _parts(value)
    assert set(policies.__all__) - shown == NOT_DEPLOYED
    assert not shown & NOT_DEPLOYED


class NoHostSynchronisation(TorchDispatchMode):
    """Refuse every operator whose result the host has to wait for."""

    waiting = ("_local_scalar_dense", "item", "nonzero", "masked_select", "equal", "unique")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        assert not name.startswith(self.waiting), f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


def _walk(policy: Policy, *, device: str, dtype: torch.dtype = torch.float32) -> Any:
    """Two tokens through every exit, one row finished."""
    state = policy.init(3, device=torch.device(device))
    running = torch.tensor([True, True, False], device=device)
    inputs = [
        [
            table.features_at(
                stage, 3, device=torch.device(device), dtype=dtype, position=token, running=running
            )
            for stage in range(table.N_EXITS)
        ]
        for token in (1, 2)
    ]

    def walk(state: Any) -> tuple[list[Tensor], list[Tensor], Any]:
        stops, scores = [], []
        for token in inputs:
            for features in token:
                stop, score, state = policy.update(features, state)
                stops.append(stop)
                scores.append(score)
            state = policy.advance(state)
        return stops, scores, state

    return walk, state


def _policies() -> list[Any]:
    stages = tuple(range(table.N_EXITS))
    rules = [
        pytest.param(Policy(policies.ProbeScore(), row.rule, stages=stages), id=row.name)
        for row in table.RULES
    ]
    scores = [
        pytest.param(Policy(score, policies.Threshold(-0.5), stages=stages), id=name)
        for name, score in table.SCORES
    ]
    return rules + scores


each_policy = pytest.mark.parametrize("policy", _policies())


def test_the_guard_against_synchronisation_can_fail() -> None:
    with NoHostSynchronisation(), pytest.raises(AssertionError, match="waits for the device"):
        bool(torch.ones(1).any())


@each_device
@each_policy
def test_update_never_waits_for_the_device(policy: Policy, device: str) -> None:
    walk, state = _walk(policy, device=device)
    with NoHostSynchronisation():
        stops, scores, _ = walk(state)
    for stop, score in zip(stops, scores, strict=True):
        assert stop.dtype is torch.bool
        assert score.dtype is torch.float32
        assert stop.shape == score.shape == (3,)


@each_policy
def test_state_keeps_its_shapes(policy: Policy) -> None:
    """Fixed buffers: the same keys, shapes and dtypes after any number of tokens."""
    walk, state = _walk(policy, device="cpu")
    after = walk(state)[2]
    assert {key: (value.shape, value.dtype) for key, value in after.items()} == {
        key: (value.shape, value.dtype) for key, value in state.items()
    }


@each_policy
@pytest.mark.slow
def test_update_compiles_without_a_graph_break(policy: Policy) -> None:
    torch.compiler.reset()
    walk, state = _walk(policy, device="cpu")
    compiled = torch.compile(walk, fullgraph=True, backend="eager")
    for plain, captured in zip(walk(state)[:2], compiled(state)[:2], strict=True):
        for one, other in zip(plain, captured, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
@each_policy
def test_update_is_captured_in_a_cuda_graph(policy: Policy) -> None:
    walk, state = _walk(policy, device="cuda")
    plain = walk(state)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        walk(state)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = walk(state)
    graph.replay()
    for one, other in zip(plain[0] + plain[1], captured[0] + captured[1], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@each_score
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_row_does_not_see_its_neighbours(score: AbstractScore, dtype: torch.dtype) -> None:
    rows = torch.tensor([2, 0])
    together, alone = score.init(3, device=table.CPU), score.init(2, device=table.CPU)
    for position in (1, 2):
        for stage in range(table.N_EXITS):
            features = table.features_at(stage, 3, dtype=dtype, position=position)
            all_rows, together = score.score(features, together)
            some, alone = score.score(table.take(features, rows), alone)
            assert all_rows.dtype is torch.float32
            torch.testing.assert_close(some, all_rows[rows], rtol=1e-5, atol=1e-6)
        together, alone = score.advance(together), score.advance(alone)


def _scores_along(score: AbstractScore, seed: int) -> Tensor:
    """Scores of three rows at every exit, [3, n_exits]."""
    state, found = score.init(3, device=table.CPU), []
    for stage in range(table.N_EXITS):
        value, state = score.score(table.features_at(stage, 3, seed=seed), state)
        found.append(value)
    return torch.stack(found, dim=1)


@each_score
@pytest.mark.parametrize("method", [fit_isotonic, fit_platt])
def test_every_score_can_be_calibrated(score: AbstractScore, method: Any) -> None:
    """The map gives probabilities, keeps the order within an exit, and "no score" as it is."""
    scores = torch.cat([_scores_along(score, seed) for seed in range(60)]).numpy()
    trace = Trace(
        scores=scores,
        losses={"disagreement": np.random.default_rng(0).uniform(size=scores.shape) < 0.5},
        costs=np.arange(1.0, table.N_EXITS + 2.0),
        cost_quantity="layers",
    )
    calibrated = policies.Calibrated.fit(score, trace, method=method)
    for seed in range(70, 80):
        plain, mapped = _scores_along(score, seed), _scores_along(calibrated, seed)
        assert torch.equal(mapped == -math.inf, plain == -math.inf)
        assert ((mapped == -math.inf) | (mapped >= 0.0) & (mapped <= 1.0)).all()
        order = plain.argsort(dim=0)
        assert (mapped.gather(0, order)[1:] >= mapped.gather(0, order)[:-1]).all()


@each_score
def test_memory_within_a_token_is_cleared(score: AbstractScore) -> None:
    """After a token a score starts anew, unless it declares memory across tokens."""
    fresh = score.init(3, device=table.CPU)
    used = fresh
    for stage in range(table.N_EXITS):
        _, used = score.score(table.features_at(stage, 3, seed=5), used)
    after = score.advance(used)
    equal = all(torch.equal(after[key].nan_to_num(), fresh[key].nan_to_num()) for key in fresh)
    assert equal is not score.across_tokens


@each_rule
def test_rows_that_do_not_run_keep_their_memory(row: Any) -> None:
    policy = Policy(policies.ProbeScore(), row.rule, stages=tuple(range(table.N_EXITS)))
    state = policy.init(3, device=table.CPU)
    running = torch.tensor([True, False, True])
    for stage in range(table.N_EXITS):
        before = state
        _, _, state = policy.update(table.features_at(stage, 3, running=running), state)
        for key, value in state.items():
            if value is not before[key]:
                assert torch.equal(value[1].nan_to_num(), before[key][1].nan_to_num())
