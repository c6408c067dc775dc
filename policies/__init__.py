"""Scores and stopping rules on torch tensors: any device, batched, state in and state out."""

from adaptive.policies._base import FEATURES, AbstractRule, AbstractScore, Features, State
from adaptive.policies._policy import Mode, Policy, members
from adaptive.policies._scores import Margin, MaxProbability, ProbeScore, Saturation
from adaptive.policies._simulate import exit_stages
from adaptive.policies._threshold import Threshold

__all__ = [
    "FEATURES",
    "AbstractRule",
    "AbstractScore",
    "Features",
    "Margin",
    "MaxProbability",
    "Mode",
    "Policy",
    "ProbeScore",
    "Saturation",
    "State",
    "Threshold",
    "exit_stages",
    "members",
]
