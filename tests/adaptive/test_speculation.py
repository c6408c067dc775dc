"""Rejection sampling in `verify` mode: the full model's distribution, and wrong variants caught."""

from __future__ import annotations

import abc
import itertools
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar, Self

import helpers
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

from adaptive import InvalidArgumentError, Policy, attach_exits, generate
from adaptive._choose import Chooser, KeyedNoise
from adaptive._decode import walk
from adaptive._exits import require_exits
from adaptive._speculation import Coupled, Draft, Rejection, Verdict, drawn
from adaptive.policies import (
    AbstractRule,
    Features,
    FixedStage,
    Margin,
    NoScore,
    RandomStage,
    State,
    Threshold,
)

#: A right sampler fails one simulation of these in 10 000; a wrong one has to fail by far.
LEVEL, CAUGHT = 1e-4, 1e-8
ROWS = 40_000

# -- one place, without a model: p and q are given ------------------------------------------------

EARLY = torch.tensor([0.5, 0.2, 0.1, 0.1, 0.06, 0.04, 0.0])
FULL = torch.tensor([0.2, 0.3, 0.1, 0.0, 0.25, 0.1, 0.05])
#: Pairs of early and full distribution. The first has entries that only one of the two can say.
PAIRS = {
    "zeros on either side": (EARLY, FULL),
    "the same": (FULL, FULL),
    "nothing in common": (torch.tensor([0.4, 0.6, 0, 0]), torch.tensor([0, 0, 0.3, 0.7])),
    "a sure draft": (torch.tensor([0.0, 1, 0, 0]), torch.tensor([0.3, 0.4, 0.2, 0.1])),
    "a sure full model": (torch.tensor([0.3, 0.4, 0.2, 0.1]), torch.tensor([0.0, 1, 0, 0])),
    "close": (torch.tensor([0.5001, 0.3, 0.1999]), torch.tensor([0.5, 0.3, 0.2])),
}


class Swapped(Rejection):
    """Wrong: accepts with q / p."""

    def judge(self, prefix: Tensor, logits: Tensor, index: int, **given: Any) -> Verdict:
        draft: Draft = given["draft"]
        full = self._distribution(prefix, logits).gather(-1, draft.tokens[:, None])[:, 0]
        kept = self._noise.uniforms(index, logits)[:, 1] * full < draft.probability
        return replace(super().judge(prefix, logits, index, **given), kept=kept)


class Replacing(Rejection):
    """Wrong: replaces from another distribution than the normalised positive part of p - q."""

    @abc.abstractmethod
    def weights(self, early: Tensor, full: Tensor) -> Tensor:
        """What the wrong twin draws from."""

    def judge(self, prefix: Tensor, logits: Tensor, index: int, **given: Any) -> Verdict:
        early = self._distribution(prefix, given["draft"].logits)
        weights = self.weights(early, self._distribution(prefix, logits))
        tokens = drawn(weights, self._noise.uniforms(index, logits)[:, 2])
        return replace(super().judge(prefix, logits, index, **given), instead=lambda: tokens)


class FromFull(Replacing):
    def weights(self, early: Tensor, full: Tensor) -> Tensor:
        return full


class DraftedAgain(Replacing):
    def weights(self, early: Tensor, full: Tensor) -> Tensor:
        return early


class BothSides(Replacing):
    def weights(self, early: Tensor, full: Tensor) -> Tensor:
        return (full - early).abs() / 2


class NotNormalised(Replacing):
    """What is left of the unit interval behind the last entry goes to the last entry."""

    def weights(self, early: Tensor, full: Tensor) -> Tensor:
        left = (full - early).clamp(min=0)
        return torch.cat([left[:, :-1], 1 - left[:, :-1].sum(dim=-1, keepdim=True)], dim=-1)


class Keeping(Rejection):
    """Wrong: every draft stands."""

    def judge(self, prefix: Tensor, logits: Tensor, index: int, **given: Any) -> Verdict:
        right = super().judge(prefix, logits, index, **given)
        return replace(right, kept=torch.ones_like(right.kept))


class _Echo(KeyedNoise):
    """Wrong noise: what accepts a draft is what drew it."""

    def uniforms(self, index: int, like: Tensor) -> Tensor:
        return super().uniforms(index, like)[:, [0, 0, 2]]


class Echoing(Rejection):
    def __init__(self, chooser: Chooser, noise: Any) -> None:
        super().__init__(chooser, _Echo(noise._units, noise._seed))


WRONG = (Swapped, FromFull, DraftedAgain, BothSides, NotNormalised, Keeping, Echoing)


def _one_place(
    kind: type[Rejection],
    early: Tensor,
    full: Tensor,
    *,
    processors: LogitsProcessorList | None = None,
    rows: int = ROWS,
    seed: int = 0,
) -> tuple[NDArray[np.int64], int]:
    """Counts of the final token over independent rows, and how many drafts stood."""
    noise = KeyedNoise(torch.arange(rows), seed)
    speculation = kind(Chooser(processors or LogitsProcessorList(), noise), noise)
    prefix = torch.zeros(rows, 1, dtype=torch.int64)
    said, meant = early.log().expand(rows, -1), full.log().expand(rows, -1)
    draft = speculation.draft(prefix, said, 3)
    never = torch.zeros(rows, dtype=torch.bool)
    verdict = speculation.judge(prefix, meant, 3, draft=draft, full=never)
    tokens = torch.where(verdict.kept, draft.tokens, verdict.instead())
    return np.bincount(tokens.numpy(), minlength=early.numel()), int(verdict.kept.sum())


def _fits(counts: NDArray[Any], law: NDArray[Any]) -> float:
    """P-value of counts ``[groups, cells]`` under the laws of the groups.

    Chi-square over cells of which at least 5 are expected; rarer ones are one cell. An impossible
    cell that is not empty has p-value 0.
    """
    statistic, freedom = 0.0, 0
    for found, expected in zip(counts, law * counts.sum(axis=1, keepdims=True), strict=True):
        if found[expected == 0].any():
            return 0.0
        often = expected >= 5
        cells = np.append(found[often], found[~often].sum())
        means = np.append(expected[often], expected[~often].sum())
        cells, means = cells[means > 0], means[means > 0]
        statistic += float(((cells - means) ** 2 / means).sum())
        freedom += cells.size - 1
    return float(stats.chi2.sf(statistic, freedom)) if freedom else 1.0


@pytest.mark.statistical
@pytest.mark.parametrize("name", PAIRS)
def test_a_token_follows_the_full_distribution(name: str) -> None:
    early, full = PAIRS[name]
    counts, kept = _one_place(Rejection, early, full)
    assert _fits(counts[None], full.double().numpy()[None]) > LEVEL
    stands = 1 - float((early.double() - full.double()).abs().sum()) / 2
    assert stats.binomtest(kept, ROWS, min(max(stands, 0.0), 1.0)).pvalue > LEVEL


@pytest.mark.statistical
@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_sampler_is_caught(kind: type[Rejection]) -> None:
    counts, _ = _one_place(kind, EARLY, FULL)
    assert _fits(counts[None], FULL.double().numpy()[None]) < CAUGHT


@pytest.mark.statistical
def test_processors_apply_to_both_distributions() -> None:
    chain = [TemperatureLogitsWarper(0.7), TopKLogitsWarper(5), TopPLogitsWarper(0.9)]
    processors = LogitsProcessorList(chain)
    early, full = (
        processors(torch.zeros(1, 1, dtype=torch.int64), law.log()[None].clone()).softmax(dim=-1)[0]
        for law in (EARLY, FULL)
    )
    assert bool(((early > 0) & (full == 0)).any()), "a draft that the full model cannot say"
    assert bool(((early == 0) & (full > 0)).any()), "a token that is never drafted"
    counts, kept = _one_place(Rejection, EARLY, FULL, processors=processors)
    assert _fits(counts[None], full.double().numpy()[None]) > LEVEL
    stands = 1 - float((early.double() - full.double()).abs().sum()) / 2
    assert stats.binomtest(kept, ROWS, stands).pvalue > LEVEL
    raw, _ = _one_place(Rejection, EARLY, FULL)
    assert _fits(raw[None], full.double().numpy()[None]) < CAUGHT


def test_equal_distributions_keep_every_draft() -> None:
    rows = 200_000
    noise = KeyedNoise(torch.arange(rows), 5)
    law = torch.randn(11, generator=torch.Generator().manual_seed(1)).softmax(dim=-1)
    _, kept = _one_place(Rejection, law, law, rows=rows)
    assert kept == rows
    # the largest draw there is keeps them too: u q rounds below q
    largest = torch.full((rows,), 1 - 2.0**-53, dtype=torch.float64)
    early = torch.rand(rows, generator=torch.Generator().manual_seed(2))
    assert bool((largest * early < early).all())
    assert float(noise.uniforms(0, torch.empty(rows, 1)).max()) <= 1 - 2.0**-53


@pytest.mark.statistical
def test_rejection_keeps_more_drafts_than_common_noise() -> None:
    noise = KeyedNoise(torch.arange(ROWS), 2)
    coupled = Coupled(Chooser(LogitsProcessorList(), noise))
    prefix = torch.zeros(ROWS, 1, dtype=torch.int64)
    draft = coupled.draft(prefix, EARLY.log().expand(ROWS, -1), 3)
    full = torch.zeros(ROWS, dtype=torch.bool)
    verdict = coupled.judge(prefix, FULL.log().expand(ROWS, -1), 3, draft=draft, full=full)
    distance = float((EARLY - FULL).abs().sum()) / 2
    common = float(verdict.kept.float().mean())
    _, kept = _one_place(Rejection, EARLY, FULL, seed=2)
    error = 4 * (0.25 / ROWS) ** 0.5
    assert (1 - distance) / (1 + distance) - error < common < kept / ROWS - error
    assert common < 1 - distance - error


def test_what_the_full_depth_drew_stands() -> None:
    noise = KeyedNoise(torch.arange(50), 0)
    rejection = Rejection(Chooser(LogitsProcessorList(), noise), noise)
    prefix = torch.zeros(50, 1, dtype=torch.int64)
    draft = rejection.draft(prefix, EARLY.log().expand(50, -1), 1)
    meant = FULL.log().expand(50, -1)
    full = torch.arange(50) % 2 == 0
    verdict = rejection.judge(prefix, meant, 1, draft=draft, full=full)
    assert bool(verdict.kept[full].all())
    assert not bool(verdict.kept.all())


@pytest.mark.parametrize("size", [3, 50_000])
def test_weights_are_drawn_by_their_sums(size: int) -> None:
    weights = torch.zeros(4, size)
    weights[:, 1] = torch.tensor([1.0, 0.25, 1e-9, 3e-17])  # any sum, also of tiny residuals
    weights[1, 2] = 0.75
    ends = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    for uniform, expected in zip(ends, ([1, 1, 1, 1], [1, 2, 1, 1]), strict=True):
        assert drawn(weights, uniform.expand(4)).tolist() == expected
    at = torch.tensor([0.2499999, 0.25], dtype=torch.float64)
    assert drawn(weights[[1, 1]], at).tolist() == [1, 2]


def test_a_draft_keeps_its_logits_as_they_came() -> None:
    noise = KeyedNoise(torch.arange(2), 0)
    rejection = Rejection(Chooser(LogitsProcessorList(), noise), noise)
    logits = EARLY.log().expand(2, -1).to(torch.bfloat16)
    draft = rejection.draft(torch.zeros(2, 1, dtype=torch.int64), logits, 0)
    assert draft.logits is logits


# -- texts: joint law of the first tokens ---------------------------------------------------------

WORDS, TOKENS = 5, 3
PROMPTS = torch.tensor([[0, 2, 3], [1, 4, 2], [3, 3, 3], [0, 0, 4]])
MASK = torch.tensor([[0, 1, 1], [1, 1, 1], [1, 1, 1], [0, 0, 1]])
#: Settings of `generate`, and the processors that transformers makes of them.
LAWS: dict[str, tuple[dict[str, Any], list[Any]]] = {
    "plain": ({"top_k": 0}, []),
    "warped": (
        {"temperature": 0.6, "top_k": 4, "top_p": 0.9},
        [TemperatureLogitsWarper(0.6), TopKLogitsWarper(4), TopPLogitsWarper(0.9)],
    ),
    "after the prefix": (
        {"top_k": 0, "repetition_penalty": 1.7},
        [RepetitionPenaltyLogitsProcessor(1.7)],
    ),
    "with an end": ({"top_k": 0, "eos_token_id": 4}, []),
}


@cache
def _model() -> PreTrainedModel:
    """A model of 5 words whose exits are wrong about them, by more after some prompts."""
    model = helpers.tiny(
        "llama", exits=False, vocab_size=WORDS, num_hidden_layers=3, initializer_range=0.6
    )
    attach_exits(model, [1, 2])
    return model


def _policy(name: str = "first exit") -> Policy:
    if name == "first exit":
        return Policy(NoScore(), FixedStage(0), stages=(0,), mode="verify")
    rules = {"in turn": InTurn(), "random": RandomStage(0.6), "threshold": Threshold(0.5)}
    return Policy(Margin(), rules[name], stages=(0, 1), mode="verify")


@dataclass(frozen=True)
class InTurn(AbstractRule):
    """The first exit, the second, the full depth, and so on: remembers how many tokens went by."""

    nested: ClassVar[bool] = False

    def init(self, batch_size: int, *, device: torch.device) -> State:
        return {"count": torch.zeros(batch_size, dtype=torch.int64, device=device)}

    def decide(self, features: Features, score: Tensor, state: State) -> tuple[Tensor, State]:
        return state["count"] % 3 <= features.stage, state

    def advance(self, state: State) -> State:
        return {"count": state["count"] + 1}

    def with_knob(self, knob: float) -> Self:
        return self

    def knobs(self, trace: Any, *, size: int) -> tuple[float, ...]:
        return (float("inf"),)


def _many(rows: int, **settings: Any) -> Any:
    """One call for the four prompts, ``rows`` times each."""
    settings = {
        "policy": _policy(),
        "speculation": "rejection",
        "do_sample": True,
        "max_new_tokens": TOKENS,
        "max_pending": TOKENS,
        "tier": "native",
        "return_dict_in_generate": True,
    } | settings
    ids, mask = PROMPTS.repeat(rows, 1), MASK.repeat(rows, 1)
    return generate(_model(), ids, attention_mask=mask, **settings)


def _counts(text: Tensor) -> NDArray[np.int64]:
    """How often each text was said after each prompt, ``[prompts, texts]``."""
    number = (text * WORDS ** torch.arange(TOKENS)).sum(dim=1).view(-1, len(PROMPTS))
    return np.stack(
        [np.bincount(number[:, row], minlength=WORDS**TOKENS) for row in range(len(PROMPTS))]
    )


@cache
def _law(name: str) -> NDArray[np.float64]:
    """The full model's own probability of each text after each prompt, token by token."""
    processors = LogitsProcessorList(LAWS[name][1])
    end = LAWS[name][0].get("eos_token_id")
    law = np.zeros((len(PROMPTS), WORDS**TOKENS))
    for row, prompt in enumerate(PROMPTS):
        real = prompt[MASK[row] == 1]
        for text in itertools.product(range(WORDS), repeat=TOKENS):
            number = sum(token * WORDS**place for place, token in enumerate(text))
            law[row, number] = _probability(real, text, processors, end)
    np.testing.assert_allclose(law.sum(axis=1), 1, atol=1e-5)
    return law


def _probability(
    prompt: Tensor, text: tuple[int, ...], processors: LogitsProcessorList, end: int | None
) -> float:
    found = 1.0
    for place, token in enumerate(text):
        before = text[:place]
        if end is not None and end in before:
            found *= float(token == 0)
            continue
        logits = _next_logits((*prompt.tolist(), *before))
        prefix = torch.tensor([[*prompt.tolist(), *before]])
        scores = processors(prefix, logits[None].clone())
        found *= float(scores.double().softmax(dim=-1)[0, token])
    return found


@cache
def _next_logits(text: tuple[int, ...]) -> Tensor:
    with torch.no_grad():
        found: Tensor = _model()(torch.tensor([text])).logits[0, -1]
    return found


@pytest.mark.statistical
@pytest.mark.parametrize("random", ["generate", "keyed"])
@pytest.mark.parametrize("name", LAWS)
def test_texts_follow_the_full_model(name: str, random: str) -> None:
    counts = np.zeros((len(PROMPTS), WORDS**TOKENS), dtype=np.int64)
    for seed in range(3):
        torch.manual_seed(seed)
        output = _many(3000, **LAWS[name][0], random=random, seed=seed)
        counts += _counts(output.sequences[:, -TOKENS:])
    assert _fits(counts, _law(name)) > LEVEL


@pytest.mark.statistical
def test_rows_accept_at_rates_of_their_own() -> None:
    agreement = _many(3000, top_k=0).agreement[:, 1:].float().view(-1, len(PROMPTS), TOKENS - 1)
    rates = agreement.mean(dim=(0, 2))
    assert float(rates.max() - rates.min()) > 0.05
    assert 0.3 < float(rates.min()) < float(rates.max()) < 0.99


@pytest.mark.slow
@pytest.mark.statistical
def test_small_batches_follow_the_full_model() -> None:
    """Few rows keep several drafts of a round, and some are cut back with accepted ones."""
    counts = np.zeros((len(PROMPTS), WORDS**TOKENS), dtype=np.int64)
    torch.manual_seed(0)
    for _ in range(800):
        counts += _counts(_many(1, top_k=0).sequences[:, -TOKENS:])
    assert _fits(counts, _law("plain")) > LEVEL


class AllTogether(Rejection):
    """Wrong, in a batch only: rows that were right are drawn anew with the first wrong one."""

    def judge(self, prefix: Tensor, logits: Tensor, index: int, **given: Any) -> Verdict:
        right = super().judge(prefix, logits, index, **given)
        return replace(right, kept=right.kept.all().expand_as(right.kept))


@pytest.mark.statistical
@pytest.mark.parametrize("kind", [*WRONG, AllTogether])
def test_wrong_texts_are_caught(kind: type[Rejection], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adaptive._speculation.Rejection", kind)
    output = _many(3000, top_k=0, random="keyed")
    assert _fits(_counts(output.sequences[:, -TOKENS:]), _law("plain")) < CAUGHT


class _Shared(KeyedNoise):
    """Wrong noise: the four prompts of a group draw alike."""

    def uniforms(self, index: int, like: Tensor) -> Tensor:
        own = super().uniforms(index, like)
        return own[:: len(PROMPTS)].repeat_interleave(len(PROMPTS), dim=0)


def _independence(text: Tensor) -> float:
    """P-value of independence: both of a group's first two prompts get their likeliest text."""
    number = (text * WORDS ** torch.arange(TOKENS)).sum(dim=1).numpy().reshape(-1, len(PROMPTS))
    first, second = (number[:, row] == np.bincount(number[:, row]).argmax() for row in (0, 1))
    table = [
        [int(((first == a) & (second == b)).sum()) for b in (True, False)] for a in (True, False)
    ]
    return float(stats.chi2_contingency(table).pvalue)


@pytest.mark.statistical
def test_rows_that_are_cut_together_are_independent(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"top_k": 0, "random": "keyed"}
    assert _independence(_many(3000, **settings).sequences[:, -TOKENS:]) > LEVEL
    monkeypatch.setattr("adaptive._generate.KeyedNoise", _Shared)
    assert _independence(_many(3000, **settings).sequences[:, -TOKENS:]) < CAUGHT


# -- runs: seeds, rows, draft lengths -------------------------------------------------------------

POLICIES = ("first exit", "in turn", "random", "threshold")
LONG = {"max_new_tokens": 24, "top_k": 0, "max_pending": 8}


@pytest.mark.parametrize("policy", POLICIES)
def test_keyed_rows_depend_on_nothing_but_themselves(policy: str) -> None:
    settings = LONG | {"policy": _policy(policy), "random": "keyed", "seed": 3}
    together = _many(6, **settings)
    for row in range(4):
        alone = generate(
            _model(),
            PROMPTS[row : row + 1],
            attention_mask=MASK[row : row + 1],
            do_sample=True,
            speculation="rejection",
            units=torch.tensor([row]),
            return_dict_in_generate=True,
            **settings,
        )
        for name in ("sequences", "exit_stages", "agreement"):
            assert torch.equal(alone[name][0], together[name][row]), name


@pytest.mark.parametrize("random", ["generate", "keyed"])
@pytest.mark.parametrize("policy", POLICIES)
def test_the_number_of_drafts_changes_no_token(policy: str, random: str) -> None:
    texts, after = [], []
    for most in (1, 2, 5, 16, None):
        torch.manual_seed(9)
        output = _many(2, **LONG | {"policy": _policy(policy), "max_pending": most}, random=random)
        texts.append(output.sequences)
        after.append(torch.rand(1))
    assert all(torch.equal(text, texts[0]) for text in texts)
    assert all(torch.equal(value, after[0]) for value in after)
    torch.manual_seed(10)
    other = _many(2, **LONG | {"policy": _policy(policy)}, random=random, seed=1)
    assert not torch.equal(other.sequences, texts[0])


@pytest.mark.parametrize("tier", ["native", "generic"])
def test_labels_stages_and_logits_are_those_of_what_stands(tier: Any) -> None:
    output = _many(4, **LONG, tier=tier, temperature=0.8, output_scores=True, output_logits=True)
    text = output.sequences
    mask = torch.cat([MASK.repeat(4, 1), torch.ones(16, LONG["max_new_tokens"])], dim=1)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0).long()
    with torch.no_grad():
        own = _model()(text, attention_mask=mask, position_ids=positions).logits[:, 2:-1]
    torch.testing.assert_close(torch.stack(output.logits, dim=1), own, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.stack(output.scores, dim=1), own / 0.8, atol=1e-4, rtol=1e-4)
    stages, agreement = output.exit_stages[:, 1:], output.agreement[:, 1:]
    assert torch.equal(stages == 0, agreement == 1)
    assert torch.equal(stages == 2, agreement == 0)
    assert 0 < int((agreement == 0).sum()) < agreement.numel()
    deep = _many(4, **LONG, policy=_policy("threshold"))
    assert bool(((deep.exit_stages[:, 1:] == 2) & (deep.agreement[:, 1:] == 1)).any())
    assert output.past_key_values.get_seq_length() == text.shape[1] - 1


def test_a_policy_that_never_stops_drafts_nothing() -> None:
    never = Policy(Margin(), Threshold(), stages=(0, 1), mode="verify")
    output = _many(3, **LONG, policy=never)
    assert bool((output.agreement == 1).all())
    assert bool((output.exit_stages == len(require_exits(_model()).layers)).all())


def test_rows_end_where_they_say_the_end() -> None:
    output = _many(5, **LONG, eos_token_id=4, pad_token_id=0, random="keyed")
    text = output.sequences[:, PROMPTS.shape[1] :]
    ended = (text == 4).cumsum(dim=1) - (text == 4).long() > 0
    assert bool(ended.any())
    assert bool((text[ended] == 0).all())
    assert bool((output.agreement[ended] == -1).all())
    free = _many(5, **LONG, random="keyed").sequences[:, PROMPTS.shape[1] :]
    assert torch.equal(text[~ended], free[:, : text.shape[1]][~ended])


HEADS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False, "speculation": "coupled"},
    "processed": {"do_sample": False, "speculation": "coupled", "repetition_penalty": 1.7},
    "coupled": {"speculation": "coupled"},
    "rejection": {},
}


@pytest.mark.parametrize("capture", [None, "none"])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("policy", ["never", "in turn", "random"])
def test_the_head_is_read_once_more_for_drafts_and_for_nothing_else(
    policy: str, name: str, rows: int, capture: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What all rows took to full depth is confirmed by the logits that it was drawn from."""
    deep: list[bool] = []

    def walked(*given: Any) -> Any:
        step, state = walk(*given)
        deep.append(bool((step.stages == 2).all()))
        return step, state

    never = Policy(NoScore(), FixedStage(), stages=(0, 1), mode="verify")
    rule = {"never": never.rule, "in turn": InTurn(), "random": RandomStage(0.6)}[policy]
    settings = HEADS[name] | {"policy": replace(never, rule=rule), "capture": capture, "seed": 3}
    settings |= {"random": "keyed", "output_logits": True, "output_scores": True}
    settings |= {"max_new_tokens": 24, "max_pending": 8}
    if settings.get("do_sample", True):
        settings["top_k"] = 0
    prompts = {"input_ids": PROMPTS[:rows], "attention_mask": MASK[:rows]}
    if rows == 1:
        prompts = {"input_ids": PROMPTS[1:2]}
    full = _text(**prompts, **settings | {"policy": never})
    monkeypatch.setattr("adaptive._verify.walk", walked)
    with helpers.reading_head() as read:
        output = _text(**prompts, **settings)
    assert sum(read) == rows * (1 + len(deep) + deep.count(False))
    assert (policy == "never") == all(deep)
    assert any(deep)
    if name != "rejection" or policy == "never":
        assert torch.equal(output.sequences, full.sequences)
        for kind in ("logits", "scores"):
            mine, other = torch.stack(output[kind]), torch.stack(full[kind])
            torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)


def _text(**settings: Any) -> Any:
    settings = {"speculation": "rejection", "do_sample": True} | settings
    return generate(_model(), **settings, return_dict_in_generate=True)


class Collecting(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.tokens.append(-1)


def test_streamers_see_what_stands() -> None:
    streamer = Collecting()
    output = generate(
        _model(),
        PROMPTS[1:2],
        policy=_policy(),
        speculation="rejection",
        do_sample=True,
        streamer=streamer,
        **LONG,
    )
    assert streamer.tokens == [*output[0].tolist(), -1]


class AfterFive(StoppingCriteria):
    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        done = input_ids.shape[1] >= PROMPTS.shape[1] + 5
        return torch.full((input_ids.shape[0],), done)


def test_stopping_criteria_see_what_stands() -> None:
    torch.manual_seed(2)
    longer = _many(2, **LONG).sequences
    torch.manual_seed(2)
    shorter = _many(2, **LONG, stopping_criteria=StoppingCriteriaList([AfterFive()])).sequences
    assert torch.equal(shorter, longer[:, : PROMPTS.shape[1] + 5])


def test_common_noise_stays_the_default() -> None:
    settings = {"do_sample": True, "max_new_tokens": 16, "attention_mask": MASK}
    torch.manual_seed(4)
    plain = _model().generate(PROMPTS, **settings)
    torch.manual_seed(4)
    assert torch.equal(generate(_model(), PROMPTS, policy=_policy(), **settings), plain)
    torch.manual_seed(4)
    through = _model().generate(
        PROMPTS, custom_generate=generate, policy=_policy(), speculation="rejection", **settings
    )
    assert not torch.equal(through, plain)


# -- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["exact", "propagate"])
def test_other_modes_have_no_drafts(mode: Any) -> None:
    policy = Policy(NoScore(), FixedStage(0), stages=(0,), mode=mode)
    with pytest.raises(InvalidArgumentError, match=f"`speculation`.*{mode}.* mode has no drafts"):
        _many(1, policy=policy)


def test_greedy_decoding_draws_nothing() -> None:
    with pytest.raises(InvalidArgumentError, match=r"`speculation`.*greedy decoding"):
        _many(1, do_sample=False)


def test_other_words_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match=r"`speculation`.*'coupled' or 'rejection'"):
        _many(1, speculation="typical")
