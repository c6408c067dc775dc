"""Monitors beside river's detectors on the same streams: delays, bursts, folds, cost.

delays   5,000 quiet losses, then a change. Our settings come from the promise alone. The peers'
         settings are chosen on other streams, knowing the change: of those that alarm falsely on at
         most 5 % of quiet streams, the fastest on a doubling; ours is put through the same choice
         in a row of its own. Delays count the alarming loss.
bursts   quiet streams in bursts of difficulty: alarms per 100,000 losses, and the delay.
folds    noisy paths to a fold bifurcation against stationary ones: false alarms, lead time.
cost     nanoseconds per loss, on a machine that does nothing else.
long     100 million losses through the batched monitor, the largest and smallest statistic.

    python tests/benchmarks/bench_monitor.py [--streams 100] [--parts delays,bursts,...] [--out F]
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from adaptive.calibration import (
    BernoulliStream,
    BetaStream,
    BurstyStream,
    LifetimeRiskMonitor,
    MovingIndicators,
    OnlineMonitor,
    RampStream,
    RiskMonitor,
    ScoreDrift,
    SlowingDown,
    plan_detection,
    river_detector,
    simulate_fold,
    simulate_ou,
    try_detector,
    try_monitor,
)

QUIET, AFTER = 5000, 5000
LIMIT = 0.05  # of streams, in 5,000 quiet losses: what an average run length of 100,000 allows
FAMILIES = {
    "Bernoulli 0.05 to 0.10": BernoulliStream(0.05, after=0.10),
    "Bernoulli 0.05 to 0.20": BernoulliStream(0.05, after=0.20),
    "Beta 0.05 to 0.10": BetaStream(0.05, after=0.10),
    "ramp 0.05 to 0.20": RampStream(0.05, after=0.20),
}


class RollingMean:
    """A gate as serving engines have it: the mean of the last losses above a limit."""

    def __init__(self, *, window: int, limit: float) -> None:
        self.window, self.limit = window, limit
        self.kept = [0.0] * window
        self.total, self.seen = 0.0, 0

    def update(self, x: float) -> None:
        place = self.seen % self.window
        self.total += x - self.kept[place]
        self.kept[place] = x
        self.seen += 1

    @property
    def drift_detected(self) -> bool:
        return self.seen >= self.window and self.total > self.limit * self.window + 1e-9


class BernoulliCusum:
    """The textbook chart for 0/1 losses: steps of 1 - 1/gamma and -1/gamma, alarm at a height."""

    def __init__(self, *, gamma: int, height: float) -> None:
        self.gamma, self.height, self.total = gamma, height, 0

    def update(self, x: float) -> None:
        self.total = max(0, self.total + self.gamma * int(x) - 1)

    @property
    def drift_detected(self) -> bool:
        return self.total >= self.gamma * self.height


def grid(make: Callable[..., Any], **settings: list) -> list[Callable[[], Any]]:
    """Makers of one detector over the product of its settings."""
    makers = [{}]
    for name, values in settings.items():
        makers = [{**known, name: value} for known in makers for value in values]
    return [partial(make, **known) for known in makers]


def river(name: str) -> Callable[..., Any]:
    return partial(river_detector, name)


PEERS = {
    "ADWIN": grid(river("ADWIN"), delta=[0.3, 0.2, 0.1, 0.05, 0.02, 0.002], clock=[8, 32]),
    "PageHinkley": grid(
        river("PageHinkley"),
        mode=["up"],
        delta=[0.005, 0.02],
        threshold=[5, 7, 10, 12, 15, 17, 20, 25],
    ),
    "DDM": grid(river("DDM"), drift_threshold=[3.0, 3.5, 4.0, 4.5, 5.0, 6.0]),
    "rolling mean": grid(
        RollingMean, window=[100, 200, 500, 1000], limit=[0.07, 0.08, 0.09, 0.1, 0.11, 0.13, 0.15]
    ),
    "Bernoulli CUSUM": grid(BernoulliCusum, gamma=[14], height=[4, 4.5, 5, 5.5, 6, 7, 8]),
}
DEFAULTS = ("ADWIN", "PageHinkley", "DDM", "EDDM", "FHDDM", "HDDMA", "HDDMW")
STEPS = 2  # families that the defaults run on
BINARY = ("DDM", "EDDM", "FHDDM", "HDDM", "Bernoulli")


def fastest(makers: list, try_: Callable, streams: int) -> Any:
    """The maker with the least median delay on a doubling, of those within the limit."""
    change = BernoulliStream(0.05, after=0.10)
    losses = change.draw(QUIET + 2000, QUIET, streams=streams, rng=1_000_000)
    best, least = None, np.inf
    for make in makers:
        trial = try_(make, losses[:QUIET], change=QUIET)
        if trial.false_alarms > LIMIT:
            continue
        after = try_(make, losses[QUIET - 1000 :], change=1000)
        median = np.median(after.delays)
        if best is None or median < least:
            best, least = make, median
    return best


def described(make: Any) -> str:
    known = ", ".join(f"{name}={value}" for name, value in make.keywords.items())
    return known or "defaults"


def contenders(streams: int) -> dict[str, tuple[Callable, Any]]:
    """Name to (trial, monitor or maker)."""
    ours = {
        "RiskMonitor, A = 1e5 by promise": RiskMonitor(0.05, average_run_length=1e5),
        "LifetimeRiskMonitor, alpha = 0.05 by promise": LifetimeRiskMonitor(0.05, alpha=0.05),
    }
    lengths = (1e4, 2e4, 3e4, 5e4, 7e4, 1e5)
    tuned = fastest([RiskMonitor(0.05, average_run_length=a) for a in lengths], try_monitor, 1000)
    ours[f"RiskMonitor, A = {tuned.average_run_length:g} chosen"] = tuned
    found = {name: (try_monitor, monitor) for name, monitor in ours.items()}
    for name, makers in PEERS.items():
        best = fastest(makers, try_detector, streams)
        key = f"{name}, none within the limit" if best is None else f"{name}, {described(best)}"
        if best is not None:
            found[f"{key} chosen"] = (try_detector, best)
    for name in DEFAULTS:
        found[f"{name}, defaults"] = (try_detector, partial(river_detector, name))
    return found


def delays(streams: int) -> list[dict]:
    rows, chosen = [], contenders(streams)
    for number, (family, stream) in enumerate(FAMILIES.items()):
        losses = stream.draw(QUIET + AFTER, QUIET, streams=streams, rng=number)
        binary = bool(np.isin(losses, (0.0, 1.0)).all())
        for name, (try_, detector) in chosen.items():
            if name.endswith("defaults") and number >= STEPS:
                continue
            if binary or not name.startswith(BINARY):
                trial = try_(detector, losses, change=QUIET)
                rows.append({"family": family, "detector": name, **trial.summary()})
    return rows


def bursts(streams: int) -> list[dict]:
    rows = []
    for length in (1, 5, 20, 100):
        stream = BurstyStream(0.05, after=0.1, length=length)
        losses, levels = stream.draw_with_levels(QUIET + AFTER, QUIET, streams=streams, rng=length)
        monitor = RiskMonitor(0.05, average_run_length=1e5)
        for name, companions in (("loss", {}), ("excess over the curve", {"expected": levels})):
            trial = try_monitor(monitor, losses, change=QUIET, **companions)
            rows.append({"burst": length, "unit": name, "per": 1, **trial.summary()})
        blocks = losses.reshape(-1, 125, streams).mean(axis=1)
        monitor = RiskMonitor(0.05, average_run_length=1e5 / 125)
        trial = try_monitor(monitor, blocks, change=QUIET // 125)
        rows.append({"burst": length, "unit": "request of 125", "per": 125, **trial.summary()})
    for row in rows:
        row["alarms_per_100k"] = 1e5 / (row["per"] * row["run_length"])
        row["median_delay"] *= row["per"]
        row["q90_delay"] *= row["per"]
    return rows


def first_crossing(values: np.ndarray, limit: float) -> np.ndarray:
    """Number of the first row [n, n_streams] at or above the limit; 0 for none."""
    above = values >= limit
    return np.where(above.any(axis=0), above.argmax(axis=0) + 1, 0)


def slowing(paths: np.ndarray, mean: np.ndarray) -> np.ndarray:
    detector = SlowingDown(2.0, 0.1, average_run_length=2e4)
    state = detector.init(paths.shape[1])
    for row, level in zip(paths, mean, strict=True):
        on = ~np.isnan(row)
        state = detector.update(state, np.where(on, row - level, 0.0), active=on)
    return state.first_alarm


def drifting(paths: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """ScoreDrift with its own calibration series of 1,000 values per path."""
    first = np.zeros(paths.shape[1], int)
    for j in range(paths.shape[1]):
        series = simulate_ou(1000, rate=2.0, mean=1.0, rng=rng)[:, 0]
        drift = ScoreDrift.fit(series, average_run_length=2e4, rng=rng)
        state = drift.init()
        for value in paths[~np.isnan(paths[:, j]), j]:
            state = drift.update(state, drift.features([value]))
            if drift.alarm(state)[0]:
                break
        first[j] = state.first_alarm[0]
    return first


def moving(paths: np.ndarray) -> dict[str, np.ndarray]:
    """Moving variance and autocorrelation [n, n_streams], after 200 values to settle."""
    indicators = MovingIndicators(0.02)
    state = indicators.init(paths.shape[1])
    found: dict[str, list] = {"moving variance": [], "moving autocorrelation": []}
    for t, row in enumerate(paths):
        on = ~np.isnan(row)
        state = indicators.update(state, np.where(on, row, 0.0), active=on)
        start = -np.inf if t < 200 else 0.0
        found["moving variance"].append(state.variance + start)
        found["moving autocorrelation"].append(indicators.autocorrelation(state) + start)
    return {name: np.array(rows) for name, rows in found.items()}


def taus(paths: np.ndarray, window: int = 100, last: int = 200, every: int = 20) -> np.ndarray:
    """Kendall's tau of the rolling variance with time, over its last values [n, n_streams]."""
    found = np.full(paths.shape, -np.inf)
    views = np.lib.stride_tricks.sliding_window_view(paths, window, axis=0)
    rolling = views.var(axis=2)
    for end in range(window + last - 1, paths.shape[0], every):
        block = rolling[end - window - last + 1 : end - window + 1]
        for j in np.flatnonzero(~np.isnan(block).any(axis=0)):
            found[end, j] = stats.kendalltau(np.arange(last), block[:, j]).statistic
    return found


def folds(streams: int) -> list[dict]:
    """r falls from 1 to 0 in 1,000 values; thresholds without a promise from their own nulls."""
    rng = np.random.default_rng(5)
    paths = simulate_fold(1000, streams=streams, rng=rng)
    null, own = (simulate_ou(1000, rate=2.0, mean=1.0, streams=streams, rng=rng) for _ in range(2))
    escaped = np.isnan(paths)
    escape = np.where(escaped.any(axis=0), escaped.argmax(axis=0) + 1, 1001)
    known = np.sqrt(np.linspace(1.0, 0.0, 1001)[1:])
    alarms = {
        "SlowingDown, A = 2e4, mean path known": (
            slowing(paths, known),
            slowing(null, np.ones(1000)),
        ),
        "SlowingDown, A = 2e4, mean fixed at 1": (
            slowing(paths, np.ones(1000)),
            slowing(null, np.ones(1000)),
        ),
        "ScoreDrift, A = 2e4, 1,000 values": (drifting(paths, rng), drifting(null, rng)),
    }
    statistics = {name: (path, moving(null)[name]) for name, path in moving(paths).items()}
    limits = {name: values.max(axis=0) for name, values in moving(own).items()}
    statistics["tau of the rolling variance"] = (taus(paths), taus(null))
    limits["tau of the rolling variance"] = taus(own).max(axis=0)
    for name, pair in statistics.items():
        limit = float(np.quantile(limits[name], 0.95))
        alarms[f"{name}, 5 % by simulation"] = tuple(first_crossing(v, limit) for v in pair)
    rows = []
    for name, (on_paths, on_null) in alarms.items():
        seen = (on_paths > 0) & (on_paths < escape)
        rows.append(
            {
                "monitor": name,
                "false_alarms": float((on_null > 0).mean()),
                "before_escape": float(seen.mean()),
                "median_alarm": float(np.median(on_paths[seen])) if seen.any() else None,
                "median_lead": float(np.median((escape - on_paths)[seen])) if seen.any() else None,
            }
        )
    rows.append({"monitor": "escape", "median_alarm": float(np.median(escape))})
    return rows


def cost() -> dict[str, float]:
    """Nanoseconds per loss and stream, the best of five rounds, peers alternating with ours."""
    rng = np.random.default_rng(0)
    monitor = RiskMonitor(0.05)
    found: dict[str, float] = {}

    def keep(name: str, seconds: float, losses: int) -> None:
        found[name] = min(found.get(name, np.inf), 1e9 * seconds / losses)

    values = (rng.random(2000) < 0.05).astype(float).tolist()
    for _ in range(5):
        makers = {name: partial(river_detector, name) for name in ("ADWIN", "PageHinkley", "DDM")}
        makers["OnlineMonitor"] = lambda: OnlineMonitor(monitor)
        for name, make in makers.items():
            detector = make()
            start = time.perf_counter()
            for value in values:
                detector.update(value)
            keep(name, time.perf_counter() - start, len(values))
        for streams in (1, 1000, 10_000, 100_000):
            losses = (rng.random(streams) < 0.05).astype(float)
            for age, state in (("", monitor.init(streams)), (", 1e8 units old", old(streams))):
                start = time.perf_counter()
                for _ in range(20):
                    state = monitor.update(state, losses)
                name = f"RiskMonitor, {streams} streams{age}"
                keep(name, time.perf_counter() - start, 20 * streams)
    return found


def old(streams: int) -> Any:
    """A state that has seen 1e8 quiet units, by the statistic such a state has on average."""
    state = RiskMonitor(0.05).init(streams)
    return type(state)(
        state.statistics + 50.0, state.units + 10**8, state.labelled + 10**8, state.first_alarm
    )


def long() -> dict[str, Any]:
    """10,000 streams of 10,000 losses, 0/1 at the bound: every statistic stays in its range."""
    rng = np.random.default_rng(1)
    found: dict[str, Any] = {}
    for monitor in (RiskMonitor(0.05), LifetimeRiskMonitor(0.05)):
        state = monitor.init(10_000)
        size = sum(array.nbytes for array in vars(state).values())
        low, high = np.inf, 0.0
        for _ in range(10_000):
            state = monitor.update(state, (rng.random(10_000) < 0.05).astype(float))
            if monitor.alarm(state).any():
                state = monitor.restart(state, monitor.alarm(state))
            low = min(low, float(state.statistics[state.units > 0].min()))
            high = max(high, float(state.statistics.max()))
            assert np.isfinite(state.statistics).all()
        assert size == sum(array.nbytes for array in vars(state).values())
        found[type(monitor).__name__] = {"least": low, "largest": high, "bytes": size / 10_000}
    return found


def finite(report: Any) -> Any:
    """The report with null for what is infinite: a delay that was missed, a run without alarm."""
    if isinstance(report, dict):
        return {name: finite(value) for name, value in report.items()}
    if isinstance(report, list):
        return [finite(value) for value in report]
    return None if isinstance(report, float) and not np.isfinite(report) else report


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--streams", type=int, default=100)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--parts", default="delays,bursts,folds,cost,long")
    options = parser.parse_args()
    report = json.loads(options.out.read_text()) if options.out and options.out.exists() else {}
    report |= {
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("numpy", "scipy", "river")},
        "streams": options.streams,
        "plans": {
            f"{type(monitor).__name__} {factor}": vars(
                plan_detection(monitor, factor=factor, quiet=QUIET)
            )
            for monitor in (RiskMonitor(0.05), LifetimeRiskMonitor(0.05))
            for factor in (2, 4)
        },
    }
    with_streams = {"delays": delays, "bursts": bursts, "folds": folds}
    for part in options.parts.split(","):
        measure = with_streams.get(part)
        report[part] = measure(options.streams) if measure else {"cost": cost, "long": long}[part]()
    text = json.dumps(finite(report), indent=1, allow_nan=False)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
