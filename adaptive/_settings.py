"""Decoding settings: what a certificate was earned under and what a run is about to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel

from adaptive._exits import Exits
from adaptive._fingerprint import model_fingerprint, tensors_fingerprint
from adaptive.calibration import InvalidArgumentError, UnsupportedError
from adaptive.policies import Policy

#: Processors of transformers that are functions of (prefix, scores) alone.
_PURE = frozenset(
    {
        "EncoderNoRepeatNGramLogitsProcessor",
        "EpsilonLogitsWarper",
        "EtaLogitsWarper",
        "ExponentialDecayLengthPenalty",
        "ForcedBOSTokenLogitsProcessor",
        "ForcedEOSTokenLogitsProcessor",
        "InfNanRemoveLogitsProcessor",
        "LogitNormalization",
        "MinLengthLogitsProcessor",
        "MinNewTokensLengthLogitsProcessor",
        "MinPLogitsWarper",
        "NoBadWordsLogitsProcessor",
        "NoRepeatNGramLogitsProcessor",
        "RepetitionPenaltyLogitsProcessor",
        "SequenceBiasLogitsProcessor",
        "SuppressTokensAtBeginLogitsProcessor",
        "SuppressTokensLogitsProcessor",
        "TemperatureLogitsWarper",
        "TopHLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "TypicalLogitsWarper",
    }
)
#: Fields of a processor that depend on the prompt or the batch, not on the settings.
_INCIDENTAL = frozenset({"prompt_length_to_skip", "begin_index", "regulation_start", "length_bias"})


def check_processors(processors: LogitsProcessorList) -> None:
    """Refuse processors that may keep state between calls.

    A processor is asked about the same prefix more than once (for the early answer and for the
    full model's), so it must be a function of its two arguments. A class says so of itself with
    ``is_pure = True``.

    Raises
    ------
    UnsupportedError
        Naming the processor.
    """
    for processor in processors:
        kind = type(processor)
        ours = kind.__module__.startswith("transformers.")
        if getattr(kind, "is_pure", False) or (ours and kind.__name__ in _PURE):
            continue
        raise UnsupportedError(
            f"the logits processor {kind.__name__} may keep state between calls, and policies ask processors about "
            f"the same prefix twice: if it is a function of (input_ids, scores) alone, set `is_pure = True` on its class"
        )


def decoding_settings(
    model: PreTrainedModel,
    config: GenerationConfig,
    processors: LogitsProcessorList,
    *,
    new_tokens: int,
) -> dict[str, Any]:
    """Describe how text is decoded, as plain values that can be compared and stored."""
    eos = getattr(config, "_eos_token_tensor", None)
    return {
        "sampling": bool(config.do_sample),
        "processors": [_described(processor) for processor in processors],
        "eos_token_id": [] if eos is None else sorted(int(token) for token in eos.flatten()),
        "max_new_tokens": int(new_tokens),
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def exits_fingerprint(exits: Exits) -> str:
    """Fingerprint of the exits' places and weights."""
    return f"{'-'.join(map(str, exits.layers))}:{tensors_fingerprint(exits.named_parameters())}"


def fingerprints(model: PreTrainedModel, exits: Exits) -> dict[str, str]:
    """Fingerprints of what a policy runs on."""
    return {"model": model_fingerprint(model), "exits": exits_fingerprint(exits)}


def certificate_mismatches(
    policy: Policy, model: PreTrainedModel, exits: Exits, settings: dict[str, Any]
) -> tuple[str, ...]:
    """Say in which respects a run is outside what the policy's certificate was earned under.

    Returns
    -------
    tuple of str
        One sentence each; empty if the certificate applies, or if there is none.
    """
    certificate = policy.certificate
    if certificate is None:
        return ()
    found = []
    for name, here in fingerprints(model, exits).items():
        earned = certificate.fingerprints.get(name)
        if earned != here:
            found.append(f"another {name}: certified on {earned}, running on {here}")
    if certificate.decoding.get("mode") != policy.mode:
        found.append(
            f"another mode: certified in {certificate.decoding.get('mode')!r}, running in {policy.mode!r}"
        )
    for name, here in settings.items():
        earned = certificate.decoding.get(name)
        if name == "max_new_tokens":
            if earned is None or here > earned:
                found.append(
                    f"longer text: certified for at most {earned} new tokens, asked for {here}"
                )
        elif earned != here:
            found.append(f"another {name}: certified with {earned!r}, running with {here!r}")
    return tuple(found)


def check_stages(policy: Policy, exits: Exits) -> None:
    """Refuse a policy that asks at exits the model does not have, or at probes never trained."""
    if policy.stages[-1] >= len(exits.layers):
        raise InvalidArgumentError(
            "policy",
            f"stages {policy.stages}",
            f"stages among this model's exits 0..{len(exits.layers) - 1}",
        )
    if "probe" in policy.needs and not exits.trained:
        raise InvalidArgumentError(
            "policy",
            "a score that reads the exits' probes",
            "trained exits: call `train_exits(model, prompts)` first",
        )


def _described(processor: Any) -> dict[str, Any]:
    """Return class name and settings of a processor."""
    fields = {
        name.lstrip("_"): _plain(value)
        for name, value in sorted(vars(processor).items())
        if name not in _INCIDENTAL and _plain(value) is not None
    }
    return {"type": type(processor).__name__} | fields


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().tolist()
    if isinstance(value, bool | int | float | str):
        return (
            value if value == value and value not in (float("inf"), float("-inf")) else str(value)
        )
    if isinstance(value, Sequence):
        return [_plain(item) for item in value]
    return None
