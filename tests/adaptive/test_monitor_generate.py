"""`generate` with a monitor: labels, audits, alarms, fallback and its comparisons, refusals."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pytest
import tape
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from adaptive import InvalidArgumentError, Policy, UnsupportedError, generate
from adaptive._collect import collect
from adaptive._decode import label
from adaptive._deployment import Deployment
from adaptive._exits import require_exits
from adaptive._full_depth import agreement_along
from adaptive._inputs import read_units
from adaptive._losses import TOKEN_LOSSES
from adaptive._monitor_journal import read_journal
from adaptive._monitor_reference import Reference
from adaptive._output import AdaptiveOutput
from adaptive._path import token_losses
from adaptive.calibration import (
    ExpectedLossCurve,
    LifetimeRiskMonitor,
    ScoreAudits,
    UniformAudits,
)
from adaptive.monitoring import Monitor, Outcome, Watched
from adaptive.policies import Margin, Mode, Threshold

NEW = 12
RISK = 0.2
SHARE, DEPARTURE = (loss.name for loss in TOKEN_LOSSES)
_ALWAYS = -1.0
modes = pytest.mark.parametrize("mode", ["exact", "propagate"])


def certified(
    mode: str, *, threshold: float | None = None, loss: str = SHARE, quantile: float = 0.6
) -> Policy:
    """A policy with what calibration would have written, member 2 of a path of three."""
    model = helpers.shared("llama")
    policy = helpers.mixed(model, mode, quantile=quantile)
    if threshold is not None:
        policy = replace(policy, rule=Threshold(threshold))
    knob = float(np.asarray(policy.rule.threshold))
    return helpers.certified(
        model,
        policy,
        new_tokens=NEW,
        risk=RISK,
        loss=loss,
        index=2,
        evidence={"knobs": ["inf", "0.99", str(knob)]},
    )


def inputs(seed: int = 1) -> dict[str, Tensor]:
    ids, mask = helpers.prompts(seed=seed)
    return {"input_ids": ids, "attention_mask": mask}


def run(policy: Policy, monitor: Monitor | None, *, seed: int = 1, **settings: Any) -> Any:
    defaults = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True}
    given = inputs(seed) | defaults | settings
    return generate(helpers.shared("llama"), **given, policy=policy, monitor=monitor)


@cache
def plain(seed: int = 1) -> Tensor:
    model = helpers.shared("llama")
    found: Tensor = model.generate(**inputs(seed), max_new_tokens=NEW, do_sample=False)
    return found


def disagreement(output: AdaptiveOutput) -> list[float]:
    assert output.agreement is not None
    wrong, known = (output.agreement == 0).sum(1), (output.agreement >= 0).sum(1)
    return (wrong / known).tolist()


# -- labels and audits ----------------------------------------------------------------------------


@modes
@pytest.mark.parametrize("audits", [1.0, 1e-9])
@pytest.mark.parametrize("capture", [None, "none"])
def test_a_quiet_monitor_changes_nothing(mode: Mode, audits: float, capture: Any) -> None:
    policy = certified(mode)
    monitor = Monitor.for_policy(policy, audits=UniformAudits(audits))
    watched, alone = run(policy, monitor, capture=capture), run(policy, None)
    assert torch.equal(watched.sequences, alone.sequences)
    assert torch.equal(watched.exit_stages, alone.exit_stages)
    assert watched.certified is True
    assert watched.inside.tolist() == [True] * 3
    assert watched.certificate == alone.certificate
    assert (monitor.status, monitor.state.finished) == ("ok", 3)
    assert monitor.state.labelled == (3 if audits == 1.0 else 0)
    units = [found.unit for found in watched.monitored]
    assert [unit.number for unit in units] == [0, 1, 2]
    depths = torch.tensor([*require_exits(helpers.shared("llama")).layers, helpers.LAYERS])
    assert [unit.depth for unit in units] == pytest.approx(
        depths[alone.exit_stages[:, 1:]].double().mean(1).tolist()
    )
    assert [unit.score for unit in units] == pytest.approx(
        alone.exit_scores[:, 1:].double().nanmean(1).tolist()
    )


@modes
def test_labels_are_the_full_models_choices_along_the_run(mode: Mode) -> None:
    policy = certified(mode)
    monitor = Monitor.for_policy(policy, audits=UniformAudits(1.0))
    output = run(policy, monitor)
    assert 0 < sum(disagreement(output)) < 3
    assert [found.unit.loss for found in output.monitored] == pytest.approx(disagreement(output))
    # the slow way: the model itself over the whole text
    for row in range(3):
        keep = inputs()["attention_mask"][row].bool()
        text = torch.cat([inputs()["input_ids"][row][keep], output.sequences[row, -NEW:]])[None]
        with torch.no_grad():
            chosen = helpers.shared("llama")(input_ids=text).logits[0, -NEW - 1 : -1].argmax(-1)
        assert (chosen == text[0, -NEW:]).float().mean() == pytest.approx(
            1.0 - output.monitored[row].unit.loss
        )


@modes
def test_labels_do_not_need_a_detailed_output(mode: Mode) -> None:
    policy = certified(mode)
    monitors = [Monitor.for_policy(policy, audits=UniformAudits(1.0)) for _ in range(2)]
    tokens = run(policy, monitors[0], return_dict_in_generate=False)
    output = run(policy, monitors[1])
    assert torch.equal(tokens, output.sequences)
    assert monitors[0].state.loss_sum == monitors[1].state.loss_sum > 0


@modes
def test_only_audited_units_get_labels(mode: Mode) -> None:
    policy = certified(mode)
    monitor = Monitor.for_policy(policy, audits=UniformAudits(0.5), seed=4)
    full = Monitor.for_policy(policy, audits=UniformAudits(1.0))
    seen = [found for seed in range(4) for found in run(policy, monitor, seed=seed).monitored]
    all_of_them = [found for seed in range(4) for found in run(policy, full, seed=seed).monitored]
    coins = [found.unit.audited for found in seen]
    assert 0 < sum(coins) < 12
    for found, whole in zip(seen, all_of_them, strict=True):
        assert found.unit.loss == (whole.unit.loss if found.unit.audited else None)


@pytest.mark.parametrize(("audits", "paid"), [(1.0, 1), (1e-9, 0)])
def test_units_that_are_not_audited_are_not_settled(
    audits: float, paid: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = certified("exact")
    settled: list[None] = []
    monkeypatch.setattr(
        "adaptive._monitor_units.label", lambda *given: settled.append(label(*given))
    )
    monitor = Monitor.for_policy(policy, audits=UniformAudits(audits))
    run(policy, monitor, return_dict_in_generate=False)
    assert len(settled) == paid
    assert monitor.state.labelled == 3 * paid


@modes
def test_audits_by_score_follow_the_curve(mode: Mode) -> None:
    policy = certified(mode)
    certificate = policy.certificate
    assert certificate is not None
    quiet = [run(policy, None, seed=seed).exit_scores[:, 1:].nanmean(1) for seed in range(8)]
    edge = float(torch.cat(quiet).median())
    curve = ExpectedLossCurve((edge,), (0.5, 0.05), confidence=0.95, n_units=100)
    evidence = certificate.evidence | Reference(curve=curve).to_evidence()
    policy = replace(policy, certificate=replace(certificate, evidence=evidence))
    audits = ScoreAudits(1.0, 0.05)
    monitor = Monitor.for_policy(policy, audits=audits, seed=2)
    units = [found.unit for seed in range(8) for found in run(policy, monitor, seed=seed).monitored]
    expected = curve([unit.score for unit in units])
    assert len(set(expected)) == 2
    chances = audits.probabilities(24, expected=expected)
    assert [unit.probability for unit in units] == pytest.approx(chances.tolist())
    assert 0 < sum(unit.audited for unit in units) < 24
    assert [unit.loss is not None for unit in units] == [unit.audited for unit in units]
    # a unit whose exits were never asked has no score: the curve expects the worst of it
    ticket = monitor.begin(40)
    chances, coins = zip(*monitor.audits(ticket, [None] * 40), strict=True)
    assert set(chances) == {1.0}
    assert all(coins)
    monitor.finish(ticket, [Outcome(0.0, None, 6.0, 1)] * 40)


def test_as_a_decoding_method_of_the_model() -> None:
    policy = certified("exact")
    monitor = Monitor.for_policy(policy)
    model = helpers.shared("llama")
    settings = {"max_new_tokens": NEW, "do_sample": False}
    found = model.generate(
        **inputs(), **settings, custom_generate=generate, policy=policy, monitor=monitor
    )
    assert monitor.state.labelled == 3
    assert torch.equal(found, run(policy, None).sequences)


@pytest.mark.parametrize("random", ["generate", "keyed"])
def test_sampled_units_are_labelled_under_their_own_noise(random: str) -> None:
    """At full depth every sampled token is the full model's: a label under other noise is not."""
    policy = certified("propagate", threshold=math.inf)
    monitor = Monitor.for_policy(policy, audits=UniformAudits(0.5), seed=1)
    for seed in range(3):
        torch.manual_seed(seed)
        run(policy, monitor, seed=seed, do_sample=True, random=random, certified=False)
    assert 0 < monitor.state.labelled < 9
    assert monitor.state.loss_sum == 0.0


def test_rows_that_end_early_are_judged_by_their_own_tokens() -> None:
    policy = certified("exact")
    text = run(policy, None).sequences[0, -NEW:]
    monitor = Monitor.for_policy(policy)
    output = run(policy, monitor, eos_token_id=int(text[4]), pad_token_id=0, certified=False)
    lengths = (output.exit_stages >= 0).sum(1).tolist()
    assert min(lengths) < NEW
    assert [found.unit.tokens for found in output.monitored] == lengths
    assert [found.unit.loss for found in output.monitored] == pytest.approx(disagreement(output))


def test_a_run_outside_the_certificates_conditions_is_outside() -> None:
    policy = certified("exact")
    output = run(policy, Monitor.for_policy(policy), max_new_tokens=NEW + 1, certified=False)
    assert output.inside.tolist() == [False] * 3
    assert output.certified is False


# -- alarm, fallback, recovery --------------------------------------------------------------------


def fallen(policy: Policy, **settings: Any) -> tuple[Monitor, list[AdaptiveOutput]]:
    """Run a policy that stops at the first exit whatever the score until its monitor alarms."""
    monitor = Monitor.for_policy(policy, **settings)
    seen = []
    for seed in range(200):
        seen.append(run(policy, monitor, seed=seed))
        if monitor.status == "fallback":
            return monitor, seen
    raise AssertionError(f"no alarm: {monitor}")


@modes
def test_a_bad_policy_is_withdrawn_and_full_depth_runs(mode: Mode, tmp_path: Path) -> None:
    policy = certified(mode, threshold=_ALWAYS)
    events: list[str] = []
    monitor, seen = fallen(
        policy,
        audits=UniformAudits(1.0),
        journal=tmp_path / "j",
        on_event=lambda event: events.append(event.kind),
    )
    assert events == ["warn", "alarm"]
    last = seen[-1]
    assert [o.certified for o in seen[:-1]] == [True] * (len(seen) - 1)
    assert last.certified is False
    alarm = next(i for i, unit in enumerate(last.monitored) if not unit.inside)
    assert last.inside.tolist() == [i < alarm for i in range(3)]
    assert last.certificate.holds is False
    assert torch.equal(run(policy, monitor, capture="none").sequences, plain())
    after = run(policy, monitor)
    assert torch.equal(after.sequences, plain())
    assert after.mean_depth == helpers.LAYERS
    assert after.inside.tolist() == [False] * 3
    assert (after.agreement == 1).all()
    assert [found.unit.member for found in after.monitored] == [0] * 3
    monitor.close()
    kinds = [line["kind"] for line in read_journal(tmp_path / "j")]
    assert kinds == ["header"] + ["unit"] * (3 * len(seen) + 6)


@modes
@pytest.mark.parametrize("loss", [SHARE, DEPARTURE])
def test_in_fallback_early_answers_are_compared(mode: Mode, loss: str) -> None:
    """What the policy would have said at each place of the full model's text, the slow way."""
    policy = certified(mode, loss=loss, quantile=0.95)
    monitor = Monitor.for_policy(policy)
    monitor.trip("to see the comparison")
    model, units = helpers.shared("llama"), []
    prompts = []
    for seed in range(3):
        output = run(policy, monitor, seed=seed)
        units += list(output.monitored)
        given = inputs(seed)
        prompts += [
            ids[mask.bool()].tolist()
            for ids, mask in zip(given["input_ids"], given["attention_mask"], strict=True)
        ]
    texts = [tuple(plain(seed)[row, -NEW:].tolist()) for seed in range(3) for row in range(3)]
    trace = collect(
        model,
        read_units(prompts, model=model),
        texts,
        deployment=Deployment(NEW, generation={"do_sample": False}),
        score=Margin(),
        stages=(0, 1, 2),
        progress=False,
    )
    wrong = token_losses(policy, trace).astype(float).reshape(9, NEW - 1).sum(1)
    expected = wrong / NEW if loss == SHARE else (wrong > 0).astype(float)
    assert 0.0 < expected.sum() < 9.0
    assert [found.unit.loss for found in units] == pytest.approx(expected.tolist())
    assert all(found.unit.audited for found in units)
    assert monitor.state.labelled == 0


def test_the_compared_departure_is_the_delivered_one() -> None:
    """Exact mode, greedy: both runs share every prefix up to the first departure."""
    policy = certified("exact", loss=DEPARTURE, quantile=0.95)
    watching, comparing = Monitor.for_policy(policy), Monitor.for_policy(policy)
    comparing.trip("to compare")
    for seed in range(5):
        seen, shadow = run(policy, watching, seed=seed), run(policy, comparing, seed=seed)
        for one, other in zip(seen.monitored, shadow.monitored, strict=True):
            assert one.unit.loss == other.unit.loss


def test_one_token_in_fallback() -> None:
    policy = certified("exact")
    monitor = Monitor.for_policy(policy)
    monitor.trip("by hand")
    output = run(policy, monitor, max_new_tokens=1)
    assert [found.unit.loss for found in output.monitored] == [0.0] * 3


@modes
def test_good_traffic_brings_the_policy_back(mode: Mode) -> None:
    policy = certified(mode, threshold=math.inf)  # never stops: early answers are the full model's
    monitor = Monitor.for_policy(policy, probation=6, audits=UniformAudits(1.0))
    monitor.trip("by hand")
    events = []
    while monitor.status != "ok":
        events += [e for found in run(policy, monitor).monitored for e in found.events]
    assert [event.kind for event in events] == ["resume", "clear"]
    assert events[0].threshold == monitor.rules.recovery.threshold <= events[0].evidence
    assert run(policy, monitor).inside.all()


class _Tripping(BaseStreamer):
    """Withdraws the policy when it is given the fifth token."""

    def __init__(self, monitor: Monitor) -> None:
        self.monitor, self.puts = monitor, 0

    def put(self, value: Tensor) -> None:
        self.puts += 1
        if self.puts == 6:  # the prompt is put first
            self.monitor.trip("from outside")

    def end(self) -> None:
        """Nothing is kept."""


@modes
@pytest.mark.parametrize("capture", [None, "none", "step"])
def test_a_unit_in_which_the_policy_is_withdrawn_ends_at_full_depth(
    mode: Mode, capture: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if capture == "step":
        tape.install(monkeypatch)
    policy = certified(mode, threshold=_ALWAYS)
    monitor = Monitor.for_policy(policy, audits=UniformAudits(1.0), journal=tmp_path / "j")
    given = {key: value[:1] for key, value in inputs().items()}
    output = run(policy, monitor, **given, streamer=_Tripping(monitor), capture=capture)
    stages = output.exit_stages[0].tolist()
    assert stages == [3] + [0] * 4 + [3] * (NEW - 5)
    assert output.inside.tolist() == [False]
    (found,) = output.monitored
    assert found.unit.withdrawn
    assert found.unit.score is None or math.isfinite(found.unit.score)
    assert monitor.state.labelled == 0
    monitor.close()
    with Monitor.for_policy(policy, audits=UniformAudits(1.0), journal=tmp_path / "j") as again:
        assert (again.status, again.state.finished) == ("fallback", 1)
    if mode == "exact":  # the rest is the full model's own continuation of the text so far
        begun = output.sequences[:, : -(NEW - 5)]
        rest = helpers.shared("llama").generate(begun, max_new_tokens=NEW - 5, do_sample=False)
        assert torch.equal(rest, output.sequences)


def test_on_warn_a_safer_member_runs() -> None:
    policy = certified("exact", threshold=_ALWAYS)
    monitor = Monitor.for_policy(policy, tighten=1, alpha=1e-6)
    members = set()
    for seed in range(40):
        given = {key: value[:1] for key, value in inputs(seed).items()}
        status = monitor.status
        members.add((status, run(policy, monitor, **given).monitored[0].unit.member))
    assert members == {("ok", 2), ("warn", 1)}


# -- refusals -------------------------------------------------------------------------------------


def test_what_cannot_be_watched_is_refused() -> None:
    policy = certified("exact")
    other = Monitor.for_policy(certified("exact", threshold=0.5))
    with pytest.raises(InvalidArgumentError, match="made for the policy that runs"):
        run(policy, other)
    assert other.state.finished == 0
    with pytest.raises(InvalidArgumentError, match=r"Monitor\.for_policy"):
        run(policy, "watch it")  # type: ignore[arg-type]
    own = Monitor.for_policy(certified("exact", loss="words lost"))
    with pytest.raises(UnsupportedError, match=r"'words lost'.*begin"):
        run(own.policy, own)
    with pytest.raises(InvalidArgumentError, match="whole units"):
        run(policy, Monitor.for_policy(policy), resumed=[1, 1, 1])
    with pytest.raises(InvalidArgumentError, match="without a certificate"):
        Monitor.for_policy(replace(policy, certificate=None))
    bare = replace(policy, certificate=replace(policy.certificate, evidence={}))
    with pytest.raises(InvalidArgumentError, match="names no members"):
        Monitor.for_policy(bare, tighten=1)
    with pytest.raises(InvalidArgumentError, match="without a curve"):
        Monitor.for_policy(bare, audits=ScoreAudits(1.0, 0.1))
    with pytest.raises(UnsupportedError, match="no risk to watch"):
        Monitor.for_policy(replace(policy, mode="verify"))


def test_an_error_in_generation_is_no_unit() -> None:
    policy = certified("exact")
    monitor = Monitor.for_policy(policy)
    with pytest.raises(RuntimeError, match="in the middle"):
        run(policy, monitor, logits_processor=LogitsProcessorList([_Failing()]), certified=False)
    assert monitor.state.finished == 0
    output = run(policy, monitor)
    assert monitor.state.finished == 3
    assert all(isinstance(found, Watched) for found in output.monitored)


class _Failing(LogitsProcessor):
    is_pure = True

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        if ids.shape[1] > 14:
            raise RuntimeError("in the middle")
        return scores


def test_callbacks_that_fail_do_not_stop_a_generation(caplog: pytest.LogCaptureFixture) -> None:
    def fail(_: object) -> None:
        raise RuntimeError("of the user's")

    policy = certified("exact")
    monitor = Monitor.for_policy(policy, on_unit=fail, on_event=fail, detector=_nervous())
    run(policy, monitor)
    assert monitor.status == "fallback"
    assert "a monitor's callback failed" in caplog.text
    assert "evidence that losses exceed" in caplog.text


def _nervous() -> LifetimeRiskMonitor:
    return LifetimeRiskMonitor(1e-3, alpha=0.9)


def test_agreement_of_one_token_is_the_prompts() -> None:
    found = agreement_along(
        helpers.shared("llama"),
        torch.tensor([[5, 6, 7]]),
        torch.ones(1, 2, dtype=torch.int64),
        stages=torch.tensor([[3]]),
        chooser=None,  # type: ignore[arg-type]
    )
    assert found.tolist() == [[1]]
