"""Every score and every rule, one row each, and what the rows are tried on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from adaptive import policies as p
from adaptive.calibration import Trace, fit_beta_calibration, fit_isotonic, survivor_thresholds
from adaptive.policies import AbstractRule, AbstractScore, Features, State

N_EXITS = 4
WIDTH = 6
VOCABULARY = 11
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Given(AbstractScore):
    """The score that the test wrote into the feature ``probe``."""

    needs: ClassVar[frozenset[str]] = frozenset({"probe"})

    def init(self, batch_size: int, *, device: torch.device) -> State:
        return {}

    def score(self, features: Features, state: State) -> tuple[Tensor, State]:
        assert features.probe is not None
        return features.probe.float(), state


# The user's own rule, as the documentation of `adaptive.policies` shows it.
@dataclass(frozen=True)
class TwiceConfident(p.AbstractRule):
    threshold: float = math.inf

    def init(self, batch_size: int, *, device: torch.device) -> State:
        return {"t": torch.tensor(self.threshold, device=device)}

    def decide(self, features: Features, score: Tensor, state: State) -> tuple[Tensor, State]:
        return (score >= state["t"]) & (features.stage % 2 == 1), state

    def with_knob(self, knob: float) -> Self:
        return replace(self, threshold=knob)

    def knobs(self, trace: Trace, *, size: int) -> tuple[float, ...]:
        return (math.inf, *np.quantile(trace.scores, np.linspace(0.99, 0.2, size - 1)).tolist())


def make_trace(
    seed: int, *, n_units: int = 9, longest: int = 5, n_exits: int = N_EXITS, levels: int = 0
) -> Trace:
    """Random scores in (0, 1) that say something about agreement; ``levels`` > 0 makes ties."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest + 1, n_units)
    lengths[0] = longest
    n = int(lengths.sum())
    scores = rng.uniform(0.02, 0.98, (n, n_exits)).astype(np.float32)
    if levels:
        scores = (np.ceil(scores * levels) / (levels + 1)).astype(np.float32)
    wrong = rng.uniform(size=(n, n_exits)) > scores
    return Trace(
        scores=scores,
        losses={"disagreement": wrong},
        costs=np.arange(1.0, n_exits + 2.0),
        cost_quantity="layers",
        lengths=lengths,
        columns={
            "answers": rng.integers(0, 3, (n, n_exits)),
            "positions": np.concatenate([np.arange(1, length + 1) for length in lengths]),
        },
    )


FIT = make_trace(7, n_units=300, longest=4)


@dataclass(frozen=True)
class RuleRow:
    """One rule, at a knob at which some tokens stop and some do not."""

    name: str
    rule: AbstractRule
    reads_score: bool = True


def _rules() -> tuple[RuleRow, ...]:
    threshold = p.Threshold(0.7)
    per_stage = p.PerStage((0.1, math.inf, 0.0, 0.0))
    ratio = p.SequentialRatio.fit(FIT)
    window = p.WindowedPatience(window=3, agreeing=2)
    eero = p.budget_thresholds(FIT, budgets=(4.0, 3.0, 2.0))
    survivors = p.budget_thresholds(
        FIT,
        budgets=(4.0, 3.0, 2.0),
        allocate=p.geometric_allocation,
        quantiles=survivor_thresholds,
    )
    agreement = p.agreement_thresholds(FIT, targets=(0.9, 0.8, 0.7))
    certified = p.certified_agreement_thresholds(FIT, targets=(0.7, 0.6, 0.5), delta=0.1)
    return (
        RuleRow("threshold", threshold),
        RuleRow("threshold, warm-up", p.Threshold(0.6, warmup=2)),
        RuleRow("threshold per stage", p.ScheduledThreshold(per_stage, 0.7)),
        RuleRow("decaying threshold", p.ScheduledThreshold(p.Decay(tau=4.0, length=5), 0.8)),
        RuleRow("phases", p.ScheduledThreshold(p.Phases((2, 4), (0.2, 0.1, 0.0)), 0.5)),
        RuleRow("beta mixture", p.BetaMixtureThreshold.fit(FIT).with_knob(0.7)),
        RuleRow("budget, marginal", eero.with_knob(3.0)),
        RuleRow("budget, survivors", survivors.with_knob(2.0)),
        RuleRow("agreement target", agreement.with_knob(0.8)),
        RuleRow("agreement target, certified", certified.with_knob(0.5)),
        RuleRow("patience", p.Patience(1), reads_score=False),
        RuleRow("patience on values", p.ValuePatience(tolerance=0.3, patience=1)),
        RuleRow("patience in a window", window, reads_score=False),
        RuleRow("accumulated confidence", p.AccumulatedConfidence((1.0, 1.0, 2.0, 2.0), 1.2)),
        RuleRow("quantile exit", p.QuantileExit(2.3)),
        RuleRow("sampled exit", p.SampledExit(2.0)),
        RuleRow("truncated sum", p.TruncatedSumExit(1.4)),
        RuleRow("sequential ratio", replace(ratio, threshold=1.0, give_up=-2.0)),
        RuleRow("evidence process", p.EvidenceProcess.fit(FIT).with_knob(2.0)),
        RuleRow("optimal stopping", p.OptimalStopping.fit(FIT).with_knob(6.0)),
        RuleRow("fixed stage", p.FixedStage(2), reads_score=False),
        RuleRow(
            "skip decode", p.SkipDecode((2, 4, 6, 8), most=10, length=6, least=2), reads_score=False
        ),
        RuleRow("random stage", p.RandomStage(0.8), reads_score=False),
        RuleRow("all of", p.AllOf((threshold, p.Patience(1)))),
        RuleRow("any of", p.AnyOf((p.Threshold(0.9), p.Patience(2))), reads_score=False),
        RuleRow("veto", p.Veto((threshold, p.FixedStage(3)))),
        RuleRow("within", p.Within(threshold, first=1, last=3), reads_score=False),
        RuleRow("protected", p.Protected(p.Patience(1), stages=(1,), tokens=2), reads_score=False),
        RuleRow("two-sided", p.TwoSided(hopeless=0.1, threshold=0.8)),
        RuleRow("all rows", p.AllRows(p.Threshold(0.2))),
        RuleRow("least score", p.LeastScore(p.Threshold(0.2))),
        RuleRow("the user's own", TwiceConfident(0.6)),
    )


def _scores() -> tuple[tuple[str, AbstractScore], ...]:
    rng = np.random.default_rng(3)
    hidden = rng.normal(size=(200, N_EXITS, WIDTH))
    logits = rng.normal(size=(200, N_EXITS, VOCABULARY)) * 3
    agree = hidden[..., 0] + rng.normal(size=(200, N_EXITS)) > 0
    choice = logits[:, -1].argmax(axis=1)
    return (
        ("probe", p.ProbeScore()),
        ("none", p.NoScore()),
        ("max probability", p.MaxProbability()),
        ("max probability, pruned", p.MaxProbability(pruned=True)),
        ("margin", p.Margin()),
        ("margin, pruned", p.Margin(pruned=True)),
        ("logit margin", p.LogitMargin()),
        ("negative entropy", p.NegativeEntropy()),
        ("concentration", p.Concentration()),
        ("energy", p.Energy(2.0)),
        ("saturation", p.Saturation()),
        ("dynamic vocabulary", p.DynamicVocabulary((6, 5, 4, 3))),
        ("linear gate", p.LinearGate.fit(hidden, agree)),
        ("statistics gate", p.StatisticsGate.fit(logits, agree)),
        ("halting gate", p.HaltingGate.fit(hidden, agree, width=5, embedding=2, steps=20)),
        ("recurrent gate", p.RecurrentGate.fit(p.ProbeScore(), FIT)),
        ("moving mean", p.MovingMean(p.ProbeScore(), 0.5)),
        ("steadiness", p.Steadiness(p.ProbeScore(), 0.5, warmup=2)),
        ("vote share", p.VoteShare(N_EXITS)),
        ("beta majority", p.BetaMajority(N_EXITS)),
        ("calibrated, isotonic", p.Calibrated.fit(p.ProbeScore(), FIT, method=fit_isotonic)),
        ("calibrated, beta", p.Calibrated.fit(p.ProbeScore(), FIT, method=fit_beta_calibration)),
        ("tempered", p.Tempered.fit(p.MaxProbability(), logits, choice)),
        ("calibrated recurrent", _calibrated_recurrent()),
    )


def _calibrated_recurrent() -> AbstractScore:
    base = p.RecurrentGate.fit(p.ProbeScore(), FIT)
    return p.Calibrated.fit(base, FIT, method=fit_isotonic)


RULES = _rules()
SCORES = _scores()


def features_at(
    stage: int,
    batch: int,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
    position: int = 1,
    running: Tensor | None = None,
) -> Features:
    """Random features of every kind."""
    draw = torch.Generator().manual_seed(1000 * seed + 10 * position + stage)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).to(device, dtype)

    return Features(
        stage=stage,
        position=torch.full((batch,), position, dtype=torch.int64, device=device),
        probe=normal(batch),
        hidden=normal(batch, WIDTH),
        previous=normal(batch, WIDTH) if stage else None,
        logits=normal(batch, VOCABULARY) * 3,
        pruned_logits=normal(batch, 5) * 3,
        answer=torch.randint(0, 3, (batch,), generator=draw).to(device),
        noise=torch.rand(batch, generator=draw).to(device),
        running=running,
    )


def take(features: Features, rows: Tensor) -> Features:
    """Features of some rows."""
    tensors: dict[str, Tensor | None] = {
        name: None if value is None else value[rows]
        for name, value in vars(features).items()
        if name != "stage"
    }
    return Features(stage=features.stage, **tensors)  # type: ignore[arg-type]


Step = Callable[[Features, State], tuple[Tensor, Tensor, State]]
