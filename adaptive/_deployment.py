"""How text will be generated in deployment: what calibration must imitate to the letter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel

from adaptive._choose import Chooser, KeyedNoise
from adaptive._settings import check_processors, decoding_settings
from adaptive.calibration import InvalidArgumentError
from adaptive.calibration._validation import check_count
from adaptive.policies import unit_keys


@dataclass(frozen=True)
class Deployment:
    """Decoding settings, passed to ``generate`` unchanged wherever calibration generates.

    Parameters
    ----------
    new_tokens : int
        Most tokens generated per unit.
    batch_size : int
        Rows decoded together. Changes time, never tokens.
    generation : mapping
        Further arguments of ``model.generate`` (``do_sample``, ``temperature``,
        ``logits_processor``, ``generation_config`` ...).
    seed : int
        Seed of the noise, which is keyed by (unit, token): nothing depends on the batch.
    """

    new_tokens: int
    batch_size: int = 8
    generation: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("new_tokens", 2), ("batch_size", 1)):
            count = check_count(name, getattr(self, name), least=least)
            object.__setattr__(self, name, count)
        for name in ("max_new_tokens", "max_length"):
            if name in self.generation:
                raise InvalidArgumentError(
                    name, self.generation[name], "left out: `new_tokens` says how long texts become"
                )

    @classmethod
    def of(
        cls, generation: Mapping[str, Any], *, new_tokens: int, batch_size: int, seed: int
    ) -> Deployment:
        """Return what a caller's arguments say: greedy, if neither they nor their config samples.

        Parameters
        ----------
        generation : mapping
            Arguments of ``model.generate`` as the caller gave them.
        new_tokens, batch_size, seed
            As in the class.
        """
        given = getattr(generation.get("generation_config"), "do_sample", None)
        return cls(
            new_tokens=new_tokens,
            batch_size=batch_size,
            generation={"do_sample": bool(given)} | dict(generation),
            seed=seed,
        )

    def arguments(self, ids: Sequence[str]) -> dict[str, Any]:
        """Return keyword arguments of ``generate`` for rows that are units with these ids."""
        return dict(self.generation) | {
            "max_new_tokens": self.new_tokens,
            "random": "keyed",
            "units": unit_keys(ids),
            "seed": self.seed,
        }

    def prepared(self, model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Prepared:
        """Let transformers build the processors it would use for this batch."""
        found: list[Prepared] = []

        def note(
            model: PreTrainedModel,
            input_ids: Tensor,
            logits_processor: LogitsProcessorList,
            stopping_criteria: Any,
            generation_config: GenerationConfig,
            **model_kwargs: Any,
        ) -> Tensor:
            found.append(Prepared(generation_config, logits_processor))
            return input_ids

        model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=self.new_tokens,
            custom_generate=note,
            **self.generation,
        )
        check_processors(found[0].processors)
        return found[0]

    def settings(self, model: PreTrainedModel) -> dict[str, Any]:
        """Describe the decoding, as a run compares it with its certificate."""
        ids = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
        prepared = self.prepared(model, ids, torch.ones_like(ids))
        return decoding_settings(
            model, prepared.config, prepared.processors, new_tokens=self.new_tokens
        )


@dataclass(frozen=True)
class Prepared:
    """Generation config and processors as transformers prepares them for a batch."""

    config: GenerationConfig
    processors: LogitsProcessorList

    def chooser(self, ids: Sequence[str], seed: int) -> Chooser:
        """Return the configured way from logits to tokens for rows that are these units."""
        noise = KeyedNoise(unit_keys(ids), seed) if self.config.do_sample else None
        return Chooser(self.processors, noise)

    @property
    def pad(self) -> int:
        """Token that fills rows."""
        return 0 if self.config._pad_token_tensor is None else int(self.config._pad_token_tensor)
