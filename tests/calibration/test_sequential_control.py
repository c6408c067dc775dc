"""Sequential calibration and the ledger: what is spent, when it stops, what is recorded."""

from __future__ import annotations

import dataclasses
import json
import math
import threading
from itertools import pairwise

import numpy as np
import pytest

from adaptive.calibration import (
    BudgetSpentError,
    Certificate,
    CertificateError,
    DeltaLedger,
    InvalidArgumentError,
    MeanEProcess,
    Verdict,
    control_risk,
    control_sequentially,
    verify_sequential,
)


def run(table, **settings):
    asked = []

    def draw(column, first, last):
        asked.append((column, first, last))
        return table[first:last, column]

    defaults = {"n_columns": table.shape[1], "risk": 0.1, "max_units": table.shape[0]}
    return control_sequentially(draw, **{**defaults, **settings}), asked


def table_of(rates, n=800, seed=0):
    return (np.random.default_rng(seed).random((n, len(rates))) < rates).astype(float)


def test_units_are_spent_only_on_undecided_columns():
    result, asked = run(table_of([0.0, 0.0, 0.01, 0.4, 0.0]))
    assert result.index == 2
    assert [record.column for record in result.records] == [1, 2, 3]
    assert result.records[2].verdict is Verdict.HOPELESS
    assert result.drawn == len(asked) == sum(record.units for record in result.records)
    assert result.drawn < 200
    assert result.certified.tolist() == [True, True, True, False, False]
    assert result.to_frame()["verdict"].tolist() == ["CERTIFIED", "CERTIFIED", "HOPELESS"]


def test_it_decides_at_the_first_crossing_whatever_the_batch():
    table = table_of([0.0, 0.02, 0.05])
    single, _ = run(table)
    batched, asked = run(table, batch=64)
    assert [r.units for r in single.records] == [r.units for r in batched.records]
    assert [r.log_e for r in single.records] == pytest.approx([r.log_e for r in batched.records])
    assert batched.drawn > single.drawn
    assert max(last - first for _, first, last in asked) <= 64
    log_e, _ = MeanEProcess(level=0.1).path(table[:, 1])
    assert single.records[0].units == np.argmax(log_e >= math.log(20)) + 1


def test_it_gives_up_when_certification_is_out_of_reach():
    table = np.zeros((300, 2))
    table[:60, 1] = np.tile([1.0, 0.0, 0.0, 0.0, 0.0, 0.0], 10)
    result, _ = run(table, max_units=60, risk=0.17)
    record = result.records[0]
    assert record.verdict is Verdict.OUT_OF_REACH
    assert record.units < 60
    assert result.index is None
    assert not result.certificate.holds
    assert "best losses" in result.certificate.statement()
    few, asked = run(table, max_units=5)
    assert few.records[0].units == 0
    assert asked == []


def test_the_certificate_travels_and_names_its_test():
    result, _ = run(table_of([0.0, 0.01]), loss="disagreement", unit="prompt")
    certificate = Certificate.from_json(result.certificate.to_json())
    assert certificate == result.certificate
    assert certificate.method == "e-process"
    assert "disagreement" in certificate.statement()
    assert certificate.verify(table_of([0.0, 0.01]))
    with pytest.raises(InvalidArgumentError, match="at least 800 units"):
        certificate.verify(np.zeros((10, 2)))


def test_a_certificate_is_verified_by_running_it_again():
    table = table_of([0.0, 0.01, 0.3])
    result, _ = run(table, batch=32)

    def draw(column, first, last):
        return table[first:last, column]

    assert verify_sequential(result.certificate, draw)
    tampered = dataclasses.replace(result.certificate, index=2)
    assert not verify_sequential(tampered, draw)
    assert not verify_sequential(result.certificate, lambda *_: [0.0])
    other = control_risk(table, risk=0.1, loss_type="binary").certificate
    with pytest.raises(InvalidArgumentError, match="control_sequentially"):
        verify_sequential(other, draw)


def test_signed_losses_need_their_lower_bound_declared():
    table = np.random.default_rng(0).uniform(-0.5, 0.3, (500, 2))
    with pytest.raises(InvalidArgumentError, match=r"losses in \[0, 1\]"):
        run(table)
    assert run(table, least=-1.0)[0].index == 1


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"start": 2}, "in 1..1"),
        ({"least": 0.5}, "below `risk`"),
        ({"futility": 0.0}, "futility"),
        ({"batch": 0}, "batch"),
        ({"risk": 1.5}, "risk"),
    ],
)
def test_wrong_settings_are_named(settings, text):
    with pytest.raises(InvalidArgumentError, match=text):
        run(np.zeros((50, 2)), **settings)


def test_wrong_losses_are_named():
    with pytest.raises(InvalidArgumentError, match="of shape"):
        control_sequentially(lambda *_: [0.0, 0.0], n_columns=2, risk=0.1, max_units=50)
    with pytest.raises(InvalidArgumentError, match="finite"):
        control_sequentially(lambda *_: [math.nan], n_columns=2, risk=0.1, max_units=50)


def test_the_ledger_adds_up_and_refuses_to_overspend(tmp_path):
    ledger = DeltaLedger.create(tmp_path / "ledger.json", budget=0.1)
    ledger.spend(0.05, purpose="first release", data="abc")
    ledger.spend(0.03, purpose="second release")
    assert ledger.spent() == pytest.approx(0.08)
    assert ledger.left() == pytest.approx(0.02)
    with pytest.raises(BudgetSpentError, match=r"only 0\.02 is left"):
        ledger.spend(0.03, purpose="third")
    ledger.spend(0.02, purpose="third")
    assert ledger.left() == pytest.approx(0.0, abs=1e-12)
    again = DeltaLedger.open(ledger.path)
    assert [entry.purpose for entry in again.entries()] == [
        "first release",
        "second release",
        "third",
    ]
    assert again.entries()[0].data == "abc"
    assert again.to_frame()["delta"].tolist() == [0.05, 0.03, 0.02]
    assert [p.name for p in tmp_path.iterdir()] == ["ledger.json"]


def test_shares_for_any_number_of_calibrations_never_exhaust_the_budget(tmp_path):
    ledger = DeltaLedger.create(tmp_path / "ledger.json", budget=0.1)
    shares = []
    for k in range(12):
        shares.append(ledger.next_share())
        ledger.spend(shares[-1], purpose=str(k))
    assert shares[0] == pytest.approx(0.1 * 6 / math.pi**2)
    assert all(late < early for early, late in pairwise(shares))
    assert sum(shares) < 0.1


def test_ledgers_are_never_restarted_and_strangers_are_refused(tmp_path):
    path = tmp_path / "ledger.json"
    DeltaLedger.create(path, budget=0.1)
    with pytest.raises(InvalidArgumentError, match="does not exist yet"):
        DeltaLedger.create(path, budget=0.5)
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "schema_version": 7}))
    with pytest.raises(CertificateError, match="schema version 7"):
        DeltaLedger.open(path)
    path.write_text("not json")
    with pytest.raises(CertificateError, match="not a ledger"):
        DeltaLedger.open(path)
    with pytest.raises(InvalidArgumentError, match="existing ledger"):
        DeltaLedger.open(tmp_path / "none.json")


def test_writers_take_turns(tmp_path):
    ledger = DeltaLedger.create(tmp_path / "ledger.json", budget=0.5)

    def spend():
        for _ in range(10):
            ledger.spend(0.01, purpose="thread")

    threads = [threading.Thread(target=spend) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ledger.entries()) == 40


def test_a_stale_lock_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr("adaptive.calibration._ledger._PATIENCE", 0.05)
    ledger = DeltaLedger.create(tmp_path / "ledger.json", budget=0.5)
    (tmp_path / "ledger.json.lock").touch()
    with pytest.raises(InvalidArgumentError, match="stale lock"):
        ledger.spend(0.01, purpose="blocked")
