"""``generate``: text under a policy, as a verb and as transformers' ``custom_generate``."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation import GenerationMode
from transformers.generation.streamers import BaseStreamer

from adaptive._choose import AbstractNoise, Chooser, KeyedNoise, StreamNoise
from adaptive._costs import Costs
from adaptive._decode import Job, Record, decode
from adaptive._draft_length import DraftLength
from adaptive._executor import AbstractExecutor
from adaptive._exits import Exits, require_exits
from adaptive._families import family_of
from adaptive._graphs import Capture
from adaptive._memory import handing_back, noting
from adaptive._monitor import Monitor
from adaptive._monitor_records import Watched
from adaptive._monitor_units import Watch, begin_watch, finish_watch
from adaptive._output import AdaptiveOutput
from adaptive._settings import (
    certificate_mismatches,
    check_processors,
    check_stages,
    decoding_settings,
)
from adaptive._speculation import SpeculationMode
from adaptive._stacking import device_stack_for, inbox, needed_costs, stack_for
from adaptive._tier import Tier, executor_for
from adaptive._verify import decode_verified
from adaptive.calibration import (
    Certificate,
    CertificateMismatchError,
    InvalidArgumentError,
    InvalidTypeError,
    UnsupportedError,
)
from adaptive.policies import Policy

RandomMode = Literal["generate", "keyed"]
_NO_ASSISTANT = (
    "`assistant_model` is not supported under a policy "
    "(mode='verify' speculates with the model itself)"
)
#: Keyword arguments that transformers passes to every decoding method and that change nothing here.
_IGNORED = frozenset(
    {"logits_to_keep", "use_cache", "synced_gpus", "output_attentions", "output_hidden_states"}
)


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    input_ids: Tensor | None = None,
    logits_processor: LogitsProcessorList | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    generation_config: GenerationConfig | None = None,
    *,
    policy: Policy,
    monitor: Monitor | None = None,
    streamer: BaseStreamer | None = None,
    certified: bool = True,
    random: RandomMode = "generate",
    units: Tensor | None = None,
    seed: int = 0,
    speculation: SpeculationMode = "coupled",
    resumed: Tensor | None = None,
    max_pending: int | None = None,
    tier: Tier | None = None,
    capture: Capture | None = None,
    **model_kwargs: Any,
) -> AdaptiveOutput | Tensor:
    """Generate text under a policy.

    Call it as ``generate(model, **inputs, policy=policy, ...)``, or pass it to transformers:
    ``model.generate(**inputs, custom_generate=generate, policy=policy)``. Everything that
    ``model.generate`` takes for greedy decoding and sampling means here what it means there;
    what is not supported (beams, assisted decoding, input embeddings, a filled cache, attentions
    and hidden states in the output) raises and is named.

    Parameters
    ----------
    model : PreTrainedModel
        A causal language model with exits (see :func:`attach_exits`).
    input_ids : Tensor, int64 [batch, prompt]
        Prompts, padded on the left, with ``attention_mask`` where there is padding.
    logits_processor, stopping_criteria, generation_config
        As in ``model.generate``. Processors must be functions of their arguments.
    policy : Policy
        When to stop, and what becomes of skipped layers (its ``mode``).
    monitor : Monitor, optional
        Watches the policy's promise: it may run a safer member or full depth instead, labels units
        as planned, and is told what became of them. Every row is a unit.
    streamer : BaseStreamer, optional
        Receives final tokens only; in ``verify`` mode, confirmed ones.
    certified : bool
        ``True`` refuses to run outside what the policy's certificate was earned under. ``False``
        goes on, and the output says that the certificate does not apply.
    random : {"generate", "keyed"}
        How sampling draws: from torch's global generator as ``model.generate`` does (same seed,
        same tokens), or keyed by (``seed``, ``units``, token index), so that a row never depends
        on the batch around it.
    units : Tensor, int64 [batch], optional
        Number of each row's unit for ``random="keyed"``; 0, 1, 2, ... if not given.
    seed : int
        Seed for ``random="keyed"``.
    speculation : {"coupled", "rejection"}
        How sampling in ``verify`` mode draws drafts and accepts them. ``"coupled"``: draft and
        full model draw with the same noise, and a draft stays if they draw the same token. The
        text is the very text of ``model.generate`` under the same seed, which is why it is the
        default. ``"rejection"``: a draft ``x`` drawn from the exit's distribution ``q`` stays
        with probability ``min(1, p(x) / q(x))``, else a token is drawn from ``max(p - q, 0)``
        [1]_ [2]_. The text follows the full model's distribution ``p`` but is another draw than
        that of ``model.generate``; more drafts stay, ``1 - d`` of them at total variation
        distance ``d``, where same noise promises ``(1 - d) / (1 + d)`` [3]_.
    resumed : Tensor, int64 [batch], optional
        Goes on with begun texts: how many tokens at the end of each prompt are the run's own. The
        policy then decides about every new token, at the position it has in the whole text. For
        greedy decoding without processors in ``exact`` mode, and rules without memory.
    max_pending : int, optional
        Most tokens of a row that may wait for deeper layers. Changes time, never tokens. At
        least 1. By default it comes from what layers take on this machine for several tokens at
        once, which is measured once per model (about a second), and in ``verify`` mode also from
        how many drafts are accepted.
    tier : {"native", "generic"}, optional
        Force how layers are run; ``None`` chooses.
    capture : {"step", "segments", "none"}, optional
        Run a token's way in fixed shapes, with decisions that stay on the device: as one CUDA graph
        (``"step"``, for torch from 2.12 on), as one CUDA graph per segment with one flag read at
        each boundary (``"segments"``), or the same operators uncaptured, on any device
        (``"none"``). Native tier, ``exact`` and ``propagate`` mode. ``None`` lets the host decide
        segment by segment.
    **model_kwargs
        Model inputs and generation settings, as for ``model.generate``. A ``tokenizer`` given to
        the verb is compared with the certificate's. (``stop_strings`` needs
        this door: ``model.generate`` hides the tokenizer from decoding methods and then asks for
        it. There, pass a ``StopStringCriteria`` among the ``stopping_criteria``.)

    Returns
    -------
    Tensor or AdaptiveOutput
        Sequences ``[batch, prompt + generated]``; with ``return_dict_in_generate=True`` an
        :class:`AdaptiveOutput`, which settles the run so that its cache is the full model's and
        (in ``exact`` and ``verify`` mode) every token is compared with the full model's choice.

    Raises
    ------
    CertificateMismatchError
        If ``certified`` and the certificate does not apply; the message says why.
    UnsupportedError
        If a feature is not supported; the message names it.
    NoExitsError
        If the model has no exits.
    torch.OutOfMemoryError
        If memory runs out. What was generated so far is in its ``sequences`` (int64 ``[batch,
        prompt + generated]``, on the CPU), and the message says what was asked for.

    References
    ----------
    .. [1] Leviathan, Kalman and Matias, "Fast inference from transformers via speculative
           decoding", ICML 2023, algorithm 1. https://arxiv.org/abs/2211.17192
    .. [2] Chen, Borgeaud, Irving, Lespiau, Sifre and Jumper, "Accelerating large language model
           decoding with speculative sampling", 2023, algorithm 2.
           https://arxiv.org/abs/2302.01318
    .. [3] Daliri, Musco and Suresh, "Coupling without communication and drafter-invariant
           speculative decoding", 2024. https://arxiv.org/abs/2408.07978
    """
    if not isinstance(policy, Policy):
        raise InvalidTypeError("policy", policy, "a Policy")
    if random not in get_args(RandomMode):
        raise InvalidArgumentError("random", random, "'generate' or 'keyed'")
    if speculation not in get_args(SpeculationMode):
        raise InvalidArgumentError("speculation", speculation, "'coupled' or 'rejection'")
    if speculation == "rejection" and policy.mode != "verify":
        raise InvalidArgumentError(
            "speculation", speculation, f"'coupled': a policy in {policy.mode!r} mode has no drafts"
        )
    _check_ids(input_ids, model_kwargs.get("attention_mask"))
    if monitor is not None and resumed is not None:
        raise InvalidArgumentError("resumed", "begun texts", "None: a monitor watches whole units")
    if max_pending is not None and max_pending < 1:
        raise InvalidArgumentError("max_pending", max_pending, "an integer >= 1")
    if capture is not None:
        _check_capture(capture, monitor, resumed)
    own = {
        "policy": policy,
        "monitor": monitor,
        "certified": certified,
        "random": random,
        "units": units,
        "seed": seed,
        "speculation": speculation,
        "resumed": resumed,
        "max_pending": max_pending,
        "tier": tier,
        "capture": capture,
    }
    family_of(model)
    if model_kwargs.get("assistant_model") is not None:
        raise UnsupportedError(_NO_ASSISTANT)
    if not hasattr(generation_config, "_pad_token_tensor"):
        # the verb: let transformers prepare the inputs, then come back as its decoding method
        method = functools.partial(
            _prepared, own=own, streamer=streamer, tokenizer=model_kwargs.get("tokenizer")
        )
        stopping_criteria = _with_stop_strings(stopping_criteria, model_kwargs)
        prepared: AdaptiveOutput | Tensor = model.generate(
            input_ids,
            generation_config=generation_config,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            streamer=streamer,
            custom_generate=method,
            **model_kwargs,
        )
        return prepared
    assert input_ids is not None
    outer = _transformers_frame()
    if outer.get("assistant_model") is not None:
        raise UnsupportedError(_NO_ASSISTANT)
    return _prepared(
        model,
        input_ids,
        logits_processor,
        stopping_criteria,
        generation_config,
        own=own,
        streamer=streamer or outer.get("streamer"),
        tokenizer=model_kwargs.pop("tokenizer", None),
        **model_kwargs,
    )


def _check_ids(input_ids: Tensor | None, mask: Tensor | None) -> None:
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


def _check_capture(capture: Capture, monitor: Monitor | None, resumed: Tensor | None) -> None:
    if capture not in get_args(Capture):
        raise InvalidArgumentError(
            "capture", capture, f"None or one of {', '.join(map(repr, get_args(Capture)))}"
        )
    for name, value in (("monitor", monitor), ("resumed", resumed)):
        if value is not None:
            raise UnsupportedError(f"`{name}` is not supported together with `capture`")


def _with_stop_strings(
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


def _transformers_frame() -> dict[str, Any]:
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


@handing_back
def _prepared(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    *,
    own: dict[str, Any],
    streamer: BaseStreamer | None,
    tokenizer: PreTrainedTokenizerBase | None,
    **model_kwargs: Any,
) -> AdaptiveOutput | Tensor:
    """Decode what transformers' ``generate`` has prepared."""
    policy: Policy = own["policy"]
    exits = require_exits(model)
    padding, positions = _inputs(model, input_ids, generation_config, model_kwargs)
    check_stages(policy, exits)
    check_processors(logits_processor)
    if own["speculation"] == "rejection" and not generation_config.do_sample:
        raise InvalidArgumentError(
            "speculation", "rejection", "'coupled' with greedy decoding: it draws nothing"
        )
    new_tokens = generation_config.max_length - input_ids.shape[1]
    settings = decoding_settings(model, generation_config, logits_processor, new_tokens=new_tokens)
    mismatches = certificate_mismatches(
        policy, model, exits, settings, batch_size=input_ids.shape[0], tokenizer=tokenizer
    )
    if mismatches and own["certified"]:
        raise CertificateMismatchError(
            f"the policy's certificate does not apply here: {'; '.join(mismatches)}. "
            "Calibrate for these settings, or "
            "pass `certified=False` to go on without the certificate"
        )
    monitor: Monitor | None = own["monitor"]
    watch = None
    if monitor is not None:
        watch = begin_watch(monitor, policy, exits, rows=input_ids.shape[0])
    executor = executor_for(model, tier=own["tier"])
    costs = needed_costs(
        model,
        executor,
        policy.mode,
        rows=input_ids.shape[0],
        max_pending=own["max_pending"],
        tier=own["tier"],
    )
    executor.begin(
        batch_size=input_ids.shape[0],
        max_length=generation_config.max_length,
        padding=padding,
        positions=positions,
    )
    try:
        job = _job(
            model,
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config,
            own,
            streamer,
            exits,
            executor,
            costs,
        )
        if watch is not None:
            job = _watched(job, watch)
        record = decode_verified(job) if policy.mode == "verify" else decode(job)
        if streamer is not None:
            streamer.end()
        units: tuple[Watched, ...] | None = None
        if watch is not None:
            units = finish_watch(
                watch,
                model,
                job,
                record,
                padding=padding,
                covered=not mismatches,
                tier=own["tier"],
            )
        if not generation_config.return_dict_in_generate:
            return record.ids[:, : record.length]
        output = _output(job, record, policy.certificate, mismatches)
        return output if units is None else _marked(output, units)
    finally:
        executor.end()


def _inputs(
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


def _job(
    model: PreTrainedModel,
    input_ids: Tensor,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
    own: dict[str, Any],
    streamer: BaseStreamer | None,
    exits: Exits,
    executor: AbstractExecutor,
    costs: Costs | None,
) -> Job:
    policy: Policy = own["policy"]
    rows = input_ids.shape[0]
    most = own["max_pending"] or inbox(policy.mode, costs)
    pad = config._pad_token_tensor
    eos = config._eos_token_tensor
    has_eos = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
    put: Callable[[Tensor], None] = (
        _drop if streamer is None else lambda tokens: streamer.put(tokens.cpu())
    )
    put = noting(own["emitted"], put)
    details = bool(config.return_dict_in_generate)
    keys = _unit_keys(own, input_ids).to(input_ids.device)
    capture: Capture | None = own["capture"]
    if capture is None:
        stack = stack_for(executor, exits, policy.mode, costs, rows=rows, most=most)
    else:
        if policy.mode == "exact" and own["max_pending"] is None:
            most = max(1, most // rows)  # a window has its slots in every row
        stack = device_stack_for(
            executor, exits, policy, keys=keys, seed=own["seed"], most=most, capture=capture
        )
    return Job(
        policy=policy,
        exits=exits,
        stack=stack,
        chooser=Chooser(processors, _noise(config, own, input_ids)),
        criteria=criteria,
        prompt=input_ids,
        max_length=config.max_length,
        pad=0 if pad is None else int(pad),
        ends=torch.empty(0, dtype=torch.int64)
        if eos is None or not has_eos
        else eos.flatten().to(input_ids.device),
        has_eos=has_eos,
        emit=put,
        max_pending=most,
        draft_length=None
        if costs is None or policy.mode != "verify"
        else DraftLength(costs, layers=executor.layers, rows=rows, most=most),
        speculation=own["speculation"],
        labels=details,
        keep_scores=details and bool(config.output_scores),
        keep_logits=details and bool(config.output_logits),
        keys=keys,
        seed=own["seed"],
        resumed=_resumed(own, config, processors, input_ids),
    )


def _watched(job: Job, watch: Watch) -> Job:
    """Run what a monitor has planned, and keep what it wants to see."""
    return dataclasses.replace(
        job,
        policy=watch.policy,
        label_later=watch.audits,
        interrupt=watch.interrupt,
        seen=None if watch.shadow is None else [[] for _ in job.exits.layers],
    )


def _marked(output: AdaptiveOutput, units: tuple[Watched, ...]) -> AdaptiveOutput:
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


def _drop(tokens: Tensor) -> None:
    """No streamer: tokens go nowhere."""


def _noise(
    config: GenerationConfig, own: dict[str, Any], input_ids: Tensor
) -> AbstractNoise | None:
    if not config.do_sample:
        return None
    if own["random"] == "generate":
        return StreamNoise()
    return KeyedNoise(_unit_keys(own, input_ids), own["seed"])


def _unit_keys(own: dict[str, Any], input_ids: Tensor) -> Tensor:
    """Return the number of each row's unit, int64 ``[batch]``."""
    batch = input_ids.shape[0]
    units = torch.arange(batch) if own["units"] is None else torch.as_tensor(own["units"])
    if units.shape != (batch,):
        raise InvalidArgumentError(
            "units", tuple(units.shape), f"one number per row, shape ({batch},)"
        )
    return units.to(torch.int64)


def _resumed(
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


def _output(
    job: Job, record: Record, certificate: Certificate | None, mismatches: tuple[str, ...]
) -> AdaptiveOutput:
    generated = record.generated
    stages = record.stages[:, :generated]
    return AdaptiveOutput(
        sequences=record.ids[:, : record.length],
        scores=tuple(record.scores) if job.keep_scores else None,
        logits=tuple(record.logits) if job.keep_logits else None,
        past_key_values=_cache(job),
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


def _cache(job: Job) -> DynamicCache:
    """Hand over keys and values in transformers' form, every layer at the same length."""
    cache = DynamicCache()
    for layer in range(job.stack.executor.layers):
        keys, values = job.stack.executor.keys_values(layer)
        cache.update(keys, values, layer)
    return cache
