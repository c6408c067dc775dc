"""Exits of classifiers: what they learn, from whom, and what they remember."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from encoders import CLASSES, some_inputs, tiny_encoder
from sklearn.linear_model import LogisticRegression
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
)

from adaptive import calibrate, predict
from adaptive._train_classifier import fit_classifier
from adaptive.calibration import InvalidArgumentError, InvalidTypeError
from adaptive.classifiers import ClassifierExits, ClassifierTraining, train_classifier_exits
from adaptive.policies import MaxProbability, Policy, Threshold


def trained(model: Any, dataset: Any, **settings: Any) -> ClassifierExits:
    return train_classifier_exits(model, dataset, layers=(1, 2), progress=False, **settings)


@pytest.fixture
def model() -> Any:
    return tiny_encoder("bert")


@pytest.fixture
def inputs(model: Any) -> dict[str, Tensor]:
    return some_inputs(model, 60, seed=1)


def test_a_classifier_is_the_logistic_regression_of_its_penalty() -> None:
    """Against scikit-learn's solver, on labels, with the same penalty: C = 1 / (2 n penalty)."""
    rng = np.random.default_rng(0)
    states = rng.normal(size=(300, 4)) * (1.0, 5.0, 0.1, 2.0) + 3.0
    labels = (states[:, 0] + rng.normal(size=300) > 3).astype(int) + (states[:, 1] > 6)
    targets = torch.nn.functional.one_hot(torch.from_numpy(labels), 3).float()
    weight, bias = fit_classifier(torch.from_numpy(states).float(), targets, steps=200)
    ours = torch.softmax(torch.from_numpy(states).float() @ weight.T + bias, dim=-1).numpy()
    scaled = (states - states.mean(axis=0)) / states.std(axis=0)
    theirs = [
        LogisticRegression(C=1 / (2 * 300 * penalty), max_iter=1000)
        .fit(scaled, labels)
        .predict_proba(scaled)
        for penalty in (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    ]
    gaps = [float(np.abs(ours - probability).max()) for probability in theirs]
    assert min(gaps) < 5e-3
    assert max(gaps) > 5e-2  # the penalties can be told apart


def test_a_column_that_never_varies_has_no_weight() -> None:
    states = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
    states[:, 1] = 4.0
    targets = torch.nn.functional.one_hot((states[:, 0] > 0).long(), 2).float()
    weight, bias = fit_classifier(states, targets, steps=50)
    assert torch.isfinite(weight).all()
    assert torch.isfinite(bias).all()
    assert weight[:, 1].abs().max() < 1e-6


def test_labels_or_the_models_own_answers_are_learned(
    model: Any, inputs: dict[str, Tensor]
) -> None:
    """Labels that contradict the model: the exits take them over, and without them they do not."""
    with torch.no_grad():
        own = model(**inputs).logits.argmax(dim=-1)
    other = (own + 1) % CLASSES
    policy = Policy(MaxProbability(), Threshold(0.0), stages=(1,))  # all stop at the second exit

    def says(dataset: Any) -> Tensor:
        trained(model, dataset)
        return predict(model, inputs, policy=policy).labels

    assert (says((inputs, other.numpy())) == other).float().mean() > 0.6
    assert (says(inputs) == own).float().mean() > 0.6


def test_the_model_does_not_change(model: Any, inputs: dict[str, Tensor]) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained(model, inputs)
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_the_seed_decides(model: Any, inputs: dict[str, Tensor]) -> None:
    first, again, other = (trained(model, inputs, rng=seed) for seed in (3, 3, 4))
    assert first.fingerprint() == again.fingerprint()
    assert first.fingerprint() != other.fingerprint()


def test_any_container_trains_the_same_exits(model: Any, inputs: dict[str, Tensor]) -> None:
    """A datasets.Dataset, a DataLoader of dicts and a list of dicts, all without their padding."""
    datasets = pytest.importorskip("datasets")
    labels = torch.arange(60) % CLASSES
    expected = trained(model, (inputs, labels.numpy()))
    columns = inputs | {"label": labels}
    rows = [{name: value[i].tolist() for name, value in columns.items()} for i in range(60)]
    forms = [
        datasets.Dataset.from_list(rows),
        rows,
        DataLoader([{n: v[i] for n, v in columns.items()} for i in range(60)], batch_size=7),  # type: ignore[arg-type]
    ]
    for form in forms:
        found = trained(model, form)
        assert found.record.units == expected.record.units
        assert found.fingerprint() == expected.fingerprint()


def test_the_record_says_what_shaped_them(model: Any, inputs: dict[str, Tensor]) -> None:
    twice = {name: torch.cat([value, value[:5]]) for name, value in inputs.items()}
    exits = trained(model, twice, rng=2, training=ClassifierTraining(steps=3))
    assert len(exits.record.units) == len(set(exits.record.units)) == 60
    assert exits.record.settings["labels"] is False
    assert exits.record.settings["rng"] == 2
    assert exits.record.settings["steps"] == 3


def test_what_cannot_be_trained_on_is_named(model: Any, inputs: dict[str, Tensor]) -> None:
    few = {name: value[:7] for name, value in inputs.items()}
    with pytest.raises(InvalidArgumentError, match="7 distinct inputs"):
        trained(model, few)
    with pytest.raises(InvalidArgumentError, match=f"labels in 0..{CLASSES - 1}"):
        trained(model, (inputs, np.full(60, CLASSES)))


@pytest.mark.parametrize("name", ["steps", "batch_size"])
@pytest.mark.parametrize("value", [0, 1.5, "a"])
def test_settings_are_checked(name: str, value: Any) -> None:
    with pytest.raises((InvalidArgumentError, InvalidTypeError), match=f"`{name}` must be"):
        ClassifierTraining(**{name: value})


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"rng": -1}, InvalidArgumentError),
        ({"rng": "x"}, InvalidTypeError),
        ({"training": 3}, InvalidTypeError),
        ({"layers": (1.5,)}, InvalidTypeError),
        ({"layers": 3}, InvalidTypeError),
        ({"layers": (1, "a")}, InvalidTypeError),
    ],
    ids=str,
)
def test_bad_arguments_are_named(
    model: Any, inputs: dict[str, Tensor], settings: Any, error: Any
) -> None:
    with pytest.raises(error, match=f"`{next(iter(settings))}` must be"):
        train_classifier_exits(model, inputs, progress=False, **settings)


# -- from strings to answers ----------------------------------------------------------------------

GOOD = ("fine", "lovely", "great", "warm", "kind")
BAD = ("poor", "awful", "cold", "rude", "dull")
THINGS = ("the room", "the food", "this film", "our guide", "a long walk", "the whole evening")


def reviews(count: int) -> tuple[list[str], Tensor]:
    """Sentences with one word that decides, and their labels."""
    rng = np.random.default_rng(0)
    texts, labels = [], []
    for i in range(count):
        label = int(rng.integers(2))
        word = rng.choice(GOOD if label else BAD)
        texts.append(f"{rng.choice(THINGS)} number {i} was {word}, {rng.choice(THINGS)} too")
        labels.append(label)
    return texts, torch.tensor(labels)


def word_pieces(texts: list[str]) -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer, trained on the spot as BERT's was."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=120, special_tokens=special)
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]"
    )


@pytest.mark.slow
def test_a_text_classifier_from_strings_to_answers(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Train a small BERT, calibrate it on labelled strings, save, load, predict strings."""
    texts, labels = reviews(700)
    tokenizer = word_pieces(texts)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    model = BertForSequenceClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(60):
        rows = slice(32 * (step % 6), 32 * (step % 6) + 32)
        batch = tokenizer(texts[rows], padding=True, return_tensors="pt")
        loss = model(**batch, labels=labels[rows]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    monkeypatch.setattr(
        "adaptive._classifier_bench.seconds_per_row",
        lambda stages, inputs, policies, **_: np.arange(len(policies), 0, -1.0)[None],
    )
    data = [{"text": t, "label": int(y)} for t, y in zip(texts, labels, strict=True)][192:]
    policy = calibrate(
        model, data[:-40], 0.1, 0.1, loss="excess_error", tokenizer=tokenizer, progress=False
    )
    assert policy.certificate.holds, policy.certificate.statement()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ClassifierExits.of(model).save_pretrained(tmp_path)
    policy.save_pretrained(tmp_path)

    loaded = BertForSequenceClassification.from_pretrained(tmp_path).eval()
    again = Policy.from_pretrained(tmp_path)
    fresh, truth = texts[-40:], labels[-40:]
    found = predict(loaded, fresh, policy=again)  # the tokenizer is found beside the model
    assert found.certified, found.mismatches
    full = predict(loaded, fresh)
    assert found.mean_depth < 4
    assert (full.labels == truth).float().mean() > 0.9
    gap = (found.labels != truth).float().mean() - (full.labels != truth).float().mean()
    assert gap <= 0.1 + 3 * (0.1 / 40) ** 0.5
    alone = predict(loaded, fresh[:1], policy=again)  # another padding changes nothing
    torch.testing.assert_close(alone.logits, found.logits[:1], atol=1e-5, rtol=0)
