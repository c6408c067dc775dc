"""Memory that runs out: a run hands back what it had generated, and says what it asked for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from adaptive.calibration import AdaptiveError

#: How allocators say it where they have no class of error for it: the CPU's, a device's driver,
#: the libraries of a device for their workspaces.
_SIGNS = ("can't allocate memory", "out of memory", "ALLOC_FAILED")


class OutOfMemoryError(AdaptiveError, torch.OutOfMemoryError):
    """A run needed more memory than there is; what it had generated is kept.

    It is torch's own ``OutOfMemoryError``, so that code which catches that one (to try a smaller
    batch, say) goes on working.

    Parameters
    ----------
    sequences : Tensor, int64 [batch, prompt + generated]
        Prompts and all tokens that were final, on the CPU; finished rows are padded, as in the
        output of ``generate``.
    generated : int
        Number of tokens behind each prompt.
    max_length : int
        Slots that were asked for, prompt included.
    cache_bytes : int
        Keys and values of that many slots, all layers and rows.
    reason : str
        What the allocator said.
    """

    def __init__(
        self, *, sequences: Tensor, generated: int, max_length: int, cache_bytes: int, reason: str
    ) -> None:
        self.sequences, self.generated = sequences, generated
        self.max_length, self.cache_bytes, self.reason = max_length, cache_bytes, reason
        batch, length = sequences.shape
        prompt = length - generated
        # tools that look for a batch that fits read " out of memory." in the one argument
        super().__init__(
            f"the run is out of memory. {generated} of at most {max_length - prompt} tokens were "
            f"generated for a batch of {batch} with prompts of {prompt} tokens: they are in "
            f"`error.sequences`. Keys and values of {max_length} slots take up to "
            f"{cache_bytes / 2**20:.4g} MiB. Use a smaller batch, shorter prompts or a smaller "
            f"`max_new_tokens`. The allocator said: {reason}"
        )

    def __reduce__(self) -> tuple[object, ...]:
        names = ("sequences", "generated", "max_length", "cache_bytes", "reason")
        return functools.partial(type(self), **{name: getattr(self, name) for name in names}), ()


def ran_out(error: BaseException) -> bool:
    """Whether an error says that memory could not be allocated."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def noting(emitted: list[Tensor], emit: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    """Return ``emit`` that also keeps every token, int64 ``[batch]``, in ``emitted``.

    The tokens exist anyway: noting them is no work for the device.
    """

    def both(tokens: Tensor) -> None:
        emitted.append(tokens)
        emit(tokens)

    return both


def handing_back(decoding: Callable[..., Any]) -> Callable[..., Any]:
    """Make a decoding method raise :class:`OutOfMemoryError` where memory runs out.

    The method finds a list for the tokens that it emits in ``own["emitted"]``.
    """

    @functools.wraps(decoding)
    def guarded(
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        *,
        own: dict[str, Any],
        **rest: Any,
    ) -> Any:
        emitted: list[Tensor] = []
        try:
            return decoding(
                model,
                input_ids,
                logits_processor,
                stopping_criteria,
                generation_config,
                own=own | {"emitted": emitted},
                **rest,
            )
        except (RuntimeError, MemoryError) as error:
            if not ran_out(error):
                raise
            slots = generation_config.max_length
            tokens = [input_ids, *(tokens[:, None] for tokens in emitted)]
            raise OutOfMemoryError(
                sequences=torch.cat([part.cpu() for part in tokens], dim=1),
                generated=len(emitted),
                max_length=slots,
                cache_bytes=cache_bytes(model, batch=input_ids.shape[0], slots=slots),
                reason=(str(error) or type(error).__name__).splitlines()[0],
            ) from error

    return guarded


def cache_bytes(model: PreTrainedModel, *, batch: int, slots: int) -> int:
    """Bytes of the keys and values of all layers; less where they have windows."""
    config = model.config
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    values = 2 * config.num_hidden_layers * batch * key_heads * width * slots
    return int(values) * model.dtype.itemsize
