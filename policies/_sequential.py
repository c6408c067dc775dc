"""Sequential tests across stages: evidence that the answer is settled, added up."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adaptive.calibration import InvalidArgumentError, Trace
from adaptive.policies._base import Features, State
from adaptive.policies._labels import exit_losses
from adaptive.policies._statistic import AbstractStatisticRule, check_knob

Rows = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class SequentialRatio(AbstractStatisticRule):
    """Wald's sequential probability ratio test of "agrees" against "disagrees", over the stages.

    The statistic is the sum, over the asked stages so far, of the log-likelihood ratio of the
    stage's score under tokens that agree and tokens that disagree there. It stops at or above the
    threshold; at or below ``give_up`` it stops asking and goes to full depth.

    Parameters
    ----------
    edges : tuple of tuple of float [n_exits, n_bins - 1]
        Ascending inner edges of the bins of each exit's score.
    log_ratios : tuple of tuple of float [n_exits, n_bins]
        Log-likelihood ratio of each bin.
    threshold : float
        Upper boundary in nats; ``inf`` never stops early.
    give_up : float
        Lower boundary, ``-inf`` for none.

    Notes
    -----
    With independent scores of known laws, ``threshold = log((1 - beta) / alpha)`` and
    ``give_up = log(beta / (1 - alpha))`` bound the error probabilities by about ``alpha`` and
    ``beta`` (:func:`wald_boundaries`). Scores of successive stages are not independent, so here
    that budget is nominal: the guarantee comes from calibration.

    References
    ----------
    .. [1] Wald, "Sequential tests of statistical hypotheses", Ann. Math. Statist. 16 (1945).
       https://doi.org/10.1214/aoms/1177731118
    """

    per_exit: ClassVar[tuple[str, ...]] = ("edges",)
    knob_name: ClassVar[str] = "threshold"

    edges: Rows
    log_ratios: Rows
    threshold: float = math.inf
    give_up: float = -math.inf

    def __post_init__(self) -> None:
        check_knob("threshold", self.threshold)
        if not self.give_up < self.threshold:
            raise InvalidArgumentError("give_up", self.give_up, f"below {self.threshold:g}")
        _check_bins(self.edges, self.log_ratios)

    @classmethod
    def fit(cls, trace: Trace, *, n_bins: int = 16, loss: str = "disagreement") -> Self:
        """Estimate both score laws of every exit, in bins of equal mass, half a token added."""
        edges, agree, disagree = _score_laws(trace, n_bins=n_bins, loss=loss)
        ratios = np.log(agree) - np.log(disagree)
        return cls(edges=_rows(edges), log_ratios=_rows(ratios))

    def tables(self, *, device: torch.device) -> State:
        """Edges and log ratios."""
        return _bin_tables(self.edges, self.log_ratios, device)

    def memory(self, batch_size: int, *, device: torch.device) -> State:
        """Log-likelihood ratio so far."""
        return {"total": torch.zeros(batch_size, device=device)}

    def statistic(self, features: Features, score: Tensor, state: State) -> tuple[Tensor, State]:
        """Sum of log ratios; minus infinity, for good, once it has given up."""
        total = state["total"] + _binned(score, features.stage, state)
        total = torch.where(total <= self.give_up, -math.inf, total)
        return total, state | {"total": total}


@dataclass(frozen=True)
class EvidenceProcess(AbstractStatisticRule):
    """Stop when the evidence against "this token disagrees", as an e-value, is large enough.

    Each exit turns its score into an e-value (mean at most 1 among tokens that disagree there);
    the statistic is the weighted sum of those seen so far, with weights that add up to 1. That sum
    only grows and its last value is an e-value under any dependence between stages, so by Markov's
    inequality a token that disagrees everywhere stops early with probability at most
    ``1 / threshold``: the declared error budget, for score laws as fitted.

    Parameters
    ----------
    edges : tuple of tuple of float [n_exits, n_bins - 1]
        Ascending inner edges of the bins of each exit's score.
    evidence : tuple of tuple of float [n_exits, n_bins]
        E-value of each bin, times the weight of the exit.
    threshold : float
        ``1 / alpha``; ``inf`` never stops early.

    References
    ----------
    .. [1] Vovk and Wang, "E-values: calibration, combination and applications", Ann. Statist. 49
       (2021). https://doi.org/10.1214/20-AOS2020
    """

    per_exit: ClassVar[tuple[str, ...]] = ("edges",)
    knob_name: ClassVar[str] = "threshold"

    edges: Rows
    evidence: Rows
    threshold: float = math.inf

    def __post_init__(self) -> None:
        check_knob("threshold", self.threshold)
        _check_bins(self.edges, self.evidence)

    @classmethod
    def fit(cls, trace: Trace, *, n_bins: int = 16, loss: str = "disagreement") -> Self:
        """Scale likelihood ratios to mean 1 among the disagreeing; exits weigh the same."""
        edges, agree, disagree = _score_laws(trace, n_bins=n_bins, loss=loss)
        ratios = agree / disagree
        ratios /= (ratios * disagree).sum(axis=1, keepdims=True)
        return cls(edges=_rows(edges), evidence=_rows(ratios / trace.n_exits))

    def tables(self, *, device: torch.device) -> State:
        """Edges and e-values."""
        return _bin_tables(self.edges, self.evidence, device)

    def memory(self, batch_size: int, *, device: torch.device) -> State:
        """Evidence so far."""
        return {"total": torch.zeros(batch_size, device=device)}

    def statistic(self, features: Features, score: Tensor, state: State) -> tuple[Tensor, State]:
        """Weighted sum of e-values."""
        total = state["total"] + _binned(score, features.stage, state)
        return total, state | {"total": total}


def wald_boundaries(alpha: float, beta: float) -> tuple[float, float]:
    """Upper and lower boundary ``log((1 - beta) / alpha)``, ``log(beta / (1 - alpha))``.

    Parameters
    ----------
    alpha, beta : float
        Error budgets: stopping a token that disagrees, giving up on one that agrees; in (0, 1),
        together below 1.

    Examples
    --------
    >>> upper, lower = wald_boundaries(0.05, 0.2)
    >>> round(upper, 4), round(lower, 4)
    (2.7726, -1.5581)
    """
    for name, value in (("alpha", alpha), ("beta", beta)):
        if not 0.0 < value < 1.0:
            raise InvalidArgumentError(name, value, "in (0, 1)")
    if not alpha + beta < 1.0:
        raise InvalidArgumentError("beta", beta, f"below 1 - alpha = {1.0 - alpha:g}")
    return math.log((1.0 - beta) / alpha), math.log(beta / (1.0 - alpha))


def equal_mass_edges(values: NDArray[Any], *, n_bins: int) -> NDArray[np.float32]:
    """Inner edges [n_bins - 1] of bins that hold about as many finite values each."""
    finite = values[np.isfinite(values)].astype(np.float32)
    if finite.size == 0:
        return np.zeros(n_bins - 1, dtype=np.float32)
    return np.quantile(finite, np.arange(1, n_bins) / n_bins, method="higher").astype(np.float32)


def bin_of(score: Tensor, edges: Tensor) -> Tensor:
    """Index of the bin of each score [batch], 0..n_bins-1; a value at an edge is above it."""
    return torch.searchsorted(edges, score.contiguous(), right=True)


def _score_laws(
    trace: Trace, *, n_bins: int, loss: str
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Edges [n_exits, n_bins - 1] and the laws of agreeing and disagreeing scores [.., n_bins]."""
    if n_bins < 2:
        raise InvalidArgumentError("n_bins", n_bins, "an integer >= 2")
    right = exit_losses(trace, loss) == 0
    edges = np.stack([equal_mass_edges(s, n_bins=n_bins) for s in np.asarray(trace.scores).T])
    laws = np.full((2, trace.n_exits, n_bins), 0.5)
    for stage in range(trace.n_exits):
        bins = np.searchsorted(edges[stage], trace.scores[:, stage], side="right")
        for label in (0, 1):
            chosen = bins[right[:, stage] == bool(label)]
            laws[label, stage] += np.bincount(chosen, minlength=n_bins)
    laws /= laws.sum(axis=2, keepdims=True)
    return edges, laws[1], laws[0]


def _binned(score: Tensor, stage: int, state: State) -> Tensor:
    value = state["values"][stage][bin_of(score, state["edges"][stage])]
    return torch.where(torch.isnan(score), score, value)


def _bin_tables(edges: Rows, values: Rows, device: torch.device) -> State:
    return {
        "edges": torch.tensor(edges, dtype=torch.float32, device=device),
        "values": torch.tensor(values, dtype=torch.float32, device=device),
    }


def _rows(array: NDArray[Any]) -> Rows:
    return tuple(tuple(float(value) for value in row) for row in array)


def _check_bins(edges: Rows, values: Rows) -> None:
    if not edges or [len(row) + 1 for row in edges] != [len(row) for row in values]:
        raise InvalidArgumentError("edges", edges, "one row per exit, one edge fewer than bins")
