"""Prompts by role: what trains exits, what shapes the path, what the test reads."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from transformers import PreTrainedModel

from adaptive._evidence import FIT_SHARE, TRAIN_SHARE, Roles, parted, unshaped
from adaptive._exits import Exits, get_exits
from adaptive._inputs import Units
from adaptive._train import ExitTraining, train_exits


@dataclass(frozen=True)
class Split(Roles[Units]):
    """Units by role, and the exits they go with."""

    exits: Exits


def split_units(
    model: PreTrainedModel, units: Units, *, training: ExitTraining | None, rng: int, progress: bool
) -> Split:
    """Train exits if there are none; keep what shaped them out; part the rest in fit and test."""
    distinct = units.distinct()
    repeated = len(units) - len(distinct)
    exits, trained = get_exits(model), 0
    if exits is None:
        shaping, distinct = parted(distinct, TRAIN_SHARE, rng)
        trained = len(shaping)
        exits = train_exits(
            model,
            [{"input_ids": list(prompt)} for prompt in shaping.prompts],
            training=training,
            rng=rng,
            progress=progress,
        )
    kept = unshaped(distinct, set(exits.record.units), noun="prompts")
    fit, test = parted(kept, FIT_SHARE, rng + 1)
    return Split(fit, test, trained, len(distinct) - len(kept), repeated, exits)


def in_batches(units: Units, size: int) -> Units:
    """Whole batches of units, in the order given (the split's, which is random), as clusters."""
    count = len(units) // size * size
    return replace(units.select(range(count)), groups=np.repeat(np.arange(count // size), size))
