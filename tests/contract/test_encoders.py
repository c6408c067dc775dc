"""Every encoder family: full depth is the model's own, exits are per row, padding is nothing."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoders import CLASSES, FAMILIES, LAYERS, rows_of, some_inputs, tiny_encoder
from torch import nn
from transformers import PreTrainedModel

from adaptive import calibrate, predict
from adaptive._encoders import ENCODERS, EncoderRun
from adaptive._predict import stages_of
from adaptive.calibration import InvalidArgumentError, UnsupportedError
from adaptive.classifiers import ClassifierExits, train_classifier_exits
from adaptive.policies import (
    MaxProbability,
    Patience,
    Policy,
    ProbeScore,
    Saturation,
    Threshold,
)

NAMES = sorted(FAMILIES)
ROWS = 160


@pytest.fixture(scope="module", params=NAMES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """A model with trained exits after every layer but the last."""
    found = tiny_encoder(request.param)
    train_classifier_exits(
        found, some_inputs(found, ROWS, seed=1), layers=(1, 2, 3), progress=False
    )
    return found


@pytest.fixture(scope="module")
def inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return some_inputs(model, 40, seed=2)


def middle(model: PreTrainedModel, inputs: Any, score: Any = None) -> Policy:
    """A policy under which some rows stop at each exit and some do not stop."""
    score = MaxProbability() if score is None else score
    stages = (0, 1, 2)
    never = predict(model, inputs, policy=Policy(score, Threshold(), stages=stages))
    knob = float(never.scores[torch.isfinite(never.scores)].median())
    return Policy(score, Threshold(knob), stages=stages)


def test_the_table_has_every_family() -> None:
    known = {name for family in ENCODERS for name in family.model_types}
    tested = {tiny_encoder(name).config.model_type for name in NAMES}
    assert known == tested


@torch.no_grad()
def test_full_depth_is_the_models_own(model: PreTrainedModel, inputs: dict[str, Any]) -> None:
    own = model(**inputs).logits
    found = predict(model, inputs)
    torch.testing.assert_close(found.logits, own, atol=1e-5, rtol=1e-5)
    assert found.labels.tolist() == own.argmax(dim=-1).tolist()
    assert found.mean_depth == LAYERS
    assert set(found.exit_stages.tolist()) == {3}
    assert found.scores.isnan().all()


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@torch.no_grad()
def test_any_attention_kernel(model: PreTrainedModel, inputs: Any, kernel: str) -> None:
    other = copy.deepcopy(model)
    other.set_attn_implementation(kernel)
    exits = ClassifierExits.of(model)
    assert exits is not None
    exits.attach(other)
    policy = middle(model, inputs)
    here, there = predict(model, inputs, policy=policy), predict(other, inputs, policy=policy)
    torch.testing.assert_close(here.scores, there.scores, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        predict(other, inputs).logits, model(**inputs).logits, atol=1e-4, rtol=1e-4
    )


def test_hidden_states_are_the_models_own(model: PreTrainedModel, inputs: Any) -> None:
    with torch.no_grad():
        own = model(**inputs, output_hidden_states=True).hidden_states
        own = own[:: (len(own) - 1) // LAYERS]  # ALBERT reports what is inside its groups too
        run = EncoderRun(model, inputs)
        for layer in range(1, LAYERS):
            run.forward(layer - 1, layer)
            torch.testing.assert_close(run.hidden, own[layer], atol=1e-5, rtol=1e-5)
            summary = run.summary()
            real = inputs.get("attention_mask", torch.ones(own[layer].shape[:2]))
            mean = (own[layer] * real[..., None]).sum(1) / real.sum(1, keepdim=True)
            torch.testing.assert_close(summary, torch.cat([own[layer][:, 0], mean], dim=-1))


@pytest.mark.parametrize(
    "score", [MaxProbability(), ProbeScore(), Saturation()], ids=lambda s: type(s).__name__
)
def test_a_row_does_not_depend_on_its_batch(
    model: PreTrainedModel, inputs: dict[str, Any], score: Any
) -> None:
    """Rows alone, in halves, reversed and all together: same stage, same logits."""
    policy = middle(model, inputs, score)
    together = predict(model, inputs, policy=policy)
    if isinstance(score, MaxProbability):
        assert len(set(together.exit_stages.tolist())) > 1
    count = len(together)
    alone = predict(model, inputs, policy=policy, batch_size=1)
    halves = predict(model, inputs, policy=policy, batch_size=count // 2 + 1)
    order = torch.arange(count - 1, -1, -1)
    back = predict(model, rows_of(inputs, order), policy=policy)
    for other, logits, stages in (
        (alone, alone.logits, alone.exit_stages),
        (halves, halves.logits, halves.exit_stages),
        (back, back.logits[order], back.exit_stages[order]),
    ):
        assert len(other) == count
        assert stages.tolist() == together.exit_stages.tolist()
        torch.testing.assert_close(logits, together.logits, atol=1e-4, rtol=1e-4)


def test_padding_is_nothing(model: PreTrainedModel, inputs: dict[str, Any]) -> None:
    if "input_ids" not in inputs:
        pytest.skip("images have no padding")
    policy = middle(model, inputs)
    padded = predict(model, inputs, policy=policy)
    pad = model.config.pad_token_id
    wider = {
        "input_ids": nn.functional.pad(inputs["input_ids"], (0, 5), value=pad),
        "attention_mask": nn.functional.pad(inputs["attention_mask"], (0, 5)),
    }
    more = predict(model, wider, policy=policy)
    assert more.exit_stages.tolist() == padded.exit_stages.tolist()
    torch.testing.assert_close(more.logits, padded.logits, atol=1e-4, rtol=1e-4)
    rows = stages_of(model).units(wider)
    assert rows == stages_of(model).units(inputs)
    lists = predict(model, rows, policy=policy)
    torch.testing.assert_close(lists.logits, padded.logits, atol=1e-4, rtol=1e-4)


def test_rows_that_stop_are_not_computed(
    model: PreTrainedModel, inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = middle(model, inputs)
    seen: list[int] = []
    forward = EncoderRun.forward

    def noted(run: EncoderRun, low: int, high: int) -> None:
        seen.append(run.hidden.shape[0] * (high - low))
        forward(run, low, high)

    monkeypatch.setattr(EncoderRun, "forward", noted)
    found = predict(model, inputs, policy=policy)
    assert sum(seen) == found.depths.sum()
    assert found.mean_depth < LAYERS


def test_patience_and_agreement(model: PreTrainedModel, inputs: dict[str, Any]) -> None:
    """Patience 1 stops where two exits in a row answer the same: checked by hand."""
    policy = Policy(MaxProbability(), Patience(1), stages=(0, 1, 2))
    found = predict(model, inputs, policy=policy)
    answers = np.stack(
        [
            predict(
                model, inputs, policy=Policy(MaxProbability(), Threshold(0.0), stages=(exit,))
            ).labels.numpy()
            for exit in range(3)
        ],
        axis=1,
    )
    same = answers[:, 1:] == answers[:, :-1]
    expected = np.where(same[:, 0], 1, np.where(same[:, 1], 2, 3))
    assert found.exit_stages.tolist() == expected.tolist()


def test_nothing_stays_on_the_model(model: PreTrainedModel, inputs: dict[str, Any]) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        own = model(**inputs).logits
        predict(model, inputs, policy=middle(model, inputs))
        assert all(not m._forward_pre_hooks for m in model.modules())
        assert torch.equal(model(**inputs).logits, own)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_error_inside_leaves_the_model_as_it_was(
    model: PreTrainedModel, inputs: dict[str, Any]
) -> None:
    images = {"pixel_values": torch.zeros(3, 2, 8, 8)}  # of two channels instead of one
    texts = {"input_ids": torch.full((3, 4), -7)}
    with pytest.raises((IndexError, ValueError, RuntimeError)):
        predict(model, images if "pixel_values" in inputs else texts)
    assert all(not m._forward_pre_hooks for m in model.modules())


def test_exits_travel_with_the_model(
    model: PreTrainedModel, inputs: dict[str, Any], tmp_path: Path
) -> None:
    exits = ClassifierExits.of(model)
    assert exits is not None
    model.save_pretrained(tmp_path)
    exits.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    policy = middle(model, inputs)
    here, there = predict(model, inputs, policy=policy), predict(again, inputs, policy=policy)
    assert torch.equal(here.logits, there.logits)
    assert ClassifierExits.of(again).record == exits.record  # type: ignore[union-attr]
    half = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert predict(half, inputs, policy=policy).logits.dtype == torch.float32


@pytest.mark.parametrize("labelled", [False, True])
def test_calibrate_and_predict(model: PreTrainedModel, labelled: bool, monkeypatch: Any) -> None:
    import adaptive._classifier_bench as module

    monkeypatch.setattr(
        module,
        "seconds_per_row",
        lambda s, x, policies, **_: 1.0 - 0.01 * np.arange(len(policies))[None],
    )
    inputs = some_inputs(model, 300, seed=3)
    labels = predict(model, inputs).labels
    dataset = (inputs, labels) if labelled else inputs
    policy = calibrate(
        model,
        dataset,
        0.3,
        0.1,
        loss="excess_error" if labelled else "disagreement",
        batch_size=64,
        progress=False,
    )
    assert policy.certificate is not None
    assert policy.certificate.decoding["task"] == "classification"
    found = predict(model, some_inputs(model, 50, seed=4), policy=policy)
    assert found.certified is policy.certificate.holds
    assert found.logits.shape == (50, CLASSES)


def test_two_threads_share_a_model(model: PreTrainedModel, inputs: dict[str, Any]) -> None:
    """While one thread stops the model in front of its layers, another runs it as it is."""
    policy = middle(model, inputs)
    expected = predict(model, inputs, policy=policy).exit_stages
    with torch.no_grad():
        own = model(**inputs).logits
    errors: list[BaseException] = []

    def plainly() -> None:
        try:
            with torch.no_grad():
                for _ in range(20):
                    torch.testing.assert_close(model(**inputs).logits, own)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=plainly)
    thread.start()
    for _ in range(20):
        assert torch.equal(predict(model, inputs, policy=policy).exit_stages, expected)
    thread.join()
    assert not errors


def test_dropout_is_refused(model: PreTrainedModel, inputs: dict[str, Any]) -> None:
    if model.config.model_type in ("albert", "vit"):
        pytest.skip("without dropout by default")
    training = copy.deepcopy(model).train()
    with pytest.raises(InvalidArgumentError, match=r"model\.eval\(\)"):
        predict(training, inputs)


def test_attention_dropout_is_refused() -> None:
    model = tiny_encoder("vit", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.1).train()
    with pytest.raises(InvalidArgumentError, match=r"model\.eval\(\)"):
        predict(model, some_inputs(model, 2))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_labels": 1}, "1 labels"),
        ({"problem_type": "multi_label_classification"}, "multi_label"),
        ({"problem_type": "regression"}, "regression"),
        ({"is_decoder": True}, "decoder"),
    ],
)
def test_what_is_no_single_choice_is_refused(changes: dict[str, Any], match: str) -> None:
    model = tiny_encoder("bert", **changes)
    with pytest.raises(UnsupportedError, match=match):
        predict(model, some_inputs(model, 2))


def test_other_families_are_refused_by_name() -> None:
    from transformers import ElectraConfig, ElectraForSequenceClassification

    settings = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = ElectraForSequenceClassification(ElectraConfig(vocab_size=20, **settings)).eval()
    with pytest.raises(UnsupportedError, match="'electra' is not known"):
        predict(model, {"input_ids": torch.ones(2, 3, dtype=torch.int64)})


def test_foreign_inputs_are_named() -> None:
    model = tiny_encoder("distilbert")
    inputs = some_inputs(model, 2)
    with pytest.raises(InvalidArgumentError, match="token_type_ids"):
        predict(model, inputs | {"token_type_ids": inputs["input_ids"]})


def test_texts_longer_than_the_positions_are_refused() -> None:
    for name, limit in (("bert", 24), ("roberta", 22)):
        model = tiny_encoder(name)
        predict(model, [[3] * limit])
        with pytest.raises(InvalidArgumentError, match=f"at most {limit} tokens"):
            predict(model, [[3], [3] * (limit + 1)])
