"""What a check schedule is weighed by: seconds of the stages, and of asking at an exit."""

from __future__ import annotations

import time
import weakref
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from adaptive._costs import Costs, costs_of
from adaptive._exits import Exits
from adaptive._families import layers_of
from adaptive._tier import Tier, executor_for
from adaptive.policies import Mode, Policy

#: Checks per timing, and timings; the least one counts, as for layers.
_CALLS, _ROUNDS = 20, 15
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
    return ScheduleCosts(stages, found[key])


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
    """Seconds of features, score, decision and the host's read at each exit, for one row.

    Segments end at every exit, asked or not, so their ends are no part of it.
    """
    device = model.device
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    readout = executor_for(model, tier=tier).readout
    hidden = torch.ones(1, exits.down.shape[-1], dtype=model.dtype, device=device)
    position = torch.ones(1, dtype=torch.int64, device=device)
    state = policy.init(1, device=device)
    noise = torch.full((1,), 0.5, device=device) if "noise" in policy.needs else None
    found = np.zeros(len(exits.layers))
    for exit in policy.stages:
        needs = policy.needs_at(exit)

        def ask(exit: int = exit, needs: frozenset[str] = needs) -> None:
            features = exits.features(
                needs, exit, hidden, previous=hidden, position=position, readout=readout
            )
            stop, _, _ = policy.update(replace(features, noise=noise), state)
            stop.tolist()

        ask()
        rounds = []
        for _ in range(_ROUNDS):
            start = clock()
            for _ in range(_CALLS):
                ask()
            rounds.append(clock() - start)
        found[exit] = min(rounds) / _CALLS
    return found
