"""The policies that are certified end to end: one row each, and what a row may fit itself on."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adaptive import policies as p
from adaptive._collect import collect
from adaptive._inputs import Units
from adaptive.calibration import Trace, fit_beta_calibration, fit_isotonic, survivor_thresholds
from adaptive.policies import AbstractRule, AbstractScore, Features, Policy, State

EXITS = tuple(range(11))
DEPTHS = tuple(range(1, 12))  # layers below each exit


class Workshop:
    """What policies are fitted on: prompts that are used for nothing else, traced once."""

    def __init__(self, bench: Any, units: Units) -> None:
        self.bench = bench
        self.units = units
        self._traces: dict[AbstractScore, Trace] = {}

    @functools.cached_property
    def texts(self) -> list[tuple[int, ...]]:
        """The full model's own text behind every prompt."""
        found: list[tuple[int, ...]] = self.bench.full_texts(self.units)
        return found

    def trace(self, score: AbstractScore) -> Trace:
        """Trace of a score at every exit; costs count layers, so that no clock comes in."""
        if score not in self._traces:
            found = collect(
                self.bench.model,
                self.units,
                self.texts,
                deployment=self.bench.deployment,
                score=score,
                progress=False,
            )
            costs = np.array([*DEPTHS, 12.0])
            self._traces[score] = replace(found, costs=costs, cost_quantity="layers")
        return self._traces[score]

    @functools.cached_property
    def states(self) -> list[Tensor]:
        """Hidden states at the exits and at the end, float32 [n_tokens, width] each."""
        found: list[Tensor] = self.bench.states(self.units, self.texts)
        return found

    @property
    def hidden(self) -> NDArray[Any]:
        """Hidden states at the exits [n_tokens, n_exits, width]."""
        return torch.stack(self.states[:-1], dim=1).numpy()

    @functools.cached_property
    @torch.no_grad()
    def logits(self) -> NDArray[Any]:
        """Readouts of the first 600 tokens [600, n_exits, vocabulary]."""
        states = torch.stack([state[:600] for state in self.states[:-1]], dim=1)
        found: NDArray[Any] = self.bench.readout(states).numpy()
        return found

    @functools.cached_property
    def agree(self) -> NDArray[np.bool_]:
        """Whether an exit's choice is the full model's [n_tokens, n_exits]."""
        found: NDArray[np.bool_] = np.asarray(self.trace(p.NoScore()).losses["disagreement"]) == 0
        return found

    @functools.cached_property
    def choices(self) -> NDArray[np.int64]:
        """The full model's choices [n_tokens]."""
        return np.asarray(self.trace(p.NoScore()).columns["choices"])


def calm_risk_consistency(early: Any, full: Any, reference: Any) -> float:
    """How much further from the reference the early text is than the full model's."""
    risks = [p.token_f1_distance(text, reference) for text in (early, full)]
    return float(p.risk_consistency(risks[:1], risks[1:])[0])


def calm_textual_consistency(early: Any, full: Any, reference: Any) -> float:
    """One minus ROUGE-L between the early text and the full model's."""
    return float(p.textual_consistency([early], [full], distance=p.rouge_l_distance)[0])


@dataclass(frozen=True)
class Row:
    """One policy: its name, where it comes from, how it is built, its loss, members of its path."""

    name: str
    source: str
    build: Callable[[Workshop], Policy]
    loss: Any = "disagreement"
    members: int = 3


# The user's own rule, as docs/extending.md shows it.
@dataclass(frozen=True)
class EvenExits(AbstractRule):
    threshold: float = math.inf

    def init(self, batch_size: int, *, device: torch.device) -> State:
        return {"t": torch.tensor(self.threshold, device=device)}

    def decide(self, features: Features, score: Tensor, state: State) -> tuple[Tensor, State]:
        return (score >= state["t"]) & (features.stage % 2 == 1), state

    def with_knob(self, knob: float) -> Self:
        return replace(self, threshold=knob)

    def knobs(self, trace: Trace, *, size: int) -> tuple[float, ...]:
        levels = np.quantile(trace.scores, np.linspace(0.99, 0.0, size - 1))
        return (math.inf, *np.unique(levels)[::-1].tolist())


def policy(score: AbstractScore, rule: AbstractRule, *, mode: Any = "exact") -> Policy:
    """A policy that asks at every exit."""
    return Policy(score, rule, stages=EXITS, mode=mode)


def plain(score: AbstractScore) -> Callable[[Workshop], Policy]:
    """A score under a threshold."""
    return lambda shop: policy(score, p.Threshold())


def ruled(rule: AbstractRule, score: AbstractScore | None = None) -> Callable[[Workshop], Policy]:
    """A rule that needs no fitting, on the probe's score if no other is given."""
    return lambda shop: policy(score or p.ProbeScore(), rule)


def fitted(
    score: AbstractScore, rule: Callable[[Trace], AbstractRule]
) -> Callable[[Workshop], Policy]:
    """A rule that is fitted on a trace of its score."""
    return lambda shop: policy(score, rule(shop.trace(score)))


def budgeted(**settings: Any) -> Callable[[Workshop], Policy]:
    """Margins under thresholds that spend a budget of layers."""
    budgets = tuple(np.linspace(11.5, 4.0, 24).round(3).tolist())
    return fitted(p.Margin(), lambda trace: p.budget_thresholds(trace, budgets=budgets, **settings))


def calm(score: Callable[[Workshop], AbstractScore]) -> Callable[[Workshop], Policy]:
    """CALM as published."""
    return lambda shop: p.calm_policy(score(shop), stages=EXITS, length=8)


def linear_gate(shop: Workshop) -> AbstractScore:
    return p.LinearGate.fit(shop.hidden, shop.agree)


def halting_gate(shop: Workshop) -> AbstractScore:
    return p.HaltingGate.fit(shop.hidden, shop.agree, width=16, steps=150)


def statistics_gate(shop: Workshop) -> AbstractScore:
    return p.StatisticsGate.fit(shop.logits, shop.agree[: len(shop.logits)])


def tempered(shop: Workshop) -> AbstractScore:
    return p.Tempered.fit(p.MaxProbability(), shop.logits, shop.choices[: len(shop.logits)])


def calibrated(base: AbstractScore, method: Any) -> Callable[[Workshop], Policy]:
    return lambda shop: policy(
        p.Calibrated.fit(base, shop.trace(base), method=method), p.Threshold()
    )


TARGETS = tuple(np.linspace(0.99, 0.5, 30).round(4).tolist())
FINE_TARGETS = tuple(np.linspace(0.96, 0.5, 93).round(4).tolist())
PROBE, MARGIN = p.ProbeScore(), p.Margin()
SURE = p.Threshold()

ROWS: tuple[Row, ...] = (
    # scores under one threshold
    Row("probe", "the library's default", plain(PROBE)),
    Row("largest probability", "EE-LLM (ICML 2024)", plain(p.MaxProbability())),
    Row("margin", "CALM (NeurIPS 2022)", plain(MARGIN)),
    Row("margin of logits", "Prophet (2025)", plain(p.LogitMargin())),
    Row("entropy", "BranchyNet (2016), DeeBERT (ACL 2020)", plain(p.NegativeEntropy())),
    Row("normalised entropy", "BranchyNet (2016)", plain(p.Concentration())),
    Row("energy", "Liu et al. (NeurIPS 2020)", plain(p.Energy())),
    Row("saturation", "CALM (NeurIPS 2022), MuE (CVPR 2023)", plain(p.Saturation())),
    Row("largest probability, pruned", "fixed pruned vocabulary", plain(p.MaxProbability(True))),
    Row("margin, pruned", "fixed pruned vocabulary", plain(p.Margin(True))),
    Row(
        "dynamic vocabulary",
        "Vincenti et al. (ENLSP 2024)",
        plain(p.DynamicVocabulary(p.decaying_vocabulary(256, 32, n_exits=11))),
    ),
    Row(
        "linear gate",
        "CALM's classifier (NeurIPS 2022)",
        lambda shop: policy(linear_gate(shop), SURE),
    ),
    Row(
        "gate on statistics",
        "JEI-DNN (ICLR 2024)",
        lambda shop: policy(statistics_gate(shop), SURE),
    ),
    Row(
        "recurrent gate",
        "after DYNAMAX (2025)",
        lambda shop: policy(p.RecurrentGate.fit(PROBE, shop.trace(PROBE)), SURE),
    ),
    Row("moving mean", "exponential smoothing over exits", plain(p.MovingMean(PROBE, 0.5))),
    Row("steadiness", "EAT (2025)", plain(p.Steadiness(PROBE, 0.5, warmup=3))),
    Row("vote share of exits", "majority voting", plain(p.VoteShare(11))),
    Row("Beta majority of exits", "Adaptive-Consistency (EMNLP 2023)", plain(p.BetaMajority(11))),
    Row("isotonic calibration", "isotonic regression", calibrated(MARGIN, fit_isotonic)),
    Row("Beta calibration", "Kull et al. (2017)", calibrated(MARGIN, fit_beta_calibration)),
    Row(
        "The Right Tool for the Job",
        "Schwartz et al. (ACL 2020)",
        lambda shop: policy(tempered(shop), SURE),
    ),
    # thresholds that vary
    Row("threshold with warm-up", "first tokens at full depth", ruled(p.Threshold(warmup=3))),
    Row(
        "threshold per stage",
        "LITE (2023)",
        ruled(p.ScheduledThreshold(p.PerStage(tuple(np.linspace(0.1, 0.0, 11))))),
    ),
    Row(
        "phases",
        "ADEPT, Prophet: steps in position",
        ruled(p.ScheduledThreshold(p.Phases((3, 6), (0.1, 0.05, 0.0)))),
    ),
    Row(
        "CALM, textual consistency, margin",
        "CALM (NeurIPS 2022)",
        calm(lambda shop: MARGIN),
        calm_textual_consistency,
    ),
    Row(
        "CALM, textual consistency, saturation",
        "CALM (NeurIPS 2022)",
        calm(lambda shop: p.Saturation()),
        calm_textual_consistency,
    ),
    Row(
        "CALM, risk consistency, classifier",
        "CALM (NeurIPS 2022)",
        calm(linear_gate),
        calm_risk_consistency,
    ),
    # mixtures, budgets, targets
    Row("FREE's Beta mixture", "FREE (EMNLP 2023)", fitted(MARGIN, p.BetaMixtureThreshold.fit)),
    Row("EERO, conformal ranks", "EERO (UAI 2025)", budgeted()),
    Row("EERO as published", "EERO (UAI 2025)", budgeted(quantiles=p.inflated_thresholds)),
    Row("EERO on survivors", "EERO (UAI 2025)", budgeted(quantiles=survivor_thresholds)),
    Row(
        "budgeted batch",
        "MSDNet (2018), Dyn-Perceiver (ICCV 2023)",
        budgeted(allocate=p.geometric_allocation, quantiles=survivor_thresholds),
    ),
    Row("budget, linear programme", "FrugalGPT's problem", budgeted(allocate=p.linear_programme)),
    Row(
        "agreement target, optimistic",
        "self-supervised exits (2024)",
        fitted(p.NegativeEntropy(), lambda t: p.agreement_thresholds(t, targets=TARGETS)),
    ),
    Row(
        "agreement target, certified",
        "self-supervised exits (2024), corrected",
        fitted(
            p.NegativeEntropy(),
            lambda t: p.certified_agreement_thresholds(
                t, targets=FINE_TARGETS, delta=0.5, n_candidates=16
            ),
        ),
        members=8,  # its steps are coarse: three would pass over the first member that stops
    ),
    # rules with memory within a token
    Row("patience", "PABEE (NeurIPS 2020)", ruled(p.Patience(), p.NoScore())),
    Row(
        "patience on values",
        "PABEE, regression (NeurIPS 2020)",
        ruled(p.ValuePatience(tolerance=0.1)),
    ),
    Row(
        "patience in a window",
        "relaxed PABEE",
        ruled(p.WindowedPatience(window=6), p.NoScore()),
    ),
    Row(
        "accumulated confidence",
        "BEEM (ICLR 2025)",
        ruled(p.AccumulatedConfidence((1.0,) * 11), p.MaxProbability()),
    ),
    Row(
        "patient and confident",
        "LGViT (ACM MM 2023)",
        ruled(p.AllOf((p.Threshold(), p.Patience(1))), p.Concentration()),
    ),
    Row(
        "Q-exit",
        "PALBERT (NeurIPS 2022), Ouro",
        lambda shop: policy(halting_gate(shop), p.QuantileExit()),
    ),
    Row(
        "sampled halting",
        "PonderNet (2021)",
        lambda shop: policy(halting_gate(shop), p.SampledExit()),
    ),
    Row(
        "truncated sum",
        "JEI-DNN (ICLR 2024)",
        lambda shop: policy(statistics_gate(shop), p.TruncatedSumExit()),
    ),
    Row("likelihood ratio test", "Wald (1945)", fitted(MARGIN, p.SequentialRatio.fit)),
    Row("evidence process", "Vovk and Wang (2021)", fitted(MARGIN, p.EvidenceProcess.fit)),
    Row(
        "optimal stopping",
        "backward induction",
        fitted(MARGIN, functools.partial(p.OptimalStopping.fit, n_bins=8)),
    ),
    # without scores
    Row("fixed stage", "static exit", ruled(p.FixedStage(), p.NoScore())),
    Row(
        "SkipDecode",
        "SkipDecode (2023)",
        ruled(p.SkipDecode(DEPTHS, most=12, length=8), p.NoScore()),
    ),
    Row("random stage", "control", ruled(p.RandomStage(), p.NoScore())),
    # combinations
    Row("any of", "combination", ruled(p.AnyOf((SURE, p.Patience(6))))),
    Row("veto", "Dynasor's kind", ruled(p.Veto((SURE, p.FixedStage(10))))),
    Row("first and last stage", "hard cap", ruled(p.Within(SURE, first=2, last=10))),
    Row(
        "protected stages", "FFN-SkipLLM's kind", ruled(p.Protected(SURE, stages=(0, 1), tokens=2))
    ),
    Row("two-sided", "Conformal Thinking (ICML 2026)", ruled(p.TwoSided(hopeless=0.02))),
    Row("SpecExit's conjunction", "SpecExit (2025)", ruled(p.AllOf((SURE, p.FixedStage(3))))),
    # rows of a batch decide together
    Row("all rows of a batch", "Miao et al. (2024)", ruled(p.AllRows(SURE))),
    Row("least score of a batch", "CALM's released loop", ruled(p.LeastScore(SURE), MARGIN)),
    Row("the user's own", "docs/extending.md", ruled(EvenExits())),
)


def slug(name: str) -> str:
    """File name of a row."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
