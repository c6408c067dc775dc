"""A monitor on the shipped model: traffic that changes, and traffic that does not.

    python tests/benchmarks/monitor_shipped.py             # tables; rows that are there are kept
    python tests/benchmarks/monitor_shipped.py --picture   # one run, drawn

`monitor_records.py` has generated every prompt under every member of one certified path and at full
depth. Here such units are drawn with replacement and put to a monitor one after another, each under
the member that the monitor asks for. A loss that the monitor sees is a real run's; so is one that a
reader is given. What the draws come from is known exactly: its mean is the true risk.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from monitor_records import DISTORTIONS
from numpy.typing import NDArray

from adaptive._monitor_reference import Reference
from adaptive.calibration import (
    AbstractAudits,
    EvidenceAudits,
    ExpectedLossCurve,
    LifetimeRiskMonitor,
    UniformAudits,
    control_risk,
    plan_detection,
)
from adaptive.calibration.conformance import violation_limit
from adaptive.displays import MonitorDisplay
from adaptive.monitoring import Monitor, Outcome
from adaptive.policies import Policy

HERE = Path(__file__).parent / "results" / "monitor"
PICTURE = HERE.parents[3] / "docs" / "pictures" / "monitored-run.png"
MEMBER = 2
ALPHA, DELTA, CALIBRATED = 0.05, 0.05, 196
QUIET, MOST, LONGER, RUNS = 300, 1500, 300, 40
#: The certificate's promise, and a closer one that its units would have certified as well.
PROMISES = (0.1, 0.075)
Array = NDArray[np.float64]
Draw = Callable[[int], str]

AUDITS: dict[str, AbstractAudits] = {
    "every unit labelled": UniformAudits(1.0),
    "a tenth audited, half under a warning": EvidenceAudits(0.1, 0.5),
}


def records() -> dict[str, dict[str, Array]]:
    """Per kind of traffic: loss, shadow, score and depth ``[n_units, n_members]``, no member 0."""
    data = np.load(HERE / "records.npz")
    names = ("loss", "shadow", "score", "depth")
    found = {
        kind: {name: data[f"{kind}_{name}"].astype(float) for name in names}
        for kind in ("adversarial", "prose", "python")
    }
    capitals = data["adversarial_distortion"] == DISTORTIONS.index("capitals")
    found["capitals"] = {name: rows[capitals] for name, rows in found["adversarial"].items()}
    return found


def certified(known: dict[str, Array], promise: float, rng: np.random.Generator) -> Policy:
    """The recorded policy with what this version's certificates keep, from as many units."""
    policy = Policy.from_pretrained(HERE)
    certificate = policy.certificate
    assert certificate is not None
    assert certificate.evidence["upper_bound"][certificate.loss] <= promise
    rows = rng.integers(len(known["loss"]), size=certificate.n)
    loss, score, depth = (known[n][rows, MEMBER - 1] for n in ("loss", "score", "depth"))
    curve = ExpectedLossCurve.fit(score, loss, confidence=1.0 - 0.05 / 6, rng=0)
    kept = Reference(tuple(score.tolist()), tuple(depth.tolist()), curve)
    evidence = certificate.evidence | kept.to_evidence()
    changes = {"risk": promise, "index": MEMBER, "evidence": evidence}
    return replace(policy, certificate=replace(certificate, **changes))


class Life:
    """A monitor, and what readers were given while it watched."""

    def __init__(self, monitor: Monitor, kinds: dict[str, dict[str, Array]], rng: Any) -> None:
        self.monitor, self.kinds, self.rng = monitor, kinds, rng
        self.delivered: list[float] = []
        self.status: list[str] = []
        self.events: list[tuple[str, int]] = []

    def live(self, kind: str) -> None:
        """One unit of a kind of traffic."""
        monitor, known = self.monitor, self.kinds[kind]
        row = int(self.rng.integers(len(known["loss"])))
        ticket = monitor.begin(1)
        fallen = ticket.plan.status == "fallback"
        member = MEMBER if fallen else ticket.plan.member
        loss = known["shadow" if fallen else "loss"][row, member - 1]
        score, depth = (float(known[name][row, member - 1]) for name in ("score", "depth"))
        outcome = (
            Outcome(float(loss), None, 12.0, 32)
            if fallen
            else Outcome(float(loss), score, depth, 32)
        )
        (seen,) = monitor.finish(ticket, [outcome])
        self.delivered.append(0.0 if fallen else float(loss))
        self.status.append(ticket.plan.status)
        self.events += [(event.kind, len(self.delivered)) for event in seen.events]

    def first(self, kind: str, after: int) -> int | None:
        """Units from a point in time to an event."""
        return next((at - after for name, at in self.events if name == kind and at > after), None)


def shift(
    kinds: dict[str, dict[str, Array]],
    bad: str,
    *,
    promise: float,
    audits: AbstractAudits,
    rng: np.random.Generator,
    ramp: int = 0,
    tighten: int = 0,
) -> dict[str, Any]:
    """Quiet traffic, then another kind (at once or along a ramp), then the first kind again."""
    policy = certified(kinds["python"], promise, rng)
    life = Life(
        Monitor.for_policy(policy, audits=audits, tighten=tighten, seed=int(rng.integers(1 << 30))),
        kinds,
        rng,
    )
    for _ in range(QUIET):
        life.live("python")
    early = life.first("alarm", 0) is not None
    good, worse = (float(kinds[k]["loss"][:, MEMBER - 1].mean()) for k in ("python", bad))
    crossing = QUIET + round(ramp * (promise - good) / (worse - good))
    share = _share(ramp)
    for unit in range(MOST):
        if life.first("alarm", QUIET) is not None:
            break
        life.live(bad if rng.random() < share(unit) else "python")
    alarm = life.first("alarm", QUIET)
    stretch = np.array(life.delivered[crossing : QUIET + (alarm or MOST)])
    fell = len(life.delivered)
    for _ in range(LONGER):  # the other traffic goes on
        life.live(bad)
    resumed = [at for kind, at in life.events if kind == "resume" and at > fell]
    after = np.array(life.delivered[fell:])
    back = len(life.delivered)
    if life.monitor.status == "fallback":
        while life.monitor.status != "ok" and len(life.delivered) < back + MOST:
            life.live("python")
    return {
        "alarm_before_the_change": early,
        "units_to_warning": life.first("warn", QUIET),
        "units_to_alarm": None if alarm is None else QUIET + alarm - crossing,
        "risk_until_alarm": float(stretch.mean()) if stretch.size else 0.0,
        "excess_until_alarm": float((stretch - promise).sum()),
        "risk_after_alarm": float(after.mean()),
        "resumed_on_the_other_traffic": len(resumed),
        "units_to_resume": life.first("resume", back),
        "units_to_ok": life.first("clear", back),
    }


def _share(ramp: int) -> Callable[[int], float]:
    return (lambda unit: 1.0) if ramp == 0 else (lambda unit: min(1.0, (unit + 1) / ramp))


def summary(lives: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians, with lives in which something never happened counted as longest."""
    found: dict[str, Any] = {"runs": len(lives)}
    for name in lives[0]:
        values = [np.inf if life[name] is None else float(life[name]) for life in lives]
        if name.startswith("units"):
            quantiles = np.quantile(values, [0.5, 0.9], method="higher")
            found[name] = {"median": _finite(quantiles[0]), "q90": _finite(quantiles[1])}
        else:
            found[name] = round(float(np.mean(values)), 4)
    return found


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


SCENARIOS: dict[str, tuple[str, dict[str, int]]] = {
    "Python to prose, at once": ("prose", {}),
    "Python to prose, over 1000 units": ("prose", {"ramp": 1000}),
    "Python to adversarial, at once": ("adversarial", {}),
    "Python to capitals, at once": ("capitals", {}),
}


def shifts(
    kinds: dict[str, dict[str, Array]], *, promise: float, runs: int, known: dict[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every change of traffic under every way to label, but for the rows of as many runs."""
    for name, (bad, settings) in SCENARIOS.items():
        for number, (labels, audits) in enumerate(AUDITS.items()):
            if known.get(f"{name}; {labels}", {}).get("runs", 0) >= runs:
                continue
            lives = [
                shift(
                    kinds,
                    bad,
                    promise=promise,
                    audits=audits,
                    rng=np.random.default_rng([20261125, number, run]),
                    **settings,
                )
                for run in range(runs)
            ]
            facts = summary(lives)
            if not settings and audits == UniformAudits(1.0):
                facts["planned_units_to_alarm"] = planned(kinds[bad], promise)
            yield f"{name}; {labels}", facts


def planned(known: dict[str, Array], promise: float) -> dict[str, float]:
    """What the planner says of the change, every unit labelled, before any run."""
    plan = plan_detection(
        LifetimeRiskMonitor(promise, alpha=ALPHA),
        losses=known["loss"][:, MEMBER - 1],
        quiet=QUIET,
        rng=0,
    )
    return {"median": plan.median_units, "q90": plan.q90_units}


def quiet(losses: Array, *, promise: float, replicates: int) -> dict[str, Any]:
    """Calibrate on 196 units, watch ten times as many of the same traffic; how many alarm?"""
    rng = np.random.default_rng([20261125, 7, round(1e4 * promise)])
    truth = np.append(0.0, losses.mean(axis=0))
    members = np.zeros(replicates, np.int64)
    for i in range(replicates):
        drawn = losses[rng.integers(len(losses), size=CALIBRATED)]
        table = np.column_stack([np.zeros(CALIBRATED), drawn])
        members[i] = control_risk(table, risk=promise, delta=DELTA, rng=i).index or 0
    alarmed = _alarmed(losses, members, bound=promise, rng=rng)
    broken = truth[members] > promise
    return {
        "promise": promise,
        "replicates": replicates,
        "certified": int((members > 0).sum()),
        "of a member that breaks the promise": int(broken.sum()),
        "alarmed": int(alarmed.sum()),
        "limit": violation_limit(replicates, ALPHA + DELTA),
        "alarmed where the promise held": int((alarmed & ~broken).sum()),
        "limit where the promise held": violation_limit(replicates, ALPHA),
    }


def boundary(losses: Array, *, member: int, share: float, replicates: int) -> dict[str, Any]:
    """Watch one member against a share of its true risk: 1 is the worst that is no alarm."""
    rng = np.random.default_rng([20261125, 8, member])
    bound = share * float(losses[:, member - 1].mean())
    alarmed = _alarmed(losses, np.full(replicates, member), bound=bound, rng=rng)
    return {
        "member": member,
        "bound": bound,
        "alarmed": int(alarmed.sum()),
        "replicates": replicates,
        "limit": violation_limit(replicates, ALPHA),
    }


def _alarmed(
    losses: Array, members: NDArray[np.int64], *, bound: float, rng: np.random.Generator
) -> NDArray[np.bool_]:
    """Which of many streams, each under its own member, alarm within 1960 labelled units."""
    monitor = LifetimeRiskMonitor(bound, alpha=ALPHA)
    state, watched = monitor.init(len(members)), members > 0
    for _ in range(10 * CALIBRATED):
        rows = rng.integers(len(losses), size=len(members))
        seen = np.where(watched, losses[rows, members - 1], 0.0)
        state = monitor.update(state, seen, audited=watched)
    return monitor.alarm(state)


def picture(kinds: dict[str, dict[str, Array]]) -> None:
    """Draw one run: Python, prose, Python."""
    rng = np.random.default_rng(3)
    policy = certified(kinds["python"], 0.1, rng)
    with tempfile.TemporaryDirectory() as folder:
        journal = Path(folder) / "journal.jsonl"
        with Monitor.for_policy(policy, journal=journal, audits=UniformAudits(1.0)) as monitor:
            life = Life(monitor, kinds, rng)
            for kind, units in (("python", 250), ("prose", 250), ("python", 500)):
                for _ in range(units):
                    life.live(kind)
        PICTURE.parent.mkdir(exist_ok=True)
        MonitorDisplay.from_journal(journal).plot().figure_.savefig(PICTURE, dpi=100)


def unchanged(kinds: dict[str, dict[str, Array]], replicates: int) -> dict[str, Any]:
    """Traffic that stays: calibrated and watched, at the promise, and a wrong variant."""
    losses = kinds["python"]["loss"]
    risks = {
        kind: {n: known[n].mean(axis=0).round(4).tolist() for n in ("loss", "shadow")}
        for kind, known in kinds.items()
    }
    promises = (0.06, 0.08, 0.1)
    return {
        "units": {kind: len(known["loss"]) for kind, known in kinds.items()},
        "risk_per_member": risks,
        "same traffic": [quiet(losses, promise=p, replicates=replicates) for p in promises],
        "exactly at the promise": boundary(losses, member=3, share=1.0, replicates=replicates),
        "promise taken a quarter too low": boundary(
            losses, member=3, share=0.75, replicates=replicates
        ),
    }


def save(name: str, found: dict[str, Any]) -> None:
    """Write figures with what they were made by."""
    made = {
        "versions": {package: metadata.version(package) for package in ("numpy", "scipy")},
        "machine": platform.processor() or platform.machine(),
    }
    text = json.dumps(found | made, indent=1) + "\n"
    (HERE / f"{name}.json").write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--picture", action="store_true")
    parser.add_argument("--promise", type=float, choices=PROMISES, help="changes at this one only")
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--replicates", type=int, default=1000)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    kinds = records()
    if options.picture:
        picture(kinds)
        return
    if options.promise is None:
        save("same-traffic", unchanged(kinds, options.replicates))
    for promise in PROMISES if options.promise is None else (options.promise,):
        file = HERE / f"changed-traffic-{promise:g}.json"
        found = json.loads(file.read_text())["rows"] if file.exists() else {}
        for name, facts in shifts(kinds, promise=promise, runs=options.runs, known=found):
            print(promise, name, json.dumps(facts), flush=True)
            found[name] = facts
            save(f"changed-traffic-{promise:g}", {"promise": promise, "rows": found})


if __name__ == "__main__":
    main()
