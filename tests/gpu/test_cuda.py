"""The runtime on CUDA: what the CPU tests prove, on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers import mixed, never, prompts, tiny
from torch import Tensor

from adaptive import Policy, UnsupportedError, attach_exits, generate
from adaptive._device_stack import DeviceStack
from adaptive._exits import require_exits
from adaptive._transfer import sent
from adaptive.policies import Features, FixedStage, NoScore, State

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
NEW = 12


@pytest.mark.parametrize("mode", ["exact", "propagate", "verify"])
@pytest.mark.parametrize("tier", ["native", "generic"])
def test_tokens_are_those_of_the_cpu_in_float32(mode: str, tier: str) -> None:
    model = tiny("llama")
    ids, mask = prompts()
    policy = mixed(model, mode)
    settings = {"policy": policy, "tier": tier, "max_new_tokens": NEW, "do_sample": False}
    here = generate(model, ids, attention_mask=mask, **settings)
    exits = require_exits(model)
    model.to("cuda")
    attach_exits(model, exits)
    there = generate(model, ids.cuda(), attention_mask=mask.cuda(), **settings)
    assert torch.equal(here, there.cpu())


@pytest.mark.parametrize("capture", ["none", "segments", "step"])
@pytest.mark.parametrize("mode", ["exact", "propagate", "verify"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt-neox", "qwen2-window"])
def test_a_captured_step_is_the_hosts(name: str, mode: str, capture: Any) -> None:
    model = tiny(name)
    policy = mixed(model, mode)
    exits = require_exits(model)
    model.to("cuda")
    attach_exits(model, exits)
    ids, mask = (tensor.cuda() for tensor in prompts((9, 4, 7)))
    settings = {
        "attention_mask": mask,
        "policy": policy,
        "max_new_tokens": 3 * NEW,
        "max_pending": 5,
        "return_dict_in_generate": True,
    }
    theirs = generate(model, ids, **settings)
    ours = generate(model, ids, capture=capture, **settings)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert torch.equal(ours.exit_stages, theirs.exit_stages)
    assert torch.equal(ours.agreement, theirs.agreement)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("capture", [None, "none", "segments", "step"])
def test_a_model_on_another_device_than_the_current_one(capture: Any) -> None:
    model = tiny("llama")
    policy, exits = mixed(model, "exact"), require_exits(model)
    ids, mask = prompts((9, 4, 7))
    settings = {"policy": policy, "max_new_tokens": NEW, "do_sample": False}
    here = generate(model, ids, attention_mask=mask, **settings)
    model.to("cuda:1")
    attach_exits(model, exits)
    given = {"attention_mask": mask.to("cuda:1"), "capture": capture}
    there = generate(model, ids.to("cuda:1"), **given, **settings)
    assert torch.equal(here, there.cpu())
    assert torch.cuda.current_device() == 0


@dataclass(frozen=True)
class Asking(FixedStage):
    """Reads a score on the host."""

    def decide(self, features: Features, score: Tensor, state: State) -> tuple[Tensor, State]:
        bool((score > 0).any())
        return super().decide(features, score, state)


@pytest.mark.parametrize("capture", ["segments", "step"])
def test_a_policy_that_cannot_be_captured_spoils_no_capture(capture: Any) -> None:
    model = tiny("llama").cuda()
    attach_exits(model, (1, 2, 4))
    ids = prompts((6,))[0].cuda()
    settings = {"max_new_tokens": NEW, "capture": capture}
    asking = Policy(NoScore(), Asking(0), stages=(0, 1))
    with pytest.raises(UnsupportedError, match="not permitted"):
        generate(model, ids, policy=asking, **settings)
    found = generate(model, ids, policy=never("exact"), **settings)
    plain = model.generate(ids, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(found, plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_never_stopping_equals_generate_in_half_precision(dtype: torch.dtype) -> None:
    model = tiny("llama").to(device="cuda", dtype=dtype)
    attach_exits(model, (1, 2, 4))
    ids, mask = (tensor.cuda() for tensor in prompts())
    plain = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    ours = generate(
        model,
        ids,
        attention_mask=mask,
        policy=never("exact"),
        max_new_tokens=NEW,
        do_sample=False,
    )
    # near-ties may fall either way in half precision: most tokens, not all, must be equal
    assert float((plain == ours).float().mean()) > 0.9


@pytest.fixture
def no_waiting() -> Iterator[Callable[[bool], None]]:
    """Switch torch's own alarm on and off: what makes the host wait for the device then raises."""
    yield lambda on: torch.cuda.set_sync_debug_mode("error" if on else "default")
    torch.cuda.set_sync_debug_mode("default")


def test_numbers_are_sent_without_waiting(no_waiting: Callable[[bool], None]) -> None:
    device = torch.device("cuda")
    no_waiting(True)
    found = sent([3, 1, 2], device)
    none = sent([], device)
    no_waiting(False)
    assert found.tolist() == [3, 1, 2]
    assert none.shape == (0,)


@pytest.mark.parametrize("mode", ["exact", "propagate"])
def test_a_step_as_one_graph_waits_for_nothing(
    mode: str, no_waiting: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama")
    policy = mixed(model, mode)
    exits = require_exits(model)
    model.to("cuda")
    attach_exits(model, exits)
    ids, mask = (tensor.cuda() for tensor in prompts((9, 4, 7)))
    plain, steps = DeviceStack.step, []

    def strict(stack: DeviceStack, *given: Tensor) -> None:
        no_waiting(bool(steps))  # the first one captures
        plain(stack, *given)
        steps.append(1)
        if len(steps) == NEW - 1:  # until then, what lies between two steps is watched as well
            no_waiting(False)

    monkeypatch.setattr(DeviceStack, "step", strict)
    settings = {"attention_mask": mask, "policy": policy, "max_new_tokens": NEW}
    ours = generate(model, ids, capture="step", **settings)
    monkeypatch.undo()
    assert len(steps) == NEW - 1
    assert torch.equal(ours, generate(model, ids, **settings))


def test_thresholds_live_on_the_device() -> None:
    policy = mixed(tiny("llama"), "exact")
    state = policy.init(3, device=torch.device("cuda"))
    assert {value.device.type for value in state.values()} == {"cuda"}
