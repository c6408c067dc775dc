"""A step in fixed shapes is the host's step; and a CUDA graph could hold it."""

from __future__ import annotations

import functools
import weakref
from dataclasses import dataclass, replace
from typing import Any

import pytest
import tape
import torch
from helpers import NATIVE
from torch import Tensor

from adaptive import UnsupportedError, _device_stack, _pieces, generate
from adaptive import policies as p
from adaptive._capturable import NotCapturableError, OnlyCapturable
from adaptive._device_stack import ExactDeviceStack
from adaptive._families import Readout
from adaptive.calibration import InvalidArgumentError
from adaptive.policies import Features, Policy, State

LENGTHS = (11, 3, 7, 1, 10)
ON_DEVICE = ("segments", "step")


@pytest.fixture
def taped(monkeypatch: pytest.MonkeyPatch) -> type[tape.TapeGraph]:
    """CUDA graphs as they would be on a CPU."""
    return tape.install(monkeypatch)


def _given(helpers: Any, name: str, mode: str, lengths: tuple[int, ...]) -> tuple[Any, ...]:
    model = helpers.shared(name)
    ids, mask = helpers.prompts(lengths)
    given = {
        "attention_mask": mask,
        "policy": helpers.mixed(model, mode),
        "max_new_tokens": 18,
        "max_pending": 5,
        "pad_token_id": 0,
        "return_dict_in_generate": True,
    }
    return model, ids, given


def _same(ours: Any, theirs: Any) -> None:
    assert torch.equal(ours.sequences, theirs.sequences)
    assert torch.equal(ours.exit_stages, theirs.exit_stages)
    assert torch.equal(ours.agreement, theirs.agreement)
    torch.testing.assert_close(
        ours.exit_scores, theirs.exit_scores, atol=1e-4, rtol=1e-3, equal_nan=True
    )


@pytest.mark.parametrize("mode", ["exact", "propagate", "verify"])
@pytest.mark.parametrize("name", NATIVE)
def test_a_step_in_fixed_shapes_is_the_hosts(name: str, mode: str, helpers: Any) -> None:
    model, ids, given = _given(helpers, name, mode, LENGTHS)
    ours = generate(model, ids, capture="none", **given)
    theirs = generate(model, ids, **given)
    _same(ours, theirs)
    assert len(ours.exit_stages.unique()) >= 2
    for layer in range(helpers.LAYERS):
        mine, other = (given.past_key_values.layers[layer] for given in (ours, theirs))
        keys, values, slots = helpers.kept(mine, 0)
        other_keys, other_values, others = helpers.kept(other, 0)
        assert slots == others
        for row, length in enumerate(LENGTHS):
            first = max(0, ids.shape[1] - length - slots.start)
            for one, two in ((keys, other_keys), (values, other_values)):
                torch.testing.assert_close(
                    one[row, :, first:], two[row, :, first:], atol=1e-4, rtol=1e-4
                )


REPLAYED = [("llama", "segments")]
REPLAYED += [(name, "step") for name in ("llama", "gemma2", "gemma3", "gpt-neox", "qwen2-window")]


@pytest.mark.parametrize("mode", ["exact", "propagate", "verify"])
@pytest.mark.parametrize(("name", "capture"), REPLAYED)
def test_a_replayed_step_is_the_hosts(
    name: str, mode: str, capture: Any, helpers: Any, taped: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys are read in buckets of 8 slots: graphs of one bucket after the other are used."""
    monkeypatch.setattr(_device_stack, "_BUCKET", 8)
    for lengths in (LENGTHS, (6,)):
        model, ids, given = _given(helpers, name, mode, lengths)
        _same(generate(model, ids, capture=capture, **given), generate(model, ids, **given))
    if capture == "step":
        steps = 2 * 17  # the prompt decides the first token
        assert taped.replays == steps or (mode == "verify" and taped.replays > steps)


@pytest.mark.parametrize("capture", ON_DEVICE)
@pytest.mark.parametrize("mode", ["exact", "propagate", "verify"])
def test_rows_that_end_sampling_and_kept_scores(
    mode: str, capture: Any, helpers: Any, taped: Any
) -> None:
    model, ids, given = _given(helpers, "llama", mode, LENGTHS)
    given |= {"output_scores": True, "output_logits": True}
    sampled = given | {"do_sample": True, "top_k": 5, "random": "keyed", "seed": 3}
    for settings in (given, sampled):
        text = generate(model, ids, **settings).sequences
        settings["eos_token_id"] = text[:3, ids.shape[1] + 9].tolist()
        ours = generate(model, ids, capture=capture, **settings)
        theirs = generate(model, ids, **settings)
        _same(ours, theirs)
        assert bool((ours.exit_stages < 0).any())
        for name in ("scores", "logits"):
            mine, other = getattr(ours, name), getattr(theirs, name)
            assert len(mine) == len(other)
            for step, (own, their) in enumerate(zip(mine, other, strict=True)):
                live = ours.exit_stages[:, step] >= 0
                torch.testing.assert_close(own[live], their[live], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("mode", ["exact", "propagate", "verify"])
@pytest.mark.parametrize("most", [1, 2, 7, 80])
def test_the_window_may_be_of_any_size(most: int, mode: str, helpers: Any, taped: Any) -> None:
    """Longer than the prompt, than the text, or of one slot and the newest."""
    model, ids, given = _given(helpers, "llama", mode, (4, 2))
    given["max_pending"] = most
    _same(generate(model, ids, capture="step", **given), generate(model, ids, **given))


def test_drafts_may_be_taken_back_over_the_end_of_a_bucket(
    helpers: Any, taped: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces that are first needed then are captured beside those of the later bucket."""
    monkeypatch.setattr(_device_stack, "_BUCKET", 4)
    for length in (1, 2):
        model, ids, given = _given(helpers, "llama", "verify", (length,))
        given |= {"policy": helpers.mixed(model, "verify", quantile=0.5), "max_new_tokens": 24}
        _same(generate(model, ids, capture="segments", **given), generate(model, ids, **given))


@pytest.mark.parametrize("lengths", [(6,), (6, 4)])
def test_the_head_is_read_where_a_token_is_and_nowhere_else(
    lengths: tuple[int, ...], helpers: Any
) -> None:
    """Places for logits are laid down without forming any."""
    model, ids, given = _given(helpers, "llama", "propagate", lengths)
    given["policy"] = Policy(p.NoScore(), p.FixedStage(1), stages=(0, 1), mode="propagate")
    generate(model, ids, **given)  # a model is checked once
    with helpers.reading_head() as rows:
        generate(model, ids, capture="none", **given)
    assert rows == [len(lengths)] * 18  # the prompt, and the tokens behind the first


@pytest.mark.parametrize("name", NATIVE)
def test_places_for_logits_are_those_that_the_head_forms(name: str, helpers: Any) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        readout = Readout(helpers.tiny(name, exits=False).to(dtype))
        with torch.no_grad():
            formed = readout(torch.zeros(2, 32, dtype=dtype))
        place = readout.empty(2)
        assert (place.shape, place.dtype) == (formed.shape, formed.dtype)


@dataclass(frozen=True)
class Counting(p.AbstractRule):
    """Remembers how many tokens there have been: every third one goes to full depth."""

    def init(self, batch_size: int, *, device: torch.device) -> State:
        return {"tokens": torch.zeros(batch_size, dtype=torch.int64, device=device)}

    def decide(self, features: Features, score: Tensor, state: State) -> tuple[Tensor, State]:
        return state["tokens"] % 3 != 2, state

    def advance(self, state: State) -> State:
        return {"tokens": state["tokens"] + 1}

    def with_knob(self, value: float) -> Counting:
        return self

    def knobs(self, trace: Any, *, size: int = 64) -> tuple[float, ...]:
        return (float("inf"),)


@pytest.mark.parametrize("capture", ["none", "segments", "step"])
def test_a_policy_goes_back_with_its_drafts(capture: Any, helpers: Any, taped: Any) -> None:
    """A rule with memory forgets drafts that were taken back, and the text is the full model's."""
    model, ids, given = _given(helpers, "llama", "verify", (9,))
    given["policy"] = Policy(p.NoScore(), Counting(), stages=(2,), mode="verify")
    ours = generate(model, ids, capture=capture, **given)
    _same(ours, generate(model, ids, **given))
    given["policy"] = helpers.never("verify")
    assert torch.equal(ours.sequences, generate(model, ids, **given).sequences)
    stopped = ours.exit_stages < 3
    assert 0 < int(stopped.sum()) < stopped.numel()


@pytest.mark.parametrize(("name", "mode"), [("llama", "verify"), ("gemma2", "propagate")])
def test_a_step_can_be_compiled_whole(
    name: str, mode: str, helpers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced without a break and functionalised, as for any backend; code is made elsewhere."""
    _only_traced(monkeypatch)
    model, ids, given = _given(helpers, name, mode, (9, 5))
    _same(generate(model, ids, compiled=True, **given), generate(model, ids, **given))


def _only_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(_pieces, "_forms", weakref.WeakKeyDictionary())


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_compiled_step_is_the_hosts(helpers: Any) -> None:
    """With code made for this machine; from the third length on nothing is compiled."""
    given: dict[str, Any] = {}
    for length in (6, 4, 9):
        model, ids, given = _given(helpers, "llama", "propagate", (length,))
        given["policy"] = replace(given["policy"], stages=(1,))
        stance = torch.compiler.set_stance("default" if length < 9 else "fail_on_recompile")
        with stance:
            _same(generate(model, ids, compiled=True, **given), generate(model, ids, **given))


def test_fewer_layers_run_when_everybody_stops(
    helpers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from adaptive._native import NativeExecutor

    ran: list[tuple[int, int]] = []
    run = NativeExecutor.run_window

    def counted(self: Any, low: int, high: int, *args: Any, **kw: Any) -> Tensor:
        ran.append((low, high))
        return run(self, low, high, *args, **kw)

    monkeypatch.setattr(NativeExecutor, "run_window", counted)
    model, ids, given = _given(helpers, "llama", "propagate", (6,))
    given |= {"policy": Policy(p.NoScore(), p.FixedStage(0), stages=(0, 2), mode="propagate")}
    given |= {"max_pending": 80}
    generate(model, ids, capture="none", **given)
    assert ran == [(0, 1)] * 17


@dataclass(frozen=True)
class Asking(p.AbstractRule):
    """Looks at a score on the host, as a CUDA graph cannot."""

    knob_name = "threshold"
    threshold: float = 0.5

    def init(self, batch_size: int, *, device: torch.device) -> State:
        return {}

    def decide(self, features: Features, score: Tensor, state: State) -> tuple[Tensor, State]:
        if float(score[0]) > self.threshold:
            return torch.ones_like(score, dtype=torch.bool), state
        return torch.zeros_like(score, dtype=torch.bool), state

    def with_knob(self, value: float) -> Asking:
        return replace(self, threshold=value)

    def knobs(self, trace: Any, *, size: int = 64) -> tuple[float, ...]:
        return (self.threshold,)


@dataclass(frozen=True)
class Doing(Asking):
    """Does something else that a CUDA graph cannot hold."""

    what: str = ""

    def decide(self, features: Features, score: Tensor, state: State) -> tuple[Tensor, State]:
        stop = score > self.threshold
        if self.what == "choose by mask":
            score[stop].sum()
        elif self.what == "find places":
            stop.nonzero()
        elif self.what == "compare":
            torch.equal(stop, ~stop)
        elif self.what == "repeat":
            score.repeat_interleave(stop.long())
        return stop, state


@pytest.mark.parametrize("capture", ON_DEVICE)
@pytest.mark.parametrize("what", ["choose by mask", "find places", "compare", "repeat"])
def test_what_a_graph_cannot_hold_is_found_before_a_capture(
    what: str, capture: Any, helpers: Any, taped: Any
) -> None:
    """torch does not get over a capture that failed."""
    model, ids, given = _given(helpers, "llama", "exact", (6, 4))
    given["policy"] = replace(given["policy"], rule=Doing(what=what))
    generate(model, ids, **given)
    with pytest.raises(UnsupportedError, match=r"cannot be captured .* not permitted"):
        generate(model, ids, capture=capture, **given)
    assert taped.made == 0


def test_what_a_graph_can_hold_and_what_it_cannot(helpers: Any) -> None:
    score = torch.arange(4.0)
    with OnlyCapturable():
        score[score > 1] = 0.5  # filled in
        chosen = score[torch.arange(2)]
        score[torch.arange(2)] = chosen
        score.copy_(torch.where(score > 0.0, score, 3.0))
        with pytest.raises(NotCapturableError, match="index_put"):
            score[score > 1] = torch.zeros(3)
        with pytest.raises(NotCapturableError, match="_to_copy"):
            score.to("meta")
    assert score.tolist() == [3.0, 1.0, 0.5, 0.5]


@pytest.mark.parametrize("capture", ON_DEVICE)
@pytest.mark.parametrize("error", [RuntimeError("first"), torch.OutOfMemoryError("first")])
def test_the_first_error_of_a_capture_is_told(
    error: RuntimeError, capture: Any, helpers: Any, taped: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ending a capture that failed fails as well, and would hide that memory ran out."""
    model, ids, given = _given(helpers, "llama", "exact", (6,))
    carry = ExactDeviceStack.carry

    def failing(stack: ExactDeviceStack, segment: int, *, alone: bool) -> None:
        if taped.made:
            raise error
        carry(stack, segment, alone=alone)

    monkeypatch.setattr(ExactDeviceStack, "carry", failing)
    memory = isinstance(error, torch.OutOfMemoryError)
    with pytest.raises(torch.OutOfMemoryError if memory else UnsupportedError, match="first"):
        generate(model, ids, capture=capture, **given)


@pytest.mark.parametrize("capture", ON_DEVICE)
def test_a_rule_that_asks_the_host_is_refused(
    capture: Any, helpers: Any, taped: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids, given = _given(helpers, "llama", "exact", (6,))
    given["policy"] = replace(given["policy"], rule=Asking())
    generate(model, ids, **given)
    _only_traced(monkeypatch)
    with pytest.raises(UnsupportedError, match="cannot be compiled"):
        generate(model, ids, compiled=True, **given)
    with pytest.raises(UnsupportedError, match=r"cannot be captured .* not permitted"):
        generate(model, ids, capture=capture, **given)


def test_what_cannot_be_captured_is_said(helpers: Any) -> None:
    model, ids, given = _given(helpers, "llama", "exact", (6,))
    with pytest.raises(UnsupportedError, match="a model on 'cpu'"):
        generate(model, ids, capture="step", **given)
    with pytest.raises(UnsupportedError, match="the generic tier"):
        generate(model, ids, capture="none", tier="generic", **given)
    with pytest.raises(InvalidArgumentError, match="`capture`"):
        generate(model, ids, capture="all", **given)
    with pytest.raises(UnsupportedError, match="`resumed` is not supported"):
        generate(model, ids, capture="none", resumed=torch.ones(1), **given)
