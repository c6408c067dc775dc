"""What stages cost on this machine, in measured seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from adaptive._deployment import Deployment
from adaptive._device import finish
from adaptive._executor import AbstractExecutor
from adaptive._exits import Exits
from adaptive._families._rope import room_for
from adaptive._generate import generate
from adaptive._inputs import Units, batches
from adaptive._tier import Tier, executor_for
from adaptive.policies import Policy

_CONTEXT = 64
#: Rounds in which segments are timed: as many as fit into the seconds, within these.
_FEWEST_ROUNDS, _ROUNDS, _SECONDS = 9, 50, 1.0


def stage_seconds(
    model: PreTrainedModel, exits: Exits, *, tier: Tier | None = None
) -> NDArray[np.float64]:
    """Seconds to decode one token that stops at each stage, readout included, for one row.

    Parameters
    ----------
    model : PreTrainedModel
    exits : Exits
    tier : {"native", "generic"}, optional

    Returns
    -------
    ndarray of float64 [n_exits + 1]
        Cumulative and strictly increasing.
    """
    executor = executor_for(model, tier=tier)
    segments, head = _segment_seconds(executor, model, exits.layers)
    return np.asarray(np.cumsum(segments) + head)


def layer_and_head_seconds(model: PreTrainedModel) -> tuple[float, float]:
    """Seconds of one layer and of the readout for one token of one row."""
    executor = executor_for(model)
    stack, head = _segment_seconds(executor, model, ())
    return float(stack[0]) / executor.layers, head


@torch.no_grad()
def _segment_seconds(
    executor: AbstractExecutor, model: PreTrainedModel, inner: tuple[int, ...]
) -> tuple[NDArray[np.float64], float]:
    """Seconds of the layers between bounds, and of the readout, for one token of one row.

    The least of several rounds: other work on the machine only adds time.
    """
    bounds = (0, *inner, executor.layers)
    device = model.device
    slots = room_for(model, _CONTEXT + 1)
    context = slots - 1
    positions = torch.arange(slots, device=device)[None]
    executor.begin(batch_size=1, max_length=slots, padding=None, positions=positions)
    try:
        prompt = torch.ones(1, context, dtype=torch.int64, device=device)
        executor.run(0, executor.layers, executor.embed(prompt, 0), 0)
        hidden = executor.embed(prompt[:, :1], context)
        rounds: list[list[float]] = []
        began = time.perf_counter()
        while len(rounds) < _ROUNDS and (
            len(rounds) < _FEWEST_ROUNDS or time.perf_counter() - began < _SECONDS
        ):
            found = []
            for low, high in pairwise(bounds):
                executor.truncate(context)
                found.append(seconds(partial(executor.run, low, high, hidden, context), device))
            found.append(seconds(partial(executor.readout, hidden[:, -1]), device))
            rounds.append(found)
    finally:
        executor.end()
    least = np.maximum(np.min(rounds, axis=0), 1e-9)
    return least[:-1], float(least[-1])


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Wall-clock seconds of a piece of work, the device's own included."""
    finish(device)
    start = time.perf_counter()
    work()
    finish(device)
    return time.perf_counter() - start


def seconds_per_token(
    model: PreTrainedModel,
    units: Units,
    policies: Sequence[Policy],
    *,
    deployment: Deployment,
    rows: int = 1,
    tier: Tier | None = None,
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

    Returns
    -------
    ndarray of float64 [n_batches, n_policies]
        Prompts included; the same for all policies.
    """
    bare = [replace(policy, certificate=None) for policy in policies]
    found: list[list[float]] = []
    for index, ids, mask in batches(units, size=rows, pad=0, device=model.device):
        arguments = deployment.arguments([units.ids[i] for i in index])
        if rows > 1:
            arguments["attention_mask"] = mask
        found.append([])
        for policy in bare:
            work = _Timed(model, ids, policy, arguments, tier)
            spent = seconds(work, model.device)
            found[-1].append(spent / max(1, work.generated * len(index)))
    return np.array(found)


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
        self._call = partial(generate, model, ids, policy=policy, tier=tier, **arguments)
        self._prompt = ids.shape[1]
        self.generated = 0

    def __call__(self) -> None:
        sequences = self._call()
        assert isinstance(sequences, Tensor)
        self.generated = sequences.shape[1] - self._prompt
