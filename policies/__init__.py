"""Scores and stopping rules on torch tensors: any device, batched, state in and state out.

A policy is a score, a rule and the exits at which it is asked. Everything here works with
everything else: any score under any rule, offline over a trace (`exit_stages`), online in a loop
(`Policy.update`), certified by the same machinery. A rule of your own needs four methods, and then
saves to JSON, runs in the loop and is certified like the others:

>>> import math
>>> from dataclasses import dataclass, replace
>>> import numpy as np
>>> import torch
>>> @dataclass(frozen=True)
... class TwiceConfident(AbstractRule):
...     threshold: float = math.inf
...
...     def init(self, batch_size, *, device):
...         return {"t": torch.tensor(self.threshold, device=device)}
...
...     def decide(self, features, score, state):
...         return (score >= state["t"]) & (features.stage % 2 == 1), state
...
...     def with_knob(self, knob):
...         return replace(self, threshold=knob)
...
...     def knobs(self, trace, *, size):
...         levels = np.linspace(0.99, 0.0, size - 1)
...         return (math.inf, *np.quantile(trace.scores, levels).tolist())
>>> policy = Policy(ProbeScore(), TwiceConfident(0.9), stages=(0, 1, 2))
>>> Policy.from_dict(policy.to_dict()) == policy
True

What a rule must keep: decide on device tensors alone (no branch on their values, fixed shapes),
never stop on a NaN score, never stop early at an infinite knob, list knobs from safest to
cheapest, and override ``advance`` if it remembers anything within a token only.
"""

from adaptive.policies._agreement_target import agreement_thresholds, certified_agreement_thresholds
from adaptive.policies._allocators import (
    exponential_weights,
    geometric_allocation,
    geometric_rates,
    linear_programme,
    two_stage_allocation,
)
from adaptive.policies._base import (
    FEATURES,
    AbstractRule,
    AbstractSchedule,
    AbstractScore,
    Features,
    Scope,
    State,
)
from adaptive.policies._batch import AllRows, LeastScore
from adaptive.policies._beta_mixture import BetaMixtureThreshold, BetaMixtureTracker
from adaptive.policies._budget import budget_thresholds, inflated_thresholds
from adaptive.policies._calm import (
    calm_policy,
    risk_consistency,
    rouge_l_distance,
    textual_consistency,
    token_f1_distance,
)
from adaptive.policies._choose_stages import choose_stages, expected_cost
from adaptive.policies._combinators import AllOf, AnyOf, Protected, TwoSided, Veto, Within
from adaptive.policies._fixed import FixedStage, RandomStage, SkipDecode
from adaptive.policies._gates import LinearGate, RecurrentGate, StatisticsGate
from adaptive.policies._halting import (
    QuantileExit,
    SampledExit,
    TruncatedSumExit,
    expected_readout,
    halting_distribution,
    truncated_distribution,
)
from adaptive.policies._halting_gate import HaltingGate
from adaptive.policies._noise import keyed_noise, unit_keys
from adaptive.policies._optimal_stopping import OptimalStopping
from adaptive.policies._oracle import oracle_stages, regret
from adaptive.policies._outcome import (
    budget_certificate,
    mean_cost_bound,
    unit_costs,
    unit_losses,
)
from adaptive.policies._patience import (
    AccumulatedConfidence,
    Patience,
    ValuePatience,
    WindowedPatience,
)
from adaptive.policies._policy import Mode, Policy, members
from adaptive.policies._readout_scores import (
    Concentration,
    DynamicVocabulary,
    Energy,
    LogitMargin,
    NegativeEntropy,
    decaying_vocabulary,
)
from adaptive.policies._schedules import Decay, PerStage, Phases, ScheduledThreshold
from adaptive.policies._score_calibration import Calibrated, Tempered
from adaptive.policies._scores import Margin, MaxProbability, NoScore, ProbeScore, Saturation
from adaptive.policies._sequential import EvidenceProcess, SequentialRatio, wald_boundaries
from adaptive.policies._simulate import asked_at, exit_stages
from adaptive.policies._statistic import AbstractStatisticRule
from adaptive.policies._threshold import Threshold
from adaptive.policies._threshold_table import ThresholdTable
from adaptive.policies._wrappers import BetaMajority, MovingMean, Steadiness, VoteShare

__all__ = [
    "FEATURES",
    "AbstractRule",
    "AbstractSchedule",
    "AbstractScore",
    "AbstractStatisticRule",
    "AccumulatedConfidence",
    "AllOf",
    "AllRows",
    "AnyOf",
    "BetaMajority",
    "BetaMixtureThreshold",
    "BetaMixtureTracker",
    "Calibrated",
    "Concentration",
    "Decay",
    "DynamicVocabulary",
    "Energy",
    "EvidenceProcess",
    "Features",
    "FixedStage",
    "HaltingGate",
    "LeastScore",
    "LinearGate",
    "LogitMargin",
    "Margin",
    "MaxProbability",
    "Mode",
    "MovingMean",
    "NegativeEntropy",
    "NoScore",
    "OptimalStopping",
    "Patience",
    "PerStage",
    "Phases",
    "Policy",
    "ProbeScore",
    "Protected",
    "QuantileExit",
    "RandomStage",
    "RecurrentGate",
    "SampledExit",
    "Saturation",
    "ScheduledThreshold",
    "Scope",
    "SequentialRatio",
    "SkipDecode",
    "State",
    "StatisticsGate",
    "Steadiness",
    "Tempered",
    "Threshold",
    "ThresholdTable",
    "TruncatedSumExit",
    "TwoSided",
    "ValuePatience",
    "Veto",
    "VoteShare",
    "WindowedPatience",
    "Within",
    "agreement_thresholds",
    "asked_at",
    "budget_certificate",
    "budget_thresholds",
    "calm_policy",
    "certified_agreement_thresholds",
    "choose_stages",
    "decaying_vocabulary",
    "exit_stages",
    "expected_cost",
    "expected_readout",
    "exponential_weights",
    "geometric_allocation",
    "geometric_rates",
    "halting_distribution",
    "inflated_thresholds",
    "keyed_noise",
    "linear_programme",
    "mean_cost_bound",
    "members",
    "oracle_stages",
    "regret",
    "risk_consistency",
    "rouge_l_distance",
    "textual_consistency",
    "token_f1_distance",
    "truncated_distribution",
    "two_stage_allocation",
    "unit_costs",
    "unit_keys",
    "unit_losses",
    "wald_boundaries",
]
