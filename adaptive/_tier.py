"""How to run a model: the native tier where a self-check allows it, else the generic one."""

from __future__ import annotations

import copy
import logging
import math
import weakref
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from adaptive._executor import AbstractExecutor
from adaptive._families._rope import room_for
from adaptive._generic import GenericExecutor
from adaptive._locks import lock_of
from adaptive._memory import ran_out
from adaptive._native import NativeExecutor, why_not_native
from adaptive._packing import Contents, contents
from adaptive.calibration import InvalidArgumentError, UnsupportedError

Tier = Literal["native", "generic"]
_log = logging.getLogger(__name__)
#: Tokens of the text on which a tier is compared with the model, and of those that wait in it.
_CHECKED, _LATE = 6, 2
_native: weakref.WeakKeyDictionary[PreTrainedModel, NativeExecutor] = weakref.WeakKeyDictionary()
#: Models whose layers were seen to give its own logits, as they were then.
_replayed: weakref.WeakKeyDictionary[PreTrainedModel, Contents] = weakref.WeakKeyDictionary()
#: Why the self-check of a model failed.
_differing: weakref.WeakKeyDictionary[PreTrainedModel, str] = weakref.WeakKeyDictionary()


def executor_for(model: PreTrainedModel, *, tier: Tier | None = None) -> AbstractExecutor:
    """Return an executor for a model.

    Parameters
    ----------
    model : PreTrainedModel
    tier : {"native", "generic"}, optional
        ``None`` takes the native tier if the family has one and its logits on a short text equal
        the model's own, else the generic tier, whose logits must be the model's own too (both
        checked once per model). Under ``torch.autocast`` it is the generic tier too.

    Raises
    ------
    InvalidArgumentError
        If ``tier`` is none of the above, or the model would drop out units.
    UnsupportedError
        If the family is unknown, ``tier="native"`` is asked for and not possible, or the layers,
        called one after the other, do not give the model's own logits.
    """
    if tier not in (None, "native", "generic"):
        raise InvalidArgumentError("tier", tier, "'native', 'generic' or None")
    if model.training and _drops_out(model):
        raise InvalidArgumentError(
            "model", "a model in training mode with dropout", "`model.eval()` before it is run"
        )
    if tier == "generic":
        return _replaying(model)
    if torch.is_autocast_enabled(model.device.type):  # the model's own modules know what to cast
        return _without_native(model, tier, "under `torch.autocast`")
    with lock_of(model):  # packing is for one thread, and what another records looks like a hook
        executor = _native.get(model)
        if executor is None or executor.stale(model):
            _native.pop(model, None)
            reason = why_not_native(model) or _self_check(model)
            if reason is not None:
                return _without_native(model, tier, reason)
        return copy.copy(_native[model])  # packed weights are shared, keys and values are not


def _without_native(model: PreTrainedModel, tier: Tier | None, reason: str) -> AbstractExecutor:
    if tier == "native":
        raise UnsupportedError(f"`tier='native'` is not possible: {reason}")
    return _replaying(model)


def forget(model: PreTrainedModel) -> None:
    """Drop what is kept for a model."""
    with lock_of(model):
        _native.pop(model, None)
        _differing.pop(model, None)
        _replayed.pop(model, None)


def _drops_out(model: PreTrainedModel) -> bool:
    """Whether two passes over the same text could differ in training mode."""
    rates = [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
    rates += [getattr(model.config, name, 0.0) or 0.0 for name in ("attention_dropout", "dropout")]
    return any(rate > 0 for rate in rates)


@torch.inference_mode(False)  # what is packed then would be lost for training
@torch.no_grad()
def _self_check(model: PreTrainedModel) -> str | None:
    """Build the native executor and keep it if its logits are the model's own; else say why not."""
    if model in _differing:
        return _differing[model]
    tokens = _short_text(model)
    theirs = model(input_ids=tokens, use_cache=False).logits[:, -1]
    try:
        executor = NativeExecutor(model)
        ours = _last_logits(executor, tokens)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if ran_out(error):  # which says nothing about the model
            raise
        # another release of transformers may build the family's models otherwise
        reason = f"its parts are not as the family describes them ({error})"
    else:
        if _close(ours, theirs):
            _native[model] = executor
            return None
        reason = "its logits differ from the model's own on a short text"
    _differing[model] = reason
    _log.warning("the native tier is off for %s: %s", type(model).__name__, reason)
    return reason


def _replaying(model: PreTrainedModel) -> GenericExecutor:
    """Return the generic executor if its logits are the model's own."""
    executor = GenericExecutor(model)
    with lock_of(model):
        found = contents(model)
        if _replayed.get(model) != found:
            _check_replay(model, executor)
            _replayed[model] = found
    return executor


@torch.no_grad()
def _check_replay(model: PreTrainedModel, executor: GenericExecutor) -> None:
    """Refuse layers that do more than take a state and keep keys and values of it.

    Some hand each other more than the state, keep a state of their own, or are told the tokens:
    what a waiting token is told is not what the model would tell it.
    """
    tokens = _short_text(model)
    theirs = model(input_ids=tokens, use_cache=False).logits[:, -_LATE:]
    try:
        ours = _late_logits(executor, tokens)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if ran_out(error):
            raise
        reason = f"calling them one after the other fails ({' '.join(str(error).split())})"
    else:
        if _close(ours, theirs):
            return
        reason = (
            "tokens that wait and are gone on with together do not get the model's own logits "
            "(its layers hand each other more than the state, look ahead, or round by what else is "
            "in the pass)"
        )
    raise UnsupportedError(
        f"exits are not possible on this {type(model).__name__} (family "
        f"{model.config.model_type!r}), whose layers must be left and gone on with: {reason}"
    )


def _short_text(model: PreTrainedModel) -> Tensor:
    """Tokens ``[1, n]`` on which a tier is compared with the model."""
    count = room_for(model, _CHECKED)
    return torch.arange(1, count + 1, device=model.device)[None] % model.config.vocab_size


def _late_logits(executor: GenericExecutor, tokens: Tensor) -> Tensor:
    """Logits ``[1, n, vocabulary]`` behind the last tokens, which wait for the deeper layers."""
    length = tokens.shape[1]
    late, half = min(_LATE, length), (executor.layers + 1) // 2
    start = length - late
    positions = torch.arange(length, device=tokens.device)[None]
    executor.begin(batch_size=1, max_length=length, padding=None, positions=positions)
    try:
        if start:
            executor.run(0, executor.layers, executor.embed(tokens[:, :start], 0), 0)
        waiting = []
        for slot in range(start, length):
            hidden = executor.embed(tokens[:, slot : slot + 1], slot)
            waiting.append(executor.run(0, half, hidden, slot))
        hidden = executor.run(half, executor.layers, torch.cat(waiting, dim=1), start)
        return executor.readout(hidden)
    finally:
        executor.end()


def _last_logits(executor: NativeExecutor, tokens: Tensor) -> Tensor:
    """Logits ``[1, vocabulary]`` behind ``tokens [1, n]``: a prompt and one token more."""
    length = tokens.shape[1]
    positions = torch.arange(length, device=tokens.device)[None]
    executor.begin(batch_size=1, max_length=length, padding=None, positions=positions)
    hidden = executor.embed(tokens[:, :-1], 0)
    executor.run(0, executor.layers, hidden, 0)
    hidden = executor.embed(tokens[:, -1:], length - 1)
    hidden = executor.run(0, executor.layers, hidden, length - 1)
    executor.end()
    return executor.readout(hidden)[:, -1]


def _close(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two logit tensors agree to the rounding of their dtype."""
    tolerance = {torch.float64: 1e-9, torch.float32: 2e-4, torch.float16: 2e-2}.get(
        theirs.dtype, 8e-2
    )
    difference = (ours.float() - theirs.float()).abs().max().item()
    return math.isfinite(difference) and difference <= tolerance * (
        1 + theirs.float().abs().max().item()
    )
