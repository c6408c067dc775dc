"""Traces: what is refused, what is kept, splitting, joining, storing."""

from __future__ import annotations

import copy
import json
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptive.calibration import (
    InvalidArgumentError,
    InvalidTypeError,
    Trace,
    UnsupportedError,
    load_trace,
    save_trace,
)


def make(n_units=6, seed=0, prefix="u", **changes):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 5, n_units)
    n = int(lengths.sum())
    fields = {
        "scores": rng.random((n, 3)),
        "losses": {"disagreement": rng.random((n, 3)) < 0.3, "gap": rng.normal(size=(n, 3))},
        "costs": [1.0, 2.0, 3.0, 4.0],
        "cost_quantity": "seconds",
        "lengths": lengths,
        "unit_ids": [f"{prefix}{i}" for i in range(n_units)],
        "groups": [f"g{i // 2}" for i in range(n_units)],
        "weights": np.arange(1.0, n_units + 1),
        "columns": {"answers": rng.integers(0, 9, (n, 3))},
    }
    return Trace(**{**fields, **changes})


def test_it_is_read_only_and_knows_its_shape():
    trace = make()
    assert (trace.n_units, trace.n_exits, len(trace)) == (6, 3, 6)
    assert trace.scores.dtype == np.float32
    assert trace.losses["disagreement"].dtype == bool
    for array in (trace.scores, trace.costs, trace.lengths, trace.losses["gap"]):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0
    with pytest.raises(TypeError):
        trace.losses["new"] = trace.scores
    assert "6 units" in repr(trace)


def test_the_callers_arrays_stay_writeable():
    scores = np.zeros((2, 1), dtype=np.float32)
    Trace(scores=scores, losses={"x": scores}, costs=[1, 2], cost_quantity="s")
    scores[0, 0] = 1.0


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"scores": np.zeros((0, 3))}, "`scores` must be"),
        ({"costs": [1.0, 2.0, 3.0]}, "one per stage"),
        ({"costs": [1.0, 2.0, 2.0, 4.0]}, "increasing"),
        ({"costs": [0.0, 2.0, 3.0, 4.0]}, "positive"),
        ({"losses": {}}, "at least one named loss"),
        ({"losses": {"x": np.zeros((2, 3))}}, "as `scores`"),
        ({"lengths": [1, 2, 3]}, "summing to"),
        ({"unit_ids": list("aabcde")}, "'a' twice"),
        ({"unit_ids": list("abc")}, "one per unit"),
        ({"groups": [0]}, "`groups` must be"),
        ({"weights": [0.0] * 6}, "not all zero"),
        ({"weights": [-1.0] * 6}, "non-negative"),
        ({"columns": {"answers": np.zeros(1)}}, "one row per token"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(changes, text):
    with pytest.raises(InvalidArgumentError, match=text):
        make(**changes)


def test_nan_is_refused_with_its_place_and_minus_infinity_is_not():
    scores = np.zeros((4, 2))
    losses = {"x": np.zeros((4, 2))}
    scores[2, 1] = np.nan
    with pytest.raises(InvalidArgumentError, match="nan at token 2, exit 1"):
        Trace(scores=scores, losses=losses, costs=[1, 2, 3], cost_quantity="s")
    scores[2, 1] = np.inf
    with pytest.raises(InvalidArgumentError, match="inf at token 2, exit 1"):
        Trace(scores=scores, losses=losses, costs=[1, 2, 3], cost_quantity="s")
    scores[2, 1] = -np.inf
    Trace(scores=scores, losses=losses, costs=[1, 2, 3], cost_quantity="s")
    losses["x"][0, 0] = np.inf
    with pytest.raises(InvalidArgumentError, match="inf at token 0, exit 0"):
        Trace(scores=scores, losses=losses, costs=[1, 2, 3], cost_quantity="s")


def test_zero_length_units_are_refused():
    with pytest.raises(InvalidArgumentError, match="at least 1 for every unit"):
        make(lengths=[0] * 6)


def test_types_are_named():
    with pytest.raises(InvalidTypeError, match="lengths"):
        make(lengths=[1.5] * 6)
    with pytest.raises(InvalidTypeError, match="cost_quantity"):
        make(cost_quantity="")


@given(st.permutations(range(6)), st.integers(1, 6))
def test_selecting_takes_whole_units_in_the_order_asked(order, count):
    trace = make()
    part = trace.select(order[:count])
    assert part.unit_ids == tuple(f"u{i}" for i in order[:count])
    rows = np.concatenate(
        [np.arange(trace.offsets[i], trace.offsets[i + 1]) for i in order[:count]]
    )
    np.testing.assert_array_equal(part.scores, trace.scores[rows])
    np.testing.assert_array_equal(part.columns["answers"], trace.columns["answers"][rows])
    np.testing.assert_array_equal(part.weights, trace.weights[order[:count]])


@pytest.mark.parametrize("units", [[], [0, 0], [6], [-1], [True] * 5])
def test_selecting_refuses_nothing_repeats_and_strangers(units):
    with pytest.raises(InvalidArgumentError, match="units"):
        make().select(np.asarray(units, dtype=bool if units == [True] * 5 else int))


@given(st.integers(0, 20), st.sampled_from([(0.5, 0.5), (0.2, 0.3, 0.5), (1.0,)]))
def test_splitting_is_a_partition_by_group_fixed_by_the_seed(seed, fractions):
    trace = make(n_units=20)
    parts = trace.split(fractions, rng=seed)
    again = trace.split(fractions, rng=seed)
    assert [part.fingerprint() for part in parts] == [part.fingerprint() for part in again]
    names = [name for part in parts for name in part.unit_ids]
    assert sorted(names) == sorted(trace.unit_ids)
    groups = [set(part.groups.tolist()) for part in parts]
    assert sum(map(len, groups)) == len(set().union(*groups)) == 10
    bounds = np.rint(np.cumsum(fractions) * 10)
    assert [len(g) for g in groups] == np.diff(bounds, prepend=0).tolist()


def test_splitting_without_groups_counts_units():
    sizes = [p.n_units for p in make(n_units=10, groups=None).split([0.3, 0.7], rng=1)]
    assert sizes == [3, 7]
    with pytest.raises(InvalidArgumentError, match="each part gets one"):
        make(n_units=2, groups=None).split([0.1, 0.9])
    with pytest.raises(InvalidArgumentError, match="summing to 1"):
        make().split([0.5, 0.4])


def test_concatenation_undoes_selection_and_merging_forgets_the_order():
    trace = make()
    parts = [trace.select([0, 1]), trace.select([2, 3, 4, 5])]
    assert Trace.concat(parts).fingerprint() == trace.fingerprint()
    assert Trace.merge(parts[::-1]).fingerprint() == Trace.merge(parts).fingerprint()
    assert Trace.concat(parts[::-1]).fingerprint() != trace.fingerprint()


@pytest.mark.parametrize(
    ("changes", "fact"),
    [
        ({"costs": [1.0, 2.0, 3.0, 5.0]}, "costs"),
        ({"cost_quantity": "FLOPs"}, "cost quantity"),
        ({"weights": None}, "presence of weights"),
        ({"columns": {}}, "columns"),
    ],
)
def test_traces_that_differ_are_not_joined(changes, fact):
    with pytest.raises(InvalidArgumentError, match=fact):
        Trace.concat([make(), make(prefix="v", **changes)])
    with pytest.raises(InvalidArgumentError, match="twice"):
        Trace.concat([make(), make()])
    with pytest.raises(InvalidArgumentError, match="at least one"):
        Trace.concat([])


def test_fingerprints_see_every_value_and_no_storage(tmp_path):
    trace = make()
    prints = {trace.fingerprint(), make(cost_quantity="bytes").fingerprint()}
    for name in ("scores", "gap", "answers"):
        source = {
            "scores": trace.scores,
            "gap": trace.losses["gap"],
            "answers": trace.columns["answers"],
        }
        changed = source[name].copy()
        changed[-1, -1] += 1
        field = {"scores": "scores", "gap": "losses", "answers": "columns"}[name]
        value = changed if name == "scores" else {**getattr(trace, field), name: changed}
        prints.add(make(**{field: value}).fingerprint())
    assert len(prints) == 5


@pytest.mark.parametrize("optional", [True, False])
def test_a_round_trip_through_disk_changes_nothing(tmp_path, optional):
    trace = make() if optional else make(groups=None, weights=None, columns={})
    save_trace(trace, tmp_path / "trace.npz")
    trace.save(tmp_path / "trace.npz")
    trace.save(tmp_path / "folder")
    for path, mapped in (("trace.npz", False), ("folder", False), ("folder", True)):
        loaded = load_trace(tmp_path / path, memory_map=mapped)
        assert loaded.fingerprint() == trace.fingerprint()
        assert loaded.unit_ids == trace.unit_ids
        assert isinstance(loaded.scores, np.memmap) == mapped
        np.testing.assert_array_equal(loaded.losses["gap"], trace.losses["gap"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "trace.npz"]


def test_traces_travel_between_processes():
    trace = make()
    assert pickle.loads(pickle.dumps(trace)).fingerprint() == trace.fingerprint()
    assert copy.deepcopy(trace).fingerprint() == trace.fingerprint()


def test_a_directory_is_never_replaced(tmp_path):
    make().save(tmp_path / "folder")
    with pytest.raises(InvalidArgumentError, match="does not exist yet"):
        make().save(tmp_path / "folder")


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "trace.npz"
    make().save(path)
    before = path.read_bytes()
    monkeypatch.setattr(np, "savez_compressed", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make(seed=1).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["trace.npz"]


def test_unknown_versions_and_strangers_are_refused(tmp_path):
    make().save(tmp_path / "folder")
    manifest = tmp_path / "folder" / "manifest.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**content, "schema_version": 99}))
    with pytest.raises(UnsupportedError, match="schema version 99"):
        load_trace(tmp_path / "folder")
    manifest.write_text("{}")
    with pytest.raises(InvalidArgumentError, match="written by `save`"):
        load_trace(tmp_path / "folder")
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    with pytest.raises(InvalidArgumentError, match="written by `save`"):
        load_trace(tmp_path / "other.npz")
    with pytest.raises(InvalidArgumentError, match="existing"):
        Trace.load(tmp_path / "nowhere")
    with pytest.raises(InvalidArgumentError, match="memory_map"):
        load_trace(tmp_path / "other.npz", memory_map=True)


def test_the_frame_has_a_row_per_token():
    trace = make()
    frame = trace.to_frame()
    assert len(frame) == trace.n_tokens
    assert {"unit_id", "group", "weight", "position", "score_2", "gap_0", "answers_1"} <= set(frame)
    assert frame.groupby("unit_id", sort=False)["position"].max().tolist() == (
        (trace.lengths - 1).tolist()
    )
