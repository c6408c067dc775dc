"""``generate``: text under a policy, as a verb and as transformers' ``custom_generate``."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from adaptive._choose import AbstractNoise, Chooser, KeyedNoise, StreamNoise
from adaptive._costs import Costs
from adaptive._decode import Job, decode
from adaptive._device_stack import DeviceStack
from adaptive._draft_length import DraftLength
from adaptive._executor import AbstractExecutor
from adaptive._exits import Exits, require_exits
from adaptive._families import family_of
from adaptive._fingerprint import version_of
from adaptive._graphs import Capture
from adaptive._memory import handing_back, noting
from adaptive._monitor import Monitor
from adaptive._monitor_records import Watched
from adaptive._monitor_units import Watch, begin_watch, finish_watch
from adaptive._native import NativeExecutor
from adaptive._output import AdaptiveOutput, marked, output_of
from adaptive._request import (
    check_capture,
    check_inputs,
    padding_and_positions,
    resumed_counts,
    row_keys,
    transformers_frame,
    with_stop_strings,
)
from adaptive._reuse import Plan, keep, stretched, surroundings, take
from adaptive._settings import (
    certificate_mismatches,
    check_processors,
    check_stages,
    decoding_settings,
)
from adaptive._speculation import SpeculationMode
from adaptive._stack import AbstractStack
from adaptive._stacking import device_stack_for, goes_apart, inbox, needed_costs, stack_for
from adaptive._tier import Tier, executor_for
from adaptive._verify import decode_verified
from adaptive.calibration import (
    CertificateMismatchError,
    InvalidArgumentError,
    InvalidTypeError,
    UnsupportedError,
)
from adaptive.calibration._validation import check_count, check_seed
from adaptive.policies import Policy

RandomMode = Literal["generate", "keyed"]
_NO_ASSISTANT = (
    "`assistant_model` is not supported under a policy "
    "(mode='verify' speculates with the model itself)"
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
    compiled: bool = False,
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
        Prompts, padded on the left, with ``attention_mask`` where there is padding; ``inputs`` is
        another name for them, as in ``model.generate``.
    logits_processor, stopping_criteria, generation_config
        As in ``model.generate``. Processors must be functions of their arguments.
    policy : Policy
        When to stop, and what becomes of skipped layers (its ``mode``).
    monitor : Monitor, optional
        Watches the policy's promise: it may run a safer member or full depth instead, labels units
        as planned, and is told what became of them. Every row is a unit. In fallback units run
        through the host's loop, whatever ``capture`` says.
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
        Seed for ``random="keyed"`` and for rules that draw at random, in [0, 2**64).
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
        (``"none"``). For the native tier. ``None`` lets the host decide
        segment by segment.
    compiled : bool
        Compile the parts of such a step with ``torch.compile``: what lies between the products is
        fused, and the check behind a segment with it. Alone it means ``capture="none"``. The first
        call takes a minute or more, and so does the first of another policy, number of rows
        or length; results differ by rounding.
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
    InvalidArgumentError, InvalidTypeError
        If an argument is out of range or of the wrong kind, or an input is on another device than
        the model; the message names it.
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
    seed = check_seed("seed", seed)
    if monitor is not None and resumed is not None:
        raise InvalidArgumentError("resumed", "begun texts", "None: a monitor watches whole units")
    if max_pending is not None:
        max_pending = check_count("max_pending", max_pending)
    if compiled and capture is None:
        capture = "none"
    if capture is not None:
        check_capture(capture, resumed)
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
        "compiled": compiled,
    }
    family_of(model)
    if input_ids is None:  # by its name in `model.generate`
        input_ids = model_kwargs.pop("inputs", None)
    elif "inputs" in model_kwargs:
        raise InvalidArgumentError("inputs", "a second prompt", "none where `input_ids` is given")
    check_inputs(model, input_ids, model_kwargs)
    if model_kwargs.get("assistant_model") is not None:
        raise UnsupportedError(_NO_ASSISTANT)
    if not hasattr(generation_config, "_pad_token_tensor"):
        # the verb: let transformers prepare the inputs, then come back as its decoding method
        method = functools.partial(
            _prepared, own=own, streamer=streamer, tokenizer=model_kwargs.get("tokenizer")
        )
        stopping_criteria = with_stop_strings(stopping_criteria, model_kwargs)
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
    outer = transformers_frame()
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
    padding, positions = padding_and_positions(model, input_ids, generation_config, model_kwargs)
    check_stages(policy, exits)
    check_processors(logits_processor)
    if own["speculation"] == "rejection" and not generation_config.do_sample:
        raise InvalidArgumentError(
            "speculation", "rejection", "'coupled' with greedy decoding: it draws nothing"
        )
    own = own | {
        "units": row_keys(own["units"], input_ids),
        "resumed": resumed_counts(own, generation_config, logits_processor, input_ids, padding),
    }
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
        if watch.shadow is not None:  # which looks at states that no captured step hands out
            own = own | {"capture": None}
    executor = executor_for(model, tier=own["tier"])
    costs = needed_costs(model, policy.mode, max_pending=own["max_pending"], tier=own["tier"])
    # a step in fixed shapes keeps its rows together
    rows = input_ids.shape[0]
    apart = own["capture"] is None and goes_apart(model, policy.mode, rows=rows, tier=own["tier"])
    most = _waiting(policy, own, costs, rows)
    plan, lasting = None, None
    slots, hidden = positions, padding
    if (
        own["capture"] in ("step", "segments")
        and watch is None
        and isinstance(executor, NativeExecutor)
    ):
        hidden, slots = stretched(padding, positions, limit=executor.longest)
        plan = Plan(
            policy,
            exits,
            tuple(parameter.data_ptr() for parameter in exits.parameters()),
            own["capture"],
            own["compiled"],
            batch=rows,
            length=slots.shape[1],
            most=most,
            seed=own["seed"],
            head=version_of(model.get_output_embeddings()),
            around=surroundings(input_ids.device),
        )
    kept = take(model, plan, executor, padding=hidden, positions=slots)
    if kept is not None:
        executor = kept.executor
    else:
        executor.begin(
            batch_size=rows,
            max_length=slots.shape[1],
            padding=hidden,
            positions=slots,
            # a captured step in `verify` mode has one draft more than `most`, and the newest token
            ahead=most + 2,
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
            apart=apart,
            most=most,
            kept=kept,
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
        if generation_config.return_dict_in_generate:
            output = output_of(job, record, policy.certificate, mismatches)
            return output if units is None else marked(output, units)
        lasting = plan
        return record.ids[:, : record.length]
    finally:
        # nothing lasts of a run that failed, or whose keys and values were handed out
        if lasting is not None and isinstance(job.stack, DeviceStack):
            keep(model, lasting, job.stack)
        else:
            executor.end()


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
    *,
    apart: bool,
    most: int,
    kept: DeviceStack | None,
) -> Job:
    policy: Policy = own["policy"]
    rows = input_ids.shape[0]
    pad = config._pad_token_tensor
    eos = config._eos_token_tensor
    has_eos = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
    put: Callable[[Tensor], None] = (
        _drop if streamer is None else lambda tokens: streamer.put(tokens.cpu())
    )
    put = noting(own["emitted"], put)
    details = bool(config.return_dict_in_generate)
    capture: Capture | None = own["capture"]
    stack: AbstractStack
    if capture is None:
        stack = stack_for(
            executor, exits, policy.mode, rows=rows, most=most, apart=apart, costs=costs
        )
    elif kept is not None:
        kept.go_on_with(own["units"])
        stack = kept
    else:
        stack = device_stack_for(
            executor,
            exits,
            policy,
            keys=own["units"],
            seed=own["seed"],
            most=most,
            capture=capture,
            compiled=own["compiled"],
        )
    return Job(
        policy=policy,
        exits=exits,
        stack=stack,
        chooser=Chooser(processors, _noise(config, own)),
        criteria=criteria,
        prompt=input_ids,
        max_length=config.max_length,
        pad=0 if pad is None else int(pad),
        ends=torch.empty(0, dtype=torch.int64)
        if eos is None or not has_eos
        else eos.flatten().to(input_ids.device),
        has_eos=has_eos,
        open_ended=any(_may_end(criterion, config.max_length) for criterion in criteria),
        emit=put,
        max_pending=most,
        draft_length=None
        if costs is None or policy.mode != "verify"
        else DraftLength(costs, layers=executor.layers, rows=rows, most=most),
        speculation=own["speculation"],
        labels=details,
        keep_scores=details and bool(config.output_scores),
        keep_logits=details and bool(config.output_logits),
        keys=own["units"],
        seed=own["seed"],
        resumed=own["resumed"],
    )


def _waiting(policy: Policy, own: dict[str, Any], costs: Costs | None, rows: int) -> int:
    """Most slots of a row that may wait."""
    most: int = own["max_pending"] or inbox(policy.mode, costs)
    if own["capture"] is not None and policy.mode == "exact" and own["max_pending"] is None:
        return max(1, most // rows)  # a window has its slots in every row
    return most


def _watched(job: Job, watch: Watch) -> Job:
    """Run what a monitor has planned, and keep what it wants to see."""
    return dataclasses.replace(
        job,
        policy=watch.policy,
        label_later=watch.audits,
        interrupt=watch.interrupt,
        seen=None if watch.shadow is None else [[] for _ in job.exits.layers],
    )


def _may_end(criterion: StoppingCriteria, max_length: int) -> bool:
    """Whether a criterion may end a text before it has ``max_length`` tokens."""
    counts = type(criterion) is MaxLengthCriteria
    return not counts or criterion.max_length < max_length


def _drop(tokens: Tensor) -> None:
    """No streamer: tokens go nowhere."""


def _noise(config: GenerationConfig, own: dict[str, Any]) -> AbstractNoise | None:
    if not config.do_sample:
        return None
    if own["random"] == "generate":
        return StreamNoise()
    return KeyedNoise(own["units"], own["seed"])
