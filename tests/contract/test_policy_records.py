"""The table of the docs: every deployable policy has a record, and no record breaks its promise."""

from __future__ import annotations

import importlib
import inspect
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adaptive import policies
from adaptive.policies import AbstractRule, AbstractSchedule, AbstractScore

ROOT = Path(__file__).parents[2]
RECORDS = ROOT / "tests" / "benchmarks" / "results" / "policies"


@pytest.fixture(scope="module")
def script() -> Any:
    """The script that made the records."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tests" / "benchmarks"))
        found = importlib.import_module("certify_policies")
        yield found
        for name in ("certify_policies", "policy_rows", "bench_policy_cost"):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def records(script: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = script.records()
    return found


def test_every_row_has_a_record_and_every_record_a_row(script: Any, records: Any) -> None:
    assert [found["name"] for found in records] == [row.name for row in script.ROWS]
    assert len(list(RECORDS.iterdir())) == len(records)


def test_every_deployable_class_is_in_a_record(records: Any) -> None:
    """Scores, rules and schedules of the package; what is built by a function is one of these."""
    shown = {
        name
        for found in records
        for part in ("score", "rule")
        for name in re.findall(r"\w+", found[part])
    }
    deployable = {
        name
        for name in policies.__all__
        if inspect.isclass(kind := getattr(policies, name))
        and issubclass(kind, AbstractRule | AbstractScore | AbstractSchedule)
        and not name.startswith("Abstract")
    }
    assert deployable - shown == set()


def test_seeds_and_promise_are_the_same_for_all(script: Any, records: Any) -> None:
    for found in records:
        assert (found["seed"], found["promised"], found["delta"]) == (
            script.SEED,
            script.RISK,
            script.DELTA,
        )
    assert len({found["model"] for found in records}) == 1


def test_fresh_prompts_reject_no_promise(script: Any, records: Any) -> None:
    level = math.log(0.001 / len(records))
    assert math.log(script.FALSE_ALARM) == pytest.approx(level)
    for found in records:
        assert found["log_p"] > level, found["name"]
        low, high = found["interval"]
        assert low <= found["realised"] <= high
        assert found["n_fresh"] >= 130


def test_policies_stop_early_and_pay_no_less_than_the_oracle(records: Any) -> None:
    for found in records:
        assert found["oracle_depth"] < found["mean_depth"] <= 12.0
    full = {found["name"] for found in records if found["mean_depth"] == 12.0}
    assert full == set()


def test_the_check_on_fresh_prompts_can_fail(script: Any, rng: np.random.Generator) -> None:
    """Losses of a true risk of twice the promise are found out, those at the promise are not."""
    at = rng.binomial(8, script.RISK, 260) / 8
    twice = rng.binomial(8, 2.0 * script.RISK, 260) / 8
    assert script.log_p_of_promise(at) > math.log(script.FALSE_ALARM)
    assert script.log_p_of_promise(twice) < math.log(script.FALSE_ALARM)


def test_the_page_shows_the_records(script: Any) -> None:
    page = script.PAGE.read_text(encoding="utf-8")
    assert script.end_to_end_table() in page
    assert script.catalogue() in page


def test_the_cost_of_every_policy_is_on_the_page(script: Any) -> None:
    """Every row has been timed, and no decision alone is a large share of a head."""
    cost = importlib.import_module("bench_policy_cost")
    found = json.loads(cost.RESULTS.read_text(encoding="utf-8"))["policies"]
    assert [row["name"] for row in found] == [row.name for row in script.ROWS]
    assert max(row["decide"][0] for row in found) < 0.1
    assert cost.table() in (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.statistical
def test_one_policy_end_to_end(script: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """The script certifies the probe's threshold anew; the cheapest member breaks the promise."""
    monkeypatch.setattr(script, "CACHE", tmp_path)
    monkeypatch.setattr(script, "FRESH", 120)
    bench = script.Bench()
    row = next(row for row in script.ROWS if row.name == "probe")
    found = script.certify(bench, row)
    json.dumps(found, allow_nan=False)
    assert found["certified"]
    assert found["n_fresh"] == 120
    assert found["oracle_depth"] < found["mean_depth"] < 12.0
    assert found["log_p"] > math.log(script.FALSE_ALARM)
    cheapest = row.build(bench.shop).member(0.0)
    runs = bench.run(bench.fresh, cheapest)
    losses = np.array([run.disagreement for run in runs])
    assert script.log_p_of_promise(losses) < math.log(script.FALSE_ALARM)
