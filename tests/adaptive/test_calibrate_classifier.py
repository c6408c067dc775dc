"""``calibrate`` for classifiers: the promises, the evidence, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from encoders import rows_of, some_inputs, tiny_encoder
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import adaptive._certify_classifier as certifying
import adaptive._classifier_bench as bench
from adaptive import (
    CertificateMismatchError,
    InvalidArgumentError,
    Policy,
    UnsupportedError,
    calibrate,
    control_risk,
    minimum_units,
    predict,
)
from adaptive._rows import row_hashes
from adaptive.calibration import DeltaLedger, InvalidTypeError
from adaptive.calibration.conformance import violation_limit
from adaptive.classifiers import ClassifierExits, ClassifierTraining, train_classifier_exits
from adaptive.policies import AllRows, Margin, MaxProbability, Patience, Threshold

RISK, DELTA = 0.05, 0.1
LOSS = "disagreement with the full model"


def planted(x: Tensor) -> Iterator[Tensor]:
    """Stage 0 is sure to a degree ``c`` and differs from the full answer with chance (1 - c) / 2.

    Columns of x: ``c``, the full answer, the early answer. Stopping where c >= t then has risk
    (1 - t)^2 / 4 exactly.
    """
    early, logit = x[:, 2], torch.logit(0.5 + x[:, 0] / 2)
    keep = yield torch.stack([torch.where(early == k, logit, 0.0) for k in (0, 1)], dim=1)
    x = x if keep is None else x[keep]
    yield 9.0 * torch.stack([x[:, 1] == 0, x[:, 1] == 1], dim=1)


class Estimator:
    """A model of a cascade with the interface of an estimator, the planted stages' answers."""

    calls: ClassVar[list[int]] = []

    def __init__(self, stage: int) -> None:
        self.stage, self.classes_ = stage, np.arange(2)

    def predict_proba(self, rows: np.ndarray) -> np.ndarray:
        self.calls.append(len(rows))
        sure = 0.5 + rows[:, 0] / 2 if self.stage == 0 else np.full(len(rows), 0.99)
        first = np.where(rows[:, 2 - self.stage] == 0, sure, 1 - sure)
        return np.stack([first, 1 - first], axis=1)


def true_risk(knob: float) -> float:
    """Risk of stopping where the largest probability reaches the knob."""
    return 0.0 if knob == math.inf else min(1.0, (2.0 - 2.0 * max(knob, 0.5)) ** 2 / 4)


def draw(count: int, rng: np.random.Generator) -> Tensor:
    sure = rng.random(count)
    full = rng.integers(0, 2, count)
    differs = rng.random(count) < (1 - sure) / 2
    return torch.tensor(np.stack([sure, full, full ^ differs], axis=1), dtype=torch.float32)


def labels_of(x: Tensor, rng: np.random.Generator) -> Tensor:
    """Labels that the full answer misses one time in ten."""
    full = x[:, 1].long()
    return torch.where(torch.from_numpy(rng.random(len(x)) < 0.1), 1 - full, full)


def _cheaper(stages: Any, inputs: Any, policies: Any, **_: Any) -> np.ndarray:
    """Measured seconds that fall along the path, so that tests do not depend on the clock."""
    return 1.0 - 0.01 * np.arange(len(policies))[None]


@pytest.fixture(autouse=True)
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "seconds_per_row", _cheaper)


@pytest.fixture
def x(rng: np.random.Generator) -> Tensor:
    return draw(1000, rng)


def run(data: Any, risk: float = RISK, delta: float = DELTA, **settings: Any) -> Any:
    defaults = {"model": planted, "batch_size": 256, "progress": False}
    return calibrate(dataset=data, risk=risk, delta=delta, **(defaults | settings))


# -- the certificate ------------------------------------------------------------------------------


def test_the_certificate_is_complete(x: Tensor) -> None:
    policy = run(x)
    certificate = policy.certificate
    assert certificate.holds
    assert (certificate.risk, certificate.delta, certificate.loss) == (RISK, DELTA, LOSS)
    assert certificate.unit == "input"
    assert certificate.method == "binomial"
    assert certificate.n == certificate.split["n_test"] == 700
    assert certificate.knob == policy.rule.threshold < 1.0
    assert set(certificate.fingerprints) >= {"model", "data"}
    assert certificate.decoding["task"] == "classification"
    assert certificate.decoding["stages"] == [0]
    assert certificate.evidence["mean_depth"]["0"] == 2.0
    assert certificate.evidence["mean_depth"][str(certificate.index)] < 2.0
    assert any("no test input was used" in sentence for sentence in certificate.assumptions)
    assert str(certificate).startswith("With probability at least 0.9 over the draw of the 700")
    columns = certificate.evidence["columns"]
    assert certificate.evidence["certified"] == columns[: len(certificate.evidence["certified"])]
    json.dumps(policy.to_dict(), allow_nan=False)


def test_evidence_can_be_checked_against_real_runs(x: Tensor) -> None:
    policy = run(x)
    evidence = policy.certificate.evidence
    place = {name: row for row, name in enumerate(row_hashes(x))}
    test = x[[place[name] for name in policy.certificate.split["test_units"]]]
    full = predict(planted, test).labels
    table = np.zeros((len(test), evidence["n_columns"]))
    for column in evidence["columns"]:
        member = policy.member(float(evidence["knobs"][column]))
        table[:, column] = (predict(planted, test, policy=member).labels != full).numpy()
    assert policy.certificate.verify(table)
    table[:, 1] = 0.0
    assert not policy.certificate.verify(table)


def test_each_member_runs_once(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound of the last certified member is read off the losses that its test has seen."""
    begun: list[Policy | None] = []
    original = bench.ClassifierBench.run

    def noted(self: Any, policy: Policy | None) -> Any:
        begun.append(policy)
        return original(self, policy)

    monkeypatch.setattr(bench.ClassifierBench, "run", noted)
    evidence = run(x).certificate.evidence
    assert evidence["upper_bound"]
    assert len(begun) == 1 + len(evidence["columns"])  # full computation first


def test_fitting_and_testing_use_different_inputs(x: Tensor) -> None:
    split = run(torch.cat([x, x[:50]])).certificate.split
    assert split["removed_repetitions"] == 50
    assert not set(split["fit_units"]) & set(split["test_units"])
    assert split["n_fit"] + split["n_test"] == 1000


def test_the_seed_decides(x: Tensor) -> None:
    first, again, other = run(x), run(x), run(x, rng=5)
    assert first.rule == again.rule
    assert first.certificate.evidence == again.certificate.evidence
    assert first.certificate.split["test_units"] != other.certificate.split["test_units"]


@pytest.mark.parametrize("count", [2, 5, 30])
def test_too_few_inputs_give_full_computation_and_a_number(x: Tensor, count: int) -> None:
    policy = run(x[:count])
    assert policy.rule.threshold == math.inf
    assert not policy.certificate.holds
    assert "Too few units" in policy.certificate.notes[0]
    needed = minimum_units(RISK, DELTA, loss_type="binary")
    assert f"at least {needed}" in policy.certificate.notes[0]
    found = predict(planted, x[:count], policy=policy)
    assert not found.certified
    assert set(found.exit_stages.tolist()) == {1}


def test_none_faster_means_full_computation(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        bench, "seconds_per_row", lambda s, i, p, **_: 1.0 + 0.01 * np.arange(len(p))[None]
    )
    policy = run(x)
    assert policy.rule.threshold == math.inf
    assert not policy.certificate.holds
    assert "none is faster than full computation" in policy.certificate.notes[-1]


def test_the_cheapest_certified_member_is_returned(
    x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        bench,
        "seconds_per_row",
        lambda s, i, p, **_: np.array([[1.0, 0.5, *[0.9] * (len(p) - 2)]]),
    )
    policy = run(x)
    certificate = policy.certificate
    assert certificate.index == 1 < certificate.evidence["certified"][-1]
    assert policy.rule.threshold == float(certificate.evidence["knobs"][1])
    mean = certificate.evidence["means"][LOSS][0]
    assert mean <= certificate.evidence["upper_bound"][LOSS] <= RISK


def test_estimators_are_asked_about_many_rows_at_a_time(x: Tensor) -> None:
    """A call has a high price in many; the outcome is that of batches as they will be in use."""
    calls = Estimator.calls
    calls.clear()
    small, large = Estimator(0), Estimator(1)

    def as_function(member: Estimator) -> Any:
        return lambda rows: torch.from_numpy(np.log(member.predict_proba(rows.numpy())))

    policy = Policy(MaxProbability(), Threshold(), stages=(0,))
    settings = {"batch_size": 16, "members": 4, "policy": policy}
    at_once = run(x, model=[small, large], **settings).certificate
    asked, tested = len(calls), at_once.evidence["columns"]
    assert asked <= 2 * (1 + 1 + len(tested))  # two models on the fit split, in full, per member
    calls.clear()
    in_batches = run(x, model=[as_function(small), as_function(large)], **settings).certificate
    assert max(calls) == 16
    assert len(calls) > 20 * asked
    assert at_once.holds
    for name in ("columns", "certified", "means", "mean_depth", "exit_counts", "upper_bound"):
        assert at_once.evidence[name] == in_batches.evidence[name], name
    assert at_once.decoding["batch_size"] == 16


def test_a_family_that_never_stops_early(x: Tensor) -> None:
    def hopeless(batch: Tensor) -> Iterator[Tensor]:
        full = list(planted(batch))[1]
        yield full.flip(1)
        yield full

    policy = run(x, model=hopeless)
    assert "No member stops early" in policy.certificate.notes[0]


# -- losses ---------------------------------------------------------------------------------------


def test_excess_error_is_signed(x: Tensor, rng: np.random.Generator) -> None:
    policy = run((x, labels_of(x, rng)), loss="excess_error")
    certificate = policy.certificate
    assert certificate.holds
    assert certificate.loss == "excess error over the full model"
    assert certificate.method == "star"
    evidence, place = certificate.evidence, certificate.evidence["columns"].index(certificate.index)
    positive = evidence["positive_part_means"][certificate.loss][place]
    assert positive > evidence["means"][certificate.loss][place]
    assert any("offset positive ones" in note for note in certificate.notes)


def test_an_error_rate_is_tested_for_full_computation_too(
    x: Tensor, rng: np.random.Generator
) -> None:
    data = (x, labels_of(x, rng))
    policy = run(data, 0.2, loss="error")
    certificate = policy.certificate
    assert certificate.holds
    assert certificate.evidence["columns"][0] == 1
    assert 0.05 < certificate.evidence["means"]["error"][0] < 0.15  # the full model's own
    assert policy.rule.threshold == float(certificate.evidence["knobs"][certificate.index])
    refused = run(data, 0.05, loss="error")
    assert refused.rule.threshold == math.inf
    assert not refused.certificate.holds
    assert "it has no certificate either" in str(refused.certificate)
    assert "zero by construction" not in str(refused.certificate)


def test_a_certified_error_rate_of_full_computation_alone(
    x: Tensor, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        bench, "seconds_per_row", lambda s, i, p, **_: 1.0 + 0.01 * np.arange(len(p))[None]
    )
    policy = run((x, labels_of(x, rng)), 0.2, loss="error")
    assert policy.rule.threshold == math.inf
    assert policy.certificate.holds
    assert policy.certificate.index == 1
    assert predict(planted, x, policy=policy).certified


def test_a_loss_of_the_user(x: Tensor) -> None:
    def margin_lost(early: Tensor, full: Tensor, labels: Any) -> Tensor:
        assert labels is None
        return 0.5 * (early.argmax(1) != full.argmax(1)).double()

    policy = run(x, loss=margin_lost, bound=0.5)
    assert policy.certificate.loss == "margin_lost loss"
    assert policy.certificate.bound == 0.5
    with pytest.raises(InvalidArgumentError, match="bound"):
        run(x, loss=margin_lost)
    with pytest.raises(InvalidArgumentError, match="one per row"):
        run(x, loss=lambda early, full, labels: [0.0], bound=1.0)


# -- units ----------------------------------------------------------------------------------------


def test_clusters_are_the_unit(x: Tensor) -> None:
    groups = np.arange(1000) // 2
    policy = run(x, groups=groups)
    assert policy.certificate.unit == "cluster"
    assert policy.certificate.n == 350
    pooled = run(x, groups=groups, pool="last week")
    assert pooled.certificate.unit == "input"
    assert any("'last week'" in sentence for sentence in pooled.certificate.assumptions)


def test_delta_is_spent_before_the_test(x: Tensor, tmp_path: Path) -> None:
    ledger = DeltaLedger.create(tmp_path / "ledger.json", budget=0.15)
    policy = run(x, ledger=ledger)
    assert policy.certificate.split["ledger"]["spent"] == DELTA
    assert ledger.spent() == DELTA


@pytest.mark.parametrize("form", ["tensor", "array", "loader", "pairs", "dicts", "datasets"])
def test_every_form_of_a_dataset_says_the_same(
    x: Tensor, rng: np.random.Generator, form: str
) -> None:
    y = labels_of(x, rng)
    expected = run((x, y), loss="excess_error")

    def on_arrays(batch: np.ndarray) -> Iterator[Any]:
        return planted(torch.from_numpy(batch))

    data: Any = {
        "tensor": (x, y.numpy()),
        "array": (x.numpy(), y),
        "loader": DataLoader(TensorDataset(x, y), batch_size=77),
        "pairs": TensorDataset(x, y),
        "dicts": [
            {"row": row.tolist(), "label": int(label)} for row, label in zip(x, y, strict=True)
        ],
        "datasets": None,
    }[form]
    if form == "datasets":
        datasets = pytest.importorskip("datasets")
        data = datasets.Dataset.from_dict({"row": x.tolist(), "label": y.tolist()})
    found = run(data, loss="excess_error", model=on_arrays if form == "array" else planted)
    assert found.rule == expected.rule
    assert found.certificate.fingerprints["data"] == expected.certificate.fingerprints["data"]


# -- policies and models --------------------------------------------------------------------------


@pytest.mark.parametrize("score", [MaxProbability(), Margin()])
def test_any_score(x: Tensor, score: Any) -> None:
    assert run(x, policy=Policy(score, Threshold(), stages=(0,))).certificate.holds


def test_the_policy_runs_as_certified_and_nowhere_else(x: Tensor, tmp_path: Path) -> None:
    policy = run(x)
    found = predict(planted, x, policy=policy)
    assert found.certified
    assert found.certificate == policy.certificate
    policy.save_pretrained(tmp_path)
    again = Policy.from_pretrained(tmp_path)
    assert predict(planted, x, policy=again).certified

    def other(batch: Tensor) -> Iterator[Tensor]:
        for logits in planted(batch):
            yield 2 * logits

    with pytest.raises(CertificateMismatchError, match="another model"):
        predict(other, x, policy=policy)
    outside = predict(other, x, policy=policy, certified=False)
    assert not outside.certified
    assert "another model" in outside.mismatches[0]
    assert not outside.certificate.holds  # type: ignore[union-attr]
    moved = replace(policy, certificate=replace(policy.certificate, decoding={}))
    with pytest.raises(CertificateMismatchError, match="another task"):
        predict(planted, x, policy=moved)


def test_weights_are_part_of_the_model(x: Tensor) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def stages(self, batch: Tensor) -> Iterator[Tensor]:
            early, full = planted(batch)
            yield self.scale * early
            yield full

    model = Scaled()
    policy = run(x, model=model)
    assert predict(model, x, policy=policy).certified
    with torch.no_grad():
        model.scale.mul_(1.5)
    with pytest.raises(CertificateMismatchError, match="another model"):
        predict(model, x, policy=policy)


@pytest.fixture(scope="module")
def encoder() -> Any:
    return tiny_encoder("distilbert", seed=1)


def test_inputs_that_shaped_the_exits_are_left_out(encoder: Any) -> None:
    inputs = some_inputs(encoder, 400, seed=5)
    train_classifier_exits(encoder, rows_of(inputs, slice(100)), layers=(1, 2), progress=False)
    policy = run(inputs, 0.5, model=encoder)
    split = policy.certificate.split
    assert split["removed_because_they_shaped_the_exits"] == 100
    exits = ClassifierExits.of(encoder)
    assert exits is not None
    assert not set(exits.record.units) & {*split["fit_units"], *split["test_units"]}
    with pytest.raises(InvalidArgumentError, match="did not shape the exits"):
        run(rows_of(inputs, slice(100)), 0.5, model=encoder)


def test_exits_are_trained_where_there_are_none() -> None:
    model = tiny_encoder("distilbert", seed=2)
    policy = run(some_inputs(model, 300, seed=6), 0.5, model=model, training=ClassifierTraining(20))
    assert ClassifierExits.of(model) is not None
    assert policy.certificate.split["n_train_exits"] == 90
    assert set(policy.certificate.fingerprints) >= {"model", "exits"}
    ClassifierExits.of(model).weight.mul_(2)  # type: ignore[union-attr]
    if policy.certificate.holds:
        with pytest.raises(CertificateMismatchError, match="another exits"):
            predict(model, some_inputs(model, 5), policy=policy)


# -- what is refused ------------------------------------------------------------------------------


def test_a_device_that_is_not_there_is_named(x: Tensor) -> None:
    layer = torch.nn.Linear(3, 2)
    layer.stages = planted  # type: ignore[assignment]
    with pytest.raises(InvalidArgumentError, match=r"`device` must be a usable .*got 'warp'"):
        run(x[:100], model=layer, device="warp")
    with pytest.raises(InvalidArgumentError, match="no `to`"):
        run(x[:100], device="cpu")


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"mode": "exact"}, InvalidArgumentError, "left out for a classifier"),
        ({"temperature": 0.5}, InvalidArgumentError, "left out for a classifier"),
        ({"loss": "excess_error"}, InvalidArgumentError, "labels"),
        ({"loss": "departure"}, InvalidArgumentError, "excess_error"),
        ({"members": 0}, InvalidArgumentError, "members"),
        ({"batch_size": 0}, InvalidArgumentError, "batch_size"),
        ({"rng": 0.5}, InvalidTypeError, "rng"),
        ({"rng": 2**32}, InvalidArgumentError, "rng"),
        ({"members": 2.5}, InvalidTypeError, "members"),
        ({"batch_size": "8"}, InvalidTypeError, "batch_size"),
        ({"groups": 3}, InvalidArgumentError, "groups"),
        ({"loss": max, "bound": "a"}, InvalidTypeError, "bound"),
        ({"training": 3}, InvalidTypeError, "training"),
        ({"groups": [1, 2]}, InvalidArgumentError, "groups"),
        ({"policy": Policy(MaxProbability(), Threshold(), stages=(1,))}, InvalidArgumentError, "1"),
        (
            {"policy": Policy(MaxProbability(), AllRows(Threshold()), stages=(0,))},
            UnsupportedError,
            "decide together",
        ),
    ],
)
def test_bad_arguments_are_named(x: Tensor, settings: Any, error: Any, match: str) -> None:
    with pytest.raises(error, match=match):
        run(x[:100], **settings)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        ((torch.ones(3, 3), [0, 1]), "2 labels"),
        ((torch.ones(3, 3), [0, 1, -1]), "labels of 0"),
        ((torch.ones(3, 3), [0.5, 1.0, 1.0]), "whole class numbers"),
        (torch.ones(0, 3), "no rows"),
    ],
)
def test_bad_datasets_are_named(data: Any, match: str) -> None:
    with pytest.raises((InvalidArgumentError, InvalidTypeError), match=match):
        run(data)


def test_one_set_of_patience(x: Tensor) -> None:
    """A rule on answers runs through the same hook: with two stages patience never stops."""
    policy = run(x, policy=Policy(MaxProbability(), Patience(), stages=(0,)))
    assert not policy.certificate.holds


# -- the guarantee --------------------------------------------------------------------------------


def _naive(losses: Any, **settings: Any) -> Any:
    """Take the cheapest member whose mean on the test split looks good enough."""
    if not callable(losses):
        return control_risk(losses, **settings)
    means = [0.0] + [losses(column).mean() for column in range(1, settings["n_columns"])]
    good = np.array(means) <= settings["risk"]
    index = int(np.flatnonzero(good).max()) or None
    return replace(control_risk(losses, **settings), index=index, certified=good)


def _broken(trials: int) -> tuple[int, int]:
    """Count calibrations that certify something, and those whose true risk is above the promise."""
    rng = np.random.default_rng(7)
    certified = broken = 0
    for trial in range(trials):
        policy = run(draw(220, rng), 0.06, 0.05, rng=trial, members=6)
        certified += policy.rule.threshold < math.inf
        broken += true_risk(policy.rule.threshold) > 0.06
    return certified, broken


@pytest.mark.statistical
@pytest.mark.slow
def test_the_promise_holds_and_tuning_would_break_it(monkeypatch: pytest.MonkeyPatch) -> None:
    trials = 400
    certified, broken = _broken(trials)
    assert certified > trials / 4
    assert broken <= violation_limit(trials, 0.05)
    monkeypatch.setattr(certifying, "control_risk", _naive)
    assert _broken(trials // 2)[1] > violation_limit(trials // 2, 0.05)
