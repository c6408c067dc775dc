"""What a check schedule is weighed by: seconds of the stages, and of asking at an exit."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from adaptive._costs import Costs, costs_of, seconds_of
from adaptive._exits import Exits
from adaptive._families import layers_of
from adaptive._tier import Tier, executor_for
from adaptive.policies import Mode, Policy

#: Rounds, of which the median counts, and layers that are run in each.
_ROUNDS, _LAYERS = 25, 2
_known: weakref.WeakKeyDictionary[Exits, dict[tuple[object, ...], NDArray[np.float64]]] = (
    weakref.WeakKeyDictionary()
)


@dataclass(frozen=True)
class ScheduleCosts:
    """Seconds per token of one row.

    Parameters
    ----------
    stages : ndarray of float64 [n_exits + 1]
        Of a token that stops at each stage, without checks; strictly increasing. The head is
        part of it unless every check reads it.
    checks : ndarray of float64 [n_exits]
        Of asking at each exit; 0 where a policy does not ask.
    """

    stages: NDArray[np.float64]
    checks: NDArray[np.float64]


def schedule_costs(
    model: PreTrainedModel, exits: Exits, policy: Policy, *, tier: Tier | None = None
) -> ScheduleCosts:
    """Measure stages and checks on this machine, once per model and process.

    Parameters
    ----------
    model : PreTrainedModel
    exits : Exits
        Of the model.
    policy : Policy
        Its checks are timed at the exits where it asks.
    tier : {"native", "generic"}, optional
    """
    costs = costs_of(model, tier=tier)
    stages = seconds_of_stages(costs, exits.layers, layers=len(layers_of(model)), mode=policy.mode)
    if all(policy.needs_at(exit) & {"logits", "answer"} for exit in range(len(exits.layers))):
        stages[:-1] -= costs.of_head(1)  # the check has read the head, and it is not read again
    threads = torch.get_num_threads()
    key = (policy.score, policy.rule, policy.stages, tier, model.device, model.dtype, threads)
    found = _known.setdefault(exits, {})
    if key not in found:
        found[key] = _checks(model, exits, policy, tier)
    return ScheduleCosts(stages, found[key] * costs.of_layer(1))


def seconds_of_stages(
    costs: Costs, exits: tuple[int, ...], *, layers: int, mode: Mode
) -> NDArray[np.float64]:
    """Seconds of a token that stops at each stage, what it costs later included.

    Parameters
    ----------
    costs : Costs
        Of one layer and the head, for several tokens at once.
    exits : tuple of int
        Layers below each exit.
    layers : int
        Of the model.
    mode : {"exact", "propagate"}
        In ``exact`` mode a skipped layer is paid for later, in a pass that is made anyway: what it
        takes for one token more. In ``propagate`` mode filling keys and values counts as nothing.

    Returns
    -------
    ndarray of float64 [n_exits + 1]
        Strictly increasing.
    """
    once = costs.of_layer(1)
    later = 0.0
    if mode == "exact":
        most = max(2, costs.efficient)
        later = (costs.of_layer(most) - once) / (most - 1)
    depths = np.array([*exits, layers])
    # a trace wants costs that rise, even where nothing is saved by stopping
    later = min(later, (1.0 - 1e-6) * once)
    return np.asarray(depths * once + (layers - depths) * later + costs.of_head(1))


@torch.no_grad()
def _checks(
    model: PreTrainedModel, exits: Exits, policy: Policy, tier: Tier | None
) -> NDArray[np.float64]:
    """Time of features, score, decision and the host's read at each exit, in layers, for one row.

    Layers are run before each check, as in the loop, and timed with it, so that both meet the same
    machine. Segments end at every exit, asked or not, so their
    ends are no part of it.
    """
    device = model.device
    executor = executor_for(model, tier=tier)
    position = torch.ones(1, dtype=torch.int64, device=device)
    noise = torch.full((1,), 0.5, device=device) if "noise" in policy.needs else None
    state = policy.init(1, device=device)
    span = min(_LAYERS, executor.layers)

    def ask(exit: int) -> None:
        features = exits.features(
            policy.needs_at(exit),
            exit,
            here,
            previous=here,
            position=position,
            readout=executor.readout,
        )
        stop, _, _ = policy.update(replace(features, noise=noise), state)
        stop.tolist()

    executor.begin(batch_size=1, max_length=1, padding=None, positions=position[None] - 1)
    try:
        hidden = executor.embed(position[None], 0)
        here = hidden[:, 0]
        layers = partial(executor.run, 0, span, hidden, 0)
        rounds = np.zeros((_ROUNDS + 1, len(exits.layers)))
        for turn in range(_ROUNDS + 1):
            for exit in policy.stages:
                executor.truncate(0)
                layer = seconds_of(layers, device) / span
                rounds[turn, exit] = seconds_of(partial(ask, exit), device) / layer
    finally:
        executor.end()
    return np.asarray(np.median(rounds[1:], axis=0))
