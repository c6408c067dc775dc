"""Scores and stopping rules on torch tensors: any device, batched, state in and state out."""

from adaptive.policies._base import (
    FEATURES,
    AbstractRule,
    AbstractSchedule,
    AbstractScore,
    Features,
    Scope,
    State,
)
from adaptive.policies._gates import HaltingGate, LinearGate, RecurrentGate, StatisticsGate
from adaptive.policies._halting import (
    QuantileExit,
    SampledExit,
    TruncatedSumExit,
    expected_readout,
    halting_distribution,
    truncated_distribution,
)
from adaptive.policies._noise import keyed_noise, unit_keys
from adaptive.policies._optimal_stopping import OptimalStopping
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
from adaptive.policies._score_calibration import (
    Calibrated,
    Tempered,
    beta_table,
    fit_temperatures,
    histogram_table,
    isotonic_table,
    platt_table,
)
from adaptive.policies._scores import Margin, MaxProbability, NoScore, ProbeScore, Saturation
from adaptive.policies._sequential import EvidenceProcess, SequentialRatio, wald_boundaries
from adaptive.policies._simulate import exit_stages
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
    "BetaMajority",
    "Calibrated",
    "Concentration",
    "Decay",
    "DynamicVocabulary",
    "Energy",
    "EvidenceProcess",
    "Features",
    "HaltingGate",
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
    "QuantileExit",
    "RecurrentGate",
    "SampledExit",
    "Saturation",
    "ScheduledThreshold",
    "Scope",
    "SequentialRatio",
    "State",
    "StatisticsGate",
    "Steadiness",
    "Tempered",
    "Threshold",
    "ThresholdTable",
    "TruncatedSumExit",
    "ValuePatience",
    "VoteShare",
    "WindowedPatience",
    "beta_table",
    "decaying_vocabulary",
    "exit_stages",
    "expected_readout",
    "fit_temperatures",
    "halting_distribution",
    "histogram_table",
    "isotonic_table",
    "keyed_noise",
    "members",
    "platt_table",
    "truncated_distribution",
    "unit_keys",
    "wald_boundaries",
]
