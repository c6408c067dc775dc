"""``collect_trace``: a trace of a model's exits from prompts alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adaptive._collect import collect
from adaptive._deployment import Deployment
from adaptive._exits import require_exits
from adaptive._inputs import read_units
from adaptive._runs import full_depth_texts, require_same_work
from adaptive._tier import Tier
from adaptive.calibration import InvalidTypeError, Trace
from adaptive.calibration._validation import check_rng
from adaptive.policies import AbstractScore


def collect_trace(
    model: PreTrainedModel,
    dataset: Any,
    *,
    score: AbstractScore | None = None,
    new_tokens: int = 64,
    batch_size: int = 8,
    column: str | None = None,
    groups: Sequence[Any] | str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    tier: Tier | None = None,
    rng: int = 0,
    progress: bool = True,
    **generation: Any,
) -> Trace:
    """Generate every prompt's text at full depth and trace the exits along it.

    Batch size, padding and the other prompts never change a value beyond rounding.

    Parameters
    ----------
    model : PreTrainedModel
        With exits.
    dataset
        Prompts, as for :func:`calibrate`; equal prompts count once.
    score : AbstractScore, optional
        What is read at every exit; the probe's score by default.
    new_tokens, batch_size, column, groups, tokenizer, tier, rng, progress, **generation
        As for :func:`calibrate`.

    Returns
    -------
    Trace
        Scores and disagreement with the full model per token and exit, measured costs per stage;
        columns ``answers``, ``choices``, ``emitted`` and ``positions``, and ``exit_choices`` where
        logits are processed or sampled (``answers`` are the likeliest tokens of the raw logits,
        which is what rules read).

    Raises
    ------
    NoExitsError
        If the model has no exits.
    InvalidArgumentError, InvalidTypeError
        If an argument is out of range or of the wrong kind; the message names it.
    """
    exits = require_exits(model)
    if score is not None and not isinstance(score, AbstractScore):
        raise InvalidTypeError("score", score, "an AbstractScore")
    deployment = Deployment.of(
        generation, new_tokens=new_tokens, batch_size=batch_size, seed=check_rng(rng)
    )
    units = read_units(
        dataset, model=model, tokenizer=tokenizer, column=column, groups=groups
    ).distinct()
    require_same_work(model, units)
    texts = full_depth_texts(
        model, units, exits, deployment=deployment, tier=tier, progress=progress
    )
    return collect(
        model,
        units,
        texts,
        deployment=deployment,
        score=score,
        progress=progress,
        tier=tier,
    )
