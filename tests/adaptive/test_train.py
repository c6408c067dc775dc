"""Training of exits: it helps, it repeats, it resumes, it leaves the model alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn import functional as F

from adaptive import (
    Exits,
    ExitTraining,
    InvalidArgumentError,
    Policy,
    attach_exits,
    collect_trace,
    generate,
    get_exits,
    train_exits,
)
from adaptive._fingerprint import lineage, tokens_hash
from adaptive._train import fit_probe
from adaptive.calibration import InvalidTypeError
from adaptive.policies import ProbeScore, Threshold

SMALL = ExitTraining(rank=2, steps=4, new_tokens=4, slots=100, batch_size=16)


def _equal(a: Exits, b: Exits) -> bool:
    theirs = dict(b.named_parameters())
    return all(torch.equal(value, theirs[name]) for name, value in a.named_parameters())


def _keeper(found: list[Tensor]) -> Any:
    def hook(module: Any, args: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    return hook


def _states(model: Any, prompts: list[list[int]], new_tokens: int = 8) -> list[Tensor]:
    """Hidden states after every layer at the generated tokens of fresh prompts, ``[n, width]``."""
    rows: list[tuple[Tensor, ...]] = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        text = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
        )
        with torch.no_grad():
            inside = model.model(input_ids=text[:, :-1], output_hidden_states=True).hidden_states
            # the last of them is already normed: the output of the last layer is taken by a hook
            found: list[Tensor] = []
            hook = model.model.layers[-1].register_forward_hook(_keeper(found))
            model(input_ids=text[:, :-1], use_cache=False)
            hook.remove()
        rows.append(tuple(state[0, len(prompt) :] for state in (*inside[1:-1], *found)))
    return [torch.cat(parts) for parts in zip(*rows, strict=True)]


# -- what is learned ------------------------------------------------------------------------------


def test_translators_bring_early_readouts_closer(tools: SimpleNamespace) -> None:
    """What the last layer adds to every token, the translators add before it."""
    model = tools.model(amplitude=0.0, attention_bias=True)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.bias.zero_()
        model.model.layers[3].self_attn.o_proj.bias.normal_().mul_(3.0)
    training = replace(tools.TRAINING, steps=120, learning_rate=0.05, new_tokens=6)
    exits = train_exits(
        model, tools.prompts(30, seed=1), layers=(1, 3), training=training, progress=False
    )
    states = _states(model, tools.prompts(20, seed=8))

    def readout(hidden: Tensor) -> Tensor:
        return model.lm_head(model.model.norm(hidden))

    with torch.no_grad():
        target = readout(states[-1]).softmax(-1)
        for exit, layer in enumerate(exits.layers):
            hidden = states[layer - 1]
            plain = F.cross_entropy(readout(hidden), target)
            trained = F.cross_entropy(readout(exits.translate(exit, hidden)), target)
            least = -(target * target.log()).sum(-1).mean()
            assert trained - least < 0.5 * (plain - least)


def test_probes_tell_agreement_apart(planted: Any, tools: SimpleNamespace) -> None:
    trace = collect_trace(
        planted, tools.prompts(80, seed=9), new_tokens=12, batch_size=32, progress=False
    )
    agree = 1 - np.asarray(trace.losses["disagreement"])
    assert (agree.mean(axis=0) < 0.97).all()
    for exit in range(3):
        assert roc_auc_score(agree[:, exit], trace.scores[:, exit]) > 0.6


def test_probes_are_calibrated_on_average(planted: Any, tools: SimpleNamespace) -> None:
    trace = collect_trace(
        planted, tools.prompts(80, seed=9), new_tokens=12, batch_size=32, progress=False
    )
    agree = 1 - np.asarray(trace.losses["disagreement"])
    assert np.allclose(agree.mean(axis=0), trace.scores.mean(axis=0), atol=0.08)


def test_a_probe_recovers_a_planted_direction(rng: np.random.Generator) -> None:
    states = rng.normal(size=(1500, 8)) * np.linspace(0.1, 10, 8) + 3
    direction = np.array([4.0, 0, 0, 0, 0, 0, 0, 0.1])
    agree = rng.random(1500) < 1 / (1 + np.exp(-(states - 3) @ direction))
    weight, bias = fit_probe(states, agree, rng=0)
    assert roc_auc_score(agree, states @ weight + bias) > 0.65
    assert weight.dtype == np.float32
    assert abs(float(np.mean(1 / (1 + np.exp(-(states @ weight + bias))))) - agree.mean()) < 0.02


@pytest.mark.parametrize("positive", [0, 5, 195, 200])
def test_labels_nearly_all_alike_give_a_constant_probe(
    rng: np.random.Generator, positive: int
) -> None:
    states = rng.normal(size=(200, 4))
    weight, bias = fit_probe(states, np.arange(200) < positive, rng=0)
    assert not weight.any()
    assert 1 / (1 + np.exp(-bias)) == pytest.approx((positive + 0.5) / 201)


def test_exits_that_always_agree_are_trained_all_the_same(tools: SimpleNamespace) -> None:
    model = tools.model(amplitude=0.0)
    exits = train_exits(model, tools.prompts(8, seed=1), training=SMALL, progress=False)
    assert exits.trained
    assert not exits.probe_weight[1:].any()
    assert (exits.probe_bias > 0).all()
    assert all(torch.isfinite(value).all() for value in exits.parameters())


def test_a_rank_of_zero_trains_probes_only(tools: SimpleNamespace) -> None:
    training = replace(SMALL, rank=0)
    exits = train_exits(tools.model(), tools.prompts(8, seed=1), training=training, progress=False)
    assert exits.rank == 0
    assert not exits.shift.any()
    assert exits.trained


@pytest.mark.parametrize("name", ["opt-projected", "opt-post-norm"])
def test_embeddings_narrower_than_the_residual_stream(
    name: str, helpers: ModuleType, tools: SimpleNamespace
) -> None:
    model = helpers.tiny(name, exits=False, word_embed_proj_dim=16)  # as OPT-350m has them
    exits = train_exits(
        model, tools.prompts(24, seed=1), layers=(1, 3), training=SMALL, progress=False
    )
    assert exits.down.shape == (2, SMALL.rank, model.config.hidden_size)
    assert bool(exits.up.any())
    ids, mask = helpers.prompts()
    policy = Policy(ProbeScore(), Threshold(0.5), stages=(0, 1))
    text = generate(
        model, ids, attention_mask=mask, policy=policy, max_new_tokens=4, do_sample=False
    )
    assert text.shape == (3, ids.shape[1] + 4)


def test_the_kept_vocabulary_is_the_models_favourites(tools: SimpleNamespace) -> None:
    training = replace(SMALL, kept_vocabulary=5)
    model = tools.model()
    exits = train_exits(model, tools.prompts(12, seed=1), training=training, progress=False)
    assert exits.kept.shape == (5,)
    assert exits.kept.dtype == torch.int64
    assert len(set(exits.kept.tolist())) == 5


# -- what is recorded -----------------------------------------------------------------------------


def test_the_record_names_model_units_and_settings(tools: SimpleNamespace) -> None:
    model, prompts = tools.model(), tools.prompts(6, seed=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    exits = train_exits(
        model, [*prompts, prompts[0]], layers=(1, 3), training=SMALL, rng=4, progress=False
    )
    assert exits.record.model == lineage(model)
    assert exits.record.units == tuple(tokens_hash(prompt) for prompt in prompts)
    assert exits.record.settings["rng"] == 4
    assert exits.record.settings["layers"] == [1, 3]
    assert get_exits(model) is exits
    # the model is what it was, gradients included
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_seed_decides(tools: SimpleNamespace) -> None:
    def trained(rng: int) -> Exits:
        return train_exits(
            tools.model(), tools.prompts(8, seed=1), training=SMALL, rng=rng, progress=False
        )

    first = trained(3)
    torch.randn(5)  # the global generators are not asked
    np.random.rand()  # noqa: NPY002
    assert _equal(first, trained(3))
    assert not _equal(first, trained(4))


def test_training_again_replaces_the_exits(tools: SimpleNamespace) -> None:
    model = tools.model()
    attach_exits(model, (2,))
    exits = train_exits(
        model, tools.prompts(8, seed=1), layers=(1, 2), training=SMALL, progress=False
    )
    assert get_exits(model) is exits


# -- resuming -------------------------------------------------------------------------------------


def _run(tools: SimpleNamespace, checkpoint: Path | None, **changes: Any) -> Exits:
    settings = {"training": replace(SMALL, steps=12), "rng": 2} | changes
    return train_exits(
        tools.model(),
        tools.prompts(8, seed=1),
        checkpoint=checkpoint,
        progress=False,
        **settings,
    )


@pytest.fixture
def interrupted(tools: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Checkpoint of a run that broke off in step 8 of 12."""
    import adaptive._train as module

    monkeypatch.setattr(module, "_SAVE_EVERY", 5)
    plain, calls = module._translator_loss, []

    def failing(*args: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return plain(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_translator_loss", failing)
        with pytest.raises(KeyboardInterrupt):
            _run(tools, tmp_path / "run")
    assert (tmp_path / "run" / "translators.safetensors").is_file()
    return tmp_path / "run"


def test_a_stopped_run_goes_on_bit_for_bit(
    tools: SimpleNamespace, interrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import adaptive._train as module

    whole = _run(tools, None)
    steps: list[int] = []
    plain = module._translator_loss

    def counting(*args: Any) -> Tensor:
        steps.append(1)
        return plain(*args)

    def regenerated(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the text was kept")

    monkeypatch.setattr(module, "_translator_loss", counting)
    monkeypatch.setattr(module, "full_depth_texts", regenerated)
    again = _run(tools, interrupted)
    assert len(steps) == 7
    assert _equal(again, whole)
    assert again.record == whole.record
    assert list(interrupted.iterdir()) == []  # finished: nothing is kept


@pytest.mark.parametrize(
    "changes", [{"rng": 3}, {"training": replace(SMALL, steps=13)}, {"layers": (1, 2)}]
)
def test_checkpoints_of_another_run_are_refused(
    tools: SimpleNamespace, interrupted: Path, changes: dict[str, Any]
) -> None:
    with pytest.raises(InvalidArgumentError, match="`checkpoint` must be an empty directory"):
        _run(tools, interrupted, **changes)


# -- bad input ------------------------------------------------------------------------------------


def test_too_few_distinct_prompts(tools: SimpleNamespace) -> None:
    with pytest.raises(InvalidArgumentError, match="got 3 distinct prompts"):
        train_exits(tools.model(), [[2, 3], [4], [5], [4]], training=SMALL, progress=False)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rank", -1),
        ("steps", -1),
        ("new_tokens", 1),
        ("slots", 99),
        ("kept_vocabulary", -1),
        ("batch_size", 0),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("learning_rate", float("inf")),
        ("learning_rate", "x"),
        ("rank", 1.5),
        ("steps", "a"),
        ("new_tokens", 2.5),
        ("batch_size", True),
    ],
)
def test_settings_are_checked(name: str, value: Any) -> None:
    with pytest.raises((InvalidArgumentError, InvalidTypeError), match=f"`{name}` must be"):
        ExitTraining(**{name: value})


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"rng": -1}, InvalidArgumentError),
        ({"rng": 2**32}, InvalidArgumentError),
        ({"rng": 1.5}, InvalidTypeError),
        ({"rng": "x"}, InvalidTypeError),
        ({"rng": None}, InvalidTypeError),
        ({"training": {"rank": 1}}, InvalidTypeError),
        ({"layers": (1.5,)}, InvalidTypeError),
    ],
    ids=str,
)
def test_bad_arguments_are_named(tools: SimpleNamespace, settings: Any, error: Any) -> None:
    prompts = [[2, 3], [4], [5], [6]]
    with pytest.raises(error, match=f"`{next(iter(settings))}` must be"):
        train_exits(tools.model(), prompts, **{"training": SMALL, "progress": False} | settings)


def test_integers_of_numpy_are_written_as_any(tmp_path: Path, tools: SimpleNamespace) -> None:
    training = replace(SMALL, rank=np.int64(SMALL.rank), steps=np.int64(1))
    prompts = [[2, 3], [4], [5], [6]]
    settings = {"training": training, "progress": False, "rng": np.int64(1)}
    exits = train_exits(tools.model(), prompts, **settings)
    exits.save_pretrained(tmp_path)
    assert Exits.from_pretrained(tmp_path).record == exits.record


def test_texts_that_end_at_once_teach_nothing(tools: SimpleNamespace) -> None:
    model = tools.model()
    prompts = tools.prompts(6, seed=1)
    with torch.no_grad():
        ends = {int(model(torch.tensor([p])).logits[0, -1].argmax()) for p in prompts}
    model.generation_config.eos_token_id = sorted(ends)
    with pytest.raises(InvalidArgumentError, match="prompts whose text ends at once"):
        train_exits(model, prompts, training=SMALL, progress=False)
