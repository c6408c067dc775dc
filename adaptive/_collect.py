"""Traces: what every exit would have said along the model's own full-depth text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel

from adaptive._choose import Chooser
from adaptive._deployment import Deployment
from adaptive._distributed import from_first, gathered, processes, share
from adaptive._exits import Exits, require_exits
from adaptive._families import Readout
from adaptive._full_depth import choices_along, full_states
from adaptive._inputs import Units, texts_batch
from adaptive._progress import bar
from adaptive._tier import Tier
from adaptive._timing import stage_seconds
from adaptive.calibration import InvalidArgumentError, Trace
from adaptive.policies import AbstractScore, ProbeScore

#: Slots whose readouts are formed at once: bounds memory at any vocabulary.
_CHUNK = 128


def collect(
    model: PreTrainedModel,
    units: Units,
    texts: Sequence[tuple[int, ...]],
    *,
    deployment: Deployment,
    score: AbstractScore | None = None,
    stages: tuple[int, ...] | None = None,
    progress: bool = True,
    tier: Tier | None = None,
) -> Trace:
    """Trace the exits along given continuations, in one full-depth pass.

    Logits exist for a few slots at a time and are reduced on the fly, so memory does not grow
    with the vocabulary times the number of tokens.

    Parameters
    ----------
    model : PreTrainedModel
        With exits.
    units : Units
        Prompts.
    texts : sequence of tuple of int
        Continuation of each prompt: the model's own, as ``run_units`` generates it.
    deployment : Deployment
        How the text is decoded; its processors and noise shape every choice.
    score : AbstractScore, optional
        Read at every asked exit; the probe's score by default.
    stages : tuple of int, optional
        Exits that are asked, all by default; others have the score ``-inf``.
    progress : bool
    tier : {"native", "generic"}, optional

    Returns
    -------
    Trace
        One row per generated token but the first, which the prompt's own pass decides. Loss
        ``disagreement``; columns ``answers [n, n_exits]`` (the likeliest token of each exit, which
        is what rules read), ``choices [n]`` (the full model's), ``emitted [n]`` (the text's) and
        ``positions [n]``. Where logits are processed or sampled, ``exit_choices [n, n_exits]``
        (elsewhere the answers); where some exit was not asked, ``asked [n, n_exits]``. Units of a
        single token have no rows and are left out. Costs are measured seconds per token.

    Raises
    ------
    InvalidArgumentError
        If no continuation has two tokens.
    """
    exits = require_exits(model)
    score = ProbeScore() if score is None else score
    asked = tuple(range(len(exits.layers))) if stages is None else stages
    sizes = [len(p) + len(t) for p, t in zip(units.prompts, texts, strict=True)]
    order = [int(i) for i in np.argsort(sizes, kind="stable") if len(texts[i]) > 1]
    if not order:
        raise InvalidArgumentError("texts", "no text of two tokens", "longer continuations")
    rows: dict[int, dict[str, NDArray[Any]]] = {}
    own = -(-len(order) // processes())
    with bar(total=own, desc="tracing", unit="unit", progress=progress) as shown:
        for start in share(range(0, len(order), deployment.batch_size)):
            index = order[start : start + deployment.batch_size]
            pairs = [(units.prompts[i], texts[i]) for i in index]
            ids, mask = texts_batch(pairs, model.device)
            prepared = deployment.prepared(model, ids[:, : mask.shape[1]], mask)
            chooser = prepared.chooser([units.ids[i] for i in index], deployment.seed)
            states, readout = full_states(model, ids, mask, exits.layers, tier=tier)
            found = _read(exits, states, readout, ids, mask.shape[1], chooser, score, asked)
            rows.update(zip(index, _split(found, pairs), strict=True))
            shown.update(len(index))
    rows = gathered(rows)
    kept = sorted(rows)
    joined = {name: np.concatenate([rows[i][name] for i in kept]) for name in rows[kept[0]]}
    if len(asked) < len(exits.layers):
        read = np.isin(np.arange(len(exits.layers)), asked)
        joined["asked"] = np.tile(read, (len(joined["scores"]), 1))
    return Trace(
        scores=joined.pop("scores"),
        losses={"disagreement": joined.pop("disagreement")},
        costs=from_first(lambda: stage_seconds(model, exits, tier=tier)),
        cost_quantity="seconds",
        lengths=np.array([len(texts[i]) - 1 for i in kept]),
        unit_ids=tuple(units.ids[i] for i in kept),
        groups=None if units.groups is None else units.groups[kept],
        columns=joined,
    )


@torch.no_grad()
def _read(
    exits: Exits,
    states: list[Tensor],
    readout: Readout,
    ids: Tensor,
    prompt: int,
    chooser: Chooser,
    score: AbstractScore,
    stages: tuple[int, ...],
) -> dict[str, Tensor]:
    """Scores, answers and full choices of a batch, each ``[batch, n, ...]``."""
    choices = choices_along(states[-1], readout, ids, prompt, chooser)

    def of_exits(chooser: Chooser) -> Tensor:
        columns = [
            choices_along(exits.translate(exit, states[exit]), readout, ids, prompt, chooser)
            for exit in range(len(exits.layers))
        ]
        return torch.stack(columns, dim=-1)

    answers = of_exits(Chooser(LogitsProcessorList(), None))
    found = {"answers": answers.to(torch.int32), "choices": choices}
    if not chooser.plain:
        answers = of_exits(chooser)
        found["exit_choices"] = answers.to(torch.int32)
    return found | {
        "scores": _scores(exits, states, readout, score, stages),
        "disagreement": answers != choices[:, :, None],
    }


def _scores(
    exits: Exits,
    states: list[Tensor],
    readout: Readout,
    score: AbstractScore,
    stages: tuple[int, ...],
) -> Tensor:
    """Score at every slot and exit, float32 ``[batch, n, n_exits]``, ``-inf`` where not asked.

    A score that remembers nothing across tokens sees the slots of a chunk as rows of one batch;
    the others walk the slots in order, as they do in the loop.
    """
    batch, count, width = states[0].shape
    device = states[0].device
    step = 1 if score.across_tokens else _CHUNK
    found = torch.full((batch, count, len(exits.layers)), float("-inf"), device=device)
    memory = score.init(batch, device=device)
    for start in range(0, count, step):
        stop = min(start + step, count)
        rows = batch * (stop - start)
        state = memory if score.across_tokens else score.init(rows, device=device)
        position = torch.arange(start + 1, stop + 1, device=device).repeat(batch)
        previous: Tensor | None = None
        for exit in stages:
            here = states[exit][:, start:stop].reshape(rows, width)
            features = exits.features(
                frozenset(score.needs),
                exit,
                here,
                previous=previous,
                position=position,
                readout=readout,
            )
            value, state = score.score(features, state)
            found[:, start:stop, exit] = value.float().view(batch, stop - start)
            previous = here
        if score.across_tokens:
            memory = score.advance(state)
    return found


def _split(
    found: dict[str, Tensor], pairs: list[tuple[tuple[int, ...], tuple[int, ...]]]
) -> list[dict[str, NDArray[Any]]]:
    """Cut a batch into its units, each at its own length."""
    arrays = {name: value.cpu().numpy() for name, value in found.items()}
    rows = []
    for row, (_, text) in enumerate(pairs):
        n = len(text) - 1
        own = {name: value[row, :n] for name, value in arrays.items()}
        own["emitted"] = np.array(text[1:], dtype=np.int64)
        own["positions"] = np.arange(1, n + 1)
        rows.append(own)
    return rows
