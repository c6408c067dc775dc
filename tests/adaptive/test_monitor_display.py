"""The picture and the metrics of a monitored run say what its journal says."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest

from adaptive._monitor_state import Rules
from adaptive.calibration import (
    AbstractAudits,
    EvidenceAudits,
    LifetimeRiskMonitor,
    MissingExtraError,
    RecoveryTest,
    UniformAudits,
)
from adaptive.displays import MonitorDisplay
from adaptive.integrations.prometheus import MonitorMetrics
from adaptive.monitoring import JournalError, Monitor, Outcome, Watched
from adaptive.policies import Policy, ProbeScore, Threshold

mpl.use("agg")


def watch(
    path: Path | None, *, audits: AbstractAudits | None = None, **callbacks: object
) -> Monitor:
    """A monitor of a policy whose promise is 0.1."""
    rules = Rules(
        member=0,
        detector=LifetimeRiskMonitor(0.1, warn=0.25),
        recovery=RecoveryTest(0.1),
        audits=UniformAudits(1.0) if audits is None else audits,
        probation=10,
    )
    policy = Policy(ProbeScore(), Threshold(0.8), stages=(0,))
    return Monitor(policy, rules, journal=path, **callbacks)  # type: ignore[arg-type]


def feed(monitor: Monitor, losses: list[float | None]) -> None:
    for loss in losses:
        monitor.finish(monitor.begin(1), [Outcome(loss, None, 2.0, 8)])


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    """Good units, an incident, good units again, and one label that came late."""
    with watch(tmp_path / "j") as monitor:
        feed(monitor, [0.05] * 40)
        feed(monitor, [None])
        feed(monitor, [0.05] * 9)
        monitor.label(40, 0.3)
        feed(monitor, [0.7] * 20)
        feed(monitor, [0.0] * 250)
        assert [event.kind for event in monitor.events] == ["warn", "alarm", "resume", "clear"]
    return tmp_path / "j"


def test_what_is_shown_is_what_the_journal_says(journal: Path) -> None:
    display = MonitorDisplay.from_journal(journal)
    lines = [json.loads(line) for line in journal.read_text().splitlines()][1:]
    assert display.units[-1] == 320
    assert len(display.status) == len(lines) == 321  # one line is a label
    assert display.status[50] == "ok"
    assert display.outside == sum(not line["inside"] for line in lines if line["kind"] == "unit")
    fallen = np.array([line.get("status") == "fallback" for line in lines])
    own = [
        line["loss"]
        for line, hidden in zip(lines, fallen, strict=True)
        if not hidden and line["loss"] is not None
    ]
    assert display.mean[-1] == pytest.approx(np.mean(own))
    assert np.isnan(display.risk[fallen]).all()
    assert np.isnan(display.shadow[~fallen]).all()
    assert np.isnan(display.risk[8])
    assert display.risk[9] == pytest.approx(0.05)
    assert display.evidence.tolist() == [line["evidence"] for line in lines]
    assert [event.kind for event in display.events] == ["warn", "alarm", "resume", "clear"]


def test_the_picture_has_its_parts(journal: Path, tmp_path: Path) -> None:
    drawn = MonitorDisplay.from_journal(journal).plot()
    names = {"risk", "mean", "shadow", "promise", "evidence", "alarm", "warn", "recovery"}
    assert names | {"resume", "states", "events"} == set(drawn.artists_)
    assert drawn.ax_[0].get_title(loc="left") == drawn.headline
    assert drawn.headline.startswith("Now: OK since unit ")
    assert drawn.headline.endswith(f"Outside the certificate: {drawn.outside} of 320")
    assert f"Risk: last labels {drawn.risk[-1]:.2f}, promised 0.1." in drawn.headline
    assert [note.get_text() for note in drawn.artists_["events"]] == [
        "warn, alarm",
        "resume, clear",
    ]
    assert list(drawn.artists_["states"]) == ["ok", "warn", "fallback", "probation"]
    drawn.figure_.savefig(tmp_path / "p.png")
    assert MonitorDisplay.from_journal(journal).plot(drawn.ax_).ax_ == drawn.ax_


def test_a_journal_that_is_being_written_can_be_shown(tmp_path: Path) -> None:
    with watch(tmp_path / "j") as monitor:
        with pytest.raises(JournalError, match="no units yet"):
            MonitorDisplay.from_journal(tmp_path / "j")
        feed(monitor, [None, None])
        display = MonitorDisplay.from_journal(tmp_path / "j")
        assert "too few labels to say" in display.headline
        assert "recovery" not in display.plot().artists_
    (tmp_path / "other").write_text('{"kind": "unit"}\n')
    with pytest.raises(JournalError, match="no header"):
        MonitorDisplay.from_journal(tmp_path / "other")


def test_in_fallback_the_headline_says_what_early_answers_would_miss(tmp_path: Path) -> None:
    with watch(tmp_path / "j") as monitor:
        feed(monitor, [0.7] * 30)
        assert monitor.status == "fallback"
    headline = MonitorDisplay.from_journal(tmp_path / "j").headline
    assert "full depth delivered; early answers would miss 0.70, promised 0.1" in headline


def test_transitions_close_together_share_a_name(journal: Path) -> None:
    display = MonitorDisplay.from_journal(journal)
    first = display.events[0]
    near = [
        replace(first, kind=kind, finished=first.finished + i)
        for i, kind in enumerate(["calm", "warn", "alarm"], start=1)
    ]
    drawn = replace(display, events=(first, *near, *display.events[2:])).plot()
    names = [note.get_text() for note in drawn.artists_["events"]]
    assert names == ["warn, calm, alarm", "resume, clear"]


def test_a_label_counts_by_the_units_it_stands_for(tmp_path: Path) -> None:
    """More labels while it is bad: their plain mean is not the risk, whoever reports it."""
    client = pytest.importorskip("prometheus_client")
    registry = client.CollectorRegistry()
    metrics = MonitorMetrics(registry)
    audits = EvidenceAudits(0.1, 1.0)
    seen: list[Watched] = []

    def note(watched: Watched) -> None:
        metrics.unit(watched)
        seen.append(watched)

    with watch(tmp_path / "j", audits=audits, on_unit=note) as monitor:
        feed(monitor, [0.0] * 1000)
        while monitor.status == "ok":
            feed(monitor, [0.8])
        feed(monitor, [0.09] * 120)
        assert {watched.unit.probability for watched in seen} == {0.1, 1.0}
        assert "fallback" not in {watched.status for watched in seen}
        labels = [watched.unit for watched in seen if watched.unit.audited]
        weights = [1.0 / unit.probability for unit in labels]
        risk = np.average([unit.loss for unit in labels], weights=weights)
        assert monitor.risk_so_far == pytest.approx(risk)
    assert risk != pytest.approx(np.mean([unit.loss for unit in labels]), rel=0.02)
    assert MonitorDisplay.from_journal(tmp_path / "j").mean[-1] == pytest.approx(risk)
    value = registry.get_sample_value
    assert value("adaptive_loss_total") / value("adaptive_labelled_total") == pytest.approx(risk)


def test_metrics_follow_the_monitor() -> None:
    client = pytest.importorskip("prometheus_client")
    registry = client.CollectorRegistry()
    metrics = MonitorMetrics(registry)
    assert registry.get_sample_value("adaptive_status", {"status": "ok"}) == 1.0
    monitor = watch(None, on_event=metrics.event, on_unit=metrics.unit)
    feed(monitor, [0.05] * 10 + [None])
    monitor.label(10, 0.25)
    value = registry.get_sample_value
    assert value("adaptive_units_total", {"status": "ok", "inside": "yes"}) == 11.0
    assert value("adaptive_audits_total") == 11.0
    assert value("adaptive_loss_total") == pytest.approx(0.75)
    assert value("adaptive_labelled_total") == pytest.approx(11.0)
    feed(monitor, [0.9] * 12)
    assert monitor.status == "fallback"
    assert value("adaptive_status", {"status": "fallback"}) == 1.0
    assert value("adaptive_status", {"status": "ok"}) == 0.0
    assert value("adaptive_events_total", {"kind": "alarm"}) == 1.0
    assert value("adaptive_evidence") == monitor.evidence
    before = value("adaptive_loss_total")
    feed(monitor, [0.9])
    assert value("adaptive_loss_total") == before  # only compared, not delivered
    assert value("adaptive_units_total", {"status": "fallback", "inside": "no"}) > 0.0


def test_a_missing_client_library_gives_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'adaptive-control\[prometheus\]'"):
        MonitorMetrics()
