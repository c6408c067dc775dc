"""Noise: the generator's own draws, or a function of unit and place; both can be read twice."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper

from adaptive._choose import Chooser, KeyedNoise, StreamNoise

VOCABULARY = 12


def _logits(rows: int, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, VOCABULARY, generator=generator) * 1.5


def _prefix(rows: int) -> Tensor:
    return torch.zeros(rows, 1, dtype=torch.int64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_stream_noise_is_what_multinomial_draws(dtype: torch.dtype) -> None:
    steps = [_logits(5, seed=step).to(dtype) for step in range(40)]
    torch.manual_seed(3)
    theirs = [torch.multinomial(step.float().softmax(dim=-1), 1)[:, 0] for step in steps]
    after = torch.rand(1)
    torch.manual_seed(3)
    chooser = Chooser(LogitsProcessorList(), StreamNoise())
    ours = [chooser(_prefix(5), step, index)[0] for index, step in enumerate(steps)]
    assert torch.equal(torch.rand(1), after)
    assert torch.equal(torch.stack(ours), torch.stack(theirs))


def test_stream_noise_can_be_read_twice_and_rewound() -> None:
    noise, like = StreamNoise(), torch.empty(2, VOCABULARY)
    torch.manual_seed(5)
    before = [noise.at(index, like).clone() for index in range(4)]
    assert all(torch.equal(noise.at(index, like), before[index]) for index in (2, 0, 3))
    noise.rewind(2)  # tokens 2 and 3 were drafts that nobody took
    after = torch.empty_like(like).exponential_(1)
    assert torch.equal(after, before[2])


def test_released_noise_is_forgotten() -> None:
    noise, like = StreamNoise(), torch.empty(1, VOCABULARY)
    for index in range(50):
        noise.at(index, like)
        noise.release(index)
    assert len(noise._drawn) == len(noise._before) == 1


@pytest.mark.parametrize("kind", ["at", "uniforms"])
def test_noise_that_is_set_aside_is_drawn_anew(kind: str) -> None:
    """Nothing of the vocabulary's size is kept, and the generator stays where it is."""
    noise, like = StreamNoise(), torch.empty(2, VOCABULARY)
    read = getattr(noise, kind)
    torch.manual_seed(5)
    before = []
    for index in range(4):
        before.append(read(index, like).clone())
        noise.set_aside(index + 1)
        assert not noise._drawn
    state = torch.get_rng_state()
    assert all(torch.equal(read(index, like), before[index]) for index in (2, 0, 3, 2))
    assert not noise._drawn
    assert torch.equal(torch.get_rng_state(), state)
    noise.release(4)
    assert not noise._before


@pytest.mark.statistical
@pytest.mark.parametrize("seed", [0, 1, 2**40 + 7])
def test_keyed_noise_samples_the_softmax(seed: int) -> None:
    n = 20_000
    logits = _logits(1, seed=9)
    chooser = Chooser(LogitsProcessorList([TemperatureLogitsWarper(0.8)]), None)
    expected = (logits[0] / 0.8).double().softmax(dim=-1).numpy() * n
    units = torch.arange(n)
    for index in (0, 1, 511):  # over units at one place, and over places of few units
        drawn, _ = Chooser(chooser.processors, KeyedNoise(units, seed))(
            _prefix(n), logits.expand(n, -1), index
        )
        counts = np.bincount(drawn.numpy(), minlength=VOCABULARY)
        assert stats.chisquare(counts, expected * counts.sum() / expected.sum()).pvalue > 1e-4
    few = Chooser(chooser.processors, KeyedNoise(torch.arange(10), seed))
    places = [few(_prefix(10), logits.expand(10, -1), index)[0] for index in range(n // 10)]
    counts = np.bincount(torch.cat(places).numpy(), minlength=VOCABULARY)
    assert stats.chisquare(counts, expected * counts.sum() / expected.sum()).pvalue > 1e-4


@pytest.mark.statistical
def test_keyed_noise_is_exponential_and_without_echo() -> None:
    like = torch.empty(64, 512)
    noise = KeyedNoise(torch.arange(64), 1)
    here, next_ = noise.at(7, like).double(), noise.at(8, like).double()
    assert stats.kstest(here.flatten().numpy(), "expon").pvalue > 1e-3
    pairs = {
        "places": (here, next_),
        "units": (here[:-1], here[1:]),
        "entries": (here[:, :-1], here[:, 1:]),
        # neither may unit u at place p be unit u+1 at place p-1
        "diagonals": (here[1:], next_[:-1]),
        "seeds": (here, KeyedNoise(torch.arange(64), 2).at(7, like).double()),
    }
    for name, (one, other) in pairs.items():
        correlation = np.corrcoef(one.flatten().numpy(), other.flatten().numpy())[0, 1]
        assert abs(correlation) < 5 / np.sqrt(one.numel()), name


def test_keyed_noise_knows_unit_and_place_only() -> None:
    units = torch.tensor([8, 3, 5])
    like = torch.empty(3, VOCABULARY)
    batch = KeyedNoise(units, 4).at(6, like)
    for row in range(3):
        alone = KeyedNoise(units[row : row + 1], 4).at(6, like[:1])
        assert torch.equal(batch[row], alone[0])
    again = KeyedNoise(units.flip(0), 4).at(6, like).flip(0)
    assert torch.equal(batch, again)
    assert not torch.equal(batch, KeyedNoise(units, 5).at(6, like))
    assert not torch.equal(batch, KeyedNoise(units, 4).at(7, like))


def test_noise_is_never_zero_nor_infinite() -> None:
    like = torch.empty(400, 1000)
    noise = KeyedNoise(torch.arange(400), 0).at(0, like)
    assert bool((noise > 0).all())
    assert bool(noise.isfinite().all())


def test_greedy_choice_and_raw_logits_untouched() -> None:
    logits = _logits(4)
    kept = logits.clone()
    chooser = Chooser(LogitsProcessorList([TemperatureLogitsWarper(0.5)]), None)
    tokens, scores = chooser(_prefix(4), logits, 0)
    assert torch.equal(tokens, kept.argmax(dim=-1))
    assert torch.equal(logits, kept)
    torch.testing.assert_close(scores, kept / 0.5)


@pytest.mark.parametrize("noise", [None, KeyedNoise(torch.arange(3), 1)], ids=["greedy", "keyed"])
def test_choices_along_a_text_are_the_single_choices(noise: KeyedNoise | None) -> None:
    ids = torch.arange(30).view(3, 10)
    logits = torch.stack([_logits(3, seed=step) for step in range(5)], dim=1)
    seen: list[Tensor] = []

    class Watching:
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            seen.append(input_ids)
            return scores

    chooser = Chooser(LogitsProcessorList([Watching()]), noise)
    chosen = chooser.each(ids, logits, range(4, 9), 3)
    assert [prefix.shape[1] for prefix in seen] == [5, 6, 7, 8, 9]
    for offset in range(5):
        alone, _ = chooser(ids[:, : 5 + offset], logits[:, offset], 2 + offset)
        assert torch.equal(chosen[:, offset], alone)
    apart = chooser.each(ids, logits[:, ::2], (4, 6, 8), 3)
    assert torch.equal(apart, chosen[:, ::2])
