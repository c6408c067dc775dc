"""``predict``: rows that stop leave the batch, whatever kind of model answers in stages."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.compose import ColumnTransformer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from torch import Tensor, nn

from adaptive import (
    InvalidArgumentError,
    Policy,
    UnsupportedError,
    calibrate,
    predict,
)
from adaptive.calibration import InvalidTypeError
from adaptive.classifiers import StageOutput, collect_predictions
from adaptive.policies import (
    AllRows,
    Margin,
    MaxProbability,
    NegativeEntropy,
    Patience,
    ProbeScore,
    RandomStage,
    SampledExit,
    Saturation,
    Threshold,
    exit_stages,
)

CLASSES, STAGES = 4, 4


class Staged(nn.Module):
    """A few layers, each with a head; counts the rows that it computes."""

    def __init__(self, *, hidden: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.layers = nn.Parameter(torch.randn(STAGES, 6, 6, generator=generator))
        self.heads = nn.Parameter(3 * torch.randn(STAGES, 6, CLASSES, generator=generator))
        self.hidden = hidden
        self.computed = 0

    def stages(self, x: Tensor) -> Iterator[Any]:
        for layer, head in zip(self.layers, self.heads, strict=True):
            self.computed += len(x)
            x = torch.tanh(x @ layer)
            logits = x @ head
            keep = yield StageOutput(logits, x, logits[:, 0]) if self.hidden else logits
            x = x if keep is None else x[keep]


def ignoring(model: Staged) -> Any:
    """The same stages by a generator that does not look at what it is sent."""

    def stages(x: Tensor) -> Iterator[Tensor]:
        for layer, head in zip(model.layers, model.heads, strict=True):
            x = torch.tanh(x @ layer)
            yield x @ head

    return stages


def listed(model: Staged) -> Any:
    """The same stages as a plain iterator, which nothing can be sent to."""
    return lambda x: iter(list(ignoring(model)(x)))


@pytest.fixture
def model() -> Staged:
    return Staged()


@pytest.fixture
def inputs() -> Tensor:
    return torch.randn(64, 6, generator=torch.Generator().manual_seed(4))


def policy_at(knob: float, score: Any = None, stages: tuple[int, ...] = (0, 1, 2)) -> Policy:
    return Policy(MaxProbability() if score is None else score, Threshold(knob), stages=stages)


def slow(model: Staged, x: Tensor, policy: Policy) -> tuple[list[int], Tensor]:
    """Row by row, every stage computed, the first that passes taken."""
    stages, logits = [], []
    with torch.no_grad():
        for row in x:
            answers = list(ignoring(model)(row[None]))
            passing = [
                stage
                for stage in policy.stages
                if float(torch.softmax(answers[stage], dim=-1).max()) >= policy.rule.threshold  # type: ignore[attr-defined]
            ]
            stages.append(min(passing, default=STAGES - 1))
            logits.append(answers[stages[-1]][0])
    return stages, torch.stack(logits)


# -- the loop -------------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [(0, 1, 2), (1,), (0, 2)])
@pytest.mark.parametrize("form", [lambda m: m, ignoring, listed], ids=["sent", "ignoring", "list"])
def test_the_slow_way_says_the_same(
    model: Staged, inputs: Tensor, stages: tuple[int, ...], form: Any
) -> None:
    policy = policy_at(0.8, stages=stages)
    expected, logits = slow(model, inputs, policy)
    assert len(set(expected)) > 1
    for size in (None, 1, 7, 64):
        found = predict(form(model), inputs, policy=policy, batch_size=size)
        assert found.exit_stages.tolist() == expected
        torch.testing.assert_close(found.logits, logits)
        assert found.labels.tolist() == logits.argmax(dim=-1).tolist()
        assert found.depths.tolist() == [stage + 1 for stage in expected]
        assert found.mean_depth == pytest.approx(np.mean(expected) + 1)


def test_rows_that_stop_are_not_computed(model: Staged, inputs: Tensor) -> None:
    found = predict(model, inputs, policy=policy_at(0.8))
    assert model.computed == found.depths.sum() < STAGES * len(inputs)


def test_without_a_policy_all_is_computed(model: Staged, inputs: Tensor) -> None:
    found = predict(model, inputs)
    assert set(found.exit_stages.tolist()) == {STAGES - 1}
    assert found.scores.isnan().all()
    assert not found.certified
    assert found.certificate is None
    assert not found.logits.requires_grad


def test_scores_are_those_of_the_last_stage_asked(model: Staged, inputs: Tensor) -> None:
    found = predict(model, inputs, policy=policy_at(0.8))
    early = found.exit_stages < STAGES - 1
    assert (found.scores[early] >= 0.8).all()
    assert (found.scores[~early] < 0.8).all()


def test_everybody_stops_at_once(model: Staged, inputs: Tensor) -> None:
    found = predict(model, inputs, policy=policy_at(0.0))
    assert model.computed == len(inputs)
    assert set(found.exit_stages.tolist()) == {0}


def test_one_row(model: Staged, inputs: Tensor) -> None:
    found = predict(model, inputs[:1], policy=policy_at(0.8))
    assert found.logits.shape == (1, CLASSES)


def test_ties_with_the_threshold_stop(model: Staged, inputs: Tensor) -> None:
    knob = float(predict(model, inputs, policy=policy_at(math.inf, stages=(1,))).scores.median())
    found = predict(model, inputs, policy=policy_at(knob, stages=(1,)))
    assert (found.scores == knob).any()
    assert ((found.exit_stages == 1) == (found.scores >= knob)).all()


def test_a_score_that_is_not_a_number_never_stops(inputs: Tensor) -> None:
    def stages(x: Tensor) -> Iterator[Tensor]:
        logits = x[:, :CLASSES].clone()
        logits[::2] = float("nan")
        yield logits
        yield x[:, :CLASSES]

    found = predict(stages, inputs, policy=policy_at(0.0, stages=(0,)))
    assert found.exit_stages.tolist() == [1, 0] * 32
    assert found.logits.isfinite().all()


@pytest.mark.parametrize("rule", [Patience(1), SampledExit(1.0)], ids=lambda r: type(r).__name__)
def test_memory_goes_with_its_row(inputs: Tensor, rule: Any) -> None:
    """Rules with memory or noise decide for a row alone as they do in company."""
    model = Staged(hidden=True)
    score = ProbeScore()
    policy = Policy(score, rule, stages=(0, 1, 2))
    units = torch.arange(100, 164)
    together = predict(model, inputs, policy=policy, units=units)
    assert len(set(together.exit_stages.tolist())) > 2
    for row in range(len(inputs)):
        one = predict(model, inputs[row : row + 1], policy=policy, units=units[row : row + 1])
        assert one.exit_stages.tolist() == [int(together.exit_stages[row])]


def test_the_state_before_goes_with_its_row(inputs: Tensor) -> None:
    model = Staged(hidden=True)
    policy = policy_at(0.3, Saturation())
    together = predict(model, inputs, policy=policy)
    assert len(set(together.exit_stages.tolist())) > 1
    for row in range(len(inputs)):
        one = predict(model, inputs[row : row + 1], policy=policy)
        torch.testing.assert_close(one.scores, together.scores[row : row + 1])


def test_rows_that_decide_together(model: Staged, inputs: Tensor) -> None:
    """Such a rule runs, uncertified: nobody stops before all can."""
    policy = Policy(MaxProbability(), AllRows(Threshold(0.2)), stages=(0, 1, 2))
    assert len(set(predict(model, inputs, policy=policy).exit_stages.tolist())) == 1


# -- what comes in --------------------------------------------------------------------------------


def test_any_container_has_rows(model: Staged, inputs: Tensor) -> None:
    policy = policy_at(0.8)
    expected = predict(model, inputs, policy=policy).exit_stages.tolist()

    def of(form: Any) -> Any:
        return lambda batch: model.stages(form(batch))

    given = {
        "array": (lambda b: torch.from_numpy(b), inputs.numpy()),
        "mapping": (lambda b: b["x"], {"x": inputs, "unused": np.zeros(64)}),
        "list": (lambda b: torch.stack(b), list(inputs)),
    }
    for form, batch in given.values():
        for size in (None, 10):
            found = predict(of(form), batch, policy=policy, batch_size=size)
            assert found.exit_stages.tolist() == expected


def test_arrays_out_of_a_stage() -> None:
    def stages(x: np.ndarray) -> Iterator[np.ndarray]:
        keep = yield np.stack([x, -x], axis=1)
        x = x if keep is None else x[keep]
        yield np.stack([-x, x], axis=1)

    x = np.array([3.0, 0.1, -3.0], dtype=np.float32)
    found = predict(stages, x, policy=policy_at(0.9, stages=(0,)))
    assert found.exit_stages.tolist() == [0, 1, 0]
    assert found.labels.tolist() == [0, 1, 1]


def test_a_cascade_of_estimators_and_functions() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 5))
    y = (x @ [1, 1, 0, 0, 2] > 0).astype(int) + (x[:, 2] > 1)
    small, large = LogisticRegression().fit(x[:, :3], y), LogisticRegression().fit(x, y)

    class Small:
        classes_ = small.classes_

        def predict_proba(self, rows: np.ndarray) -> np.ndarray:
            probability: np.ndarray = small.predict_proba(rows[:, :3])
            return probability

    seen: list[int] = []

    def oracle(rows: np.ndarray) -> Tensor:
        seen.append(len(rows))
        return torch.from_numpy(large.predict_log_proba(rows))

    for cascade in ([Small(), large], (Small(), oracle)):
        found = predict(cascade, x, policy=policy_at(0.8, stages=(0,)))
        sure = small.predict_proba(x[:, :3]).max(axis=1) >= np.float32(0.8)
        answers = np.where(sure, small.predict(x[:, :3]), large.predict(x))
        assert found.labels.tolist() == answers.tolist()
        assert found.exit_stages.tolist() == (~sure).astype(int).tolist()
    assert seen == [int((~sure).sum())]
    tensors = predict([Small(), large], torch.from_numpy(x), policy=policy_at(0.8, stages=(0,)))
    assert tensors.labels.tolist() == answers.tolist()


def test_a_frame_has_one_row_per_row(model: Staged, inputs: Tensor) -> None:
    found = predict(model, inputs, policy=policy_at(0.8))
    frame = found.to_frame()
    assert list(frame) == ["label", "exit_stage", "score", "depth"]
    assert frame["exit_stage"].tolist() == found.exit_stages.tolist()


# -- offline and online ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "score", [MaxProbability(), Margin(), NegativeEntropy(), Saturation(), ProbeScore()]
)
@pytest.mark.parametrize("stages", [(0, 1, 2), (0, 2)])
def test_simulation_on_a_trace_is_the_run(inputs: Tensor, score: Any, stages: Any) -> None:
    """Offline decisions over a trace, row by row, at every knob of the path."""
    model = Staged(hidden=True)
    trace = collect_predictions(
        model, inputs, score=score, stages=stages, batch_size=16, progress=False
    )
    family = Policy(score, Threshold(), stages=stages)
    checked = 0
    for knob in family.rule.knobs(trace, size=20):
        policy = family.member(knob)
        near = np.abs(trace.scores - np.float32(knob)).min(axis=1) < 1e-6
        offline = exit_stages(policy.rule, trace, stages=stages)
        found = predict(model, inputs, policy=policy, batch_size=23)
        online = found.exit_stages.numpy()
        assert (online == offline)[~near].all()
        answers = np.concatenate(
            [trace.columns["answers"], trace.columns["choices"][:, None]], axis=1
        )
        assert (found.labels.numpy() == answers[np.arange(64), offline])[~near].all()
        checked += int((~near).sum())
    assert checked > 800


def test_patience_offline_and_online(inputs: Tensor) -> None:
    model = Staged()
    trace = collect_predictions(model, inputs, progress=False)
    policy = Policy(MaxProbability(), Patience(1), stages=(0, 1, 2))
    found = predict(model, inputs, policy=policy)
    assert found.exit_stages.tolist() == exit_stages(policy.rule, trace).tolist()


def test_a_trace_says_what_the_stages_say(model: Staged, inputs: Tensor) -> None:
    labels = torch.arange(64) % CLASSES
    trace = collect_predictions(model, (inputs, labels), batch_size=10, progress=False)
    with torch.no_grad():
        answers = torch.stack([z.argmax(-1) for z in ignoring(model)(inputs)], dim=1).numpy()
    assert (trace.columns["answers"] == answers[:, :-1]).all()
    assert (trace.losses["disagreement"] == (answers[:, :-1] != answers[:, -1:])).all()
    wrong = (answers != labels.numpy()[:, None]).astype(int)
    assert (trace.losses["excess_error"] == wrong[:, :-1] - wrong[:, -1:]).all()
    assert (np.diff(trace.costs) > 0).all()
    assert trace.cost_quantity == "seconds"
    assert trace.lengths.tolist() == [1] * 64


# -- what is refused ------------------------------------------------------------------------------


def test_a_model_without_stages_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"stages\(batch\)"):
        predict(nn.Linear(2, 2), torch.ones(1, 2))


@pytest.mark.parametrize(
    ("yielded", "match"),
    [
        ([], "at least one stage"),
        ([torch.ones(3)], "at least two classes"),
        ([torch.ones(3, 1)], "at least two classes"),
        ([torch.ones(3, 2), torch.ones(2, 2)], "2 rows"),
        ([torch.ones(3, 2), torch.ones(3, 4)], "shape"),
        ([torch.ones(2, 2)], "shape"),
    ],
)
def test_stages_that_do_not_fit(yielded: list[Tensor], match: str) -> None:
    with pytest.raises(InvalidArgumentError, match=match):
        predict(lambda x: iter(yielded), torch.ones(3, 2))


def test_something_else_than_logits() -> None:
    with pytest.raises(InvalidTypeError, match="yields logits or a StageOutput"):
        predict(lambda x: iter(["yes"]), torch.ones(3, 2))


def test_the_last_stage_is_not_asked(model: Staged, inputs: Tensor) -> None:
    with pytest.raises(InvalidArgumentError, match="the last is full computation"):
        predict(model, inputs, policy=policy_at(0.99, stages=(0, STAGES - 1)))


@pytest.mark.parametrize(
    ("score", "match"),
    [
        (ProbeScore(), "yields no probe"),
        (Saturation(), "yields no hidden state"),
        (MaxProbability(pruned=True), "pruned_logits"),
    ],
)
def test_features_that_are_not_there(model: Staged, inputs: Tensor, score: Any, match: str) -> None:
    with pytest.raises(InvalidArgumentError, match=match):
        predict(model, inputs, policy=policy_at(0.5, score))


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"policy": 0.5}, InvalidTypeError, "policy"),
        ({"batch_size": 0}, InvalidArgumentError, "batch_size"),
        ({"batch_size": 2.5}, InvalidTypeError, "batch_size"),
        ({"batch_size": "8"}, InvalidTypeError, "batch_size"),
        ({"units": torch.arange(3)}, InvalidArgumentError, "units"),
        ({"units": "ab"}, InvalidTypeError, "units"),
        ({"units": torch.rand(3)}, InvalidTypeError, "units"),
        ({"seed": "x"}, InvalidTypeError, "seed"),
        ({"seed": 1.5}, InvalidTypeError, "seed"),
        ({"seed": -1}, InvalidArgumentError, "seed"),
    ],
)
def test_bad_arguments_are_named(
    model: Staged, inputs: Tensor, settings: Any, error: Any, match: str
) -> None:
    with pytest.raises(error, match=match):
        predict(model, inputs, **settings)


def test_units_are_integers_of_any_kind(model: Staged, inputs: Tensor) -> None:
    units = torch.arange(64).flip(0)
    policy = Policy(MaxProbability(), RandomStage(0.5), stages=(0, 1))
    plain = predict(model, inputs, policy=policy, units=units, seed=5)
    assert len(set(plain.exit_stages.tolist())) > 1
    for kind in (units.tolist(), units.numpy()):
        found = predict(model, inputs, policy=policy, units=kind, seed=np.int64(5))
        assert torch.equal(found.exit_stages, plain.exit_stages)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"batch_size": 0}, InvalidArgumentError),
        ({"batch_size": 1.5}, InvalidTypeError),
        ({"rng": "x"}, InvalidTypeError),
        ({"rng": -1}, InvalidArgumentError),
        ({"stages": 0}, InvalidTypeError),
        ({"stages": (0.5,)}, InvalidTypeError),
        ({"score": 3}, InvalidTypeError),
    ],
    ids=str,
)
def test_bad_arguments_of_traces_are_named(
    model: Staged, inputs: Tensor, settings: Any, error: Any
) -> None:
    with pytest.raises(error, match=f"`{next(iter(settings))}` must be"):
        collect_predictions(model, inputs, progress=False, **settings)


@pytest.mark.parametrize(
    ("batch", "match"),
    [(torch.ones(0, 6), "no rows"), ({"a": torch.ones(2), "b": torch.ones(3)}, "as many rows")],
)
def test_batches_without_rows(model: Staged, batch: Any, match: str) -> None:
    with pytest.raises(InvalidArgumentError, match=match):
        predict(model, batch)


def test_a_batch_of_no_kind(model: Staged) -> None:
    with pytest.raises(InvalidTypeError, match="batch"):
        predict(model, 3.0)


def test_a_table_stays_a_frame_with_its_labels_taken_out() -> None:
    """Estimators fitted on a frame are asked with one, in its own columns and order."""
    pd = pytest.importorskip("pandas")
    rng = np.random.default_rng(3)
    table = pd.DataFrame(rng.normal(size=(900, 4)), columns=["age", "sex", "fare", "class"])
    table["label"] = (table.to_numpy().sum(axis=1) > 0).astype(int)
    table = table.sample(frac=1.0, random_state=0)  # its index is no longer 0, 1, 2, ...
    train, draw, fresh = table[:300], table[300:800], table[800:]
    names = [name for name in table.columns if name != "label"]
    few = ColumnTransformer([("few", "passthrough", ["age", "class"])])
    small = make_pipeline(few, LogisticRegression()).fit(train[names], train["label"])
    large = LogisticRegression().fit(train[names], train["label"])

    settings: dict[str, Any] = {"delta": 0.1, "batch_size": 64, "progress": False}
    policy = calibrate([small, large], draw, 0.3, loss="error", **settings)
    apart = calibrate([small, large], (draw[names], draw["label"]), 0.3, loss="error", **settings)
    assert policy.certificate.n == 350
    assert policy.certificate.fingerprints["data"] == apart.certificate.fingerprints["data"]
    assert policy.certificate.split["test_units"] == apart.certificate.split["test_units"]

    policy = Policy(MaxProbability(), Threshold(0.9), stages=(0,))
    found = predict([small, large], fresh[names], policy=policy, batch_size=17)
    early = small.predict_proba(fresh[names])
    stops = early.max(axis=1) >= np.float32(0.9)
    expected = np.where(stops, early.argmax(axis=1), large.predict(fresh[names]))
    assert 0 < stops.sum() < len(fresh)
    assert found.labels.tolist() == expected.tolist()
    assert (found.exit_stages.numpy() == 0).tolist() == stops.tolist()


def test_estimators_count_classes_from_zero() -> None:
    x = np.random.default_rng(0).normal(size=(30, 2))
    named = LogisticRegression().fit(x, np.where(x[:, 0] > 0, "a", "b"))
    with pytest.raises(InvalidArgumentError, match="LabelEncoder"):
        predict([named, named], x)
    with pytest.raises(InvalidArgumentError, match="two models or more"):
        predict([named], x)


def test_dropout_in_a_module_is_refused(inputs: Tensor) -> None:
    class Dropping(Staged):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.1)

    with pytest.raises(InvalidArgumentError, match=r"model\.eval\(\)"):
        predict(Dropping(), inputs)
    assert len(predict(Dropping().eval(), inputs)) == 64


def test_the_generator_is_closed(inputs: Tensor) -> None:
    closed: list[bool] = []

    def stages(x: Tensor) -> Iterator[Tensor]:
        try:
            yield x[:, :2]
            yield x[:, :2]
        finally:
            closed.append(True)

    predict(stages, inputs, policy=policy_at(0.0, stages=(0,)))
    assert closed == [True]
