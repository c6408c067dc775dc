"""Prompts by role: what trains exits, what shapes the path, what the test reads."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import numpy as np
from transformers import PreTrainedModel

from adaptive._evidence import FIT_SHARE, TRAIN_SHARE, Roles, parted
from adaptive._exits import Exits, get_exits
from adaptive._inputs import Units
from adaptive._train import ExitTraining, train_exits
from adaptive.calibration import InvalidArgumentError

_log = logging.getLogger(__name__)


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
    shaped = set(exits.record.units)
    kept = [i for i, name in enumerate(distinct.ids) if name not in shaped]
    overlapping = len(distinct) - len(kept)
    if overlapping:
        _log.info("%d prompts shaped the exits and are left out", overlapping)
    if len(kept) < 2:
        raise InvalidArgumentError(
            "dataset",
            len(kept),
            "at least 2 distinct prompts that did not shape the exits",
        )
    fit, test = parted(distinct.select(kept), FIT_SHARE, rng + 1)
    return Split(fit, test, trained, overlapping, repeated, exits)


def in_batches(units: Units, size: int) -> Units:
    """Whole batches of units, in the order given (the split's, which is random), as clusters."""
    count = len(units) // size * size
    return replace(units.select(range(count)), groups=np.repeat(np.arange(count // size), size))
