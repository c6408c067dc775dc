"""Windowed layers keep a window and what may wait: the same texts in less memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive import generate
from adaptive._keys_values import KeyValues
from adaptive._tokens import Tokens, visible, visible_in_ring

CPU = torch.device("cpu")
WINDOWED = ("mistral-window", "qwen2-window", "gemma2", "gemma3")
MODES = ("exact", "propagate", "verify")
WIDTH = 3


def _memory(windows: tuple[int | None, ...], *, length: int = 40, ahead: int | None = 4) -> Any:
    like = torch.zeros(())
    return KeyValues(windows, batch=2, heads=1, length=length, width=WIDTH, ahead=ahead, like=like)


def _said(first: int, stop: int) -> torch.Tensor:
    """Keys that say which slot they are of, ``[2, 1, n, width]``."""
    return torch.arange(first, stop).float()[None, None, :, None].expand(2, 1, -1, WIDTH)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), window=st.integers(1, 6), ahead=st.integers(0, 5))
def test_a_query_sees_its_window_wherever_it_is_kept(data: Any, window: int, ahead: int) -> None:
    """Runs of up to ``ahead + 1`` slots, with up to ``ahead`` of them forgotten now and then."""
    memory = _memory((window,), ahead=ahead)
    places, stop = memory.places[window], 0
    assert places == window + ahead
    padding = torch.zeros(2, 4, dtype=torch.bool)
    padding[1, : data.draw(st.integers(0, 3))] = True
    while stop < 36:
        first, stop = stop, stop + data.draw(st.integers(1, ahead + 1))
        memory.write(0, _said(first, stop), -_said(first, stop), memory.into(window, first, stop))
        slots = torch.arange(first, stop).expand(2, -1)
        seen = visible_in_ring(slots, padding, places=places, window=window)[:, 0]
        plain = visible(slots, padding, low=0, stop=stop, window=window)[:, 0]
        for row in range(2):
            for query in range(stop - first):
                held = memory.keys[0][row, 0, :places, 0][seen[row, query]]
                expected = torch.arange(stop)[plain[row, query]]
                assert sorted(held.tolist()) == expected.tolist()
        stop -= data.draw(st.integers(0, min(ahead, stop - first)))


def test_no_query_sees_everything_in_the_ring() -> None:
    mask = visible_in_ring(torch.tensor([[9, -1]]), None, places=6, window=3)[0, 0].int()
    assert mask.tolist() == [[0, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0]]


@settings(max_examples=50, deadline=None)
@given(first=st.integers(0, 20), count=st.integers(1, 12))
def test_stacked_layers_are_filled_as_one_by_one(first: int, count: int) -> None:
    windows = (5, None, 5, None, 5)
    one, all_, single = (_memory(windows) for _ in range(3))
    layers = torch.arange(5.0)[:, None, None, None, None] * 100
    keys = layers + _said(first, first + count)
    low, high = 1, 5
    all_.fill(low, high, keys[low:high], -keys[low:high], first)
    rows = np.array([0, 1])
    tokens = Tokens(rows, rows * 0 + first, rows * 0 + first + count, device=CPU)
    picked = keys[low:high].permute(0, 2, 1, 3, 4).flatten(2, 3)
    if count <= 9:  # single tokens of a row never wait in greater number than there are places
        single.fill_tokens(low, high, picked, -picked, tokens)
    for layer in range(low, high):
        into = one.into(windows[layer], first, first + count)
        one.write(layer, keys[layer], -keys[layer], into)
    for layer in range(5):
        for others in (all_, single) if count <= 9 else (all_,):
            assert torch.equal(one.keys[layer], others.keys[layer])
            assert torch.equal(one.values[layer], others.values[layer])
    for layer in range(low, high):
        kept, _ = one.last(layer, first + count)
        places = one.places[windows[layer]]
        slots = kept[0, 0, :, 0] - 100 * layer
        assert slots.tolist()[-min(count, places) :] == list(range(first, first + count))[-places:]


def test_what_is_written_elsewhere_in_a_piece_of_fixed_shape() -> None:
    """A place behind the last, in every layer, takes what belongs nowhere."""
    memory = _memory((5, None), length=30)
    slots = torch.tensor([30, 30, 11, 12])
    assert memory.where(5, slots).tolist() == [9, 9, 2, 3]
    assert memory.where(None, slots).tolist() == [30, 30, 11, 12]


@pytest.mark.parametrize("ahead", [None, 100])
def test_short_texts_and_runs_that_ask_for_it_keep_every_slot(ahead: int | None) -> None:
    memory = _memory((5, None), ahead=ahead)
    assert set(memory.places.values()) == {40}
    assert not memory.wraps(5, 40)


def _given(helpers: Any, mode: str, lengths: tuple[int, ...], model: Any) -> dict[str, Any]:
    ids, mask = helpers.prompts(lengths)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "policy": helpers.mixed(model, mode),
        "max_new_tokens": 40,
        "pad_token_id": 0,
        "return_dict_in_generate": True,
    }


@pytest.mark.parametrize(
    ("capture", "lengths", "most"),
    [(None, (19,), 1), (None, (5, 23, 16), 4), ("none", (19,), 4), ("none", (5, 23, 16), 1)],
    ids=["one", "padded", "fixed shapes, one", "fixed shapes, padded"],
)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", WINDOWED)
def test_a_ring_changes_no_text(
    name: str, mode: str, most: int, lengths: tuple[int, ...], capture: Any, helpers: Any
) -> None:
    """Past the window several times, beside the generic tier, which keeps every slot."""
    model = helpers.shared(name)
    arguments = _given(helpers, mode, lengths, model) | {"max_pending": most}
    ours = generate(model, capture=capture, tier="native", **arguments)
    theirs = generate(model, tier="generic", **arguments)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert torch.equal(ours.exit_stages, theirs.exit_stages)
    assert torch.equal(ours.agreement, theirs.agreement)
    for mine, other in zip(ours.past_key_values.layers, theirs.past_key_values.layers, strict=True):
        keys, values, slots = helpers.kept(mine, 0)
        real = arguments["attention_mask"].bool().all(dim=0).nonzero().min()
        late = max(0, int(real) - slots.start)  # padding is not compared
        for one, whole in ((keys, other.keys), (values, other.values)):
            torch.testing.assert_close(
                one[:, :, late:], whole[:, :, slots][:, :, late:], atol=3e-5, rtol=3e-5
            )


@pytest.mark.parametrize("mode", MODES)
def test_rows_that_go_apart_and_end_keep_their_windows(
    mode: str, helpers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adaptive._stacking.pays_apart", lambda *_, **__: True)
    model = helpers.shared("gemma3")
    arguments = _given(helpers, mode, (5, 23, 16, 11), model)
    text = generate(model, tier="generic", **arguments).sequences
    ends = text[:2, 23 + 15].tolist()
    both = [
        generate(model, tier=tier, max_pending=3, eos_token_id=ends, **arguments)
        for tier in ("native", "generic")
    ]
    assert bool((both[0].exit_stages < 0).any())
    assert torch.equal(both[0].sequences, both[1].sequences)
    assert torch.equal(both[0].exit_stages, both[1].exit_stages)
    assert torch.equal(both[0].agreement, both[1].agreement)


@pytest.mark.parametrize("mode", ["exact", "verify"])
def test_a_ring_without_room_for_what_waits_changes_the_text(
    mode: str, helpers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = helpers.shared("mistral-window")
    arguments = _given(helpers, mode, (19,), model) | {"max_pending": 4}
    expected = generate(model, **arguments)
    begin = KeyValues.__init__

    def narrow(own: Any, *args: Any, ahead: int, **kwargs: Any) -> None:
        begin(own, *args, ahead=0, **kwargs)

    monkeypatch.setattr(KeyValues, "__init__", narrow)
    # runs of several tokens are to believe that they fit
    monkeypatch.setattr(KeyValues, "holds", lambda *_: True)
    found = generate(model, **arguments)
    same = [
        torch.equal(getattr(found, name), getattr(expected, name))
        for name in ("sequences", "agreement")
    ]
    assert not all(same)


def test_the_cache_is_what_transformers_would_hand_out(helpers: Any) -> None:
    """The same classes of layers, and a text that goes on from it is the text in one go."""
    model = helpers.shared("gemma3")
    ids, _ = helpers.prompts((19,))
    plain = model.generate(ids, max_new_tokens=30, do_sample=False, return_dict_in_generate=True)
    ours = generate(
        model,
        ids,
        policy=helpers.mixed(model, "verify"),
        max_new_tokens=30,
        do_sample=False,
        return_dict_in_generate=True,
    )
    layers = plain.past_key_values.layers
    for mine, theirs in zip(ours.past_key_values.layers, layers, strict=True):
        assert type(mine) is type(theirs)
        assert mine.get_seq_length() == theirs.get_seq_length()
        torch.testing.assert_close(mine.keys, theirs.keys, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(mine.values, theirs.values, atol=1e-4, rtol=1e-4)
    more = model.generate(
        ours.sequences,
        attention_mask=torch.ones_like(ours.sequences),  # a text may hold the token that pads
        past_key_values=ours.past_key_values,
        max_new_tokens=12,
        do_sample=False,
    )
    whole = model.generate(ids, max_new_tokens=42, do_sample=False)
    assert torch.equal(more, whole)
