"""The journal: what was acknowledged outlives the process at any point, and replay is exact."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import monitored_life
import numpy as np
import pytest

from adaptive._monitor import Monitor, policy_fingerprint
from adaptive._monitor_journal import Journal, Snapshot, read_journal
from adaptive._monitor_outcome import Outcome
from adaptive._monitor_records import JournalError
from adaptive._monitor_reference import Reference
from adaptive._run import Run
from adaptive.calibration import InvalidArgumentError, InvalidTypeError, RiskMonitor, control_risk
from adaptive.policies import Policy, ProbeScore, Threshold

HEADER = {"policy": "p", "rules": {"seed": 0}}


@pytest.fixture(scope="module")
def policy() -> Policy:
    """A certified policy without a model: what a monitor needs is in the certificate."""
    rng = np.random.default_rng(0)
    losses = (rng.random((200, 3)) < [0.0, 0.02, 0.04]).astype(float)
    certificate = control_risk(losses, risk=0.1, delta=0.1, loss_type="binary").certificate
    runs = [
        Run((1, 2, 3), np.array([3, 0, 1]), np.ones(3, np.int8), rng.random(3).astype(np.float32))
        for _ in range(200)
    ]
    kept = Reference.of(runs, losses[:, 2], exits=(1, 2, 3), layers=4)
    knobs = {"knobs": ["inf", "0.9", "0.8"]}
    certificate = replace(
        certificate, evidence=certificate.evidence | knobs | kept.to_evidence(), index=2, knob=0.8
    )
    return Policy(ProbeScore(), Threshold(0.8), stages=(0, 1, 2), certificate=certificate)


_OPEN: list[Monitor] = []


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    while _OPEN:
        _OPEN.pop().close()


def alive(policy: Policy, journal: Path, **settings: Any) -> Monitor:
    monitor = Monitor.for_policy(policy, journal=journal, **settings)
    _OPEN.append(monitor)
    return monitor


def feed(monitor: Monitor, losses: list[float], *, together: int = 1) -> None:
    for start in range(0, len(losses), together):
        part = losses[start : start + together]
        monitor.finish(monitor.begin(len(part)), [Outcome(loss, 0.5, 2.0, 8) for loss in part])


def exact(monitor: Monitor) -> str:
    return json.dumps(monitor.state.to_dict(monitor.rules))


# The file.


def test_a_torn_last_line_is_cut_off_and_the_rest_stays(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "journal.jsonl"
    journal = Journal(path, HEADER)
    journal.append([{"kind": "unit", "n": 1}, {"kind": "unit", "n": 2}])
    journal.close()
    whole = path.read_bytes()
    for cut in range(1, len(whole) - whole.rfind(b"\n", 0, -1)):
        path.write_bytes(whole[:-cut])
        again = Journal(path, HEADER)
        numbers = [record["n"] for record in again.read(again.start)]
        again.append([{"kind": "unit", "n": 3}])
        again.close()
        assert numbers == [1]
        assert [r.get("n") for r in read_journal(path)] == [None, 1, 3]


def test_a_file_torn_inside_its_header_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "j"
    path.write_bytes(b'{"kind": "hea')
    Journal(path, HEADER).close()
    assert [record["kind"] for record in read_journal(path)] == ["header"]


def test_a_long_torn_line_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "j"
    Journal(path, HEADER).close()
    with path.open("ab") as file:
        file.write(b"x" * 300_000)
    Journal(path, HEADER).close()
    assert len(list(read_journal(path))) == 1


def test_damage_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "j"
    journal = Journal(path, HEADER)
    journal.append([{"kind": "unit"}])
    journal.close()
    path.write_bytes(path.read_bytes() + b"nonsense\n[]\n")
    with pytest.raises(JournalError, match=r"damaged at byte \d+"):
        list(read_journal(path))
    path.write_bytes(b"[]\n")
    with pytest.raises(JournalError, match="not a record"):
        Journal(path, HEADER)
    path.write_bytes(b'{"kind": "header", "schema": 99}\n')
    with pytest.raises(JournalError, match="schema 99"):
        Journal(path, HEADER)
    with pytest.raises(JournalError, match="no journal"):
        list(read_journal(tmp_path / "none"))


def test_two_monitors_cannot_share_a_journal(tmp_path: Path) -> None:
    first = Journal(tmp_path / "j", HEADER)
    with pytest.raises(JournalError, match="in use"):
        Journal(tmp_path / "j", HEADER)
    first.close()
    with pytest.raises(JournalError, match="closed"):
        first.append([{}])
    Journal(tmp_path / "j", HEADER).close()


def test_a_full_disk_leaves_no_half_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: Policy
) -> None:
    monitor = alive(policy, tmp_path / "j")
    feed(monitor, [0.0, 0.0])
    before, size = exact(monitor), (tmp_path / "j").stat().st_size

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            feed(monitor, [1.0])
    assert (tmp_path / "j").stat().st_size == size
    assert exact(monitor) == before
    feed(monitor, [0.0])
    monitor.close()
    assert alive(policy, tmp_path / "j").state.finished == 3


# Another policy, other settings.


def test_journal_and_snapshot_refuse_another_policy_and_other_settings(
    tmp_path: Path, policy: Policy
) -> None:
    path = tmp_path / "j"
    with alive(policy, path) as monitor:
        feed(monitor, [0.0])
    other = replace(policy, rule=Threshold(0.7))
    with pytest.raises(JournalError, match=f"{policy_fingerprint(policy)}.*name another file"):
        alive(other, path)
    with pytest.raises(JournalError, match=r"other settings \(seed\)"):
        alive(policy, path, seed=5)
    with pytest.raises(JournalError, match=r"other settings \(detector\)"):
        alive(policy, path, alpha=0.01)
    path.unlink()  # the snapshot is left
    with pytest.raises(JournalError, match="belongs to the policy"):
        alive(other, path)


def test_a_damaged_snapshot_and_a_lost_journal_are_named(tmp_path: Path, policy: Policy) -> None:
    path, beside = tmp_path / "j", tmp_path / "j.state"
    with alive(policy, path) as monitor:
        feed(monitor, [0.0] * 3)
    good = beside.read_text()
    beside.write_text(good.replace("finished", "finisher"))
    with pytest.raises(JournalError, match="checksum"):
        alive(policy, path)
    beside.write_text("{")
    with pytest.raises(JournalError, match="damaged"):
        alive(policy, path)
    beside.write_text(good)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]))
    with pytest.raises(JournalError, match="shorter than its snapshot"):
        alive(policy, path)
    beside.unlink()
    assert alive(policy, path).state.finished == 2


def test_a_changed_line_does_not_follow(tmp_path: Path, policy: Policy) -> None:
    path = tmp_path / "j"
    with alive(policy, path) as monitor:
        feed(monitor, [0.0, 0.5, 0.0])
    (tmp_path / "j.state").unlink()
    good = path.read_text()
    for old, new in (('"loss": 0.5', '"loss": 0.4'), ('"audited": true', '"audited": false')):
        path.write_text(good.replace(old, new))
        with pytest.raises(JournalError, match="does not follow"):
            alive(policy, path)
    path.write_text(good.replace('"kind": "unit"', '"kind": "note"'))
    with pytest.raises(JournalError, match="unknown kind 'note'"):
        alive(policy, path)
    path.write_text(good.replace('"inside"', '"outside"'))
    with pytest.raises(JournalError, match="lacks 'inside'"):
        alive(policy, path)


# What is put in.

GOOD = {"loss": 0.0, "score": 0.5, "depth": 2.0, "tokens": 8}


@pytest.mark.parametrize("status", ["ok", "fallback"])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"loss": 1.5}, r"`loss` must be in \[0, 1\], got 1.5"),
        ({"loss": -0.1}, r"`loss` must be in \[0, 1\]"),
        ({"loss": float("nan")}, "`loss` must be finite"),
        ({"loss": "bad"}, "`loss` must be a real number"),
        ({"score": float("inf")}, "`score` must be finite"),
        ({"depth": float("nan")}, "`depth` must be finite"),
        ({"tokens": 2.5}, "`tokens` must be an integer"),
    ],
)
def test_values_out_of_range_are_named_and_not_counted(
    tmp_path: Path, policy: Policy, status: str, changes: dict[str, Any], words: str
) -> None:
    monitor = alive(policy, tmp_path / "j")
    feed(monitor, [0.1])
    if status == "fallback":
        monitor.trip("by hand")
    before, size = exact(monitor), (tmp_path / "j").stat().st_size
    ticket = monitor.begin(2)
    with pytest.raises((InvalidArgumentError, InvalidTypeError), match=words):
        monitor.finish(ticket, [Outcome(**GOOD), Outcome(**GOOD | changes)])
    with pytest.raises(InvalidArgumentError, match="one Outcome for each of the 2 units"):
        monitor.finish(ticket, [Outcome(**GOOD)])
    assert (exact(monitor), (tmp_path / "j").stat().st_size) == (before, size)
    monitor.finish(ticket, [Outcome(**GOOD)] * 2)
    assert monitor.state.finished == 3


def test_a_units_outcome_counts_once(tmp_path: Path, policy: Policy) -> None:
    monitor = alive(policy, tmp_path / "j")
    ticket = monitor.begin(1)
    monitor.finish(ticket, [Outcome(**GOOD)])
    before = exact(monitor)
    with pytest.raises(InvalidArgumentError, match="of units not yet finished"):
        monitor.finish(ticket, [Outcome(**GOOD)])
    assert exact(monitor) == before


def test_numbers_of_other_libraries_are_numbers(tmp_path: Path, policy: Policy) -> None:
    with alive(policy, tmp_path / "j", seed=np.int64(3)) as monitor:
        put = Outcome(np.float32(0.25), np.float32(0.5), np.float64(2), np.int64(8))
        monitor.finish(monitor.begin(np.int64(1)), [put])
        monitor.finish(monitor.begin(1), [replace(put, loss=np.bool_(True))])
        monitor.finish(monitor.begin(1), [replace(put, loss=None)])
        monitor.label(2, True)
    (tmp_path / "j.state").unlink()
    assert alive(policy, tmp_path / "j", seed=3).state.loss_sum == 2.25


def test_a_late_label_out_of_range_is_named_whatever_state_it_comes_in(
    tmp_path: Path, policy: Policy
) -> None:
    monitor = alive(policy, tmp_path / "j")
    feed(monitor, [None])  # type: ignore[list-item]
    monitor.trip("by hand")  # the label is no evidence any more
    for loss in (2.0, float("nan")):
        with pytest.raises(InvalidArgumentError, match="`loss` must be"):
            monitor.label(0, loss)
    monitor.label(0, 1.0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"detector": RiskMonitor(0.3)}, r"a bound of at most the 0.1 promised"),
        ({"detector": RiskMonitor(0.05, upper=0.5)}, "for losses up to 1"),
        ({"detector": "a good one"}, "`detector` must be a RiskMonitor"),
        ({"audits": 0.1}, "`audits` must be UniformAudits"),
        ({"curve_weight": "half"}, "`curve_weight` must be a real number"),
        ({"seed": -1}, "`seed` must be at least 0"),
        ({"probation": 1.5}, "`probation` must be an integer"),
        ({"snapshot_every": 2.5}, "`snapshot_every` must be an integer"),
        ({"snapshot_every": "a"}, "`snapshot_every` must be an integer"),
        ({"alpha": 0.0}, "`alpha` must be in"),
        ({"beta": 1.0}, "`beta` must be in"),
    ],
)
def test_settings_that_cannot_keep_the_promise_are_named(
    policy: Policy, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises((InvalidArgumentError, InvalidTypeError), match=words):
        Monitor.for_policy(policy, **settings)


def test_what_is_watched_is_a_policy() -> None:
    with pytest.raises(InvalidTypeError, match="`policy` must be a Policy"):
        Monitor.for_policy(0.9)  # type: ignore[arg-type]


def test_losses_below_zero_where_the_detector_declares_them(policy: Policy) -> None:
    monitor = Monitor.for_policy(policy, detector=RiskMonitor(0.1, lower=-0.5))
    feed(monitor, [-0.5])
    monitor.trip("by hand")
    feed(monitor, [-0.5])
    with pytest.raises(InvalidArgumentError, match=r"`loss` must be in \[-0.5, 1\]"):
        feed(monitor, [-0.6])


# Exactness.


@pytest.mark.parametrize("together", [1, 4])
def test_a_resumed_life_is_the_uninterrupted_one(
    tmp_path: Path, policy: Policy, together: int
) -> None:
    rng = random.Random(1)
    losses = [float(rng.random() < (0.6 if 80 <= i < 120 else 0.0)) for i in range(300)]
    whole = alive(policy, tmp_path / "whole", clock=lambda: 0.0)
    feed(whole, losses, together=together)
    assert {event.kind for event in whole.events} >= {"warn", "alarm", "resume"}
    for start in range(0, 300, 60):
        # with and without the snapshot: every second one is thrown away
        with alive(policy, tmp_path / "j", clock=lambda: 0.0, snapshot_every=7) as part:
            feed(part, losses[start : start + 60], together=together)
            reached = exact(part)
        if start % 120:
            (tmp_path / "j.state").unlink()
    assert reached == exact(whole)
    assert (tmp_path / "j").read_text() == (tmp_path / "whole").read_text()


def test_snapshots_give_the_state_that_the_journal_gives(tmp_path: Path, policy: Policy) -> None:
    with alive(policy, tmp_path / "j", snapshot_every=5) as monitor:
        feed(monitor, [0.1] * 23)
        fast = exact(monitor)
    snapshot = Snapshot.read(tmp_path / "j.state", monitor._header)
    assert snapshot is not None
    assert json.dumps(snapshot.state) == fast
    (tmp_path / "j.state").unlink()
    assert exact(alive(policy, tmp_path / "j")) == fast


def test_labels_that_come_late_or_never_survive_and_replay(tmp_path: Path, policy: Policy) -> None:
    with alive(policy, tmp_path / "j") as monitor:
        for _ in range(6):
            monitor.finish(monitor.begin(1), [Outcome(None, 0.5, 2.0, 8)])
        before = monitor.evidence
        assert monitor.label(3, 1.0).late
        assert monitor.evidence > before
        monitor.label(1, 0.0)
    for forget in (False, True):
        if forget:
            (tmp_path / "j.state").unlink()
        again = alive(policy, tmp_path / "j")
        assert exact(again) == exact(monitor)
        with pytest.raises(InvalidArgumentError, match="without a label"):
            again.label(3, 1.0)
        with pytest.raises(InvalidArgumentError, match=r"`loss` must be in \[0, 1\], got 1.5"):
            again.label(2, 1.5)
        assert exact(again) == exact(monitor)
        again.close()
    path = tmp_path / "j"
    path.write_text(
        path.read_text().replace('"number": 1, "loss": 0.0', '"number": 9, "loss": 0.0')
    )
    (tmp_path / "j.state").unlink()
    with pytest.raises(JournalError, match="number"):
        alive(policy, path)


@pytest.mark.slow
def test_killed_at_any_point_nothing_acknowledged_is_lost(tmp_path: Path, policy: Policy) -> None:
    """One process after another is killed while it works; then the journal is read and replayed."""
    policy.save_pretrained(tmp_path / "policy")
    journal = tmp_path / "journal.jsonl"
    script = Path(monitored_life.__file__)
    rng, acknowledged = random.Random(3), []
    for _ in range(5):
        with subprocess.Popen(
            [sys.executable, str(script), str(tmp_path / "policy"), str(journal), "100000"],
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None
            first = process.stdout.readline()  # it has started to work
            time.sleep(rng.uniform(0.0, 0.15))
            process.send_signal(signal.SIGKILL)
            rest = process.stdout.read().splitlines(keepends=True)
        assert process.returncode == -signal.SIGKILL
        acknowledged += [int(line) for line in [first, *rest] if line.endswith("\n")]
    lines = [record for record in read_journal(journal) if record["kind"] == "unit"]
    numbers = [line["number"] for line in lines]
    assert len(set(numbers)) == len(numbers)
    assert set(acknowledged) <= set(numbers)
    assert len(acknowledged) > 10
    for line in lines:
        seen = monitored_life.outcome(line["number"])
        assert (line["score"], line["depth"]) == (seen.score, seen.depth)
    with alive(policy, journal) as resumed:
        said = [(event.kind, event.unit, event.evidence) for event in resumed.events]
    (tmp_path / "journal.jsonl.state").unlink()
    with alive(policy, journal) as replayed:
        assert exact(replayed) == exact(resumed)
        assert replayed.state.finished == len(lines)
        came = [(event.kind, event.unit, event.evidence) for event in replayed.events]
    assert came[len(came) - len(said) :] == said
