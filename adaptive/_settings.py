"""Decoding settings: what a certificate was earned under and what a run is about to do."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from adaptive._exits import Exits
from adaptive._fingerprint import model_fingerprint, text_hash, weights_fingerprint
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
#: Fields of a processor that follow from the batch or fill up in use: no settings.
_INCIDENTAL = frozenset(
    {
        "batch_size",
        "cu_seq_lens_q",
        "generated_ngrams",
        "length_1_bias",
        "logits_indices",
        "multi_token_biases",
        "prepared_bias_variables",
    }
)
#: Fields that count from the start of the prompt: a setting only once its length is taken off.
_COUNTED = frozenset({"prompt_length_to_skip", "begin_index", "regulation_start", "max_length"})
_tokenizers: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, str] = weakref.WeakKeyDictionary()


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
            f"the logits processor {kind.__name__} may keep state between calls, and policies "
            "ask processors about "
            "the same prefix twice: if it is a function of (input_ids, scores) alone, set "
            "`is_pure = True` on its class"
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
        "processors": [
            _described(processor, config, config.max_length - new_tokens)
            for processor in processors
        ],
        "eos_token_id": [] if eos is None else sorted(int(token) for token in eos.flatten()),
        "max_new_tokens": int(new_tokens),
        "dtype": _dtype(model),
    }


def _dtype(model: PreTrainedModel) -> str:
    """Name what is computed in, which ``torch.autocast`` changes."""
    names, kind = str(model.dtype), model.device.type
    if torch.is_autocast_enabled(kind):
        names += f" under autocast to {torch.get_autocast_dtype(kind)}"
    return names.replace("torch.", "")


def exits_fingerprint(exits: Exits) -> str:
    """Fingerprint of the exits' places and weights."""
    return f"{'-'.join(map(str, exits.layers))}:{weights_fingerprint(exits)}"


def fingerprints(model: PreTrainedModel, exits: Exits) -> dict[str, str]:
    """Fingerprints of what a policy runs on."""
    return {"model": model_fingerprint(model), "exits": exits_fingerprint(exits)}


def tokenizer_fingerprints(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Fingerprints of a tokenizer's vocabulary and, where it has one, of its chat template."""
    if tokenizer not in _tokenizers:
        _tokenizers[tokenizer] = text_hash(str(sorted(tokenizer.get_vocab().items())))
    found = {"tokenizer": _tokenizers[tokenizer]}
    template = getattr(tokenizer, "chat_template", None)
    return found | ({"chat_template": text_hash(str(template))} if template else {})


def certificate_mismatches(
    policy: Policy,
    model: PreTrainedModel,
    exits: Exits,
    settings: dict[str, Any],
    *,
    batch_size: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[str, ...]:
    """Say in which respects a run is outside what the policy's certificate was earned under.

    The tokenizer and its chat template are compared where the caller passes the tokenizer: token
    ids alone do not show them. The size of the batch is compared where its rows decide together.

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
    if tokenizer is not None:
        texts = tokenizer_fingerprints(tokenizer)
        found += [
            f"another {name.replace('_', ' ')}: certified on {earned}, running on {texts.get(name)}"
            for name in ("tokenizer", "chat_template")
            if (earned := certificate.fingerprints.get(name)) not in (None, texts.get(name))
        ]
    if certificate.decoding.get("mode") != policy.mode:
        found.append(
            f"another mode: certified in {certificate.decoding.get('mode')!r}, running in "
            f"{policy.mode!r}"
        )
    if policy.scope == "batch" and batch_size != certificate.decoding.get("batch_size"):
        found.append(
            f"another batch size: its rows decide together, certified for batches of "
            f"{certificate.decoding.get('batch_size')}, running {batch_size}"
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
            "one whose score reads probes, and these were never trained",
            "one that reads no probes, or have trained exits: call `train_exits(model, prompts)`",
        )


def _described(processor: Any, config: GenerationConfig, prompt: int) -> dict[str, Any]:
    """Return class name and settings of a processor, the same for any prompt and batch."""
    counted = set(_COUNTED)
    if getattr(config, "min_new_tokens", None) is not None:
        counted.add("min_length")  # transformers has set it from the prompt's length
    fields = {}
    for name, value in sorted(vars(processor).items()):
        plain = _plain(value)
        if name in _INCIDENTAL or plain is None:
            continue
        if name == "prompt_ignore_length" and isinstance(value, torch.Tensor):
            continue  # the padding of each row
        fields[name.lstrip("_")] = plain - prompt if name in counted else plain
    return {"type": type(processor).__name__} | fields


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().tolist()
    if isinstance(value, bool | int | float | str):
        return (
            value if value == value and value not in (float("inf"), float("-inf")) else str(value)
        )
    if isinstance(value, Mapping):
        return sorted([_plain(key), _plain(item)] for key, item in value.items())
    if isinstance(value, Sequence):
        return [_plain(item) for item in value]
    return None
