"""Offline is online through the decode loop itself: every kind of policy, on a tiny model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import helpers
import numpy as np
import policy_table as table
import pytest
import tape
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from adaptive import InvalidArgumentError, attach_exits, generate
from adaptive import policies as p
from adaptive._collect import collect
from adaptive._deployment import Deployment
from adaptive._exits import Exits, require_exits
from adaptive._families import Readout
from adaptive._inputs import Units, read_units
from adaptive._run import Run
from adaptive._runs import full_depth, run_units
from adaptive.calibration import fit_isotonic
from adaptive.policies import AbstractScore, Policy, exit_stages

STAGES = (0, 1, 2, 3)
NEW, SEED = 10, 5
WIDTH, VOCABULARY = 32, helpers.VOCABULARY


@cache
def _model() -> PreTrainedModel:
    """Six layers, four exits with random probes: nobody asks whether they are any good."""
    model = helpers.tiny("llama", exits=False)
    exits = attach_exits(model, (1, 2, 3, 4))
    exits.record = replace(exits.record, settings={"probes": "random"})
    draw = torch.Generator().manual_seed(3)
    exits.probe_weight = nn.Parameter(
        torch.randn(4, WIDTH, generator=draw) / 8, requires_grad=False
    )
    exits.kept = nn.Parameter(torch.arange(0, VOCABULARY, 3), requires_grad=False)
    return model


@cache
def _units() -> Units:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, VOCABULARY, size=n).tolist() for n in (5, 8, 6, 9, 7)]
    return read_units(prompts, model=_model())


def _deployed(batch_size: int) -> Deployment:
    return Deployment(
        new_tokens=NEW, batch_size=batch_size, generation={"do_sample": False}, seed=SEED
    )


def _trace(score: AbstractScore, runs: Sequence[Run], stages: tuple[int, ...] = STAGES) -> Any:
    texts = [run.tokens for run in runs]
    return collect(_model(), _units(), texts, deployment=_deployed(8), score=score, stages=stages)


@cache
def _full_runs() -> tuple[Run, ...]:
    policy = full_depth(require_exits(_model()))
    return run_units(_model(), _units(), policy, deployment=_deployed(8), progress=False)


def _gates() -> list[AbstractScore]:
    rng = np.random.default_rng(1)
    hidden = rng.normal(size=(200, 4, WIDTH))
    logits = 3 * rng.normal(size=(200, 4, VOCABULARY))
    agree = hidden[..., 0] + 0.5 * rng.normal(size=(200, 4)) > 0
    return [
        p.LinearGate.fit(hidden, agree),
        p.StatisticsGate.fit(logits, agree),
        p.HaltingGate.fit(hidden, agree, width=8, embedding=2, steps=30),
        p.RecurrentGate.fit(p.ProbeScore(), table.FIT),
        p.Tempered(p.DynamicVocabulary((40, 30, 20, 10)), (1.5, 1.2, 1.0, 0.9)),
        p.Calibrated.fit(p.Margin(), table.FIT, method=fit_isotonic),
    ]


SCORES: list[AbstractScore] = [
    p.MaxProbability(),
    p.MaxProbability(pruned=True),
    p.Margin(),
    p.LogitMargin(),
    p.NegativeEntropy(),
    p.Concentration(),
    p.Energy(),
    p.Saturation(),
    p.DynamicVocabulary((40, 30, 20, 10)),
    p.MovingMean(p.Saturation(), 0.5),
    p.Steadiness(p.ProbeScore(), 0.5, warmup=2),
    p.VoteShare(4),
    p.BetaMajority(4),
    *_gates(),
]

#: No score at all, and the default score, which every rule of the table is tried on.
ELSEWHERE = {"NoScore", "ProbeScore"}


def test_every_score_goes_through_the_loop() -> None:
    shown = {type(score) for score in SCORES} | {getattr(p, name) for name in ELSEWHERE}
    assert {type(score) for _, score in table.SCORES} <= shown


RULES = [row for row in table.RULES if row.rule.scope == "row"]
SHARED = [row for row in table.RULES if row.rule.scope == "batch"]


def _between(policy: Policy) -> Policy:
    """Member halfway along the path, its knob between two statistics, where rounding is harmless.

    A table of thresholds has only its own levels: its thresholds were fitted elsewhere.
    """
    rule = policy.rule
    if isinstance(rule, p.ThresholdTable):
        return policy
    knobs = rule.knobs(_trace(policy.score, _full_runs(), policy.stages), size=7)
    assert len(knobs) >= 2, "nothing would stop"
    if len(knobs) == 2:
        return policy.member(knobs[1])
    place = 1 + len(knobs) // 3
    return policy.member((knobs[place - 1] + knobs[place]) / 2)


def _same(policy: Policy, *, batch_size: int) -> float:
    """Compare the loop with the trace of its own text; return the share of early stops."""
    runs = run_units(_model(), _units(), policy, deployment=_deployed(batch_size), progress=False)
    trace = _trace(policy.score, runs, policy.stages)
    found = exit_stages(policy.rule, trace, seed=SEED)
    online = np.concatenate([run.stages[1:] for run in runs])
    np.testing.assert_array_equal(found, online)
    return float((online < len(STAGES)).mean())


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("row", RULES, ids=[row.name for row in RULES])
def test_a_rule_stops_in_the_loop_where_it_stops_offline(row: Any, batch_size: int) -> None:
    score = p.ProbeScore()
    assert 0.0 < _same(_between(Policy(score, row.rule, stages=STAGES)), batch_size=batch_size)


@pytest.mark.parametrize("row", SHARED, ids=[row.name for row in SHARED])
def test_rows_that_decide_together_do_so_in_the_loop(row: Any) -> None:
    rule = row.rule.with_knob(0.45)
    _same(Policy(p.ProbeScore(), rule, stages=STAGES), batch_size=5)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("score", SCORES, ids=lambda score: type(score).__name__)
def test_a_score_is_the_same_in_the_loop(score: AbstractScore, batch_size: int) -> None:
    policy = _between(Policy(score, p.Threshold(), stages=STAGES))
    assert 0.0 < _same(policy, batch_size=batch_size) < 1.0


def test_rows_that_stop_without_logits_are_read_where_they_stop() -> None:
    """Logits of the first exit are not those of the second, among other rows as alone."""
    score = p.DynamicVocabulary((40, 30, 20, 10))
    policy = Policy(score, p.FixedStage(1), stages=STAGES)
    together, alone = (
        run_units(_model(), _units(), policy, deployment=_deployed(size), progress=False)
        for size in (5, 1)
    )
    for ours, theirs in zip(together, alone, strict=True):
        np.testing.assert_array_equal(ours.tokens, theirs.tokens)


def _captured(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare a captured and replayed step with the host's, rows of several lengths together."""
    rows = _units().ids
    ids, mask = helpers.prompts(tuple(map(len, rows)))
    for mode in ("exact", "propagate"):
        given = {"policy": replace(policy, mode=mode), "max_new_tokens": NEW, "max_pending": 3}
        given |= {"attention_mask": mask, "return_dict_in_generate": True, "seed": SEED}
        theirs = generate(_model(), ids, **given)
        with monkeypatch.context() as patch:
            tape.install(patch)
            ours = generate(_model(), ids, capture="step", **given)
        assert torch.equal(ours.sequences, theirs.sequences)
        assert torch.equal(ours.exit_stages, theirs.exit_stages)


@pytest.mark.parametrize("row", table.RULES, ids=[row.name for row in table.RULES])
def test_a_rule_is_the_same_in_a_cuda_graph(row: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = row.rule.scope == "batch"
    rule = row.rule.with_knob(0.45) if shared else row.rule
    policy = Policy(p.ProbeScore(), rule, stages=STAGES)
    _captured(policy if shared else _between(policy), monkeypatch)


@pytest.mark.parametrize("score", SCORES, ids=lambda score: type(score).__name__)
def test_a_score_is_the_same_in_a_cuda_graph(
    score: AbstractScore, monkeypatch: pytest.MonkeyPatch
) -> None:
    _captured(_between(Policy(score, p.Threshold(), stages=STAGES)), monkeypatch)


@pytest.mark.parametrize(
    "rule",
    [p.Patience(), p.QuantileExit(), p.RandomStage(), table.RULES[17].rule],
    ids=lambda rule: type(rule).__name__,
)
def test_exits_that_are_not_asked_count_for_nothing(rule: Any) -> None:
    """The path is that of the asked exits: an exit that was not asked has no say in it."""
    policy = Policy(p.ProbeScore(), rule, stages=(1, 3))
    full = _trace(policy.score, _full_runs(), (1, 3))
    knobs = rule.knobs(full, size=6)
    assert len(knobs) > 1
    depths = [exit_stages(rule.with_knob(knob), full) for knob in knobs]
    assert all((later <= earlier).all() for earlier, later in pairwise(depths))
    assert (depths[1] < 4).any()
    assert set(np.unique(np.stack(depths))) <= {1, 3, 4}
    assert 0.0 < _same(_between(policy), batch_size=3)


def test_a_dynamic_vocabulary_multiplies_the_kept_rows_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The full head runs at the first exit and where the token is read, and nowhere between."""
    calls = {"full": 0, "rows": 0}
    whole, rows = Readout.__call__, Readout.at

    def counted(self: Readout, hidden: Tensor) -> Tensor:
        calls["full"] += 1
        return whole(self, hidden)

    def asked(self: Readout, hidden: Tensor, ids: Tensor) -> Tensor:
        calls["rows"] += 1
        assert ids.shape == (1, (40, 30, 20, 10)[calls["rows"] % 3 or 3])
        return rows(self, hidden, ids)

    policy = Policy(p.DynamicVocabulary((40, 30, 20, 10)), p.Threshold(), stages=STAGES)
    with monkeypatch.context() as patch:
        patch.setattr(Readout, "__call__", counted)
        patch.setattr(Readout, "at", asked)
        one = _units().select([0])
        (run,) = run_units(
            _model(), one, policy, deployment=_deployed(1), labels=False, progress=False
        )
    decided = len(run.tokens) - 1
    assert calls["rows"] == 3 * decided
    # the prompt; per token the first exit and the last layer
    assert calls["full"] == 1 + 2 * decided


def test_rows_of_the_head_are_those_of_all_logits() -> None:
    model = helpers.shared("llama-tied-biased")
    readout = Readout(model)
    hidden = torch.randn(3, WIDTH)
    ids = torch.tensor([[5, 1], [0, 7], [96, 96]])
    torch.testing.assert_close(
        readout.at(hidden, ids), readout(hidden).gather(-1, ids), rtol=1e-5, atol=1e-5
    )
    biased = nn.Linear(WIDTH, 9)
    readout._head, readout._cap = biased, 2.0
    torch.testing.assert_close(
        readout.at(hidden, ids.clamp(max=8)),
        readout(hidden).gather(-1, ids.clamp(max=8)),
        rtol=1e-5,
        atol=1e-5,
    )


def test_a_loop_computes_what_is_needed_at_the_exit() -> None:
    exits: Exits = require_exits(_model())
    policy = Policy(p.DynamicVocabulary((9, 9, 9, 9), first=1), p.Threshold(), stages=(1, 2))
    assert policy.needs_at(1) == {"logits"}
    assert policy.needs_at(2) == {"head"}
    for stage, given in ((1, "logits"), (2, "head")):
        found = exits.features(
            policy.needs_at(stage),
            stage,
            torch.randn(2, WIDTH),
            previous=None,
            position=torch.ones(2, dtype=torch.int64),
            readout=Readout(_model()),
        )
        assert getattr(found, given) is not None
        assert getattr(found, "head" if given == "logits" else "logits") is None
    with pytest.raises(InvalidArgumentError, match="exits from 1 on, the `first` of Dynamic"):
        Policy(p.DynamicVocabulary((9, 9), first=1), p.Threshold(), stages=(0, 1))
    wrapped = p.MovingMean(p.DynamicVocabulary((9, 9)), 0.5)
    with pytest.raises(InvalidArgumentError, match="`stages`"):
        Policy(wrapped, p.Threshold(), stages=(1,))
    assert Policy(wrapped, p.Patience(), stages=(0, 1)).needs_at(1) == {"head", "answer"}
