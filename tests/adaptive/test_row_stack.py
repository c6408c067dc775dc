"""Rows of a batch with filled lengths of their own: what is run, and that nothing changes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers import NATIVE
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive import _generate, _stacking, generate, get_exits
from adaptive._costs import Costs
from adaptive._native import NativeExecutor
from adaptive._stack import ExactStack, PropagateStack
from adaptive._tokens import Tokens, visible

CPU = torch.device("cpu")
LENGTHS = (11, 3, 7, 1, 10, 9, 5, 8)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), batch=st.integers(1, 7))
def test_a_layout_puts_every_token_in_its_line_and_takes_it_back(data: Any, batch: int) -> None:
    of = data.draw(st.lists(st.integers(0, batch - 1), min_size=1, max_size=6))
    starts = np.arange(len(of)) * 10  # no slot of a row twice
    stops = (
        starts + np.array(data.draw(st.lists(st.integers(1, 3), min_size=6, max_size=6)))[: len(of)]
    )
    tokens = Tokens(np.array(of), starts, stops, device=CPU)
    expected = [(r, s) for r, a, b in zip(of, starts, stops, strict=True) for s in range(a, b)]
    assert list(zip(tokens.rows.tolist(), tokens.slots.tolist(), strict=True)) == expected
    layout = tokens.layout(batch)
    values = torch.arange(tokens.count * 2.0).view(-1, 2)
    laid = layout.lay(values)
    assert laid.shape == (layout.lines, layout.longest, 2)
    assert torch.equal(layout.pick(laid), values)
    lines = layout.lay(tokens.rows, empty=-1)
    for line, kept in enumerate(layout.of(torch.arange(batch)).tolist()):
        held = lines[line][lines[line] >= 0]
        assert bool((held == kept).all())  # a line holds its own row's tokens only
        slots = layout.lay(tokens.slots, empty=-1)[line]
        assert slots[slots >= 0].tolist() == sorted(s for r, s in expected if r == kept)


def test_rows_are_copied_only_if_few_of_them_are_asked_for() -> None:
    one = np.zeros(1, dtype=np.int64)
    assert Tokens(one, one, one + 1, device=CPU).layout(3).rows is None
    assert Tokens(one, one, one + 1, device=CPU).layout(4).rows is not None


def test_what_a_token_sees() -> None:
    slots = torch.tensor([[2, 3], [4, -1]])
    padding = torch.tensor([[True, False], [False, False]])
    mask = visible(slots, padding, low=0, stop=5, window=None)[:, 0].int()
    assert mask[0].tolist() == [[0, 1, 1, 0, 0], [0, 1, 1, 1, 0]]
    assert mask[1].tolist() == [[1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]  # no query: sees one key
    near = visible(slots, None, low=1, stop=5, window=2)[:, 0].int()
    assert near[0].tolist() == [[1, 1, 0, 0], [0, 1, 1, 0]]


@pytest.fixture(autouse=True)
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of models this small would stay together: nothing is saved."""
    monkeypatch.setattr(_stacking, "pays_apart", lambda *_, **__: True)


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Turn rows of their own off, for comparison."""

    def stack(executor: Any, exits: Any, mode: str, *_: Any, **__: Any) -> Any:
        kind = PropagateStack if mode == "propagate" else ExactStack
        return kind(executor, exits.layers)

    def run(*args: Any, **kwargs: Any) -> Any:
        with monkeypatch.context() as patched:
            patched.setattr(_generate, "stack_for", stack)
            return generate(*args, **kwargs)

    return run


def _some_end(helpers: Any, name: str, mode: str, run: Any) -> tuple[Any, Any, dict[str, Any]]:
    """A model, prompts and settings; with ``run``, such that three rows end before the others."""
    model = helpers.shared(name)
    ids, mask = helpers.prompts(LENGTHS)
    given: dict[str, Any] = {
        "attention_mask": mask,
        "policy": helpers.mixed(model, mode),
        "max_new_tokens": 24,
        "max_pending": 5,
        "pad_token_id": 0,
        "return_dict_in_generate": True,
    }
    if run is not None:
        text = run(model, ids, **given).sequences
        given["eos_token_id"] = text[:3, ids.shape[1] + 9].tolist()
    return model, ids, given


@pytest.mark.parametrize("mode", ["exact", "propagate"])
@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("ended", [False, True], ids=["full length", "rows end"])
def test_rows_of_their_own_change_nothing(
    name: str, mode: Any, ended: bool, shared: Any, helpers: Any
) -> None:
    model, ids, given = _some_end(helpers, name, mode, shared if ended else None)
    ours, theirs = generate(model, ids, **given), shared(model, ids, **given)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert torch.equal(ours.exit_stages, theirs.exit_stages)
    assert torch.equal(ours.agreement, theirs.agreement)
    assert len(ours.exit_stages.unique()) >= 3  # depths are mixed
    for layer in range(helpers.LAYERS):
        mine, other = (given.past_key_values.layers[layer] for given in (ours, theirs))
        keys, values, slots = helpers.kept(mine, 0)
        other_keys, other_values, others = helpers.kept(other, 0)
        assert slots == others
        for row in range(len(LENGTHS)):
            stop = ids.shape[1] + int((ours.exit_stages[row] >= 0).sum()) - (not ended)
            if slots.start > 0 and stop < slots.stop:
                continue  # of a row that ended before, the window may hold what came earlier
            real = slice(max(0, ids.shape[1] - LENGTHS[row] - slots.start), stop - slots.start)
            for one, two in ((keys, other_keys), (values, other_values)):
                torch.testing.assert_close(
                    one[row, :, real], two[row, :, real], atol=1e-4, rtol=1e-4
                )


class _Counted:
    """Tokens times layers that pass an executor."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.work = 0
        run, run_tokens = NativeExecutor.run, NativeExecutor.run_tokens

        def counted(own: Any, low: int, high: int, hidden: Any, start: int, **kw: Any) -> Any:
            self.work += (high - low) * hidden.shape[0] * hidden.shape[1]
            return run(own, low, high, hidden, start, **kw)

        def counted_tokens(
            own: Any, low: int, high: int, hidden: Any, *args: Any, **kw: Any
        ) -> Any:
            self.work += (high - low) * hidden.shape[0]
            return run_tokens(own, low, high, hidden, *args, **kw)

        monkeypatch.setattr(NativeExecutor, "run", counted)
        monkeypatch.setattr(NativeExecutor, "run_tokens", counted_tokens)


@pytest.mark.parametrize("ended", [False, True], ids=["full length", "rows end"])
def test_only_rows_that_need_a_segment_pass_it(
    ended: bool, helpers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In `propagate` mode the layers that are run are those the record names, and no more."""
    model = helpers.shared("llama")
    ids, mask = helpers.prompts(LENGTHS)
    given: dict[str, Any] = {
        "attention_mask": mask,
        "policy": helpers.mixed(model, "propagate"),
        "max_new_tokens": 24,
        "max_pending": 40,
        "pad_token_id": 0,
    }
    if ended:
        text = generate(model, ids, **given)
        given["eos_token_id"] = text[:3, ids.shape[1] + 6].tolist()
    stages = generate(model, ids, return_dict_in_generate=True, **given).exit_stages[:, 1:]
    counted = _Counted(monkeypatch)
    generate(model, ids, **given)
    depth = torch.tensor([*get_exits(model).layers, helpers.LAYERS, 0])  # -1: none
    assert counted.work - ids.numel() * helpers.LAYERS == int(depth[stages].sum())
    assert bool((stages < 0).any()) is ended


def test_exact_mode_runs_every_layer_of_a_token_once(
    helpers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = helpers.shared("llama")
    ids, mask = helpers.prompts(LENGTHS)
    counted = _Counted(monkeypatch)
    generate(
        model,
        ids,
        attention_mask=mask,
        policy=helpers.mixed(model, "exact"),
        max_new_tokens=24,
        max_pending=5,
        pad_token_id=0,
        return_dict_in_generate=True,
    )
    # of every row: the prompt, and all new tokens but the last, which nobody reads
    assert counted.work == (ids.numel() + 23 * len(LENGTHS)) * helpers.LAYERS


def test_in_exact_mode_rows_go_together_until_one_is_finished(
    helpers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that waits passes with the newest, in one piece of the batch; finished rows do not."""
    model = helpers.shared("llama")
    ids, mask = helpers.prompts(LENGTHS)
    given: dict[str, Any] = {
        "attention_mask": mask,
        "policy": helpers.mixed(model, "exact"),
        "max_new_tokens": 24,
        "max_pending": 40,
        "pad_token_id": 0,
    }
    text = generate(model, ids, **given)
    ends = text[:3, ids.shape[1] + 6].tolist()
    picked: list[tuple[int, int]] = []
    run_tokens = NativeExecutor.run_tokens

    def watched(own: Any, low: int, high: int, hidden: Any, tokens: Any, **kw: Any) -> Any:
        picked.extend(zip(tokens.rows.tolist(), tokens.slots.tolist(), strict=True))
        return run_tokens(own, low, high, hidden, tokens, **kw)

    monkeypatch.setattr(NativeExecutor, "run_tokens", watched)
    counted = _Counted(monkeypatch)
    generate(model, ids, **given)
    assert not picked
    counted.work = 0
    output = generate(model, ids, eos_token_id=ends, **given)
    new = output[:, ids.shape[1] :]
    end = [ids.shape[1] + row.index(next(t for t in row if t in ends)) for row in new.tolist()[:3]]
    assert picked
    # a finished row's last tokens wait for good: none of them passes once its end is there
    assert all(row >= 3 or slot < end[row] for row, slot in picked)
    lengths = [*(stop - ids.shape[1] for stop in end), *(new.shape[1] - 1 for _ in LENGTHS[3:])]
    assert counted.work < (ids.numel() + sum(lengths)) * helpers.LAYERS


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt-neox"])
@pytest.mark.parametrize("ended", [False, True], ids=["full length", "rows end"])
def test_whoever_is_taken_along_nothing_changes(
    name: str, ended: bool, shared: Any, helpers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids, given = _some_end(helpers, name, "exact", shared if ended else None)
    theirs = shared(model, ids, **given)
    rng, asked = np.random.default_rng(0), []

    def coin(own: Any, needed: int, others: int) -> bool:
        asked.append(others > 0)
        return bool(rng.random() < 0.5)

    monkeypatch.setattr(_stacking.ExactRowStack, "_pays_along", coin)
    for _ in range(3):
        ours = generate(model, ids, **given)
        assert torch.equal(ours.sequences, theirs.sequences)
        assert torch.equal(ours.exit_stages, theirs.exit_stages)
        assert torch.equal(ours.agreement, theirs.agreement)
    assert any(asked)


def test_waiting_tokens_are_taken_along_where_a_pass_takes_hardly_longer(
    helpers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them where time is that of reading weights; nobody where it is that of the tokens."""
    model = helpers.shared("llama")
    ids, mask = helpers.prompts(LENGTHS)
    policy = helpers.mixed(model, "exact")
    counts = tuple(range(1, 65))
    flat = Costs(counts, tuple(1.0 + 1e-6 * n for n in counts), tuple(map(float, counts)))
    steep = Costs(counts, tuple(float(n) ** 1.1 for n in counts), tuple(map(float, counts)))
    texts, passed = [], []
    for costs in (flat, steep):
        monkeypatch.setattr(_generate, "needed_costs", lambda *_, costs=costs, **__: costs)
        monkeypatch.setattr(_generate, "inbox", lambda *_: 40)
        counted = _Counted(monkeypatch)
        texts.append(generate(model, ids, attention_mask=mask, policy=policy, max_new_tokens=24))
        passed.append(counted.work)
        monkeypatch.undo()
        monkeypatch.setattr(_stacking, "pays_apart", lambda *_, **__: True)
    assert torch.equal(*texts)
    # what nobody needed any more at the end has not been paid for
    assert passed[1] < passed[0]
