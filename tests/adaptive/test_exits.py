"""Exits on a model: attached, saved, found again, refused where they do not belong."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

from adaptive import (
    Exits,
    InvalidArgumentError,
    NoExitsError,
    UnsupportedError,
    attach_exits,
    detach_exits,
    generate,
    get_exits,
)
from adaptive._exits import default_layers, require_exits
from adaptive._families import Readout
from adaptive._fingerprint import (
    model_fingerprint,
    tensors_fingerprint,
    text_hash,
    tokens_hash,
)
from adaptive.calibration import CertificateError, InvalidTypeError
from adaptive.policies import (
    DynamicVocabulary,
    Margin,
    MaxProbability,
    Mode,
    Policy,
    ProbeScore,
    Threshold,
)


def _filled(helpers: ModuleType, *, rank: int = 2) -> tuple[Any, Exits]:
    """A tiny model whose exits hold random numbers everywhere."""
    model = helpers.tiny("llama", exits=False)
    exits = attach_exits(model, (1, 3, 5), rank=rank)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in exits.parameters():
            if parameter.is_floating_point():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    exits.kept = torch.nn.Parameter(torch.tensor([5, 3, 96]), requires_grad=False)
    return model, exits


# -- attaching ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [(), (0, 2), (2, 1), (2, 2), (3, 6), (7,), (-1, 3)])
def test_layers_are_checked(helpers: ModuleType, layers: tuple[int, ...]) -> None:
    model = helpers.tiny("llama", exits=False)
    with pytest.raises(InvalidArgumentError, match=r"`layers` must be ascending .* in 1\.\.5"):
        attach_exits(model, layers)
    assert get_exits(model) is None


@pytest.mark.parametrize("layers", [(1.5, 2), 3, (1, "a"), ((1, 2),)])
def test_layers_that_are_no_integers_are_named(helpers: ModuleType, layers: Any) -> None:
    model = helpers.tiny("llama", exits=False)
    with pytest.raises(InvalidTypeError, match=r"`layers` must be ascending .* in 1\.\.5"):
        attach_exits(model, layers)
    assert attach_exits(model, np.array([1, 3])).layers == (1, 3)


@pytest.mark.parametrize(
    ("rank", "error"),
    [(-1, InvalidArgumentError), (1.5, InvalidTypeError), ("a", InvalidTypeError)],
)
def test_rank_is_checked(helpers: ModuleType, rank: Any, error: Any) -> None:
    with pytest.raises(error, match="`rank` must be"):
        attach_exits(helpers.tiny("llama", exits=False), (1,), rank=rank)


@pytest.mark.parametrize(
    ("layers", "chosen"),
    [(2, (1,)), (3, (1, 2)), (4, (1, 2, 3)), (6, (2, 3, 4)), (12, (3, 6, 9)), (32, (8, 16, 24))],
)
def test_default_layers_are_quarters(layers: int, chosen: tuple[int, ...]) -> None:
    assert default_layers(layers) == chosen


def test_default_exits_are_attached(helpers: ModuleType) -> None:
    model = helpers.tiny("llama", exits=False)
    exits = attach_exits(model)
    assert exits.layers == (2, 3, 4)
    assert not exits.trained
    assert get_exits(model) is exits


def test_attaching_leaves_the_model_as_it_is(helpers: ModuleType) -> None:
    model = helpers.tiny("llama", exits=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    children = [name for name, _ in model.named_modules()]
    attach_exits(model, (1, 2), rank=3)
    assert [name for name, _ in model.named_modules()] == children
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_an_untrained_translator_changes_nothing(helpers: ModuleType) -> None:
    exits = attach_exits(helpers.tiny("llama", exits=False), (1, 2), rank=3)
    hidden = torch.randn(4, 32)
    assert torch.equal(exits.translate(0, hidden), hidden)


def test_translator_and_probe_are_their_formulas(helpers: ModuleType) -> None:
    _, exits = _filled(helpers)
    hidden = torch.randn(4, 32)
    expected = hidden + hidden @ exits.down[1].T @ exits.up[1].T + exits.shift[1]
    assert torch.allclose(exits.translate(1, hidden), expected)
    logit = (hidden * exits.probe_weight[2]).sum(-1) + exits.probe_bias[2]
    assert torch.allclose(exits.probe(2, hidden), logit, atol=1e-5)


@pytest.mark.parametrize("name", ["logits", "answer"])
def test_the_likeliest_token_is_looked_for_if_asked_for(helpers: ModuleType, name: str) -> None:
    model, exits = _filled(helpers)
    features = exits.features(
        frozenset({name}),
        0,
        torch.randn(2, 32),
        previous=None,
        position=torch.ones(2, dtype=torch.int64),
        readout=Readout(model),
    )
    assert features.logits is not None  # the token can be read off them where it stops
    assert (features.answer is not None) == (name == "answer")


def test_detach_forgets(helpers: ModuleType) -> None:
    model = helpers.tiny("llama")
    ids, mask = helpers.prompts()
    policy = helpers.mixed(model, "exact")
    before = model(input_ids=ids).logits
    generate(model, ids, attention_mask=mask, policy=policy, max_new_tokens=4, do_sample=False)
    detach_exits(model)
    assert get_exits(model) is None
    assert torch.equal(model(input_ids=ids).logits, before)
    with pytest.raises(NoExitsError, match="attach_exits"):
        require_exits(model)
    detach_exits(model)  # a second time is not an error


def test_models_outside_the_families_are_named() -> None:
    config = T5Config(
        vocab_size=97, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, pad_token_id=0
    )
    with pytest.raises(UnsupportedError, match="encoder-decoder"):
        attach_exits(T5ForConditionalGeneration(config))  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match=r"Linear has no `config\.model_type`"):
        attach_exits(torch.nn.Linear(2, 2))  # type: ignore[arg-type]


@pytest.mark.parametrize("tier", ["native", "generic"])
@torch.no_grad()
def test_a_pruned_vocabulary_follows_a_head_that_is_trained(helpers: ModuleType, tier: Any) -> None:
    model, exits = _filled(helpers)
    ids, mask = helpers.prompts()
    policy = Policy(MaxProbability(pruned=True), Threshold(math.inf), stages=(0, 1, 2))

    def scores() -> torch.Tensor:
        output: Any = generate(
            model,
            ids,
            attention_mask=mask,
            policy=policy,
            max_new_tokens=4,
            max_pending=4,
            do_sample=False,
            return_dict_in_generate=True,
            tier=tier,
        )
        found: torch.Tensor = output.exit_scores
        return found

    scores()
    model.get_output_embeddings().weight[exits.kept] = 0.0
    found = scores()[:, 1:]
    torch.testing.assert_close(found, torch.full_like(found, 1 / 3))


def test_a_score_on_a_pruned_vocabulary_needs_one(helpers: ModuleType) -> None:
    from adaptive.policies import Margin, Policy, Threshold

    model = helpers.tiny("llama")
    ids, _ = helpers.prompts((5,))
    policy = Policy(Margin(pruned=True), Threshold(0.5), stages=(0,))
    with pytest.raises(InvalidArgumentError, match="kept_vocabulary > 0"):
        generate(model, ids, policy=policy, max_new_tokens=4, do_sample=False)


# -- saving ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 2])
def test_saved_exits_come_back_bit_for_bit(helpers: ModuleType, tmp_path: Path, rank: int) -> None:
    model, exits = _filled(helpers, rank=rank)
    exits.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exits.json", "exits.safetensors"]
    again = Exits.from_pretrained(tmp_path)
    assert again.layers == exits.layers
    assert again.rank == exits.rank
    assert again.record == exits.record
    theirs = dict(exits.named_parameters())
    assert dict(again.named_parameters()).keys() == theirs.keys()
    for name, value in again.named_parameters():
        assert value.dtype == theirs[name].dtype
        assert torch.equal(value, theirs[name])
    assert attach_exits(model, tmp_path).layers == exits.layers


def test_exits_of_another_model_are_refused(helpers: ModuleType, tmp_path: Path) -> None:
    _, exits = _filled(helpers)
    exits.save_pretrained(tmp_path)
    other = helpers.tiny("llama", exits=False, rms_norm_eps=1e-3)
    with pytest.raises(InvalidArgumentError, match="exits of this model"):
        attach_exits(other, tmp_path)
    assert get_exits(other) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_exits_go_with_their_model_in_another_precision(
    helpers: ModuleType, tmp_path: Path, dtype: torch.dtype
) -> None:
    model, exits = _filled(helpers)
    model.save_pretrained(tmp_path)
    exits.save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert get_exits(half) is not None
    assert model_fingerprint(half) != model_fingerprint(model)
    # stored in half precision and computed in full: the way the shipped model comes
    half.save_pretrained(tmp_path / "half")
    exits.save_pretrained(tmp_path / "half")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.float32)
    assert get_exits(again) is not None
    half.model.layers[0].mlp.up_proj.weight.data.mul_(1.1)
    half.save_pretrained(tmp_path / "half")
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.float32)
    with pytest.raises(InvalidArgumentError, match="exits of this model in any precision"):
        get_exits(other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("mode", ["exact", "propagate", "verify"])
def test_trained_exits_stay_float32_in_a_model_of_any_precision(
    helpers: ModuleType, dtype: torch.dtype, mode: Mode
) -> None:
    """Translators meet states of the model's own precision, and hand such states on."""
    model, exits = _filled(helpers)
    exits.record = replace(exits.record, settings={"steps": 1})
    model.to(dtype)
    ids, _ = helpers.prompts((5, 5))
    for score in (ProbeScore(), Margin(), Margin(pruned=True), DynamicVocabulary((9, 9, 9))):
        output = generate(
            model,
            ids,
            policy=Policy(score, Threshold(0.0), stages=(0, 1, 2), mode=mode),
            max_new_tokens=5,
            do_sample=False,
            return_dict_in_generate=True,
        )
        assert mode == "verify" or (output.exit_stages[:, 1:] < 3).all()
    hidden = torch.randn(2, exits.shift.shape[1]).to(dtype)
    moved = exits.translate(1, hidden)
    assert moved.dtype is dtype
    assert exits.down.dtype is torch.float32
    torch.testing.assert_close(
        moved.float(), exits.translate(1, hidden.float()), rtol=2e-2, atol=2e-2
    )


def test_exits_beside_a_model_are_found(helpers: ModuleType, tmp_path: Path) -> None:
    model, exits = _filled(helpers)
    model.save_pretrained(tmp_path)
    exits.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    found = get_exits(loaded)
    assert found is not None
    assert found.layers == exits.layers
    assert torch.equal(found.up, exits.up)


def test_a_model_without_a_home_has_no_exits(
    helpers: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies in the working directory is not beside a model that was never loaded."""
    _, exits = _filled(helpers)
    exits.save_pretrained(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert get_exits(helpers.tiny("qwen2", exits=False)) is None


def _no_weights(folder: Path) -> None:
    (folder / "exits.safetensors").unlink()


def _cut_weights(folder: Path) -> None:
    path = folder / "exits.safetensors"
    path.write_bytes(path.read_bytes()[:-40])


def _cut_config(folder: Path) -> None:
    path = folder / "exits.json"
    path.write_text(path.read_text()[:-20])


def _binary_config(folder: Path) -> None:
    (folder / "exits.json").write_bytes(b"\xff\xfe\x00")


def _edited(**changes: Any) -> Any:
    def damage(folder: Path) -> None:
        path = folder / "exits.json"
        config = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in config.items() if value != ""}))

    return damage


def _list_config(folder: Path) -> None:
    (folder / "exits.json").write_text("[1, 2]")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_no_weights, "no exits in"),
        (_cut_weights, "not readable"),
        (_cut_config, "not readable"),
        (_binary_config, "not readable"),
        (_list_config, "schema 'list'"),
        (_edited(schema=99), "schema 99"),
        (_edited(record=""), "damaged"),
        (_edited(record={}), "damaged"),
        (_edited(width=16), "damaged"),
        (_edited(layers=[1, 2]), "damaged"),
    ],
)
def test_damaged_exits_are_named(
    helpers: ModuleType, tmp_path: Path, damage: Any, message: str
) -> None:
    _, exits = _filled(helpers)
    exits.save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(CertificateError, match=message):
        Exits.from_pretrained(tmp_path)


def test_no_directory_at_all(tmp_path: Path) -> None:
    with pytest.raises(CertificateError, match="no exits in"):
        Exits.from_pretrained(tmp_path / "nowhere")


def test_a_failed_save_leaves_the_old_exits(
    helpers: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, exits = _filled(helpers)
    exits.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    write = Path.write_bytes

    def fail(path: Path, content: bytes) -> int:
        write(path, content[:100])
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="disk full"):
        exits.save_pretrained(tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


# -- fingerprints ---------------------------------------------------------------------------------


def test_a_saved_model_keeps_its_fingerprint(helpers: ModuleType, tmp_path: Path) -> None:
    for name in ("llama", "llama-tied-biased", "gpt2"):
        model = helpers.tiny(name, exits=False)
        model.save_pretrained(tmp_path / name)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert model_fingerprint(loaded) == model_fingerprint(model)


def test_another_model_has_another_fingerprint(helpers: ModuleType) -> None:
    def fresh(**changes: Any) -> Any:
        return helpers.tiny("llama", exits=False, **changes)

    found = [model_fingerprint(fresh()), model_fingerprint(fresh(rope_theta=5e3))]
    found.append(model_fingerprint(fresh(rms_norm_eps=1e-3)))
    found.append(model_fingerprint(fresh().to(torch.bfloat16)))
    assert model_fingerprint(fresh()) == found[0]
    assert len(set(found)) == len(found)


def test_a_training_step_changes_the_fingerprint(helpers: ModuleType) -> None:
    model = helpers.tiny("llama", exits=False)
    before = model_fingerprint(model)
    assert model_fingerprint(model) == before
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    ids, _ = helpers.prompts((6,))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert model_fingerprint(model) != before


@torch.inference_mode()
def test_a_write_under_inference_mode_changes_the_fingerprint(helpers: ModuleType) -> None:
    model = helpers.tiny("llama")  # its parameters do not count what is written to them
    before = model_fingerprint(model)
    assert model_fingerprint(model) == before
    model.get_output_embeddings().weight[3, 5] += 1.0
    assert model_fingerprint(model) != before


def test_exits_found_under_inference_mode_outlive_it(helpers: ModuleType, tmp_path: Path) -> None:
    model, exits = _filled(helpers)
    model.save_pretrained(tmp_path)
    exits.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.inference_mode():
        found = require_exits(loaded)
    assert not any(parameter.is_inference() for parameter in found.parameters())


@given(
    numel=st.integers(1, 70_000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int8]),
    data=st.data(),
)
@settings(max_examples=40, deadline=None)
def test_no_element_changes_unnoticed(numel: int, dtype: torch.dtype, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(numel)
    value = torch.randint(-60, 60, (numel,), generator=generator).to(dtype)
    before = tensors_fingerprint([("a", value)])
    assert tensors_fingerprint([("a", value.clone())]) == before
    assert tensors_fingerprint([("a", torch.cat((value, value))[numel:])]) == before  # no offset
    index = data.draw(st.integers(0, numel - 1))
    value[index] += 1
    assert tensors_fingerprint([("a", value)]) != before


def test_two_elements_do_not_swap_unnoticed() -> None:
    value = torch.arange(40_000.0)
    before = tensors_fingerprint([("a", value)])
    value[[5, 30_001]] = value[[30_001, 5]]
    assert tensors_fingerprint([("a", value)]) != before


def test_names_shapes_and_dtypes_count() -> None:
    value = torch.arange(6.0)
    found = {
        tensors_fingerprint([("a", value)]),
        tensors_fingerprint([("b", value)]),
        tensors_fingerprint([("a", value.view(2, 3))]),
        tensors_fingerprint([("a", value.double())]),
        tensors_fingerprint([("a", value + 1)]),
    }
    assert len(found) == 5


def test_hashes_of_texts_and_units() -> None:
    assert text_hash("a text") == text_hash("a text") != text_hash("a text ")
    assert tokens_hash([1, 23]) != tokens_hash([12, 3]) != tokens_hash([1, 2, 3])
    assert tokens_hash([1, 2]) == tokens_hash((1, 2))
