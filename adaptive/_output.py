"""What a generation reports beside its tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.generation import GenerateDecoderOnlyOutput

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
