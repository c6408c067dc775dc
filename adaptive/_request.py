"""What a call of ``generate`` asks for: checked by name, and brought into one form."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any, get_args

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation import GenerationMode

from adaptive._graphs import Capture
from adaptive.calibration import InvalidArgumentError, UnsupportedError

#: Keyword arguments that transformers passes to every decoding method and that change nothing here.
_IGNORED = frozenset(
    {"logits_to_keep", "use_cache", "synced_gpus", "output_attentions", "output_hidden_states"}
)


def check_ids(input_ids: Tensor | None, mask: Tensor | None) -> None:
    """Refuse what is no batch of token ids, or has a mask of another shape."""
    if input_ids is None:
        return
    if input_ids.ndim != 2 or input_ids.is_floating_point():
        raise InvalidArgumentError(
            "input_ids",
            f"{input_ids.dtype} of shape {tuple(input_ids.shape)}",
            "token ids: integers of shape [batch, prompt]",
        )
    # behind a filled cache, which is refused by its own name, a mask is longer than the ids
    if mask is not None and (mask.ndim != 2 or mask.shape[1] < input_ids.shape[1]):
        raise InvalidArgumentError(
            "attention_mask",
            f"shape {tuple(mask.shape)}",
            f"of the shape of `input_ids`, {tuple(input_ids.shape)}",
        )


def check_devices(model: PreTrainedModel, **tensors: Tensor | None) -> None:
    """Refuse inputs that are not where the model is, unless they are moved to its parts."""
    if getattr(model, "hf_device_map", None):
        return
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != model.device:
            raise InvalidArgumentError(
                name, f"a tensor on {tensor.device}", f"on the model's device, {model.device}"
            )


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
    cache = model_kwargs.pop("past_key_values", None)
    if cache is not None and cache.get_seq_length() > 0:
        raise UnsupportedError(
            "a filled `past_key_values` is not supported under a policy: pass the whole prompt"
        )
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
    given = given[:, -prompt:].expand(batch, prompt)
    later = torch.arange(1, max_length - prompt + 1, device=input_ids.device)
    return torch.cat([given, given[:, -1:] + later], dim=1)


def row_keys(own: dict[str, Any], input_ids: Tensor) -> Tensor:
    """Return the number of each row's unit, int64 ``[batch]``."""
    batch = input_ids.shape[0]
    units = torch.arange(batch) if own["units"] is None else torch.as_tensor(own["units"])
    if units.shape != (batch,):
        raise InvalidArgumentError(
            "units", tuple(units.shape), f"one number per row, shape ({batch},)"
        )
    return units.to(torch.int64)


def resumed_counts(
    own: dict[str, Any],
    config: GenerationConfig,
    processors: LogitsProcessorList,
    input_ids: Tensor,
) -> Tensor | None:
    """Check that begun texts can be gone on with."""
    if own["resumed"] is None:
        return None
    plain = not config.do_sample and not processors and own["policy"].mode == "exact"
    counts = torch.as_tensor(own["resumed"]).to(input_ids.device)
    if not plain or counts.shape != (input_ids.shape[0],) or bool((counts < 1).any()):
        raise InvalidArgumentError(
            "resumed",
            own["resumed"],
            "one count >= 1 per row, with greedy decoding, no processors and mode 'exact'",
        )
    return counts
