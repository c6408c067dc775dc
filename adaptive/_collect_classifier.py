"""Traces of a classifier: what every stage says of every unit, and what it costs."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from adaptive._classifier_losses import ClassLossName, RowLoss, row_loss
from adaptive._device import finish
from adaptive._distributed import gathered, processes, share
from adaptive._examples import Examples, read_examples
from adaptive._predict import features, predict_rows, stages_of
from adaptive._progress import bar
from adaptive._rows import Batch, count_rows, take_rows
from adaptive._stages import AbstractStages, StageOutput
from adaptive.calibration import InvalidArgumentError, InvalidTypeError, Trace
from adaptive.calibration._validation import check_count, check_rng
from adaptive.policies import AbstractScore, MaxProbability, Policy, keyed_noise, unit_keys
from adaptive.policies._base import check_stage

#: Every stage is asked, however many there are.
_ALL = range(sys.maxsize)
_LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class StageTable:
    """Answers of all stages on all units, in the order of the units.

    Parameters
    ----------
    logits : tuple of Tensor, float32 [n, classes]
        One per stage.
    scores : Tensor, float32 [n, n_exits]
        ``-inf`` where a stage was not asked.
    costs : ndarray of float64 [n_stages]
        Measured seconds per unit up to each stage, increasing; the median of the batches, so that
        what disturbs a few of them does not count.
    """

    logits: tuple[Tensor, ...]
    scores: Tensor
    costs: NDArray[np.float64]

    @property
    def full(self) -> Tensor:
        """Logits of full computation."""
        return self.logits[-1]


@dataclass(frozen=True)
class _Part:
    """One batch: logits per stage, scores, seconds per row of each stage."""

    logits: tuple[Tensor, ...]
    scores: Tensor
    seconds: NDArray[np.float64]


@torch.no_grad()
def stage_table(
    stages: AbstractStages,
    units: Examples,
    *,
    score: AbstractScore | None = None,
    asked: tuple[int, ...] | None = None,
    batch_size: int,
    seed: int = 0,
    progress: bool = True,
) -> StageTable:
    """Run every unit through every stage, and a score along.

    Parameters
    ----------
    stages : AbstractStages
    units : Examples
    score : AbstractScore, optional
        Without one nothing is scored.
    asked : tuple of int, optional
        Stages at which the score is read; all but the last by default.
    batch_size : int
        Rows run together.
    seed : int
        Of the noise that a score may read.
    progress : bool

    Raises
    ------
    InvalidArgumentError
        If there are fewer than two stages, or not equally many for every batch.
    """
    own: dict[int, _Part] = {}
    with bar(
        total=-(-len(units) // processes()), desc="tracing", unit="input", progress=progress
    ) as shown:
        for start in share(range(0, len(units), batch_size)):
            rows = torch.arange(start, min(len(units), start + batch_size), device="cpu")
            batch = stages.prepared(take_rows(units.inputs, rows))
            outputs, seconds = _outputs(stages, batch)
            keys = unit_keys(tuple(units.ids[i] for i in rows.tolist()))
            scores = _scores(outputs, score, asked, keys, seed)
            logits = tuple(output.logits.float().cpu() for output in outputs)
            own[start] = _Part(logits, scores.cpu(), np.array(seconds) / len(rows))
            shown.update(len(rows))
    parts = [part for _, part in sorted(gathered(own).items())]
    counts = {len(part.logits) for part in parts}
    if len(counts) > 1 or min(counts) < 2:
        raise InvalidArgumentError(
            "model",
            f"{' or '.join(map(str, sorted(counts)))} stages",
            "of equally many stages for every batch, 2 or more",
        )
    return StageTable(
        logits=tuple(map(torch.cat, zip(*(part.logits for part in parts), strict=True))),
        scores=torch.cat([part.scores for part in parts]),
        costs=np.cumsum(np.maximum(np.median([part.seconds for part in parts], axis=0), 1e-12)),
    )


def trace_of(table: StageTable, units: Examples, losses: dict[str, RowLoss]) -> Trace:
    """Return the trace of a table: one token per unit, losses of stopping at each exit."""
    exits, full = table.logits[:-1], table.full
    answers = torch.stack([logits.argmax(dim=-1) for logits in exits], dim=1).numpy()
    columns = {"answers": answers, "choices": full.argmax(dim=-1).numpy()}
    if units.labels is not None:
        columns["labels"] = units.labels
    return Trace(
        scores=table.scores.numpy(),
        losses={
            name: np.stack([loss.of(logits, full, units.labels) for logits in exits], axis=1)
            for name, loss in losses.items()
        },
        costs=table.costs,
        cost_quantity="seconds",
        unit_ids=units.ids,
        groups=units.groups,
        columns=columns,
    )


def seconds_per_row(
    stages: AbstractStages,
    inputs: Batch,
    policies: Sequence[Policy | None],
    *,
    batch_size: int,
) -> NDArray[np.float64]:
    """Seconds per row of real runs, policies taking turns; None is full computation.

    Parameters
    ----------
    stages : AbstractStages
    inputs : Batch
        A few batches are enough.
    policies : sequence of Policy or None
    batch_size : int
        Rows run together, as in use.

    Returns
    -------
    ndarray of float64 [n_batches, n_policies]
    """
    found: list[list[float]] = []
    for rows in torch.arange(count_rows(inputs), device="cpu").split(batch_size):
        batch = take_rows(inputs, rows)
        found.append([])
        for policy in policies:
            start = time.perf_counter()
            run = predict_rows(stages, batch, policy)
            run.exit_stages.cpu()  # waits for the device
            found[-1].append((time.perf_counter() - start) / len(rows))
    return np.array(found)


def collect_predictions(
    model: Any,
    dataset: Any,
    *,
    score: AbstractScore | None = None,
    stages: tuple[int, ...] | None = None,
    batch_size: int = 32,
    column: str | None = None,
    groups: Sequence[Any] | str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    rng: int = 0,
    progress: bool = True,
) -> Trace:
    """Run every input through every stage of a classifier: a trace to compare policies on.

    Parameters
    ----------
    model
        As for :func:`~adaptive.predict`, with exits.
    dataset
        As for :func:`~adaptive.calibrate`; equal inputs count once.
    score : AbstractScore, optional
        What is read at every stage; the largest probability by default.
    stages : tuple of int, optional
        Stages at which it is read; all but the last by default.
    batch_size : int
        Rows run together. Changes time, and values by rounding only.
    column, groups, tokenizer, rng, progress
        As for :func:`~adaptive.calibrate`.

    Returns
    -------
    Trace
        One row per input. Losses ``disagreement`` and, with labels, ``excess_error``; measured
        seconds per stage; columns ``answers [n, n_exits]``, ``choices`` (the full model's) and,
        with labels, ``labels``.

    Raises
    ------
    InvalidArgumentError, InvalidTypeError
        If an argument is out of range or of the wrong kind; the message names it.
    """
    batch_size, rng = check_count("batch_size", batch_size), check_rng(rng)
    if score is not None and not isinstance(score, AbstractScore):
        raise InvalidTypeError("score", score, "an AbstractScore")
    asked = None if stages is None else check_stage(stages)
    runner = stages_of(model, tokenizer=tokenizer)
    units = read_examples(dataset, stages=runner, column=column, groups=groups).distinct()
    score = MaxProbability() if score is None else score
    table = stage_table(
        runner,
        units,
        score=score,
        asked=asked,
        batch_size=batch_size,
        seed=rng,
        progress=progress,
    )
    names: tuple[ClassLossName, ...] = ("disagreement", "excess_error")
    known = names[:1] if units.labels is None else names
    return trace_of(table, units, {name: row_loss(name, bound=None) for name in known})


def _outputs(stages: AbstractStages, batch: object) -> tuple[list[StageOutput], list[float]]:
    """Output of every stage for a batch that keeps all rows, and the seconds each took."""
    found: list[StageOutput] = []
    seconds: list[float] = []
    steps = stages.run(batch, asked=_ALL)
    while True:
        start = time.perf_counter()
        try:
            output = next(steps)
        except StopIteration:
            return found, seconds
        assert output is not None
        finish(output.logits.device)
        seconds.append(time.perf_counter() - start)
        found.append(output)


def _scores(
    outputs: list[StageOutput],
    score: AbstractScore | None,
    asked: tuple[int, ...] | None,
    keys: Tensor,
    seed: int,
) -> Tensor:
    """Scores float32 [rows, n_exits], as the loop would compute them."""
    logits = outputs[0].logits
    found = torch.full((len(logits), len(outputs) - 1), float("-inf"), device=logits.device)
    if score is None:
        return found
    state = score.init(len(logits), device=logits.device)
    position = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    noise = keyed_noise(keys.to(logits.device), position, seed=seed)
    previous: Tensor | None = None
    for stage in range(len(outputs) - 1) if asked is None else asked:
        if stage >= len(outputs) - 1:
            raise InvalidArgumentError(
                "policy", f"stage {stage}", f"stages below {len(outputs) - 1}, the last one"
            )
        output = outputs[stage]
        here = features(frozenset(score.needs), stage, output, position, noise, previous)
        found[:, stage], state = score.score(here, state)
        previous = output.hidden
    # what no rule stops at: a score that is not a number
    return torch.nan_to_num(found, nan=-math.inf, posinf=_LARGEST, neginf=-math.inf)
