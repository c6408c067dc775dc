"""What a generation reports beside its tokens."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation import GenerateDecoderOnlyOutput

from adaptive._decode import Job, Record
from adaptive._monitor_records import Watched
from adaptive.calibration import Certificate


@dataclass
class AdaptiveOutput(GenerateDecoderOnlyOutput):
    """Output of a generation under a policy.

    Everything of ``GenerateDecoderOnlyOutput`` (``sequences``, ``scores``, ``logits``,
    ``past_key_values``), and per generated token, padded on the right:

    Attributes
    ----------
    exit_stages : Tensor, int64 [batch, generated]
        Exit whose readout gave the token; the number of exits for full depth; -1 after the end.
    exit_scores : Tensor, float32 [batch, generated]
        Score at the last stage asked; NaN where none was asked.
    agreement : Tensor, int8 [batch, generated]
        1 where the full model chooses the same token after the same prefix, 0 where not, -1 where
        that is not known (``propagate`` mode) or after the end. With ``speculation="rejection"``
        every token is a draw from the full model's distribution: 1 where the draft was kept or
        the full depth drew at once, 0 where a rejected draft was replaced.
    mean_depth : float
        Mean number of layers per generated token, the prompt's own full pass not counted.
    certified : bool
        Whether the run was inside what the policy's certificate promises; with a monitor, whether
        all of its rows were.
    mismatches : tuple of str
        Why not, if it was not.
    certificate : Certificate
        The policy's certificate; outside its conditions, one that says it no longer holds.
    inside : Tensor, bool [batch]
        With a monitor: rows that the certificate applies to. Not those that ran in fallback, or
        into which an alarm fell.
    monitored : tuple of Watched
        With a monitor: what became of each row's unit, events included.
    """

    exit_stages: torch.Tensor | None = None
    exit_scores: torch.Tensor | None = None
    agreement: torch.Tensor | None = None
    mean_depth: float | None = None
    certified: bool | None = None
    mismatches: tuple[str, ...] | None = None
    certificate: Certificate | None = None
    inside: torch.Tensor | None = None
    monitored: tuple[Watched, ...] | None = None


def output_of(
    job: Job, record: Record, certificate: Certificate | None, mismatches: tuple[str, ...]
) -> AdaptiveOutput:
    """Report on a run; ``mismatches`` say why its certificate does not apply."""
    generated = record.generated
    stages = record.stages[:, :generated]
    return AdaptiveOutput(
        sequences=record.ids[:, : record.length],
        scores=tuple(record.scores) if job.keep_scores else None,
        logits=tuple(record.logits) if job.keep_logits else None,
        past_key_values=_cache(job, record.length - 1),
        exit_stages=stages,
        exit_scores=record.exit_scores[:, :generated],
        agreement=record.agreement[:, :generated],
        mean_depth=mean_depth(stages, job.exits.layers, job.stack.executor.layers),
        certified=certificate is not None and certificate.holds and not mismatches,
        mismatches=mismatches,
        certificate=_voided(certificate, mismatches),
    )


def _voided(certificate: Certificate | None, mismatches: tuple[str, ...]) -> Certificate | None:
    """Return the certificate, or outside its conditions one that says it no longer holds."""
    if certificate is None or not mismatches:
        return certificate
    notes = tuple(f"It does not hold for this run: {mismatch}." for mismatch in mismatches)
    return dataclasses.replace(certificate, holds=False, notes=(*certificate.notes, *notes))


def mean_depth(stages: Tensor, exits: tuple[int, ...], layers: int) -> float:
    """Mean number of layers behind a generated token, the first (the prompt's) not counted."""
    later = stages[:, 1:]
    depth = torch.tensor([*exits, layers], dtype=torch.float64, device=stages.device)
    real = later >= 0
    if not bool(real.any()):
        return float(layers)
    return float(depth[later[real]].mean())


def _cache(job: Job, length: int) -> DynamicCache:
    """Hand over keys and values of ``length`` slots in transformers' form.

    Of a layer with a window, the last slots, as transformers keeps them.
    """
    executor = job.stack.executor
    cache = DynamicCache()
    for layer in range(executor.layers):
        window = executor.kept_window(layer)
        if window is None:
            cache.layers.append(DynamicLayer())
        else:
            cache.layers.append(DynamicSlidingWindowLayer(sliding_window=window))
        cache.update(*executor.keys_values(layer), layer)
        if window is not None:
            cache.layers[layer].cumulative_length = length
    return cache


def marked(output: AdaptiveOutput, units: tuple[Watched, ...]) -> AdaptiveOutput:
    """Say which rows were inside the certificate."""
    output.monitored = units
    output.inside = torch.tensor([unit.inside for unit in units])
    outside = [unit.unit.number for unit in units if not unit.inside]
    output.certified = bool(output.certified) and not outside
    if outside and output.certificate is not None:
        note = f"It does not apply to the units {outside}: they ran outside the policy."
        notes = (*output.certificate.notes, note)
        output.certificate = dataclasses.replace(output.certificate, holds=False, notes=notes)
    return output
