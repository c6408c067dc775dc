"""The simulator that `bench_rows.py` holds the loop against."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def schedules(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return __import__("schedules")


def _passes(schedules: ModuleType, *, fixed: float, each: float) -> object:
    segment = lambda count: 2.0 * (fixed + each * count)  # noqa: E731
    head = lambda count: fixed + each * count  # noqa: E731
    return schedules.Passes((segment, segment, segment, head))


def test_where_passes_cost_by_the_token_every_schedule_takes_the_same(
    schedules: ModuleType,
) -> None:
    depths = np.random.default_rng(0).integers(0, 3, (8, 20))
    passes = _passes(schedules, fixed=0.0, each=1.0)
    alone = float((2.0 * (depths + 1) + 1.0).sum())
    best, _ = schedules.best_schedule(depths, passes)
    assert schedules.simulate(depths, passes, schedules.aligned) == pytest.approx(alone)
    assert best == pytest.approx(alone)


@pytest.mark.parametrize("exact", [False, True])
def test_full_depth_passes_everything_once(schedules: ModuleType, exact: bool) -> None:
    passes = _passes(schedules, fixed=1.0, each=0.1)
    deep = np.full((4, 10), 2)
    once = 3 * 2.0 * (1.0 + 0.4) + 1.4
    found = schedules.simulate(deep, passes, schedules.aligned, exact=exact)
    assert found == pytest.approx(10 * once)


def test_waiting_tokens_pass_with_their_rows_next(schedules: ModuleType) -> None:
    # one row: two tokens stop behind segment 0, the third takes them through the others
    passes = _passes(schedules, fixed=1.0, each=1.0)
    found = schedules.simulate(np.array([[0, 0, 2]]), passes, schedules.aligned, exact=True)
    assert found == pytest.approx(3 * 2.0 * 2.0 + 2 * 2.0 * (1.0 + 3.0) + 3 * 2.0)


@pytest.mark.parametrize("rows", [8, 32])
def test_rows_in_step_are_near_the_best_where_a_pass_takes_as_long_for_many(
    schedules: ModuleType, rows: int
) -> None:
    depths = np.random.default_rng(1).integers(0, 3, (rows, 30))
    passes = _passes(schedules, fixed=1.0, each=0.0)
    ours = schedules.simulate(depths, passes, schedules.aligned)
    best, _ = schedules.best_schedule(depths, passes)
    ahead = schedules.simulate(depths, passes, schedules.best_used(passes, rows))
    assert ours <= 1.02 * best
    assert ahead > ours  # running ahead empties the passes
