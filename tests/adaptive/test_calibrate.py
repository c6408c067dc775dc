"""``calibrate`` end to end on a planted model: what is promised, on what evidence, and when not."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

import adaptive._bench as bench
import adaptive._certify as certifying
from adaptive import (
    CertificateMismatchError,
    ExitTraining,
    InvalidArgumentError,
    Policy,
    Trace,
    UnsupportedError,
    calibrate,
    control_risk,
    detach_exits,
    generate,
    get_exits,
    minimum_units,
)
from adaptive._deployment import Deployment
from adaptive._evidence import total_units
from adaptive._fingerprint import tokens_hash
from adaptive._inputs import read_units
from adaptive._output import AdaptiveOutput
from adaptive._path import choose_path, token_losses
from adaptive._runs import run_units
from adaptive._schedule_costs import ScheduleCosts
from adaptive.calibration import DeltaLedger, InvalidTypeError
from adaptive.calibration.conformance import violation_limit
from adaptive.policies import AllRows, ProbeScore, Threshold, asked_at, choose_stages

NEW = 8
RISK = 0.1
LOSS = "share of tokens that differ from the full model's choice"


def _cheaper(model: Any, units: Any, policies: Any, **_: Any) -> np.ndarray:
    """Measured seconds that fall along the path, so that tests do not depend on the clock."""
    return 1.0 - 0.01 * np.arange(len(policies))[None]


def _dearer(model: Any, units: Any, policies: Any, **_: Any) -> np.ndarray:
    """Measured seconds that say full depth is fastest, then the safest member."""
    return 1.0 + 0.01 * np.arange(len(policies))[None]


def _first_is_best(model: Any, units: Any, policies: Any, **_: Any) -> np.ndarray:
    return np.array([[1.0, *(0.5 + 0.01 * place for place in range(len(policies) - 1))]])


def _costing(*checks: float) -> Callable[..., ScheduleCosts]:
    """Prescribed seconds: a millisecond per layer, and what is given for a check at each exit."""

    def measured(model: Any, exits: Any, policy: Policy, **_: Any) -> ScheduleCosts:
        return ScheduleCosts(1e-3 * np.array([1.0, 2.0, 3.0, 4.0]), 1e-3 * np.array(checks))

    return measured


_cheap_checks = _costing(0.01, 0.01, 0.01)


@pytest.fixture(scope="module")
def model(tools: SimpleNamespace, saved_planted: Path) -> Any:
    return tools.reread(tools.model(), saved_planted)


@pytest.fixture(autouse=True)
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "seconds_per_token", _cheaper)
    monkeypatch.setattr(bench, "schedule_costs", _cheap_checks)


@pytest.fixture(scope="module")
def prompts(tools: SimpleNamespace) -> list[list[int]]:
    found: list[list[int]] = tools.prompts(140, seed=3)
    return found


def run(model: Any, prompts: Any, risk: float = RISK, delta: float = 0.1, **settings: Any) -> Any:
    defaults = {"new_tokens": NEW, "batch_size": 64, "members": 5, "mode": "exact"}
    return calibrate(model, prompts, risk, delta, progress=False, **(defaults | settings))


@pytest.fixture(scope="module")
def result(model: Any, prompts: list[list[int]]) -> SimpleNamespace:
    """One calibration, with the losses its test read."""
    seen: dict[int, np.ndarray] = {}

    def watched(losses: Callable[[int], np.ndarray], **settings: Any) -> Any:
        if not callable(losses):
            return control_risk(losses, **settings)

        def noted(column: int) -> np.ndarray:
            seen[column] = losses(column)
            return seen[column]

        return control_risk(noted, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "seconds_per_token", _cheaper)
        patch.setattr(bench, "schedule_costs", _cheap_checks)
        patch.setattr(certifying, "control_risk", watched)
        policy = run(model, prompts)
    return SimpleNamespace(policy=policy, certificate=policy.certificate, losses=seen)


def _full(policy: Policy) -> bool:
    """Whether a policy can never stop early."""
    rule = policy.rule
    assert isinstance(rule, Threshold)
    return rule.threshold == math.inf


# -- the certificate ------------------------------------------------------------------------------


def test_the_certificate_is_complete(result: SimpleNamespace, model: Any) -> None:
    certificate = result.certificate
    assert certificate.holds
    assert certificate.risk == RISK
    assert certificate.delta == 0.1
    assert certificate.loss == LOSS
    assert certificate.unit == "prompt"
    assert certificate.procedure == "fixed-sequence"
    assert certificate.n == certificate.split["n_test"] == 98
    assert certificate.bound == 1.0
    assert certificate.assumptions
    assert certificate.knob == result.policy.rule.threshold
    assert certificate.cost is not None
    assert set(certificate.fingerprints) >= {"model", "exits", "data"}
    assert certificate.decoding["mode"] == "exact" == result.policy.mode
    assert certificate.decoding["max_new_tokens"] == NEW
    assert certificate.decoding["dtype"] == "float32"
    assert certificate.decoding["sampling"] is False
    assert set(certificate.versions) >= {"torch", "transformers", "numpy", "python"}
    assert 0 < certificate.evidence["upper_bound"][LOSS] <= RISK
    assert str(certificate).startswith("With probability at least 0.9 over the draw of the 98")


def test_members_before_the_first_failure_are_certified(result: SimpleNamespace) -> None:
    """The first failing member is seen and not returned; none behind it is ever run."""
    evidence, index = result.certificate.evidence, result.certificate.index
    columns, certified = evidence["columns"], evidence["certified"]
    assert columns == list(range(1, len(columns) + 1))
    assert certified == columns[:-1]
    assert math.exp(evidence["log_p_values"][-1]) > 0.1
    assert index in certified
    assert sorted(result.losses) == columns
    assert evidence["knobs"][index] == str(result.policy.rule.threshold)
    assert evidence["knobs"][0] == "inf"
    knobs = [float(knob) for knob in evidence["knobs"]]
    assert knobs == sorted(knobs, reverse=True)


def test_the_cheapest_certified_member_is_returned(
    result: SimpleNamespace, model: Any, prompts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert result.certificate.index == result.certificate.evidence["certified"][-1]
    monkeypatch.setattr(bench, "seconds_per_token", _first_is_best)
    policy = run(model, prompts)
    certificate = policy.certificate
    assert certificate.index == 1
    assert certificate.cost == 0.5
    assert policy.rule.threshold == float(certificate.evidence["knobs"][1])
    mean = certificate.evidence["means"][LOSS][0]
    bound = certificate.evidence["upper_bound"][LOSS]
    assert mean <= bound <= RISK
    assert bound <= result.certificate.evidence["upper_bound"][LOSS]


def test_none_faster_means_full_depth(
    model: Any, prompts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "seconds_per_token", _dearer)
    policy = run(model, prompts)
    assert _full(policy)
    assert not policy.certificate.holds
    assert policy.certificate.index is None
    assert "none is faster than full depth" in policy.certificate.notes[-1]
    assert policy.certificate.evidence["milliseconds_per_token"]["0"] == 1000.0


def test_evidence_can_be_checked_against_the_losses(result: SimpleNamespace) -> None:
    table = np.zeros((98, result.certificate.evidence["n_columns"]))
    for column, losses in result.losses.items():
        table[:, column] = losses
    assert result.certificate.verify(table)
    table[:, 1] = 0.0
    assert not result.certificate.verify(table)


def test_losses_are_those_of_real_runs(
    result: SimpleNamespace, model: Any, prompts: list[list[int]]
) -> None:
    """The member again, by hand, on the recorded test units: same mean, same depth."""
    certificate = result.certificate
    units = read_units(prompts, model=model).distinct()
    place = {name: i for i, name in enumerate(units.ids)}
    test = units.select([place[name] for name in certificate.split["test_units"]])
    runs = run_units(
        model, test, result.policy, deployment=Deployment(NEW, batch_size=8), progress=False
    )
    losses = [run.disagreement for run in runs]
    assert np.allclose(losses, result.losses[certificate.index])
    at = certificate.evidence["columns"].index(certificate.index)
    assert np.mean(losses) == pytest.approx(certificate.evidence["means"][LOSS][at])
    depth = np.array([1, 2, 3, 4])[np.concatenate([run.stages[1:] for run in runs])].mean()
    assert depth == pytest.approx(certificate.evidence["mean_depth"][str(certificate.index)])


# -- the split ------------------------------------------------------------------------------------


def test_fitting_and_testing_use_different_prompts(
    result: SimpleNamespace, prompts: list[list[int]]
) -> None:
    split = result.certificate.split
    fit, test = set(split["fit_units"]), set(split["test_units"])
    assert not fit & test
    assert fit | test == {tokens_hash(prompt) for prompt in prompts}
    assert (split["n_fit"], split["n_test"]) == (42, 98)
    assert split["seed"] == 0


def test_prompts_that_shaped_the_exits_are_left_out(
    model: Any, prompts: list[list[int]], tools: SimpleNamespace
) -> None:
    shaping = tools.prompts(96, seed=1)[:7]
    exits = get_exits(model)
    assert exits is not None
    policy = run(model, [*shaping, *prompts[:30], *prompts[:4], shaping[0]])
    split = policy.certificate.split
    assert split["removed_because_they_shaped_the_exits"] == 7
    assert split["removed_repetitions"] == 5
    assert split["n_fit"] + split["n_test"] == 30
    assert not set(exits.record.units) & {*split["fit_units"], *split["test_units"]}


def test_nothing_left_is_an_error(model: Any, tools: SimpleNamespace) -> None:
    with pytest.raises(InvalidArgumentError, match="distinct prompts that did not shape the exits"):
        run(model, tools.prompts(96, seed=1)[:20])


def test_exits_are_trained_where_there_are_none(tools: SimpleNamespace) -> None:
    model = tools.model()
    training = ExitTraining(rank=2, steps=3, new_tokens=4, slots=200, batch_size=32)
    policy = run(model, tools.prompts(90, seed=4), training=training, members=2)
    exits = get_exits(model)
    assert exits is not None
    assert exits.trained
    split = policy.certificate.split
    assert split["n_train_exits"] == len(exits.record.units) == 27
    assert split["n_train_exits"] + split["n_fit"] + split["n_test"] == 90
    assert not set(exits.record.units) & {*split["fit_units"], *split["test_units"]}
    assert split["removed_because_they_shaped_the_exits"] == 0
    detach_exits(model)


def test_embeddings_narrower_than_the_residual_stream(
    helpers: ModuleType, tools: SimpleNamespace
) -> None:
    model = helpers.tiny("opt-projected", exits=False)
    training = ExitTraining(rank=2, steps=3, new_tokens=4, slots=200, batch_size=32)
    policy = run(model, tools.prompts(90, seed=4), training=training, members=2)
    assert policy.certificate.split["n_train_exits"] == 27
    detach_exits(model)


def test_the_seed_decides(model: Any, prompts: list[list[int]]) -> None:
    def told(rng: int) -> dict[str, Any]:
        found: dict[str, Any] = run(model, prompts[:70], rng=rng, members=2).certificate.to_dict()
        found.pop("created")
        return found

    first = told(3)
    assert told(3) == first
    assert told(4)["split"]["test_units"] != first["split"]["test_units"]


# -- the check schedule ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scheduled(model: Any, prompts: list[list[int]]) -> SimpleNamespace:
    """Calibrations under prescribed costs of a check, by these costs; and what the path saw."""
    seen: list[Trace] = []

    def noted(family: Policy, trace: Trace, **settings: Any) -> Any:
        seen.append(trace)
        return choose_path(family, trace, **settings)

    found = {}
    for checks in ((0.0, 0.0, 0.0), (50.0, 0.0, 0.0), (50.0, 50.0, 50.0)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(bench, "seconds_per_token", _cheaper)
            patch.setattr(bench, "schedule_costs", _costing(*checks))
            patch.setattr(bench, "choose_path", noted)
            found[checks] = run(model, prompts, 0.3, members=2)
    return SimpleNamespace(policies=found, traces=seen)


def test_exits_whose_check_costs_more_than_it_saves_are_not_asked(
    scheduled: SimpleNamespace,
) -> None:
    free, one, dear = (policy.stages for policy in scheduled.policies.values())
    assert 0 in free
    assert 0 not in one
    assert one
    assert len(dear) == 1


def test_the_schedule_is_frozen_with_the_policy_and_on_record(
    scheduled: SimpleNamespace, tmp_path: Path
) -> None:
    policy = scheduled.policies[50.0, 0.0, 0.0]
    record = policy.certificate.evidence["check_schedule"]
    assert tuple(record["stages"]) == policy.stages
    assert record["microseconds_per_check"] == [50_000.0, 0.0, 0.0]
    predicted = record["milliseconds_per_token"]
    assert predicted["chosen"] < predicted["everywhere"]
    assert policy.certificate.evidence["exit_counts"]["1"][0] == 0  # nothing stopped at exit 0
    policy.save_pretrained(tmp_path)
    assert Policy.from_pretrained(tmp_path) == policy


def test_the_schedule_is_chosen_on_the_fit_split_alone(
    scheduled: SimpleNamespace, result: SimpleNamespace
) -> None:
    for policy, trace in zip(scheduled.policies.values(), scheduled.traces, strict=True):
        split = policy.certificate.split
        assert set(trace.unit_ids) <= set(split["fit_units"])
        assert not set(trace.unit_ids) & set(split["test_units"])
        asked = np.flatnonzero(np.isfinite(trace.scores).all(axis=0))
        assert tuple(asked.tolist()) == policy.stages  # the path is placed on what is asked
        # neither the split nor the evidence depends on what a check costs
        assert split == result.certificate.split
        assert policy.certificate.n == result.certificate.n


def test_a_schedule_that_is_given_is_kept(
    model: Any, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "schedule_costs", lambda *_, **__: pytest.fail("measured"))
    given = Policy(ProbeScore(), Threshold(), stages=(0, 2))
    policy = run(model, prompts[:70], policy=given, members=1)
    assert policy.stages == (0, 2)
    assert "check_schedule" not in policy.certificate.evidence


# -- too little evidence --------------------------------------------------------------------------


def test_too_few_prompts_give_full_depth_and_a_number(
    model: Any, prompts: list[list[int]], tools: SimpleNamespace
) -> None:
    policy = run(model, prompts[:12])
    certificate = policy.certificate
    assert _full(policy)
    assert not certificate.holds
    assert certificate.index is None
    needed = minimum_units(RISK, 0.1)
    assert certificate.n == 9 < needed
    assert f"at least {needed} in the test" in certificate.notes[0]
    assert "Full computation is used" in str(certificate)
    # and it runs: plain text, and no promise of speed
    ids = torch.tensor(prompts[:1])
    output = generate(
        model,
        ids,
        policy=policy,
        max_new_tokens=NEW,
        do_sample=False,
        return_dict_in_generate=True,
    )
    assert isinstance(output, AdaptiveOutput)
    plain = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False
    )
    assert torch.equal(output.sequences, plain)
    assert output.certified is False


@pytest.mark.parametrize("count", [2, 3, 4])
def test_a_handful_of_prompts_is_no_error(model: Any, prompts: list[list[int]], count: int) -> None:
    for groups in (None, list(range(count))):
        policy = run(model, prompts[:count], groups=groups)
        assert _full(policy)
        assert "Too few units" in policy.certificate.notes[0]


def test_the_number_of_prompts_named_is_enough(model: Any, tools: SimpleNamespace) -> None:
    """As many prompts as the certificate asks for pass the first gate."""
    needed = minimum_units(0.4, 0.2, loss_type="binary")
    total = total_units(needed)
    enough = run(model, tools.prompts(total, seed=77), 0.4, 0.2, loss="departure", members=1)
    assert enough.certificate.split["n_test"] >= needed
    assert not any("Too few" in note for note in enough.certificate.notes)


def test_a_family_that_never_stops_early(model: Any, prompts: list[list[int]]) -> None:
    policy = run(
        model,
        prompts[:60],
        policy=Policy(ProbeScore(), Threshold(warmup=1000), stages=(0,)),
        mode=None,
    )
    assert _full(policy)
    assert "No member" in policy.certificate.notes[0]


# -- losses ---------------------------------------------------------------------------------------


def test_departure_is_tested_with_the_exact_binomial(model: Any, prompts: list[list[int]]) -> None:
    policy = run(model, prompts, 0.35, loss="departure", members=3)
    certificate = policy.certificate
    assert certificate.holds
    assert "binomial" in certificate.method
    (means,) = certificate.evidence["means"].values()
    for mean, log_p in zip(means, certificate.evidence["log_p_values"], strict=True):
        wrong = round(mean * certificate.n)
        assert log_p == pytest.approx(stats.binom.logcdf(wrong, certificate.n, 0.35))


def test_any_is_departure(model: Any, prompts: list[list[int]]) -> None:
    by_name = run(model, prompts[:60], 0.4, loss="departure", members=2)
    by_reduction = run(model, prompts[:60], 0.4, reduction="any", members=2)
    assert by_name.certificate.evidence == by_reduction.certificate.evidence


def test_losses_of_the_user_may_be_negative(model: Any, prompts: list[list[int]]) -> None:
    seen: list[tuple[Any, Any, Any]] = []

    def taste(early: Any, full: Any, reference: Any) -> float:
        seen.append((early, full, reference))
        return -0.25 if early == full else 0.75

    items = [{"input_ids": p, "continuation": [5, 6]} for p in prompts]
    policy = run(model, items, loss=taste, bound=0.75, members=3)
    certificate = policy.certificate
    assert certificate.holds
    assert certificate.loss == "taste loss"
    assert certificate.bound == 0.75
    assert min(certificate.evidence["means"]["taste loss"]) < 0
    assert any("Negative values of taste loss offset positive ones" in n for n in certificate.notes)
    assert seen[0][2] == (5, 6)


def test_named_text_losses(model: Any, prompts: list[list[int]]) -> None:
    policy = run(model, prompts, 0.2, loss="rouge_l", members=2)
    assert policy.certificate.loss == "rouge_l loss against the full model's text"
    assert policy.certificate.evidence["columns"]


# -- clusters -------------------------------------------------------------------------------------


def test_clusters_are_the_unit(model: Any, prompts: list[list[int]]) -> None:
    groups = np.arange(len(prompts)) // 2
    policy = run(model, prompts, groups=groups, members=2)
    certificate = policy.certificate
    assert certificate.unit == "cluster"
    assert certificate.n == certificate.split["n_test"] // 2 == 49
    cluster = {tokens_hash(prompt): int(g) for prompt, g in zip(prompts, groups, strict=True)}
    fit = {cluster[name] for name in certificate.split["fit_units"]}
    test = {cluster[name] for name in certificate.split["test_units"]}
    assert not fit & test
    assert any("The unit is the cluster" in note for note in certificate.notes)


def test_a_named_pool_makes_the_prompt_the_unit(model: Any, prompts: list[list[int]]) -> None:
    groups = np.arange(len(prompts)) // 2
    policy = run(model, prompts, groups=groups, pool="the stdlib of Python", members=2)
    certificate = policy.certificate
    assert certificate.unit == "prompt"
    assert certificate.n == certificate.split["n_test"]
    assert "drawn at random from the pool 'the stdlib of Python'" in str(certificate.assumptions)


def test_each_member_writes_its_texts_once(
    model: Any, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bound of the last certified member is read off the losses that its test has seen."""
    begun: list[str] = []

    def noted(*args: Any, **settings: Any) -> Any:
        begun.append(settings["description"])
        return run_units(*args, **settings)

    monkeypatch.setattr(bench, "run_units", noted)
    certificate = run(model, prompts).certificate
    assert certificate.evidence["upper_bound"]
    tested = [words for words in begun if words.startswith("testing member")]
    assert len(tested) == len(set(tested)) == len(certificate.evidence["columns"])


def test_few_clusters_are_few_units(model: Any, prompts: list[list[int]]) -> None:
    policy = run(model, prompts, groups=np.arange(len(prompts)) // 10)
    assert not policy.certificate.holds
    assert "Too few units: the test split has 10" in policy.certificate.notes[0]


# -- modes ----------------------------------------------------------------------------------------


def test_without_a_gain_the_default_says_so(
    model: Any, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr(bench, "seconds_per_token", _dearer)
    monkeypatch.setattr(certifying, "control_risk", None)  # nothing is tested
    policy = run(model, prompts[:60], mode=None)
    assert _full(policy)
    assert policy.mode == "exact"
    assert not policy.certificate.holds
    assert "Pass mode='propagate'" in policy.certificate.notes[0]
    assert "gains nothing on this machine" in caplog.text


def test_with_a_gain_the_default_is_exact(model: Any, prompts: list[list[int]]) -> None:
    policy = run(model, prompts, mode=None, members=2)
    assert policy.mode == "exact"
    assert policy.certificate.decoding["mode"] == "exact"
    assert policy.certificate.evidence["columns"]


def test_propagate_is_labelled_by_the_full_model(model: Any, prompts: list[list[int]]) -> None:
    policy = run(model, prompts, 0.15, mode="propagate", members=3)
    assert policy.mode == "propagate"
    assert policy.certificate.decoding["mode"] == "propagate"
    member = policy.member(0.7)
    units = read_units(prompts[:8], model=model)
    runs = run_units(model, units, member, deployment=Deployment(NEW), progress=False)
    assert any((run.stages < 3).any() for run in runs)
    for prompt, run_ in zip(units.prompts, runs, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *run_.tokens[:-1]]])).logits[0]
        choices = logits[len(prompt) - 1 :].argmax(-1).tolist()
        expected = [int(a == b) for a, b in zip(choices, run_.tokens, strict=True)]
        assert run_.agreement.tolist() == expected


def test_verify_has_no_risk(model: Any, prompts: list[list[int]]) -> None:
    with pytest.raises(UnsupportedError, match="`verify` mode has no risk to calibrate"):
        run(model, prompts, mode="verify")
    policy = Policy(ProbeScore(), Threshold(), stages=(0,), mode="verify")
    with pytest.raises(UnsupportedError, match="`verify` mode has no risk to calibrate"):
        run(model, prompts, policy=policy, mode=None)


def test_rows_that_decide_together_are_certified_as_batches(
    model: Any, prompts: list[list[int]], tmp_path: Path
) -> None:
    """The batch is the unit, its size is part of what is certified, its mean is the loss."""
    family = Policy(ProbeScore(), AllRows(Threshold()), stages=(0, 1))
    found = run(model, prompts, 0.3, policy=family, batch_size=4)
    certificate = found.certificate
    assert certificate.holds
    assert certificate.unit == "batch of 4 prompts drawn at random"
    assert certificate.decoding["batch_size"] == 4
    by_id = {tokens_hash(tuple(prompt)): prompt for prompt in prompts}
    names = certificate.split["test_units"]
    assert certificate.n == len(names) // 4
    texts = [by_id[name] for name in names]
    seen = []
    for start in range(0, 4 * certificate.n, 4):
        units = read_units(texts[start : start + 4], model=model)
        runs = run_units(model, units, found, deployment=Deployment(NEW, seed=0), progress=False)
        seen.append(np.mean([one.disagreement for one in runs]))
        assert (np.stack([one.stages for one in runs]).std(axis=0) == 0).all()
    place = certificate.evidence["columns"].index(certificate.index)
    assert np.mean(seen) == pytest.approx(certificate.evidence["means"][LOSS][place])
    again = Policy.from_pretrained(found.save_pretrained(tmp_path))
    rows = torch.tensor([texts[0]] * 4)
    generate(model, rows, policy=again, max_new_tokens=NEW, do_sample=False)
    with pytest.raises(CertificateMismatchError, match="certified for batches of 4, running 3"):
        generate(model, rows[:3], policy=again, max_new_tokens=NEW, do_sample=False)


def test_batches_of_clusters_are_refused(model: Any, prompts: list[list[int]]) -> None:
    policy = Policy(ProbeScore(), AllRows(Threshold()), stages=(0,))
    groups = [i // 2 for i in range(len(prompts))]
    with pytest.raises(UnsupportedError, match="batches of prompts from several clusters"):
        run(model, prompts, policy=policy, groups=groups)
    assert run(model, prompts, 0.3, policy=policy, groups=groups, pool="all", batch_size=4)


def test_too_few_batches_says_how_many_prompts(model: Any, prompts: list[list[int]]) -> None:
    policy = Policy(ProbeScore(), AllRows(Threshold()), stages=(0,))
    found = run(model, prompts, policy=policy, batch_size=40)
    needed = minimum_units(RISK, 0.1, loss_type="bounded", bound=1.0)
    assert f"about {40 * total_units(needed)} prompts" in found.certificate.notes[0]


# -- the policy in use ----------------------------------------------------------------------------


def test_the_policy_runs_as_certified(
    result: SimpleNamespace, model: Any, prompts: list[list[int]]
) -> None:
    settings = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True}
    ids = torch.tensor(prompts[:1])
    output = generate(model, ids, policy=result.policy, **settings)
    assert isinstance(output, AdaptiveOutput)
    assert output.certified
    with pytest.raises(CertificateMismatchError, match="longer text: certified for at most 8"):
        generate(model, ids, policy=result.policy, **(settings | {"max_new_tokens": NEW + 1}))
    with pytest.raises(CertificateMismatchError, match="another sampling"):
        generate(model, ids, policy=result.policy, **(settings | {"do_sample": True}))


def test_a_saved_policy_keeps_its_certificate(
    result: SimpleNamespace, model: Any, prompts: list[list[int]], tmp_path: Path
) -> None:
    result.policy.save_pretrained(tmp_path)
    again = Policy.from_pretrained(tmp_path)
    assert again.certificate == result.certificate
    assert again == result.policy
    ids = torch.tensor(prompts[:1])
    settings = {"max_new_tokens": NEW, "do_sample": False}
    ours = generate(model, ids, policy=again, **settings)
    assert torch.equal(ours, generate(model, ids, policy=result.policy, **settings))  # type: ignore[arg-type]


def test_sampling_is_calibrated_as_deployed(model: Any, prompts: list[list[int]]) -> None:
    policy = run(model, prompts, 0.3, members=2, do_sample=True, top_k=30, temperature=0.8)
    decoding = policy.certificate.decoding
    assert decoding["sampling"] is True
    assert [p["type"] for p in decoding["processors"]] == [
        "TemperatureLogitsWarper",
        "TopKLogitsWarper",
    ]
    ids = torch.tensor(prompts[:1])
    settings = {"max_new_tokens": NEW, "do_sample": True, "top_k": 30, "temperature": 0.8}
    generate(model, ids, policy=policy, **settings)
    with pytest.raises(CertificateMismatchError, match="another processors"):
        generate(model, ids, policy=policy, **(settings | {"top_k": 20}))


def test_a_generation_config_that_samples_is_not_overruled(
    model: Any, prompts: list[list[int]]
) -> None:
    from transformers import GenerationConfig

    config = GenerationConfig(do_sample=True, top_k=30, pad_token_id=0)
    policy = run(model, prompts[:12], generation_config=config)
    assert policy.certificate.decoding["sampling"] is True


def test_delta_is_spent_before_the_test(
    model: Any, prompts: list[list[int]], tmp_path: Path
) -> None:
    ledger = DeltaLedger.create(tmp_path / "ledger.json", budget=0.15)
    policy = run(model, prompts, ledger=ledger, members=1)
    assert ledger.spent() == pytest.approx(0.1)
    assert policy.certificate.split["ledger"]["spent"] == pytest.approx(0.1)


# -- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"risk": 0.0}, InvalidArgumentError, "`risk`"),
        ({"risk": 1.0}, InvalidArgumentError, "`risk`"),
        ({"risk": float("nan")}, InvalidArgumentError, "`risk`"),
        ({"delta": 0.0}, InvalidArgumentError, "`delta`"),
        ({"delta": 1.5}, InvalidArgumentError, "`delta`"),
        ({"mode": "fast"}, InvalidArgumentError, "`mode` must be"),
        ({"members": 0}, InvalidArgumentError, "`members` must be"),
        ({"new_tokens": 1}, InvalidArgumentError, "`new_tokens` must be"),
        ({"batch_size": 0}, InvalidArgumentError, "`batch_size` must be"),
        ({"loss": "bleu"}, InvalidArgumentError, "`loss` must be one of"),
        ({"loss": max}, InvalidArgumentError, "`bound` must be"),
        ({"method": "guess"}, InvalidArgumentError, "`method`"),
        ({"rng": 1.5}, InvalidTypeError, "`rng` must be"),
        ({"rng": None}, InvalidTypeError, "`rng` must be"),
        ({"rng": -1}, InvalidArgumentError, "`rng` must be at least 0"),
        ({"rng": 2**32}, InvalidArgumentError, "`rng` must be less than"),
        ({"members": 2.5}, InvalidTypeError, "`members` must be an integer"),
        ({"new_tokens": 2.5}, InvalidTypeError, "`new_tokens` must be an integer"),
        ({"batch_size": "8"}, InvalidTypeError, "`batch_size` must be an integer"),
        ({"batch_size": 2.5}, InvalidTypeError, "`batch_size` must be an integer"),
        ({"loss": max, "bound": "a"}, InvalidTypeError, "`bound` must be"),
        ({"ledger": 3}, InvalidTypeError, "`ledger` must be a DeltaLedger"),
        ({"pool": 3}, InvalidTypeError, "`pool` must be"),
        ({"groups": 3}, InvalidArgumentError, "`groups` must be one label per unit"),
        ({"groups": [1, 2]}, InvalidArgumentError, "`groups` must be one per prompt"),
        ({"groups": [1] * 140}, InvalidArgumentError, "`groups` must be at least two clusters"),
        ({"tier": "fast"}, InvalidArgumentError, "`tier` must be"),
        ({"max_new_tokens": 9}, InvalidArgumentError, "`max_new_tokens` must be left out"),
        ({"max_length": 9}, InvalidArgumentError, "`max_length` must be left out"),
        ({"num_beams": 2}, UnsupportedError, "beam search"),
        ({"policy": 0.9}, InvalidTypeError, "`policy` must be a Policy"),
        ({"reduction": "sum"}, InvalidArgumentError, "`reduction` must be"),
        (
            {"policy": Policy(ProbeScore(), Threshold(), stages=(7,))},
            InvalidArgumentError,
            "`policy` must be stages among",
        ),
    ],
    ids=lambda part: str(part)[:40] if isinstance(part, dict) else "",
)
def test_bad_arguments_are_named(
    model: Any, prompts: list[list[int]], settings: dict[str, Any], kind: Any, message: str
) -> None:
    with pytest.raises(kind, match=message):
        run(model, prompts, **settings)


def test_what_is_no_model_is_refused(prompts: list[list[int]]) -> None:
    with pytest.raises(UnsupportedError, match="exits need a Hugging Face causal language model"):
        run(None, prompts)


def test_losses_outside_their_bound_are_errors(model: Any, prompts: list[list[int]]) -> None:
    for value in (2.0, float("nan")):
        with pytest.raises(InvalidArgumentError, match="losses"):
            run(model, prompts, loss=lambda *_, value=value: value, bound=1.0)


# -- the guarantee --------------------------------------------------------------------------------


def _synthetic(rng: np.random.Generator, units: int) -> Trace:
    """Units of four tokens and two exits: hard units disagree often, whatever the score says."""
    hard = np.repeat(rng.random(units) < 0.1, 4)
    scores = rng.random((units * 4, 2)).astype(np.float32)
    wrong = rng.random(scores.shape) < np.where(hard[:, None], 0.9, 0.5 * (1 - scores) ** 2)
    return Trace(
        scores=scores,
        losses={"disagreement": wrong},
        costs=np.array([1.0, 2.0, 3.0]),
        cost_quantity="layers",
        lengths=np.full(units, 4),
        unit_ids=tuple(map(str, range(units))),
    )


def _unit_losses(policy: Policy, trace: Trace) -> np.ndarray:
    found: np.ndarray = token_losses(policy, trace).reshape(-1, 4).mean(axis=1)
    return found


def _choose(variant: str, rng: np.random.Generator, risk: float, delta: float) -> Policy:
    """Policy of one calibration: path on one draw, test on another; or both on one draw."""
    family = Policy(ProbeScore(), Threshold(), stages=(0, 1))
    fit, test = _synthetic(rng, 30), _synthetic(rng, 60)
    if variant == "right, exits chosen":
        family = choose_stages(family, fit, risk=risk, checks=0.35, margin=0.0)
        fit = asked_at(fit, family.stages)
    path = choose_path(family, fit, risk=risk, members=5, any_token=False)
    tables = {j: _unit_losses(family.member(k), test) for j, k in enumerate(path.knobs)}
    if variant == "tuned on the test units":
        within = [j for j, losses in tables.items() if losses.mean() <= risk]
        return family.member(path.knobs[within[-1]])
    if len(path.knobs) == 1:
        return family.member(path.knobs[0])
    found = control_risk(
        lambda column: tables[column], risk=risk, delta=delta, n_columns=len(path.knobs), rng=0
    )
    return family.member(path.knobs[found.index or 0])


@pytest.mark.statistical
@pytest.mark.parametrize(
    ("variant", "kept"),
    [("right", True), ("right, exits chosen", True), ("tuned on the test units", False)],
)
def test_path_and_test_together_keep_the_promise(
    variant: str, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adaptive._path.GRID", 12)
    monkeypatch.setattr("adaptive.policies._choose_stages._GRID", 24)
    monkeypatch.setattr("gc.collect", lambda *_: 0)
    risk, delta, replicates = 0.1, 0.05, 100
    rng = np.random.default_rng(8)
    population = _synthetic(np.random.default_rng(9), 20_000)
    grid = np.linspace(0, 1, 201)

    @functools.cache
    def true(stages: tuple[int, ...]) -> np.ndarray:
        family = Policy(ProbeScore(), Threshold(), stages=stages)
        return np.array([_unit_losses(family.member(k), population).mean() for k in grid])

    broken, asked = 0, set()
    for _ in range(replicates):
        policy = _choose(variant, rng, risk, delta)
        knob = policy.rule.threshold  # type: ignore[attr-defined]
        asked.add(policy.stages)
        broken += knob <= 1 and float(np.interp(knob, grid, true(policy.stages))) > risk
    assert (broken <= violation_limit(replicates, delta)) is kept
    assert (len(asked) > 1) is ("exits chosen" in variant)  # which exits is left to the fit split


def test_members_lie_around_the_promise(rng: np.random.Generator) -> None:
    family = Policy(ProbeScore(), Threshold(), stages=(0, 1))
    trace = _synthetic(rng, 80)
    path = choose_path(family, trace, risk=0.1, members=6, any_token=False)
    assert path.knobs[0] == math.inf
    assert path.predicted[0] == 0
    assert len(path.knobs) <= 7
    assert (np.diff(path.knobs) < 0).all()
    assert (path.predicted <= 0.13).all()
    by_hand = [
        float(np.mean(token_losses(family.member(k), trace).reshape(-1, 4).sum(1) / 5))
        for k in path.knobs
    ]
    assert np.allclose(path.predicted, by_hand)
    anywhere = choose_path(family, trace, risk=0.3, members=3, any_token=True)
    share = [
        float(token_losses(family.member(k), trace).reshape(-1, 4).any(1).mean())
        for k in anywhere.knobs
    ]
    assert np.allclose(anywhere.predicted, share)


def test_replacing_nothing_keeps_the_family() -> None:
    """A member differs from its family by the knob alone."""
    family = Policy(ProbeScore(), Threshold(warmup=2), stages=(0, 2), mode="propagate")
    member = family.member(0.4)
    assert replace(member, rule=family.rule) == family
