"""What stages cost on this machine, in measured seconds."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from adaptive._deployment import Deployment
from adaptive._exits import Exits
from adaptive._generate import generate
from adaptive._inputs import Units, batches
from adaptive._tier import Tier, executor_for
from adaptive.policies import Policy

_CONTEXT = 64


@torch.no_grad()
def stage_seconds(
    model: PreTrainedModel, exits: Exits, *, tier: Tier | None = None, repeats: int = 9
) -> NDArray[np.float64]:
    """Seconds to decode one token that stops at each stage, readout included, for one row.

    Parameters
    ----------
    model : PreTrainedModel
    exits : Exits
    tier : {"native", "generic"}, optional
    repeats : int
        The median of this many measurements is taken for every segment.

    Returns
    -------
    ndarray of float64 [n_exits + 1]
        Cumulative and strictly increasing.
    """
    executor = executor_for(model, tier=tier)
    device = model.device
    slots = _CONTEXT + 1
    executor.begin(
        batch_size=1,
        max_length=slots,
        padding=None,
        positions=torch.arange(slots, device=device)[None],
    )
    try:
        prompt = torch.ones(1, _CONTEXT, dtype=torch.int64, device=device)
        executor.run(0, executor.layers, executor.embed(prompt, 0), 0)
        hidden = executor.embed(prompt[:, :1], _CONTEXT)
        bounds = (0, *exits.layers, executor.layers)
        segments: list[list[float]] = [[] for _ in range(len(bounds) - 1)]
        heads: list[float] = []
        for _ in range(repeats):
            for segment, (low, high) in enumerate(pairwise(bounds)):
                executor.truncate(_CONTEXT)
                work = _bound(executor.run, low, high, hidden, _CONTEXT)
                segments[segment].append(seconds(work, device))
            heads.append(seconds(_bound(executor.readout, hidden[:, -1]), device))
    finally:
        executor.end()
    run = np.maximum(np.median(segments, axis=1), 1e-9)
    return np.asarray(np.cumsum(run) + np.median(heads))


@torch.no_grad()
def layer_and_head_seconds(model: PreTrainedModel, *, repeats: int = 15) -> tuple[float, float]:
    """Seconds of one layer and of the readout for one token of one row, medians of repetitions."""
    executor = executor_for(model)
    device = model.device
    slots = _CONTEXT + 1
    positions = torch.arange(slots, device=device)[None]
    executor.begin(batch_size=1, max_length=slots, padding=None, positions=positions)
    try:
        prompt = torch.ones(1, _CONTEXT, dtype=torch.int64, device=device)
        executor.run(0, executor.layers, executor.embed(prompt, 0), 0)
        hidden = executor.embed(prompt[:, :1], _CONTEXT)
        stack, head = [], []
        for _ in range(repeats):
            executor.truncate(_CONTEXT)
            stack.append(
                seconds(_bound(executor.run, 0, executor.layers, hidden, _CONTEXT), device)
            )
            head.append(seconds(_bound(executor.readout, hidden[:, -1]), device))
    finally:
        executor.end()
    return float(np.median(stack)) / executor.layers, float(np.median(head))


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Wall-clock seconds of a piece of work, the device's own included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _bound(function: Callable[..., object], *args: object) -> Callable[[], object]:
    return lambda: function(*args)


def seconds_per_token(
    model: PreTrainedModel,
    units: Units,
    policies: Sequence[Policy],
    *,
    deployment: Deployment,
    rows: int = 1,
    tier: Tier | None = None,
    repeats: int = 3,
) -> NDArray[np.float64]:
    """Seconds per generated token of real runs, policies taking turns.

    Parameters
    ----------
    model : PreTrainedModel
    units : Units
        Few are enough.
    policies : sequence of Policy
    deployment : Deployment
    rows : int
        Units decoded together.
    tier : {"native", "generic"}, optional
    repeats : int
        Rounds; the median over rounds is returned.

    Returns
    -------
    ndarray of float64 [n_policies]
        Prompts included; the same for all policies.
    """
    found = np.zeros((repeats, len(policies)))
    for turn in range(repeats):
        for column, policy in enumerate(policies):
            spent = tokens = 0.0
            for index, ids, mask in batches(units, size=rows, pad=0, device=model.device):
                arguments = deployment.arguments([units.ids[i] for i in index])
                if rows > 1:
                    arguments["attention_mask"] = mask
                work = _Timed(model, ids, replace(policy, certificate=None), arguments, tier)
                spent += seconds(work, model.device)
                tokens += work.generated * len(index)
            found[turn, column] = spent / max(1.0, tokens)
    return np.asarray(np.median(found, axis=0))


class _Timed:
    """One generation, called without arguments."""

    def __init__(
        self,
        model: PreTrainedModel,
        ids: Tensor,
        policy: Policy,
        arguments: dict[str, Any],
        tier: Tier | None,
    ) -> None:
        self._call = functools.partial(generate, model, ids, policy=policy, tier=tier, **arguments)
        self._prompt = ids.shape[1]
        self.generated = 0

    def __call__(self) -> None:
        sequences = self._call()
        assert isinstance(sequences, Tensor)
        self.generated = sequences.shape[1] - self._prompt
