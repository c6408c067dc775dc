"""What a call of ``generate`` asks for: checked by name, and brought into one form."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any, get_args

import torch
from torch import Tensor
from transformers import (
    Cache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation import GenerationMode

from adaptive._graphs import Capture
from adaptive._rows import row_integers
from adaptive.calibration import InvalidArgumentError, InvalidTypeError, UnsupportedError
from adaptive.calibration._validation import check_count

#: Keyword arguments that transformers passes to every decoding method and that change nothing here.
_IGNORED = frozenset(
    {"logits_to_keep", "use_cache", "synced_gpus", "output_attentions", "output_hidden_states"}
)
#: What embeddings can be looked up with.
_INTEGERS = (torch.int64, torch.int32)


def check_inputs(
    model: PreTrainedModel, input_ids: Tensor | None, model_kwargs: dict[str, Any]
) -> None:
    """Refuse what is no batch of token ids, has a mask of another shape, or lies elsewhere."""
    mask = model_kwargs.get("attention_mask")
    for name, value in {
        "input_ids": input_ids,
        "attention_mask": mask,
        "position_ids": model_kwargs.get("position_ids"),
    }.items():
        if value is not None:
            _check_tensor(model, name, value)
    if input_ids is None:
        return
    alone = model_kwargs.get("inputs_embeds") is None and not _is_filled(model_kwargs)
    tokens = input_ids.ndim == 2 and input_ids.dtype in _INTEGERS
    if not tokens or (alone and input_ids.numel() == 0):
        raise InvalidArgumentError(
            "input_ids",
            f"{input_ids.dtype} of shape {tuple(input_ids.shape)}",
            "token ids: int64 of shape [batch, prompt], at least one token in all of them",
        )
    # what stands before the ids, and makes a mask longer, is refused by its own name
    if alone and mask is not None and mask.shape != input_ids.shape:
        raise InvalidArgumentError(
            "attention_mask",
            f"shape {tuple(mask.shape)}",
            f"of the shape of `input_ids`, {tuple(input_ids.shape)}",
        )


def _check_tensor(model: PreTrainedModel, name: str, value: object) -> None:
    """Refuse what is no tensor where the model is; a model in parts has its inputs moved."""
    if not isinstance(value, Tensor):
        raise InvalidTypeError(name, value, "a tensor")
    if value.device != model.device and not getattr(model, "hf_device_map", None):
        raise InvalidArgumentError(
            name, f"a tensor on {value.device}", f"on the model's device, {model.device}"
        )


def _is_filled(model_kwargs: dict[str, Any]) -> bool:
    """Whether there is a cache with something in it."""
    cache = model_kwargs.get("past_key_values")
    return isinstance(cache, Cache) and cache.get_seq_length() > 0


def check_capture(capture: Capture, resumed: Tensor | None) -> None:
    """Refuse an unknown way to capture, and what a step in fixed shapes cannot do."""
    if capture not in get_args(Capture):
        raise InvalidArgumentError(
            "capture", capture, f"None or one of {', '.join(map(repr, get_args(Capture)))}"
        )
    if resumed is not None:
        raise UnsupportedError("`resumed` is not supported together with `capture`")


def with_stop_strings(
    criteria: StoppingCriteriaList | None, model_kwargs: dict[str, Any]
) -> StoppingCriteriaList | None:
    """Turn ``stop_strings`` and ``tokenizer`` into a criterion.

    transformers drops the tokenizer when it is given a decoding method, and then misses it.
    """
    tokenizer, strings = model_kwargs.pop("tokenizer", None), model_kwargs.get("stop_strings")
    if tokenizer is None or strings is None:
        return criteria
    del model_kwargs["stop_strings"]
    own = StopStringCriteria(stop_strings=strings, tokenizer=tokenizer)
    return StoppingCriteriaList([*(criteria or []), own])


def transformers_frame() -> dict[str, Any]:
    """Local variables of the ``model.generate`` that called us.

    transformers hands a callable neither the streamer nor the assistant model it was given, and
    says nothing: the only place to see them is its own frame.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "generate" and "custom_generate" in frame.f_locals:
            return frame.f_locals
        frame = frame.f_back
    return {}


def padding_and_positions(
    model: PreTrainedModel,
    input_ids: Tensor,
    config: GenerationConfig,
    model_kwargs: dict[str, Any],
) -> tuple[Tensor | None, Tensor]:
    """Refuse what is not supported; return padding ``[batch, prompt]`` and all positions."""
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise UnsupportedError(
            f"{mode.value.replace('_', ' ')} is not supported under a policy: use greedy "
            "decoding or sampling"
        )
    if config.return_dict_in_generate:
        for name in ("output_attentions", "output_hidden_states"):
            if getattr(config, name, False):
                raise UnsupportedError(f"`{name}=True` is not supported under a policy")
    if model_kwargs.get("use_cache") is False:
        raise UnsupportedError(
            "`use_cache=False` is not supported under a policy: skipped layers need a cache"
        )
    if input_ids.shape[1] == 0 or model_kwargs.get("inputs_embeds") is not None:
        raise UnsupportedError(
            "`inputs_embeds` without `input_ids` is not supported under a policy"
        )
    if _is_filled(model_kwargs):
        raise UnsupportedError(
            "a filled `past_key_values` is not supported under a policy: pass the whole prompt"
        )
    model_kwargs.pop("past_key_values", None)
    if config.max_new_tokens is not None:  # transformers rounds 2.5 up to 3, and says nothing
        check_count("max_new_tokens", config.max_new_tokens)
    mask = model_kwargs.pop("attention_mask", None)
    given = model_kwargs.pop("position_ids", None)
    left = sorted(
        name for name, value in model_kwargs.items() if value is not None and name not in _IGNORED
    )
    if left:
        raise UnsupportedError(f"model inputs not supported under a policy: {', '.join(left)}")
    padding = None
    if mask is not None and not bool((mask != 0).all()):
        padding = mask == 0
        if bool(padding[:, -1].any()):
            raise InvalidArgumentError(
                "attention_mask",
                "padding on the right",
                "padding on the left (`padding_side='left'`)",
            )
    return padding, _positions(input_ids, padding, given, config.max_length)


def _positions(
    input_ids: Tensor, padding: Tensor | None, given: Tensor | None, max_length: int
) -> Tensor:
    batch, prompt = input_ids.shape
    if given is None:
        real = torch.ones_like(input_ids) if padding is None else (~padding).to(torch.int64)
        given = (real.cumsum(dim=-1) - 1).clamp(min=0)
    fits = given.ndim == 2 and given.shape[0] in (1, batch) and given.shape[1] >= prompt
    if not fits or given.dtype not in _INTEGERS:
        raise InvalidArgumentError(
            "position_ids",
            f"{given.dtype} of shape {tuple(given.shape)}",
            f"integers of shape ({batch}, {prompt}) or (1, {prompt}); where none are given, "
            "transformers makes them from `attention_mask`",
        )
    given = given[:, -prompt:].expand(batch, prompt)
    later = torch.arange(1, max_length - prompt + 1, device=input_ids.device)
    return torch.cat([given, given[:, -1:] + later], dim=1)


def row_keys(units: Tensor | None, input_ids: Tensor) -> Tensor:
    """Return the number of each row's unit, int64 ``[batch]``."""
    rows = input_ids.shape[0]
    keys = torch.arange(rows) if units is None else row_integers("units", units, rows=rows)
    return keys.to(input_ids.device)


def resumed_counts(
    own: dict[str, Any],
    config: GenerationConfig,
    processors: LogitsProcessorList,
    input_ids: Tensor,
    padding: Tensor | None,
) -> Tensor | None:
    """Check that begun texts can be gone on with."""
    if own["resumed"] is None:
        return None
    rows, length = input_ids.shape
    plain = not config.do_sample and not processors and own["policy"].mode == "exact"
    counts = row_integers("resumed", own["resumed"], rows=rows).to(input_ids.device)
    real = length if padding is None else (~padding).sum(dim=1)
    if not plain or bool(((counts < 1) | (counts >= real)).any()):
        raise InvalidArgumentError(
            "resumed",
            own["resumed"],
            "one count per row, at least 1 and less than the tokens of its prompt, with greedy "
            "decoding, no processors and mode 'exact'",
        )
    return counts
