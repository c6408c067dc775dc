"""Halting distributions: stop when enough probability of halting has accumulated."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from adaptive.calibration import InvalidArgumentError
from adaptive.policies._base import Features, State, needed
from adaptive.policies._statistic import AbstractStatisticRule


@dataclass(frozen=True)
class QuantileExit(AbstractStatisticRule):
    """Stop at the first asked stage where the halting distribution's mass exceeds a quantile.

    The score is read as the probability of halting here given that nothing halted before, as in
    PonderNet, PALBERT's Q-exit and Ouro, and clipped into [0, 1]: an exit without a score (minus
    infinity) halts nothing. At full depth the mass is 1 by definition.

    The knob slows halting down as in :class:`SampledExit`: 1 is the published rule, ``inf`` never
    stops. At slowness ``s`` the rule is the published one at the quantile ``1 - (1 - q)^s``, so the
    path runs through all quantiles; but gates trained on agreement put nearly all mass on the first
    stages, where quantiles differ in digits that a float does not have, and slownesses in the
    first.

    Parameters
    ----------
    slowness : float
        Positive.
    quantile : float
        ``q`` in (0, 1); PALBERT uses 0.5.

    References
    ----------
    .. [1] Balagansky and Gavrilov, "PALBERT: teaching ALBERT to ponder", NeurIPS 2022.
    """

    knob_name: ClassVar[str] = "slowness"
    strict: ClassVar[bool] = True

    slowness: float = math.inf
    quantile: float = 0.5

    def __post_init__(self) -> None:
        _check_slowness(self.slowness)
        if not 0.0 < self.quantile < 1.0:
            raise InvalidArgumentError("quantile", self.quantile, "in (0, 1)")

    def tables(self, *, device: torch.device) -> State:
        """Logarithm of the mass that may be left."""
        return {"passing": torch.log1p(torch.tensor(-self.quantile, device=device))}

    def memory(self, batch_size: int, *, device: torch.device) -> State:
        """Logarithm of the probability of not having halted yet, at slowness 1."""
        return {"log_alive": torch.zeros(batch_size, device=device)}

    def statistic(self, features: Features, score: Tensor, state: State) -> tuple[Tensor, State]:
        """Largest slowness at which the mass exceeds the quantile by now."""
        log_alive = state["log_alive"] + torch.log1p(-score.clamp(0.0, 1.0))
        return _slowness(log_alive, state["passing"]), state | {"log_alive": log_alive}


@dataclass(frozen=True)
class SampledExit(AbstractStatisticRule):
    """Halt at random, by the halting distribution: PonderNet's own readout.

    One uniform draw per unit and position is compared with the mass halted so far, which has the
    law of one Bernoulli draw per stage. The knob slows halting down: the chance of passing a
    stage is raised to the power ``1 / slowness``, so 1 is the published rule, ``inf`` never stops.

    Parameters
    ----------
    slowness : float
        Positive.

    References
    ----------
    .. [1] Banino, Balaguer and Blundell, "PonderNet: learning to ponder", arXiv 2107.05407.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"noise"})
    knob_name: ClassVar[str] = "slowness"
    strict: ClassVar[bool] = True

    slowness: float = math.inf

    def __post_init__(self) -> None:
        _check_slowness(self.slowness)

    def tables(self, *, device: torch.device) -> State:
        """None."""
        return {}

    def memory(self, batch_size: int, *, device: torch.device) -> State:
        """Logarithm of the probability of not having halted yet, at slowness 1."""
        return {"log_alive": torch.zeros(batch_size, device=device)}

    def statistic(self, features: Features, score: Tensor, state: State) -> tuple[Tensor, State]:
        """Largest slowness at which this draw has halted by now: ``log S / log(1 - u)``."""
        log_alive = state["log_alive"] + torch.log1p(-score.clamp(0.0, 1.0))
        passing = torch.log1p(-needed(features.noise, "noise"))
        return _slowness(log_alive, passing), state | {"log_alive": log_alive}


@dataclass(frozen=True)
class TruncatedSumExit(AbstractStatisticRule):
    """Stop when the share of the remaining mass that JEI-DNN's gates put here reaches a level.

    With gates ``g`` (the scores) divided by the slowness ``s``,
    ``p_l = max(0, min(g_l / s, 1 - sum_{j<l} g_j / s))`` and the share is
    ``p_l / (1 - sum_{j<l} p_j)``. The published rule has slowness 1 and level 0.5.

    The knob is the slowness, not the level: gates that are probabilities of agreement add up to 1
    within a few stages, the share there is 1, and no level keeps a token from stopping then.

    Parameters
    ----------
    slowness : float
        Positive; ``inf`` never stops early.
    level : float
        In (0, 1].

    References
    ----------
    .. [1] Chataoui et al., "JEI-DNN", ICLR 2024.
    """

    knob_name: ClassVar[str] = "slowness"

    slowness: float = math.inf
    level: float = 0.5

    def __post_init__(self) -> None:
        _check_slowness(self.slowness)
        if not 0.0 < self.level <= 1.0:
            raise InvalidArgumentError("level", self.level, "in (0, 1]")

    def tables(self, *, device: torch.device) -> State:
        """Level."""
        return {"level": torch.tensor(self.level, device=device)}

    def memory(self, batch_size: int, *, device: torch.device) -> State:
        """Sum of the gates before."""
        return {"total": torch.zeros(batch_size, device=device)}

    def statistic(self, features: Features, score: Tensor, state: State) -> tuple[Tensor, State]:
        """Largest slowness at which the share reaches the level; -inf where the gate is closed."""
        total, gate = state["total"], score.clamp(min=0.0)
        value = torch.where(score > 0, total + gate / state["level"], -math.inf)
        return value, state | {"total": total + gate}


_LARGEST = 1e30  # a finite stand-in for "halts at every slowness"


def _slowness(log_alive: Tensor, passing: Tensor) -> Tensor:
    """Largest ``s`` at which ``alive ** (1 / s)`` is below ``exp(passing)``; -inf if none is."""
    ratio = torch.where(passing < 0, log_alive / passing, _LARGEST).clamp(max=_LARGEST)
    return torch.where(log_alive < 0, ratio, -math.inf)


def _check_slowness(slowness: float) -> None:
    if not slowness > 0.0:
        raise InvalidArgumentError("slowness", slowness, "positive")


def halting_distribution(halting: Tensor) -> Tensor:
    """Probability of each stage from halting probabilities ``[..., K]``; the last takes the rest.

    Examples
    --------
    >>> halting_distribution(torch.tensor([0.1, 0.2, 0.5, 1.0]))
    tensor([0.1000, 0.1800, 0.3600, 0.3600])
    """
    alive = torch.cumprod(1.0 - halting[..., :-1], dim=-1)
    before = torch.cat([torch.ones_like(halting[..., :1]), alive], dim=-1)
    return torch.cat([before[..., :-1] * halting[..., :-1], before[..., -1:]], dim=-1)


def truncated_distribution(gates: Tensor) -> Tensor:
    """JEI-DNN's probability of each stage from gates ``[..., K-1]``; the last takes the rest.

    Examples
    --------
    >>> truncated_distribution(torch.tensor([0.6, 0.7, 0.9]))
    tensor([0.6000, 0.4000, 0.0000, 0.0000])
    """
    total = torch.cumsum(gates, dim=-1)
    before = torch.cat([torch.zeros_like(gates[..., :1]), total[..., :-1]], dim=-1)
    taken = torch.clamp(torch.minimum(gates, 1.0 - before), min=0.0)
    rest = torch.clamp(1.0 - taken.sum(dim=-1, keepdim=True), min=0.0)
    return torch.cat([taken, rest], dim=-1)


def expected_readout(distribution: Tensor, readouts: Tensor) -> Tensor:
    """Mean of ``readouts [..., K, values]`` under ``distribution [..., K]``: needs every stage.

    The expectation readout of PonderNet and PALBERT: not a stopping rule, since nothing is saved.
    """
    return (distribution[..., None] * readouts).sum(dim=-2)
