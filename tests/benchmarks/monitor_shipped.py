"""A monitor on the shipped model: traffic that changes, and traffic that does not.

    python tests/benchmarks/monitor_shipped.py            # replay of the records: minutes
    python tests/benchmarks/monitor_shipped.py --live     # one run, really generated; its picture

`monitor_records.py` has generated every prompt under every member of one certified path and at full
depth. Here such units are drawn with replacement and put to a monitor one after another, each under
the member that the monitor asks for. A loss that the monitor sees is a real run's; so is one that a
reader is given. What the draws come from is known exactly: its mean is the true risk.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import platform
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaptive._monitor_reference import Reference
from adaptive.calibration import (
    AbstractAudits,
    EvidenceAudits,
    ExpectedLossCurve,
    LifetimeRiskMonitor,
    UniformAudits,
    control_risk,
)
from adaptive.calibration.conformance import violation_limit
from adaptive.monitoring import Monitor, Outcome
from adaptive.policies import Policy

HERE = Path(__file__).parent / "results" / "monitor"
PICTURE = HERE.parents[3] / "docs" / "pictures" / "monitored-run.png"
MEMBER = 2
ALPHA, DELTA, CALIBRATED = 0.05, 0.05, 196
QUIET, MOST, RUNS = 300, 2500, 24
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
    kinds = sorted({name.split("_")[0] for name in data.files})
    names = ("loss", "shadow", "score", "depth")
    return {kind: {n: data[f"{kind}_{n}"].astype(float) for n in names} for kind in kinds}


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
    for _ in range(500):  # the other traffic goes on
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
}


def shifts(kinds: dict[str, dict[str, Array]], runs: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every change of traffic under every way to label."""
    for (name, (bad, settings)), promise in itertools.product(SCENARIOS.items(), PROMISES):
        for number, (labels, audits) in enumerate(AUDITS.items()):
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
            yield f"{name}; promised {promise:g}; {labels}", summary(lives)


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


def live(units: int) -> None:
    """Real generation under one monitor: Python, prose, Python; its journal and its picture."""
    import torch
    from monitor_records import LONGEST_PROMPT, NEW_TOKENS, POOL, traffic

    from adaptive import calibrate, generate
    from adaptive.displays import MonitorDisplay
    from adaptive.examples import load_model
    from adaptive.policies import Saturation, Threshold

    torch.set_num_threads(1)
    model, tokenizer = load_model()
    tokenizer.padding_side = "left"
    calibration, kinds = traffic(0)
    policy = calibrate(
        model,
        calibration,
        0.1,
        0.05,
        policy=Policy(Saturation(), Threshold(), stages=(0, 1, 2), mode="propagate"),
        pool=POOL,
        new_tokens=NEW_TOKENS,
        batch_size=32,
        members=6,
        tokenizer=tokenizer,
        progress=False,
    )
    journal = HERE / "live.jsonl"
    for old in (journal, journal.with_name("live.jsonl.state")):
        old.unlink(missing_ok=True)
    with Monitor.for_policy(policy, journal=journal, audits=UniformAudits(1.0)) as monitor:
        python, prose = iter(kinds["python"]), iter(kinds["prose"])
        for texts, count in ((python, units), (prose, units), (python, 2 * units)):
            given = 0
            while given < count:
                batch = [next(texts) for _ in range(8)]
                inputs = tokenizer(
                    batch, return_tensors="pt", padding=True, return_token_type_ids=False
                )
                if inputs["input_ids"].shape[1] > LONGEST_PROMPT:
                    continue
                generate(
                    model,
                    **inputs,
                    policy=policy,
                    monitor=monitor,
                    max_new_tokens=NEW_TOKENS,
                    do_sample=False,
                )
                given += len(batch)
            print(monitor, [str(event) for event in monitor.events], flush=True)
    PICTURE.parent.mkdir(exist_ok=True)
    MonitorDisplay.from_journal(journal).plot().figure_.savefig(PICTURE, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--live", type=int, nargs="?", const=200, help="units per stretch")
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--replicates", type=int, default=1000)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    if options.live:
        live(options.live)
        return
    kinds = records()
    risks = {
        kind: {n: known[n].mean(axis=0).round(4).tolist() for n in ("loss", "shadow")}
        for kind, known in kinds.items()
    }
    found: dict[str, Any] = {
        "units": {kind: len(known["loss"]) for kind, known in kinds.items()},
        "risk_per_member": risks,
        "versions": {name: metadata.version(name) for name in ("numpy", "scipy")},
        "machine": platform.processor() or platform.machine(),
    }
    losses = kinds["python"]["loss"]
    count = options.replicates
    found["same traffic"] = [quiet(losses, promise=p, replicates=count) for p in (0.06, 0.08, 0.1)]
    found["exactly at the promise"] = boundary(losses, member=3, share=1.0, replicates=count)
    found["promise taken a quarter too low"] = boundary(
        losses, member=3, share=0.75, replicates=count
    )
    print(json.dumps(found, indent=1), flush=True)
    found["shifts"] = {}
    for name, facts in shifts(kinds, options.runs):
        print(name, json.dumps(facts), flush=True)
        found["shifts"][name] = facts
    (HERE / "shipped.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
