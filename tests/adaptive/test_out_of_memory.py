"""Memory runs out: what was generated comes back, nothing is cut in silence, the model is whole."""

from __future__ import annotations

import functools
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import helpers
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from adaptive import AdaptiveError, generate
from adaptive._generic import GenericExecutor
from adaptive._memory import OutOfMemoryError, cache_bytes, ran_out
from adaptive._native import NativeExecutor
from adaptive._tier import executor_for, forget
from adaptive.policies import Mode

NEW = 12
#: The call of `embed` that fails: the prompt's is the first.
FAILS = 8
MODES: tuple[Mode, ...] = ("exact", "propagate", "verify")
KINDS = {"native": NativeExecutor, "generic": GenericExecutor}
#: What allocators raise: a device's, the CPU's, a library's workspace, Python's own.
ERRORS: dict[str, Callable[[], Exception]] = {
    "device": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "cpu": lambda: RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate "
        "memory: you tried to allocate 2147483648 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "workspace": lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `c()`"),
    "python": MemoryError,
}


class _Collector(BaseStreamer):
    """Keeps the tokens that it is given."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = []

    def put(self, value: Tensor) -> None:
        self.parts.append(value)

    def end(self) -> None:
        raise AssertionError("the text has no end")


def _inputs() -> dict[str, Any]:
    ids, mask = helpers.prompts()
    return {"input_ids": ids, "attention_mask": mask, "max_new_tokens": NEW, "do_sample": False}


def _failing(
    patch: pytest.MonkeyPatch, tier: str, method: str, error: Callable[[], Exception], *, at: int
) -> None:
    """Make call number ``at`` of an executor's method fail."""
    kind: Any = KINDS[tier]
    original = getattr(kind, method)
    calls = 0

    def failing(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            raise error()
        return original(self, *args, **kwargs)

    patch.setattr(kind, method, failing)


def _interrupted(patch: pytest.MonkeyPatch, model: PreTrainedModel, tier: Any, **more: Any) -> Any:
    """Run into the error and return it; afterwards nothing fails any more."""
    with patch.context() as within:
        _failing(within, tier, "embed", more.pop("error", ERRORS["device"]), at=FAILS)
        with pytest.raises(torch.OutOfMemoryError) as caught:
            generate(model, **_inputs() | more, tier=tier)
    return caught.value


@pytest.mark.parametrize("tier", KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_what_was_generated_comes_back(mode: Mode, tier: Any, monkeypatch: Any) -> None:
    model = helpers.shared("llama")
    executor_for(model)  # its self-check embeds too
    policy = helpers.mixed(model, mode)
    whole = generate(model, **_inputs(), policy=policy, tier=tier)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    streamer = _Collector()
    error = _interrupted(monkeypatch, model, tier, policy=policy, streamer=streamer)
    # a prompt and six more tokens were embedded; drafts that wait are no part of the text
    assert error.generated == FAILS - 1 or mode == "verify"
    assert 0 < error.generated < FAILS
    prompt = _inputs()["input_ids"].shape[1]
    length = prompt + error.generated
    assert torch.equal(error.sequences, whole[:, :length])
    assert torch.equal(torch.stack(streamer.parts[1:], dim=1), whole[:, prompt:length])
    # the model is as it was, and goes on working
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all("forward" not in layer.__dict__ for layer in model.model.layers)
    assert torch.equal(generate(model, **_inputs(), policy=policy, tier=tier), whole)


@pytest.mark.parametrize("name", ERRORS)
def test_every_allocator_is_understood(name: str, monkeypatch: Any) -> None:
    model = helpers.shared("llama")
    executor_for(model)
    error = _interrupted(
        monkeypatch, model, "native", policy=helpers.never("exact"), error=ERRORS[name]
    )
    assert isinstance(error, OutOfMemoryError)
    assert type(error.__cause__) is type(ERRORS[name]())
    assert error.reason in str(error)


def test_the_message_names_what_was_asked_for(monkeypatch: Any) -> None:
    model = helpers.shared("llama")
    executor_for(model)
    error = _interrupted(monkeypatch, model, "native", policy=helpers.never("exact"))
    assert isinstance(error, AdaptiveError)
    expected = (
        r"7 of at most 12 tokens were generated for a batch of 3 with prompts of 11 tokens.*"
        r"`error.sequences`.*Keys and values of 23 slots take up to .* MiB.*"
        r"`max_new_tokens`.*Tried to allocate 2\.00 GiB"
    )
    with pytest.raises(OutOfMemoryError, match=expected):
        raise error
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error)
    assert torch.equal(again.sequences, error.sequences)


def test_searches_for_a_batch_that_fits_go_on_working(monkeypatch: Any) -> None:
    memory = pytest.importorskip("accelerate.utils.memory")
    model = helpers.shared("llama")
    executor_for(model)
    error = _interrupted(monkeypatch, model, "native", policy=helpers.never("exact"))
    assert memory.should_reduce_batch_size(error)


def test_keys_and_values_are_given_back_at_once(monkeypatch: Any) -> None:
    """Whoever holds the error does not hold the cache."""
    model = helpers.shared("llama")
    executor_for(model)
    seen: list[NativeExecutor] = []
    begin = NativeExecutor.begin

    def noted(self: NativeExecutor, **kwargs: Any) -> None:
        seen.append(self)
        begin(self, **kwargs)

    monkeypatch.setattr(NativeExecutor, "begin", noted)
    error = _interrupted(monkeypatch, model, "native", policy=helpers.never("exact"))
    assert error.generated
    assert len(seen) == 1
    assert not hasattr(seen[0], "_keys")
    assert not hasattr(seen[0], "_values")


@pytest.mark.parametrize("tier", KINDS)
def test_nothing_could_be_prepared(tier: Any, monkeypatch: Any) -> None:
    model = helpers.shared("llama")
    executor_for(model)
    inputs, policy = _inputs(), helpers.never("exact")
    with monkeypatch.context() as within:
        _failing(within, tier, "begin", ERRORS["cpu"], at=1)
        with pytest.raises(OutOfMemoryError, match="0 of at most 12 tokens") as caught:
            model.generate(**inputs, custom_generate=generate, policy=policy, tier=tier)
    assert caught.value.generated == 0
    assert torch.equal(caught.value.sequences, inputs["input_ids"])
    generate(model, **inputs, policy=policy, tier=tier)


@pytest.mark.parametrize("door", ["verb", "transformers"])
def test_other_errors_stay_what_they_are(door: str, monkeypatch: Any) -> None:
    model = helpers.shared("llama")
    executor_for(model)
    _failing(monkeypatch, "native", "embed", lambda: RuntimeError("shapes differ"), at=3)
    through: Any = functools.partial(generate, model)
    if door == "transformers":
        through = functools.partial(model.generate, custom_generate=generate)
    with pytest.raises(RuntimeError, match=r"^shapes differ$"):
        through(**_inputs(), policy=helpers.never("exact"))


def test_a_self_check_without_memory_says_nothing_about_the_model(monkeypatch: Any) -> None:
    """It used to turn the native tier off for good."""
    model = helpers.tiny("llama")
    forget(model)
    with monkeypatch.context() as within:
        _failing(within, "native", "begin", ERRORS["device"], at=1)
        with pytest.raises(torch.OutOfMemoryError):
            executor_for(model)
    assert isinstance(executor_for(model), NativeExecutor)


def test_bytes_of_keys_and_values() -> None:
    """The number in the message is the size of a real cache."""
    for name in ("llama", "gpt2", "gemma2", "opt"):
        model = helpers.shared(name)
        ids, mask = helpers.prompts()
        cache, _ = helpers.own_cache(model, ids, mask)
        real = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        assert isinstance(cache, DynamicCache)
        assert cache_bytes(model, batch=ids.shape[0], slots=ids.shape[1]) == real


def test_what_is_no_lack_of_memory() -> None:
    assert not ran_out(RuntimeError("size mismatch"))
    assert not ran_out(ValueError("out of memory"))


_REAL = """
import resource, sys
import torch
from helpers import never, prompts, tiny
from adaptive import generate

model = tiny("llama", max_position_embeddings=10**9)
ids, mask = prompts()
policy = never("exact")
settings = {"input_ids": ids, "attention_mask": mask, "do_sample": False, "policy": policy}
first = generate(model, **settings, max_new_tokens=4)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, resource.RLIM_INFINITY))
try:
    generate(model, **settings, max_new_tokens=10**6)
except torch.OutOfMemoryError as error:
    assert torch.equal(error.sequences, ids), error.sequences
    assert "can't allocate memory" in str(error), str(error)
    print(type(error).__name__)
assert torch.equal(generate(model, **settings, max_new_tokens=4), first)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space as Linux does")
def test_a_real_lack_of_memory() -> None:
    """More keys and values than the process may have."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", _REAL],
        env={"PYTHONPATH": str(helpers.__file__).rsplit("/", 1)[0], "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "OutOfMemoryError"
