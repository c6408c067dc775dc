"""`generate`: every setting means what it means in transformers, or is refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedTokenizerFast,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation.streamers import BaseStreamer

from adaptive import (
    CertificateMismatchError,
    InvalidArgumentError,
    NoExitsError,
    Policy,
    UnsupportedError,
    _stacking,
    attach_exits,
    generate,
)
from adaptive._choose import StreamNoise
from adaptive._exits import require_exits
from adaptive._output import AdaptiveOutput
from adaptive._settings import tokenizer_fingerprints
from adaptive.calibration import InvalidTypeError
from adaptive.policies import Mode, NoScore, Patience, ProbeScore, RandomStage, Threshold

NEW = 12
MODES: tuple[Mode, ...] = ("exact", "propagate", "verify")
modes = pytest.mark.parametrize("mode", MODES)


def _inputs() -> dict[str, Tensor]:
    ids, mask = helpers.prompts()
    return {"input_ids": ids, "attention_mask": mask}


def _both(policy: Policy, seed: int = 11, **settings: Any) -> tuple[Any, Any]:
    """The same call with and without a policy, and whether the generator ends where it should."""
    model = helpers.shared("llama")
    settings = {"max_new_tokens": NEW, "do_sample": False} | _inputs() | settings
    torch.manual_seed(seed)
    plain = model.generate(**settings)
    after = torch.rand(1)
    torch.manual_seed(seed)
    ours = generate(model, **settings, policy=policy)
    assert torch.equal(torch.rand(1), after)
    return ours, plain


@cache
def _text() -> Tensor:
    """Plain greedy continuation of the standard prompts, int64 [3, NEW]."""
    model = helpers.shared("llama")
    found: Tensor = model.generate(**_inputs(), max_new_tokens=NEW, do_sample=False)
    return found[:, -NEW:]


def _equal_to_plain(mode: Mode, **settings: Any) -> None:
    """Never stopping in any mode, and verified early stopping, give plain text."""
    ours, plain = _both(helpers.never(mode), **settings)
    assert torch.equal(ours, plain)
    if mode == "verify":
        ours, plain = _both(helpers.mixed(helpers.shared("llama"), mode), **settings)
        assert torch.equal(ours, plain)


# -- settings -------------------------------------------------------------------------------------

SETTINGS: dict[str, dict[str, Any]] = {
    "max_new_tokens": {"max_new_tokens": 5},
    "one token": {"max_new_tokens": 1},
    "max_length": {"max_new_tokens": None, "max_length": 17},
    "generation config": {"generation_config": GenerationConfig(max_new_tokens=6, pad_token_id=3)},
    "several ends": {"eos_token_id": [int(_text()[0, 3]), int(_text()[1, 5])]},
    "repetition penalty": {"repetition_penalty": 1.8},
    "no repeated bigrams": {"no_repeat_ngram_size": 2},
    "least length": {"min_new_tokens": 8, "eos_token_id": int(_text()[0, 3])},
    "forced end": {"forced_eos_token_id": 9, "eos_token_id": 9},
    "bad words": {"bad_words_ids": [[int(_text()[0, 2])]]},
    "suppressed": {"suppress_tokens": _text()[0, :3].tolist()},
    "length penalty": {"exponential_decay_length_penalty": (2, 1.5), "eos_token_id": 9},
    "sampling": {"do_sample": True},
    "temperature": {"do_sample": True, "temperature": 0.4, "top_k": 7},
    "nucleus": {"do_sample": True, "top_p": 0.7, "min_p": 0.01},
    "typical": {"do_sample": True, "typical_p": 0.6, "epsilon_cutoff": 0.01},
    "several sequences": {"do_sample": True, "num_return_sequences": 3},
    "sampling to the end": {"do_sample": True, "eos_token_id": [4, 5, 6, 7, 8, 9, 10, 11, 12]},
    "static cache": {"cache_implementation": "static"},
    "no time": {"max_time": 0.0},
}


@pytest.mark.parametrize("name", SETTINGS)
@modes
def test_settings_mean_what_they_mean(name: str, mode: Mode) -> None:
    settings = dict(SETTINGS[name])
    if "generation_config" in settings or settings.get("max_new_tokens", 0) is None:
        model = helpers.shared("llama")
        settings = {key: value for key, value in settings.items() if value is not None}
        plain = model.generate(**_inputs(), do_sample=False, **settings)
        ours = generate(model, **_inputs(), do_sample=False, **settings, policy=helpers.never(mode))
        assert torch.equal(ours, plain)
    else:
        _equal_to_plain(mode, **settings)


@modes
def test_prompt_of_one_token(mode: Mode) -> None:
    one = torch.tensor([[5]])
    _equal_to_plain(mode, input_ids=one, attention_mask=torch.ones_like(one))


@modes
def test_no_attention_mask(mode: Mode) -> None:
    model = helpers.shared("llama")
    ids = _inputs()["input_ids"][:1]
    plain = model.generate(ids, max_new_tokens=NEW, do_sample=False)
    policy = helpers.never(mode)
    ours = generate(model, ids, max_new_tokens=NEW, do_sample=False, policy=policy)
    assert torch.equal(ours, plain)


@pytest.mark.parametrize(
    ("name", "tier"),
    [("llama", "native"), ("mistral-window", "native"), ("gpt2", "generic"), ("gemma3", "generic")],
)
def test_long_prompts_go_in_pieces(name: str, tier: Any) -> None:
    model = helpers.shared(name)
    ids, mask = helpers.prompts((1100, 1030))
    plain = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    ours = generate(
        model,
        ids,
        attention_mask=mask,
        max_new_tokens=4,
        do_sample=False,
        policy=helpers.never("exact"),
        tier=tier,
    )
    assert torch.equal(ours, plain)


@pytest.mark.parametrize(
    "name", ["llama", "qwen3", "phi", "gemma", "gemma2", "gemma3", "gpt2", "opt", "gpt-neox"]
)
@modes
def test_bfloat16(name: str, mode: Mode) -> None:
    model = helpers.tiny(name, exits=False).to(torch.bfloat16)
    attach_exits(model, helpers.EXITS)
    ids, mask = helpers.prompts((9, 4, 7, 8, 6, 5))
    settings = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True}
    plain = model.generate(ids, attention_mask=mask, output_scores=True, **settings)
    ours = generate(model, ids, attention_mask=mask, policy=helpers.never(mode), **settings)
    # 8 bits of mantissa: logits around 4 are multiples of 1/64
    flips = helpers.near_ties(
        ours.sequences, plain.sequences, plain.scores, ids.shape[1], tolerance=0.1
    )
    assert flips <= 3
    assert ours.past_key_values.layers[0].keys.dtype == torch.bfloat16


# -- processors, criteria, streamers --------------------------------------------------------------


class _Favour:
    """Adds to one token's logit: a function of its arguments, and says so."""

    is_pure = True

    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, self.token] += 0.05 * input_ids.shape[1]
        return scores


class _Counting:
    """Keeps a count: what it does depends on how often it was asked."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.count += 1
        return scores + self.count


@modes
def test_pure_processors_of_the_user(mode: Mode) -> None:
    _equal_to_plain(mode, logits_processor=LogitsProcessorList([_Favour(13)]))


def test_processors_with_memory_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match=r"_Counting may keep state.*`is_pure = True`"):
        _both(helpers.never("exact"), logits_processor=LogitsProcessorList([_Counting()]))


def test_labels_are_choices_after_the_processors() -> None:
    model = helpers.shared("llama")
    inputs = _inputs()
    ours = generate(
        model,
        **inputs,
        max_new_tokens=NEW,
        do_sample=False,
        repetition_penalty=1.8,
        policy=helpers.mixed(model, "exact", quantile=0.3),
        return_dict_in_generate=True,
    )
    _, logits = helpers.own_cache(model, ours.sequences[:, :-1], inputs["attention_mask"])
    start = inputs["input_ids"].shape[1]
    penalty = RepetitionPenaltyLogitsProcessor(1.8)
    for at in range(NEW):
        prefix = ours.sequences[:, : start + at]
        chosen = penalty(prefix, logits[:, start + at - 1].clone()).argmax(dim=-1)
        agree = (chosen == ours.sequences[:, start + at]).to(torch.int8)
        assert torch.equal(ours.agreement[:, at], agree)
    assert bool((ours.agreement == 0).any())


class _After(StoppingCriteria):
    """Ends row ``r`` once it has ``lengths[r]`` tokens."""

    def __init__(self, lengths: tuple[int, ...]) -> None:
        self.lengths = torch.tensor(lengths)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return input_ids.shape[1] >= self.lengths


@modes
@pytest.mark.parametrize("eos", [None, 9], ids=["no end token", "end token"])
@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_criteria_of_the_user(mode: Mode, eos: int | None, sampled: bool) -> None:
    criteria = StoppingCriteriaList([_After((14, 17, 13))])
    settings: dict[str, Any] = {"stopping_criteria": criteria, "do_sample": sampled}
    _equal_to_plain(mode, eos_token_id=eos, **settings)


@modes
def test_a_lower_limit_of_the_user(mode: Mode) -> None:
    # without an end token nothing else could end the run, and nobody need be asked
    _equal_to_plain(mode, stopping_criteria=StoppingCriteriaList([MaxLengthCriteria(15)]))


def _tokenizer() -> PreTrainedTokenizerFast:
    """One token per printable character."""
    characters = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ", "ĉ"]
    vocabulary = {character: index for index, character in enumerate(characters)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@modes
def test_stop_strings(mode: Mode) -> None:
    tokenizer = _tokenizer()
    stop = tokenizer.decode(_text()[0, 3:5])
    model = helpers.shared("llama")
    ids = _inputs()["input_ids"][:1]
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": NEW, "do_sample": False}
    strings = {"stop_strings": [stop], "tokenizer": tokenizer}
    plain = model.generate(ids, **settings, **strings)
    assert plain.shape[1] < ids.shape[1] + NEW
    for policy in (helpers.never(mode), helpers.mixed(model, "verify")):
        assert torch.equal(generate(model, ids, **settings, **strings, policy=policy), plain)
        criteria = StoppingCriteriaList([StopStringCriteria(tokenizer, [stop])])
        settings |= {"stopping_criteria": criteria}
        again = model.generate(ids, **settings, custom_generate=generate, policy=policy)
        assert torch.equal(again, plain)


class _Collector(BaseStreamer):
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        self.parts.append(value)

    def end(self) -> None:
        self.ended += 1


@modes
@pytest.mark.parametrize("door", ["verb", "transformers"])
def test_streamers_see_final_tokens_through_both_doors(mode: Mode, door: str) -> None:
    model = helpers.shared("llama")
    policy = helpers.mixed(model, mode, quantile=0.3)
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": int(_text()[0, 6])}
    streamer = _Collector()
    extra: dict[str, Any] = {"policy": policy, "streamer": streamer, "max_pending": 5}
    if door == "verb":
        sequences = generate(model, **_inputs(), **settings, **extra)
    else:
        sequences = model.generate(**_inputs(), **settings, **extra, custom_generate=generate)
    assert streamer.ended == 1
    prompt, *tokens = streamer.parts
    assert torch.equal(prompt, _inputs()["input_ids"])
    assert torch.equal(torch.stack(tokens, dim=1), sequences[:, prompt.shape[1] :])


def test_both_doors_give_the_same(tmp_path: Path) -> None:
    model = helpers.shared("llama")
    policy = helpers.mixed(model, "exact")
    settings = _inputs() | {"max_new_tokens": NEW, "do_sample": True, "top_k": 9}
    settings |= {"return_dict_in_generate": True}
    for extra in ({"random": "keyed", "seed": 4}, {"units": torch.tensor([4, 9, 1])}):
        torch.manual_seed(1)
        one = generate(model, **settings, policy=policy, **extra)
        torch.manual_seed(1)
        two = model.generate(**settings, policy=policy, **extra, custom_generate=generate)
        assert isinstance(two, AdaptiveOutput)
        assert torch.equal(one.sequences, two.sequences)
        assert torch.equal(one.exit_stages, two.exit_stages)


# -- what comes back ------------------------------------------------------------------------------


@modes
def test_output_reports_what_was_decided(mode: Mode) -> None:
    model = helpers.shared("llama")
    policy = helpers.mixed(model, mode)
    inputs = _inputs()
    eos = int(_text()[0, 6])
    ours = generate(
        model,
        **inputs,
        max_new_tokens=NEW,
        do_sample=False,
        policy=policy,
        eos_token_id=eos,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    start = inputs["input_ids"].shape[1]
    count = ours.sequences.shape[1] - start
    rows = inputs["input_ids"].shape[0]
    assert ours.exit_stages.shape == ours.exit_scores.shape == ours.agreement.shape == (rows, count)
    assert len(ours.scores) == len(ours.logits) == count
    assert bool((ours.exit_stages[:, 0] == len(helpers.EXITS)).all())
    assert bool(ours.exit_scores[:, 0].isnan().all())
    depth = torch.tensor([*helpers.EXITS, helpers.LAYERS], dtype=torch.float64)
    later = ours.exit_stages[:, 1:]
    assert ours.mean_depth == pytest.approx(float(depth[later[later >= 0]].mean()))
    threshold = policy.rule.threshold
    early = (later >= 0) & (later < len(helpers.EXITS))
    full = later == len(helpers.EXITS)
    assert bool((ours.exit_scores[:, 1:][early] >= threshold).all())
    assert mode == "verify" or bool((ours.exit_scores[:, 1:][full] < threshold).all())
    for at, (scores, logits) in enumerate(zip(ours.scores, ours.logits, strict=True)):
        counted = ours.exit_stages[:, at] >= 0
        emitted = ours.sequences[:, start + at]
        assert torch.equal(scores.argmax(dim=-1)[counted], emitted[counted])
        assert torch.equal(scores, logits)  # no processors here
    assert ours.past_key_values.get_seq_length() == ours.sequences.shape[1] - 1
    assert ours.certified is False
    assert ours.mismatches == ()


@pytest.mark.parametrize("ended", [False, True], ids=["full length", "rows end"])
@pytest.mark.parametrize("apart", [False, True], ids=["together", "apart"])
@pytest.mark.parametrize("mode", ["exact", "propagate"])
def test_only_rows_that_need_the_head_pass_it(
    mode: Mode, apart: bool, ended: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once at every exit that asks a row, once where none stopped it, and for labels of drafts."""
    monkeypatch.setattr(_stacking, "pays_apart", lambda *_, **__: apart)
    model = helpers.shared("llama")
    given = _inputs() | {"policy": helpers.mixed(model, mode), "do_sample": False}
    given |= {"max_new_tokens": 24, "max_pending": 5, "return_dict_in_generate": True}
    if ended:
        given["eos_token_id"] = int(_text()[0, 6])
    generate(model, **given)  # a model is checked once
    with helpers.reading_head() as rows:
        stages = generate(model, **given).exit_stages
    batch, later = stages.shape[0], stages[:, 1:]
    early = (later >= 0) & (later < len(helpers.EXITS))
    read = batch + int((later + 1).sum())  # of a finished row, whose stage is -1, nothing
    labels = batch * int(early.any(dim=0).sum()) if mode == "exact" else 0
    assert sum(rows) == read + labels
    assert int((early.any(dim=0) & (later == len(helpers.EXITS)).any(dim=0)).sum()) > 2
    assert bool((stages < 0).any()) == ended


@pytest.mark.parametrize("mode", ["exact", "propagate"])
def test_a_run_with_labels_keeps_no_noise(mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels are those of noise that is kept, and the generator ends where it did."""
    model = helpers.shared("llama")
    given = _inputs() | {"policy": helpers.mixed(model, mode), "do_sample": True, "top_k": 0}
    given |= {"max_new_tokens": 24, "return_dict_in_generate": True}
    noises: list[tuple[int, int]] = []
    read = StreamNoise.at

    def watched(self: StreamNoise, index: int, like: Tensor) -> Tensor:
        found = read(self, index, like)
        noises.append((len(self._drawn), len(self._before)))
        return found

    def run() -> tuple[Any, Tensor, int, int]:
        noises.clear()
        torch.manual_seed(5)
        output = generate(model, **given)
        drawn, states = zip(*noises, strict=True)
        return output, torch.rand(1), max(drawn), max(states)

    monkeypatch.setattr(StreamNoise, "at", watched)
    ours, after, drawn, states = run()
    assert (drawn, states) == (2, 24 if mode == "exact" else 2)
    monkeypatch.setattr(StreamNoise, "set_aside", lambda *_: None)
    theirs, later, kept, _ = run()
    assert kept == 24
    assert torch.equal(ours.sequences, theirs.sequences)
    assert torch.equal(ours.agreement, theirs.agreement)
    assert torch.equal(after, later)
    assert mode == "propagate" or {0, 1} == set(ours.agreement.unique().tolist())


def test_raw_logits_stay_raw() -> None:
    model = helpers.shared("llama")
    ours, plain = (
        model.generate(
            **_inputs(),
            max_new_tokens=NEW,
            do_sample=True,
            top_k=5,
            return_dict_in_generate=True,
            output_scores=True,
            output_logits=True,
            **extra,
        )
        for extra in (
            {"custom_generate": generate, "policy": helpers.never("exact")},
            {},
        )
        if torch.manual_seed(3)
    )
    for name in ("scores", "logits"):
        for one, other in zip(getattr(ours, name), getattr(plain, name), strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tier", ["native", "generic"])
def test_returned_cache_can_be_gone_on_with(tier: Any) -> None:
    model = helpers.shared("llama")
    inputs = _inputs()
    ours = generate(
        model,
        **inputs,
        max_new_tokens=NEW,
        do_sample=False,
        policy=helpers.mixed(model, "exact", quantile=0.2),
        tier=tier,
        return_dict_in_generate=True,
    )
    _, logits = helpers.own_cache(model, ours.sequences, inputs["attention_mask"])
    mask = torch.ones_like(ours.sequences)
    mask[:, : inputs["attention_mask"].shape[1]] = inputs["attention_mask"]
    with torch.no_grad():
        last = model(
            input_ids=ours.sequences[:, -1:],
            attention_mask=mask,
            position_ids=mask.sum(dim=-1, keepdim=True) - 1,
            past_key_values=ours.past_key_values,
        ).logits
    torch.testing.assert_close(last[:, -1], logits[:, -1], atol=1e-4, rtol=1e-4)


# -- rules with memory, rules with noise ----------------------------------------------------------


@modes
@pytest.mark.parametrize(
    "rule", [Patience(patience=1.0), RandomStage(going_on=0.5)], ids=["patience", "random"]
)
def test_rules_with_memory_or_noise_do_not_mix_rows(mode: Mode, rule: Any) -> None:
    model = helpers.shared("llama")
    policy = Policy(NoScore(), rule, stages=(0, 1, 2), mode=mode)
    ids, mask = helpers.prompts((11, 3, 7, 1))
    settings = {"max_new_tokens": NEW, "do_sample": False, "policy": policy, "seed": 2}
    settings |= {"return_dict_in_generate": True}
    units = torch.tensor([5, 2, 9, 4])
    batch = generate(model, ids, attention_mask=mask, units=units, **settings)
    assert len(batch.exit_stages[:, 1:].unique()) >= 3
    for row in range(4):
        prompt = ids[row : row + 1, mask[row].bool()]
        alone = generate(model, prompt, units=units[row : row + 1], **settings)
        assert batch.sequences[row, 11:].tolist() == alone.sequences[0, -NEW:].tolist()
        assert batch.exit_stages[row].tolist() == alone.exit_stages[0].tolist()


# -- refused by name ------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "beams": ({"num_beams": 2}, "beam search is not supported"),
    "sampled beams": ({"num_beams": 2, "do_sample": True}, "beam sample is not supported"),
    "prompt lookup": ({"prompt_lookup_num_tokens": 3}, "assisted generation is not supported"),
    "no cache": ({"use_cache": False}, "`use_cache=False` is not supported"),
    "attentions": (
        {"output_attentions": True, "return_dict_in_generate": True},
        "`output_attentions=True` is not supported",
    ),
    "hidden states": (
        {"output_hidden_states": True, "return_dict_in_generate": True},
        "`output_hidden_states=True` is not supported",
    ),
    "guidance": ({"guidance_scale": 2.0}, "UnbatchedClassifierFreeGuidanceLogitsProcessor"),
}


def _through(door: str, model: Any, **settings: Any) -> Any:
    if door == "verb":
        return generate(model, **settings)
    return model.generate(**settings, custom_generate=generate)


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("door", ["verb", "transformers"])
def test_unsupported_settings_are_named(name: str, door: str) -> None:
    settings, message = REFUSED[name]
    model = helpers.shared("llama")
    settings = {"max_new_tokens": NEW, "do_sample": False} | settings
    settings |= {"policy": helpers.never("exact")}
    with pytest.raises(UnsupportedError, match=message):
        _through(door, model, **_inputs(), **settings)


@pytest.mark.parametrize("door", ["verb", "transformers"])
def test_assistants_are_refused(door: str) -> None:
    model, assistant = helpers.shared("llama"), helpers.shared("qwen2")
    settings = {"max_new_tokens": 4, "policy": helpers.never("exact"), "assistant_model": assistant}
    ids = _inputs()["input_ids"][:1]
    with pytest.raises(UnsupportedError, match=r"`assistant_model` is not supported.*'verify'"):
        _through(door, model, input_ids=ids, **settings)


def test_contrastive_search_is_refused() -> None:
    config = GenerationConfig(penalty_alpha=0.6, top_k=4, max_new_tokens=4, pad_token_id=0)
    with pytest.raises(UnsupportedError, match="contrastive search is not supported"):
        generate(
            helpers.shared("llama"),
            **_inputs(),
            generation_config=config,
            policy=helpers.never("exact"),
        )


def test_embeddings_without_tokens_are_refused() -> None:
    model = helpers.shared("llama")
    embeds = model.get_input_embeddings()(_inputs()["input_ids"])
    with pytest.raises(UnsupportedError, match="`inputs_embeds` without `input_ids`"):
        generate(model, inputs_embeds=embeds, max_new_tokens=4, policy=helpers.never("exact"))


def test_filled_caches_are_refused() -> None:
    model = helpers.shared("llama")
    ids = _inputs()["input_ids"][:1]
    filled = DynamicCache()
    model(ids[:, :-1], past_key_values=filled)
    with pytest.raises(UnsupportedError, match="a filled `past_key_values`"):
        generate(
            model, ids, past_key_values=filled, max_new_tokens=4, policy=helpers.never("exact")
        )


def test_padding_on_the_right_is_refused() -> None:
    inputs = {key: value.flip(-1) for key, value in _inputs().items()}
    with pytest.raises(InvalidArgumentError, match=r"padding on the left \(`padding_side="):
        generate(helpers.shared("llama"), **inputs, max_new_tokens=4, policy=helpers.never("exact"))


ARGUMENTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "policy": ({"policy": 0.9}, InvalidTypeError, "`policy` must be a Policy"),
    "random": ({"random": "device"}, InvalidArgumentError, "`random` must be 'generate' or"),
    "max_pending": ({"max_pending": 0}, InvalidArgumentError, "`max_pending` must be"),
    "max_pending half": ({"max_pending": 2.5}, InvalidTypeError, "`max_pending` must be"),
    "max_pending text": ({"max_pending": "a"}, InvalidTypeError, "`max_pending` must be"),
    "seed text": ({"seed": "x"}, InvalidTypeError, "`seed` must be an integer"),
    "seed half": ({"seed": 1.5}, InvalidTypeError, "`seed` must be an integer"),
    "seed negative": ({"seed": -1}, InvalidArgumentError, "`seed` must be at least 0"),
    "seed huge": ({"seed": 2**64}, InvalidArgumentError, "`seed` must be less than"),
    "tier": ({"tier": "fast"}, InvalidArgumentError, "`tier` must be 'native', 'generic'"),
    "input_ids": (
        {"input_ids": torch.rand(3, 7)},
        InvalidArgumentError,
        "`input_ids` must be token",
    ),
    "input_ids list": ({"input_ids": [[2, 3]]}, InvalidTypeError, "`input_ids` must be a tensor"),
    "input_ids array": (
        {"input_ids": np.ones((3, 7), dtype=np.int64)},
        InvalidTypeError,
        "`input_ids` must be a tensor",
    ),
    "input_ids bool": (
        {"input_ids": torch.ones(3, 7, dtype=torch.bool)},
        InvalidArgumentError,
        "`input_ids` must be token",
    ),
    "input_ids small": (
        {"input_ids": torch.ones(3, 7, dtype=torch.uint8)},
        InvalidArgumentError,
        "`input_ids` must be token",
    ),
    "input_ids none": (
        {"input_ids": torch.ones(0, 7, dtype=torch.int64)},
        InvalidArgumentError,
        "`input_ids` must be token",
    ),
    "input_ids empty": (
        {"input_ids": torch.ones(3, 0, dtype=torch.int64)},
        InvalidArgumentError,
        "`input_ids` must be token",
    ),
    "attention_mask": (
        {"attention_mask": torch.ones(3, 2)},
        InvalidArgumentError,
        "`attention_mask` must be of the shape",
    ),
    "attention_mask list": (
        {"attention_mask": [[1] * 11] * 3},
        InvalidTypeError,
        "`attention_mask` must be a tensor",
    ),
    "attention_mask rows": (
        {"attention_mask": torch.ones(2, 11, dtype=torch.int64)},
        InvalidArgumentError,
        "`attention_mask` must be of the shape",
    ),
    "position_ids list": (
        {"position_ids": [[*range(11)]] * 3},
        InvalidTypeError,
        "`position_ids` must be a tensor",
    ),
    "position_ids short": (
        {"position_ids": torch.arange(3)[None]},
        InvalidArgumentError,
        "`position_ids` must be integers of shape",
    ),
    "position_ids rows": (
        {"position_ids": torch.arange(11)[None].expand(2, 11)},
        InvalidArgumentError,
        "`position_ids` must be integers of shape",
    ),
    "position_ids flat": (
        {"position_ids": torch.arange(11)},
        InvalidArgumentError,
        "`position_ids` must be integers of shape",
    ),
    "position_ids floats": (
        {"position_ids": torch.arange(11.0)[None]},
        InvalidArgumentError,
        "`position_ids` must be integers of shape",
    ),
    "units": ({"units": torch.arange(2)}, InvalidArgumentError, "`units` must be one integer per"),
    "units text": ({"units": "abc"}, InvalidTypeError, "`units` must be one integer per"),
    "units floats": (
        {"units": torch.tensor([0.5, 1.5, 2.5])},
        InvalidTypeError,
        "`units` must be one integer per",
    ),
    "units bool": ({"units": [True, False, True]}, InvalidTypeError, "`units` must be one integer"),
    "units huge": ({"units": [0, 1, 2**64]}, InvalidTypeError, "`units` must be one integer per"),
    "resumed text": ({"resumed": "x"}, InvalidTypeError, "`resumed` must be one integer per"),
    "resumed floats": ({"resumed": [1.0] * 3}, InvalidTypeError, "`resumed` must be one integer"),
    "resumed none": ({"resumed": [1, 0, 1]}, InvalidArgumentError, "`resumed` must be one count"),
    "resumed all": (  # the second prompt has 7 tokens, the rest of its 11 slots is padding
        {"resumed": [10, 7, 9]},
        InvalidArgumentError,
        "`resumed` must be one count per row, at least 1 and less than the tokens of its prompt",
    ),
    "max_new_tokens": ({"max_new_tokens": 2.5}, InvalidTypeError, "`max_new_tokens` must be an"),
    "stages": (
        {"policy": Policy(NoScore(), Threshold(), stages=(0, 3))},
        InvalidArgumentError,
        r"stages among this model's exits 0\.\.2",
    ),
    "probe": (
        {"policy": Policy(ProbeScore(), Threshold(), stages=(0,))},
        InvalidArgumentError,
        "trained exits",
    ),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_bad_arguments_are_named(name: str) -> None:
    settings, kind, message = ARGUMENTS[name]
    settings = {"policy": helpers.never("exact"), "random": "keyed", "max_new_tokens": 4} | settings
    with pytest.raises(kind, match=message):
        generate(helpers.shared("llama"), **_inputs() | settings)


@pytest.mark.parametrize("door", ["verb", "transformers"])
def test_masks_longer_than_the_prompt_are_refused(door: str) -> None:
    """``model.generate`` reads their end as positions and their beginning as padding."""
    inputs = _inputs()
    inputs["attention_mask"] = F.pad(inputs["attention_mask"], (0, 4), value=1)
    settings = {"policy": helpers.never("exact"), "max_new_tokens": 4}
    with pytest.raises(InvalidArgumentError, match="`attention_mask` must be of the shape"):
        _through(door, helpers.shared("llama"), **inputs, **settings)


def test_integers_of_any_kind_will_do() -> None:
    model, inputs = helpers.shared("llama"), _inputs()
    settings = {"policy": helpers.mixed(model, "exact"), "max_new_tokens": 6}
    settings |= {"do_sample": True, "random": "keyed"}
    units = torch.tensor([5, 6, 7])
    plain = generate(model, **inputs, **settings, units=units, seed=3, max_pending=2)
    for kind in (units.tolist(), units.numpy(), units.int(), [np.int64(unit) for unit in units]):
        same = {"units": kind, "seed": np.int64(3), "max_pending": np.int64(2)}
        assert torch.equal(generate(model, **inputs, **settings, **same), plain)
    greedy = settings | {"do_sample": False}
    for counts in ([1, 2, 3], np.array([10, 6, 9])):
        generate(model, **inputs, **greedy, resumed=counts)


def test_positions_may_be_one_row_for_all() -> None:
    model, inputs = helpers.shared("gpt2"), {"input_ids": _inputs()["input_ids"]}
    for given in (torch.arange(5, 16)[None], torch.arange(3, 16)[None]):  # the last 11 count
        settings = {"position_ids": given, "max_new_tokens": 4, "do_sample": False}
        ours = generate(model, **inputs, **settings, policy=helpers.never("exact"))
        assert torch.equal(ours, model.generate(**inputs, **settings))


def test_prompts_have_the_name_they_have_in_transformers_too() -> None:
    model = helpers.shared("llama")
    ids, _ = helpers.prompts((5,))
    given: dict[str, Any] = {"policy": helpers.never("exact"), "max_new_tokens": 4}
    assert torch.equal(generate(model, inputs=ids, **given), generate(model, ids, **given))
    with pytest.raises(InvalidArgumentError, match="a second prompt"):
        generate(model, ids, inputs=ids, **given)
    with pytest.raises(InvalidTypeError, match="a tensor"):
        generate(model, inputs=[[3, 4]], **given)


def test_models_without_exits_are_refused() -> None:
    model = helpers.tiny("llama", exits=False)
    with pytest.raises(NoExitsError, match="`attach_exits"):
        generate(model, **_inputs(), max_new_tokens=4, policy=helpers.never("exact"))


# -- certificates ---------------------------------------------------------------------------------

SAMPLING = {"do_sample": True, "temperature": 0.7}


def _certified(model: Any, mode: Mode = "exact", **generation: Any) -> Policy:
    """A policy with a certificate as calibration writes it, for at most NEW greedy tokens."""
    policy = helpers.certified(
        model,
        helpers.mixed(model, mode),
        new_tokens=NEW,
        settings=generation,
        risk=0.1,
        loss="disagreement",
        method="binomial",
        index=3,
        evidence={},
    )
    # what was earned must survive storage
    return Policy.from_dict(json.loads(json.dumps(policy.to_dict())))


def _run(model: Any, policy: Policy, **settings: Any) -> AdaptiveOutput:
    defaults = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True}
    output = generate(model, **_inputs(), policy=policy, **defaults | settings)
    assert isinstance(output, AdaptiveOutput)
    return output


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_new_tokens": NEW - 3},
        {"tier": "generic"},
        {"random": "keyed", "seed": 9},
        {"return_dict_in_generate": True, "output_scores": True},
    ],
    ids=["same", "shorter", "other tier", "other noise", "more output"],
)
def test_certificates_apply_where_they_were_earned(settings: dict[str, Any]) -> None:
    model = helpers.shared("llama")
    output = _run(model, _certified(model), **settings)
    assert output.certified is True
    assert output.mismatches == ()


@pytest.mark.parametrize(
    "generation",
    [
        {"repetition_penalty": 1.2, "top_k": 5} | SAMPLING,
        {"min_new_tokens": 4, "eos_token_id": 9},
        {"exponential_decay_length_penalty": (2, 1.5), "eos_token_id": 9},
        {"begin_suppress_tokens": [4, 5], "suppress_tokens": [6]},
        {"sequence_bias": [[[4], 2.0], [[5, 6], -1.0]], "forced_eos_token_id": 9},
        {"no_repeat_ngram_size": 2, "typical_p": 0.5, "eta_cutoff": 0.1} | SAMPLING,
    ],
    ids=["penalty", "least length", "decay", "suppressed", "bias", "warpers"],
)
def test_certificates_know_processors_and_sampling(generation: dict[str, Any]) -> None:
    model = helpers.shared("llama")
    generation = {"do_sample": False} | generation
    policy = _certified(model, **generation)
    assert _run(model, policy, **generation).certified is True
    # the prompt's length is no setting
    ids, mask = helpers.prompts((21, 13))
    longer = generate(
        model,
        ids,
        attention_mask=mask,
        max_new_tokens=NEW,
        policy=policy,
        return_dict_in_generate=True,
        **generation,
    )
    assert longer.certified is True


OUTSIDE: dict[str, tuple[dict[str, Any], str]] = {
    "longer text": ({"max_new_tokens": NEW + 1}, "longer text: certified for at most 12"),
    "sampling": ({"do_sample": True}, "another sampling: certified with False"),
    "processor": ({"repetition_penalty": 1.3}, "another processors"),
    "bias": ({"sequence_bias": [[[4], 2.0]]}, "another processors"),
    "own processor": ({"logits_processor": LogitsProcessorList([_Favour(3)])}, "processors"),
    "end token": ({"eos_token_id": 9}, "another eos_token_id"),
}


def test_the_very_numbers_of_a_processor_count() -> None:
    model = helpers.shared("llama")
    for name, one, other in (
        ("sequence_bias", [[[4], 2.0]], [[[4], 2.5]]),
        ("exponential_decay_length_penalty", (2, 1.5), (3, 1.5)),
        ("min_new_tokens", 3, 4),
        ("bad_words_ids", [[3]], [[4]]),
    ):
        policy = _certified(model, eos_token_id=9, **{name: one})
        assert _run(model, policy, eos_token_id=9, **{name: one}).certified is True
        with pytest.raises(CertificateMismatchError, match="another processors"):
            _run(model, policy, eos_token_id=9, **{name: other})


@pytest.mark.parametrize("name", OUTSIDE)
def test_other_settings_are_outside(name: str) -> None:
    settings, message = OUTSIDE[name]
    model = helpers.shared("llama")
    policy = _certified(model)
    with pytest.raises(CertificateMismatchError, match=message):
        _run(model, policy, **settings)
    output = _run(model, policy, certified=False, **settings)
    assert output.certified is False
    assert any(message.split(":")[0] in mismatch for mismatch in output.mismatches)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model", "another model: certified on"),
        ("weights", "another model: certified on"),
        ("exits", "another exits: certified on"),
        ("exit weights", "another exits: certified on"),
        ("mode", "another mode: certified in 'exact', running in 'propagate'"),
        ("dtype", "another dtype: certified with 'float32', running with 'bfloat16'"),
    ],
)
@torch.no_grad()
def test_other_models_are_outside(change: str, message: str) -> None:
    model = helpers.tiny("llama")
    policy = _certified(model)
    assert _run(model, policy).certified is True
    if change == "model":
        model = helpers.tiny("qwen2")
    elif change == "weights":
        model.model.layers[3].mlp.up_proj.weight.mul_(1.01)
    elif change == "exits":
        attach_exits(model, (1, 2, 5))
    elif change == "exit weights":
        require_exits(model).probe_bias.add_(0.5)
    elif change == "mode":
        policy = replace(policy, mode="propagate")
    else:
        model = model.to(torch.bfloat16)
    with pytest.raises(CertificateMismatchError, match=message):
        _run(model, policy)
    output = _run(model, policy, certified=False)
    assert output.certified is False
    assert any(message in mismatch for mismatch in output.mismatches)


def test_another_tokenizer_or_chat_template_is_outside() -> None:
    model = helpers.shared("llama")
    inner = Tokenizer(models.WordLevel({"<pad>": 0, "a": 1}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>")
    tokenizer.chat_template = "{{ messages }}"
    policy = _certified(model)
    earned = policy.certificate.fingerprints | tokenizer_fingerprints(tokenizer)
    policy = replace(policy, certificate=replace(policy.certificate, fingerprints=earned))
    assert _run(model, policy, tokenizer=tokenizer).certified is True
    assert _run(model, policy).certified is True  # ids alone do not tell
    tokenizer.chat_template = "{{ messages }} "
    with pytest.raises(CertificateMismatchError, match="another chat template: certified on"):
        _run(model, policy, tokenizer=tokenizer)
    inner.add_tokens(["b"])
    other = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>")
    output = _run(model, policy, tokenizer=other, certified=False)
    assert output.certified is False
    assert [mismatch.split(":")[0] for mismatch in output.mismatches] == [
        "another tokenizer",
        "another chat template",
    ]


def test_a_certificate_of_full_computation_is_no_promise_of_speed() -> None:
    model = helpers.shared("llama")
    policy = _certified(model)
    certificate = replace(policy.certificate, holds=False, index=None)
    policy = replace(helpers.never("exact"), certificate=certificate)
    output = _run(model, policy)
    assert output.certified is False
    assert output.mismatches == ()
    assert output.mean_depth == helpers.LAYERS


@pytest.mark.parametrize("mode", ["exact", "propagate", "verify"])
def test_autocast_is_the_models_own(mode: Any, helpers: Any) -> None:
    """As with ``model.generate``; keys and values of the native tier have the weights' dtype."""
    model = helpers.tiny("llama")
    ids, mask = helpers.prompts((6, 3))
    settings = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = model.generate(ids, **settings)
        assert torch.equal(generate(model, ids, policy=helpers.never(mode), **settings), plain)
        mixed = generate(model, ids, policy=helpers.mixed(model, mode), **settings)
        assert mixed.shape == plain.shape
        with pytest.raises(UnsupportedError, match="autocast"):
            generate(model, ids, policy=helpers.never(mode), tier="native", **settings)
    here = generate(model, ids, policy=helpers.never(mode), tier="native", **settings)
    assert here.shape == plain.shape


def test_a_certificate_earned_without_autocast_does_not_apply_under_it(helpers: Any) -> None:
    model = helpers.tiny("llama")
    policy = helpers.certified(model, helpers.mixed(model, "exact"), new_tokens=8)
    ids, _ = helpers.prompts((6,))
    given = {"policy": policy, "max_new_tokens": 8, "do_sample": False}
    generate(model, ids, **given)
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(CertificateMismatchError, match="autocast to bfloat16"),
    ):
        generate(model, ids, **given)
