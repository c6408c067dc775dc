"""One full-depth pass over given text: hidden states, and the full model's choice at every slot."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from transformers import PreTrainedModel

from adaptive._choose import Chooser
from adaptive._families import Readout
from adaptive._tier import Tier, executor_for

#: Slots whose readouts are formed at once: bounds memory at any vocabulary.
_CHUNK = 128


@torch.no_grad()
def full_states(
    model: PreTrainedModel,
    ids: Tensor,
    mask: Tensor,
    exits: tuple[int, ...],
    *,
    tier: Tier | None = None,
) -> tuple[list[Tensor], Readout]:
    """Run texts at full depth and keep the hidden states at the exits and at the end.

    Parameters
    ----------
    ids : Tensor, int64 [batch, prompt + n]
    mask : Tensor, int64 [batch, prompt]
        0 where the prompt is padding.
    exits : tuple of int
        Layer counts below the exits.

    Returns
    -------
    states : list of Tensor [batch, n, width]
        At every exit and after the last layer, at the slots behind the prompt.
    readout : Readout
    """
    batch, length = ids.shape
    prompt = mask.shape[1]
    real = torch.ones_like(ids)
    real[:, :prompt] = mask
    padding = mask == 0
    executor = executor_for(model, tier=tier)
    executor.begin(
        batch_size=batch,
        max_length=length,
        padding=padding if bool(padding.any()) else None,
        positions=(real.cumsum(dim=-1) - 1).clamp(min=0),
        ahead=0,
    )
    try:
        hidden = executor.embed(ids, 0)
        states = []
        for low, high in pairwise((0, *exits, executor.layers)):
            hidden = executor.run(low, high, hidden, 0)
            states.append(hidden[:, prompt:])
    finally:
        executor.end()
    return states, executor.readout


def choices_along(
    states: Tensor, readout: Readout, ids: Tensor, prompt: int, chooser: Chooser
) -> Tensor:
    """Token chosen at each slot, int64 ``[batch, n]``, from final states ``[batch, n, width]``."""
    parts = []
    for start in range(0, states.shape[1], _CHUNK):
        logits = readout(states[:, start : start + _CHUNK])
        slots = range(prompt + start, prompt + start + logits.shape[1])
        parts.append(chooser.each(ids, logits, slots, prompt))
    return torch.cat(parts, dim=1)


@torch.no_grad()
def agreement_along(
    model: PreTrainedModel,
    sequences: Tensor,
    mask: Tensor,
    *,
    stages: Tensor,
    chooser: Chooser,
    tier: Tier | None = None,
) -> Tensor:
    """Compare a run's text with the full model's choices after the run's own prefixes.

    Parameters
    ----------
    model : PreTrainedModel
    sequences : Tensor, int64 [batch, prompt + n]
    mask : Tensor, int64 [batch, prompt]
        0 where the prompt is padding.
    stages : Tensor, int64 [batch, n]
        Negative where a row has ended.
    chooser : Chooser
        That of the run: the same noise at the same tokens.
    tier : {"native", "generic"}, optional

    Returns
    -------
    Tensor, int8 [batch, n]
        1 where they are the same (the first token always: the prompt's own pass decides it), 0
        where not, -1 after the end.
    """
    prompt, length = mask.shape[1], sequences.shape[1]
    agreement = torch.where(stages >= 0, 1, -1).to(torch.int8)
    if length - prompt < 2:
        return agreement
    text = sequences[:, : length - 1]
    states, readout = full_states(model, text, mask, (), tier=tier)
    chosen = choices_along(states[-1], readout, text, prompt, chooser)
    same = (chosen == sequences[:, prompt + 1 :]).to(torch.int8)
    agreement[:, 1:] = torch.where(stages[:, 1:] >= 0, same, -1)
    return agreement
