"""What a GPU asks of the library, on a device that is none: tensors meet where they are."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import helpers
import numpy as np
import policy_table as table
import pytest
import second_device as stand_in
import torch
from encoders import some_inputs, tiny_encoder
from torch import Tensor, nn
from transformers import PreTrainedModel

import adaptive._costs
import adaptive._decode
import adaptive._timing
import adaptive._verify
from adaptive import (
    ExitTraining,
    InvalidArgumentError,
    Policy,
    attach_exits,
    calibrate,
    collect_trace,
    generate,
    predict,
    train_exits,
)
from adaptive._choose import StreamNoise
from adaptive._decode import walk
from adaptive._exits import require_exits
from adaptive.calibration import UniformAudits
from adaptive.classifiers import StageOutput, train_classifier_exits
from adaptive.monitoring import Monitor
from adaptive.policies import MaxProbability, Mode, Patience, ProbeScore, Threshold
from adaptive.policies import exit_stages as simulate

DEVICE = stand_in.DEVICE
CPU = torch.device("cpu")
NEW = 12
EOS = 5
TRAINING = ExitTraining(rank=2, steps=4, new_tokens=4, slots=200, batch_size=32)
SAMPLED = {"do_sample": True, "top_k": 20, "temperature": 0.9, "random": "keyed", "seed": 3}
modes = pytest.mark.parametrize("mode", ["exact", "propagate", "verify"])


@pytest.fixture(autouse=True)
def device() -> Iterator[stand_in.second_device]:
    with stand_in.second_device() as entered:
        yield entered


@cache
def moved(name: str) -> PreTrainedModel:
    """The model on the device, for tests that leave it as it is."""
    model = helpers.shared(name)
    twin = copy.deepcopy(model)
    twin.to(DEVICE)
    twin.tie_weights()  # which torch does not keep for tensors that are no plain ones
    attach_exits(twin, copy.deepcopy(require_exits(model)))
    return twin


def same(here: Any, there: Any) -> None:
    for name in ("sequences", "exit_stages", "agreement", "exit_scores"):
        mine, theirs = getattr(here, name), getattr(there, name)
        assert theirs.device == DEVICE
        if mine.is_floating_point():  # the CPU has products of its own for a few rows
            torch.testing.assert_close(mine, theirs.cpu(), equal_nan=True)
        else:
            assert torch.equal(mine, theirs.cpu()), name


# -- the stand-in ---------------------------------------------------------------------------------


def test_the_stand_in_refuses_to_mix_devices() -> None:
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(2, device=DEVICE) + torch.ones(2)
    with pytest.raises(TypeError, match="numpy"):
        np.asarray(torch.ones(2, device=DEVICE))
    assert (torch.ones(2, device=DEVICE) + torch.tensor(1.0)).tolist() == [2.0, 2.0]


def test_the_stand_in_counts_what_the_host_waits_for(device: stand_in.second_device) -> None:
    values = torch.zeros(3, device=DEVICE)
    assert not device.waits
    values[0] = 1.0  # a number of the host that is part of the call
    values[1:2].copy_(values[:1])
    assert not device.waits
    bool(values.any())
    values.cpu()
    values[torch.tensor([1, 2])] = torch.tensor([3.0, 4.0], device=DEVICE)
    torch.tensor([1, 2], device=DEVICE)
    counted = Counter(kind for kind, _ in device.waits.elements())
    assert counted == {"read": 2, "sent": 3}
    assert values.tolist() == [1.0, 3.0, 4.0]


# -- generating -----------------------------------------------------------------------------------

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "generic": {"tier": "generic"},
    "fixed shapes": {"capture": "none"},
    "sampled": SAMPLED,
    "ends": {"eos_token_id": EOS, "pad_token_id": 0, "repetition_penalty": 1.3},
    "scores": {"output_scores": True, "output_logits": True},
}


@modes
@pytest.mark.parametrize("way", WAYS)
def test_tokens_are_those_of_the_cpu(way: str, mode: str) -> None:
    model = helpers.shared("llama")
    policy = helpers.mixed(model, mode)
    ids, mask = helpers.prompts((9, 4, 7))
    settings = {"policy": policy, "max_new_tokens": NEW, "return_dict_in_generate": True}
    settings |= WAYS[way]
    here = generate(model, ids, attention_mask=mask, **settings)
    there = generate(moved("llama"), ids.to(DEVICE), attention_mask=mask.to(DEVICE), **settings)
    same(here, there)
    if way == "scores":
        for mine, theirs in zip(
            here.scores + here.logits, there.scores + there.logits, strict=True
        ):
            torch.testing.assert_close(mine, theirs.cpu())


@pytest.mark.parametrize("left", ["input_ids", "attention_mask"])
def test_inputs_elsewhere_are_refused(left: str) -> None:
    ids, mask = helpers.prompts((9, 4, 7))
    given = {"input_ids": ids.to(DEVICE), "attention_mask": mask.to(DEVICE)}
    given[left] = given[left].cpu()
    with pytest.raises(InvalidArgumentError, match=f"`{left}` must be on the model's device"):
        generate(moved("llama"), **given, policy=helpers.never("exact"), max_new_tokens=NEW)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("capture", [None, "none"])
@modes
def test_half_precision_on_the_device(mode: str, capture: Any, dtype: torch.dtype) -> None:
    model = helpers.tiny("llama", exits=False).to(dtype).to(DEVICE)
    attach_exits(model, helpers.EXITS)
    ids, mask = (tensor.to(DEVICE) for tensor in helpers.prompts((9, 4, 7)))
    given = {"attention_mask": mask, "max_new_tokens": NEW, "do_sample": False}
    plain = model.generate(ids, **given)
    ours = generate(model, ids, **given, policy=helpers.never(mode), capture=capture)
    # near-ties may fall either way in half precision
    assert float((plain == ours).float().mean()) > 0.9


def test_rejection_sampling_on_the_device() -> None:
    model = helpers.shared("llama")
    ids, mask = helpers.prompts((9, 4, 7))
    settings = SAMPLED | {"policy": helpers.mixed(model, "verify"), "speculation": "rejection"}
    settings |= {"max_new_tokens": NEW, "return_dict_in_generate": True}
    here = generate(model, ids, attention_mask=mask, **settings)
    there = generate(moved("llama"), ids.to(DEVICE), attention_mask=mask.to(DEVICE), **settings)
    same(here, there)


@pytest.mark.parametrize("capture", [None, "none"])
@pytest.mark.parametrize("name", ["llama-tied-biased", "gemma3", "gpt2", "opt", "gpt-neox"])
def test_families_on_the_device(name: str, capture: Any) -> None:
    model = helpers.shared(name)
    ids, mask = helpers.prompts((9, 4, 7))
    there = moved(name)
    for mode in ("exact", "propagate"):
        settings = {"policy": helpers.mixed(model, mode), "max_new_tokens": NEW}
        settings |= {"return_dict_in_generate": True, "capture": capture}
        here = generate(model, ids, attention_mask=mask, **settings)
        out = generate(there, ids.to(DEVICE), attention_mask=mask.to(DEVICE), **settings)
        same(here, out)


@pytest.mark.parametrize("capture", [None, "none"])
@pytest.mark.parametrize("mode", ["exact", "propagate"])
def test_a_monitor_on_the_device(mode: Mode, capture: Any) -> None:
    ids, mask = helpers.prompts((9, 4, 7))
    whole = helpers.shared("llama")
    policy = helpers.certified(whole, helpers.mixed(whole, mode), new_tokens=NEW)
    settings = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True}
    found = []
    for model, place in ((helpers.shared("llama"), CPU), (moved("llama"), DEVICE)):
        found.append(
            generate(
                model,
                ids.to(place),
                attention_mask=mask.to(place),
                policy=policy,
                monitor=Monitor.for_policy(policy, audits=UniformAudits(1.0)),
                capture=capture,
                **settings,
            )
        )
    here, there = found
    same(here, there)
    losses = [[unit.unit.loss for unit in out.monitored] for out in found]
    assert losses[0] == losses[1]
    assert there.certified is True


# -- what the host waits for ----------------------------------------------------------------------


@pytest.fixture
def walks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows with every way of newest tokens through the segments."""
    found: list[int] = []

    def counted(*given: Any) -> Any:
        found.append(1)
        return walk(*given)

    for module in (adaptive._decode, adaptive._verify):
        monkeypatch.setattr(module, "walk", counted)
    return found


def waits_per_walk(
    device: stand_in.second_device, walks: list[int], mode: str, rows: tuple[int, ...], **given: Any
) -> dict[tuple[str, str], float]:
    """What a longer run adds to what the host waits for, per way through the segments."""
    ids, mask = (tensor.to(DEVICE) for tensor in helpers.prompts(rows))
    given |= {"policy": helpers.mixed(helpers.shared("llama"), mode), "max_pending": 4}
    made, waits = [], []
    for new in (6, 6, 20):  # once to prepare the model
        device.waits.clear()
        walks.clear()
        generate(moved("llama"), ids, attention_mask=mask, max_new_tokens=new, **given)
        made.append(len(walks))
        waits.append(Counter(device.waits))
    more = waits[2].copy()
    more.subtract(waits[1])
    return {key: count / (made[2] - made[1]) for key, count in more.items() if count}


@pytest.mark.parametrize("rows", [(9,), (9, 4, 7)])
@pytest.mark.parametrize("capture", [None, "none"])
@modes
def test_the_host_reads_one_flag_per_boundary(
    mode: str,
    capture: Any,
    rows: tuple[int, ...],
    device: stand_in.second_device,
    walks: list[int],
) -> None:
    waits = waits_per_walk(device, walks, mode, rows, capture=capture)
    # in `verify` mode the host asks what was confirmed, and learns from it, per confirmation
    asked = sum(count for (_, line), count in waits.items() if line.startswith("_verify.py"))
    assert asked <= (2 if mode == "verify" else 0)
    # numbers that are sent from there take their turn on a GPU
    known = ("_verify.py", "_transfer.py")
    flags = {key: count for key, count in waits.items() if not key[1].startswith(known)}
    assert [kind for kind, _ in flags] == ["read"]
    assert 1.0 < sum(flags.values()) <= len(helpers.EXITS)
    if len(rows) == 1:
        assert not [line for _, line in waits if line.startswith("_transfer.py")]


def test_an_end_token_costs_one_more_read(device: stand_in.second_device, walks: list[int]) -> None:
    plain = waits_per_walk(device, walks, "exact", (9,))
    ends = waits_per_walk(device, walks, "exact", (9,), eos_token_id=96, pad_token_id=0)
    assert sum(ends.values()) == pytest.approx(sum(plain.values()) + 1)


# -- times and random numbers of any device --------------------------------------------------------


@pytest.mark.parametrize("seconds", [adaptive._costs.seconds_of, adaptive._timing.seconds])
def test_times_end_when_the_device_is_done(
    seconds: Callable[..., float], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[str] = []
    backend = torch.get_device_module(DEVICE)
    monkeypatch.setattr(backend, "synchronize", lambda device=None: found.append(str(device)))
    seconds(lambda: found.append("work"), DEVICE)
    assert found == [str(DEVICE), "work", str(DEVICE)]


def test_noise_is_drawn_anew_from_the_devices_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = torch.get_device_module(DEVICE)
    states = [torch.full((8,), count, dtype=torch.uint8) for count in range(3)]
    given = iter(states)
    taken: list[Tensor] = []
    monkeypatch.setattr(backend, "get_rng_state", lambda device=None: next(given))
    monkeypatch.setattr(backend, "set_rng_state", lambda state, device=None: taken.append(state))
    noise, like = StreamNoise(), torch.ones(1, 4, device=DEVICE)
    noise.at(0, like)
    noise.set_aside(1)
    noise.at(0, like)
    assert [int(state[0]) for state in taken] == [0, 1]
    noise.rewind(0)
    assert int(taken[-1][0]) == 0


# -- policies -------------------------------------------------------------------------------------


def _walk(policy: Policy, place: torch.device) -> list[Tensor]:
    state = policy.init(3, device=place)
    running = torch.tensor([True, True, False], device=place)
    found: list[Tensor] = []
    for token in (1, 2):
        for stage in range(table.N_EXITS):
            features = table.features_at(
                stage, 3, device=place, dtype=torch.float32, position=token, running=running
            )
            stop, score, state = policy.update(features, state)
            found += [stop, score]
        state = policy.advance(state)
    return found


_STAGES = tuple(range(table.N_EXITS))
_ALL = {row.name: Policy(ProbeScore(), row.rule, stages=_STAGES) for row in table.RULES} | {
    name: Policy(score, Threshold(-0.5), stages=_STAGES) for name, score in table.SCORES
}


@pytest.mark.parametrize("name", _ALL)
def test_policies_decide_on_the_device(name: str, device: stand_in.second_device) -> None:
    here = _walk(_ALL[name], CPU)
    there = _walk(_ALL[name], DEVICE)
    for mine, theirs in zip(here, there, strict=True):
        assert theirs.device == DEVICE
        torch.testing.assert_close(mine, theirs.cpu(), rtol=0, atol=0, equal_nan=True)


# -- training, traces, calibration ----------------------------------------------------------------


def _prompts(count: int, seed: int) -> list[list[int]]:
    return [row.tolist() for row in helpers.prompts((6,) * count, seed=seed)[0]]


def test_exits_are_trained_and_certified_on_the_device() -> None:
    found = []
    for place in ("cpu", DEVICE):
        model = helpers.tiny("llama", exits=False)
        exits = train_exits(
            model.to(place),
            _prompts(60, 1),
            layers=helpers.EXITS,
            training=TRAINING,
            progress=False,
        )
        trace = collect_trace(model, _prompts(12, 2), new_tokens=6, progress=False)
        policy = calibrate(
            model, _prompts(40, 3), 0.4, new_tokens=4, mode="exact", members=3, progress=False
        )
        assert policy.certificate is not None
        found.append((exits, trace, policy.certificate))
    (mine, here, promise), (theirs, there, other) = found
    for name, value in mine.named_parameters():
        given = dict(theirs.named_parameters())[name]
        assert given.device == DEVICE
        torch.testing.assert_close(value, given.cpu(), rtol=0.01, atol=0.01, msg=name)
    for name, losses in here.losses.items():
        assert np.array_equal(losses, there.losses[name])
    assert np.allclose(here.scores, there.scores, rtol=0.05, atol=0.05)
    assert (promise.n, promise.risk, promise.loss) == (other.n, other.risk, other.loss)


def test_exits_go_with_their_model() -> None:
    """Attached or trained on the CPU, before the model is moved."""
    model = helpers.tiny("llama", exits=False)
    train_exits(model, _prompts(60, 1), layers=helpers.EXITS, training=TRAINING, progress=False)
    policy = Policy(ProbeScore(), Threshold(-0.5), stages=(0, 1, 2))
    ids, mask = helpers.prompts((9, 4, 7))
    settings = {"policy": policy, "max_new_tokens": NEW, "return_dict_in_generate": True}
    here = generate(model, ids, attention_mask=mask, **settings)
    model.to(DEVICE)
    model.tie_weights()
    same(here, generate(model, ids.to(DEVICE), attention_mask=mask.to(DEVICE), **settings))
    encoder = tiny_encoder("bert")
    inputs = some_inputs(encoder, 40)
    train_classifier_exits(encoder, inputs, layers=(1, 2), progress=False)
    policy = Policy(MaxProbability(), Threshold(0.5), stages=(0, 1))
    stages = predict(encoder, inputs, policy=policy).exit_stages
    there = predict(encoder.to(DEVICE), inputs, policy=policy)
    assert torch.equal(there.exit_stages.cpu(), stages)


@pytest.fixture
def default_device() -> Iterator[None]:
    """Tensors that name no device are on the device, as ``torch.set_default_device`` asks."""
    torch.set_default_device(DEVICE)
    yield
    torch.set_default_device(None)


def test_the_device_may_be_torchs_default(default_device: None) -> None:
    """What is computed beside the model stays with the host."""
    model = helpers.tiny("llama", exits=False).to(DEVICE)
    train_exits(model, _prompts(20, 1), layers=helpers.EXITS, training=TRAINING, progress=False)
    given = {"new_tokens": 3, "members": 2, "progress": False}
    assert calibrate(model, _prompts(16, 3), 0.4, mode="exact", **given).certificate is not None
    trace = collect_trace(model, _prompts(4, 2), new_tokens=3, progress=False)
    assert simulate(Patience(2), trace).shape == (trace.n_tokens,)
    assert Patience(2).knobs(trace, size=8)
    staged = Staged()
    inputs, labels = torch.randn(60, 6), torch.arange(60) % 4
    assert calibrate(staged, (inputs, labels), 0.4, loss="excess_error", progress=False)


class Staged(nn.Module):
    """A few layers, each with a head."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.layers = nn.Parameter(torch.randn(3, 6, 6, generator=generator))
        self.heads = nn.Parameter(3 * torch.randn(3, 6, 4, generator=generator))

    def stages(self, x: Tensor) -> Iterator[Any]:
        for layer, head in zip(self.layers, self.heads, strict=True):
            x = torch.tanh(x @ layer)
            logits = x @ head
            keep = yield StageOutput(logits, x, logits[:, 0])
            x = x if keep is None else x[keep]

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.layers[0]) @ self.heads[0]


@pytest.mark.parametrize("data", [CPU, DEVICE], ids=["data of the host", "data of the device"])
def test_models_in_stages_on_the_device(data: torch.device) -> None:
    generator = torch.Generator().manual_seed(1)
    inputs, labels = torch.randn(120, 6, generator=generator), torch.arange(120) % 4
    policy = Policy(MaxProbability(), Threshold(0.8), stages=(0, 1))
    given = (inputs.to(data), labels.to(data))
    model = Staged()
    here = predict(model, inputs, policy=policy)
    promise = calibrate(model, (inputs, labels), 0.4, loss="excess_error", progress=False)
    model.to(DEVICE)
    there = predict(model, given[0], policy=policy)
    assert torch.equal(here.exit_stages, there.exit_stages.cpu())
    torch.testing.assert_close(here.logits, there.logits.cpu())
    other = calibrate(model, given, 0.4, loss="excess_error", progress=False)
    assert promise.certificate is not None
    assert other.certificate is not None
    assert promise.certificate.n == other.certificate.n
    # from small to large, on two devices
    both = predict([Staged(), model], given[0], policy=replace(policy, stages=(0,)))
    assert torch.equal(both.logits, predict([Staged(), Staged()], inputs).logits)


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_classifiers_on_the_device(name: str) -> None:
    found = []
    for place in ("cpu", DEVICE):
        model = tiny_encoder(name).to(place)
        inputs = some_inputs(model, 90)
        train_classifier_exits(model, some_inputs(model, 80, seed=4), layers=(1, 2), progress=False)
        policy = calibrate(model, inputs, 0.3, progress=False)
        found.append((policy, predict(model, inputs, policy=policy, certified=False)))
    (_, here), (_, there) = found
    assert here.logits.shape == there.logits.shape
