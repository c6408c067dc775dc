"""Threshold calibration from scores, beside MAPIE, in one run.

    python tests/benchmarks/bench_risk_curve.py [n_units] [n_thresholds]

The job, the same for both: a score per unit, stopping at ``score >= threshold`` is wrong for known
units, certify P(stopped and wrong) <= 0.05 at confidence 0.9 for all thresholds by Holm's procedure
and exact binomial p-values, and return the lowest certified threshold. Each side runs in a process
of its own, with the data made and everything imported before the clock starts; memory is the growth
of the peak resident set after that. MAPIE's own extra, choosing among valid thresholds by a second
objective, is part of its call and cannot be left out; it is the cheap part.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import numpy as np

RISK, DELTA = 0.05, 0.1


def data(n_units: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    scores = rng.random(n_units)
    return scores, rng.random(n_units) < 0.2 * (1.0 - scores)


def grid(n_thresholds: int) -> np.ndarray:
    return np.arange(n_thresholds) / n_thresholds


def ours(n_units: int, n_thresholds: int) -> Callable[[], np.ndarray]:
    from adaptive.calibration import Trace, binomial_log_p, holm, risk_curve

    scores, wrong = data(n_units)
    thresholds = grid(n_thresholds)

    def job() -> np.ndarray:
        trace = Trace(
            scores=scores[:, None],
            losses={"wrong": wrong[:, None]},
            costs=[1.0, 2.0],
            cost_quantity="stages",
        )
        errors = risk_curve(trace, thresholds, loss="wrong").errors()
        return thresholds[holm(np.exp(binomial_log_p(errors, n_units, risk=RISK)), delta=DELTA)]

    return job


def mapie(n_units: int, n_thresholds: int) -> Callable[[], np.ndarray]:
    from mapie.risk_control import BinaryClassificationController
    from mapie.risk_control.risks import BinaryRisk

    scores, wrong = data(n_units)
    both = np.stack([1.0 - scores, scores], axis=1)
    stopped_and_wrong = BinaryRisk(
        risk_occurrence=lambda y_true, y_pred: (y_pred == 1) & (y_true == 1),
        risk_condition=lambda y_true, y_pred: np.ones_like(y_pred, dtype=bool),
        higher_is_better=False,
    )

    def job() -> np.ndarray:
        controller = BinaryClassificationController(
            predict_function=lambda _: both,
            risk=stopped_and_wrong,
            target_level=RISK,
            confidence_level=1.0 - DELTA,
            best_predict_param_choice="predicted_positive_fraction",
            list_predict_params=grid(n_thresholds),
            fwer_method="bonferroni_holm",
        )
        controller.calibrate(scores, wrong.astype(int))
        return np.sort(np.asarray(controller.valid_predict_params, dtype=float))

    return job


def curve_only(n_units: int, n_thresholds: int) -> Callable[[], np.ndarray]:
    from adaptive.calibration import Trace, risk_curve

    rng = np.random.default_rng(0)
    trace = Trace(
        scores=rng.random((n_units, 12), dtype=np.float32),
        losses={"disagreement": rng.random((n_units, 12), dtype=np.float32) < 0.3},
        costs=np.arange(1.0, 14.0),
        cost_quantity="layers",
    )
    return lambda: risk_curve(trace, np.linspace(1.0, 0.0, n_thresholds)).risk


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024.0


def measured(name: str, n_units: int, n_thresholds: int) -> None:
    warnings.simplefilter("ignore")
    job = globals()[name](n_units, n_thresholds)
    globals()[name](2000, 20)()
    before = peak()
    start = time.process_time()
    answer = job()
    seconds = time.process_time() - start
    report = {
        "seconds": seconds,
        "growth_mib": peak() - before,
        "peak_mib": peak(),
        "count": int(answer.size),
        "lowest": float(answer.min()),
    }
    sys.stdout.write(json.dumps(report) + "\n")


def run(name: str, n_units: int, n_thresholds: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", name, str(n_units), str(n_thresholds)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(n_units: int = 100_000, n_thresholds: int = 1000) -> None:
    results = {name: run(name, n_units, n_thresholds) for name in ("ours", "mapie")}
    print(f"{n_units:,} units x {n_thresholds:,} thresholds, {os.cpu_count()} cores")
    for name, found in results.items():
        print(
            f"{name:6} {found['seconds']:9.3f} s of CPU  {found['growth_mib']:8.1f} MiB growth "
            f"{found['peak_mib']:8.1f} MiB peak  {found['count']} certified, "
            f"lowest {found['lowest']:.3f}"
        )
    a, b = results["ours"], results["mapie"]
    same = (a["count"], a["lowest"]) == (b["count"], b["lowest"])
    print(
        f"same decision: {same}; {b['seconds'] / a['seconds']:.0f} x faster; memory growth "
        f"1/{b['growth_mib'] / max(a['growth_mib'], 0.1):.0f}, "
        f"whole process 1/{b['peak_mib'] / a['peak_mib']:.1f}"
    )
    curve = run("curve_only", 1_000_000, 1000)
    print(
        f"exact risk curve, 1,000,000 x 12 x 1,000: {curve['seconds']:.2f} s of CPU, "
        f"{curve['peak_mib']:.0f} MiB peak"
    )
    facts = {
        "job": {"n_units": n_units, "n_thresholds": n_thresholds, "risk": RISK, "delta": DELTA},
        **results,
        "curve_1e6_x_12_x_1000": curve,
        "same_decision": same,
        "versions": {name: metadata.version(name) for name in ("numpy", "scipy", "mapie")},
        "machine": platform.processor() or platform.machine(),
    }
    target = Path(__file__).parent / "results" / "risk_curve.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if "--one" in sys.argv:
        measured(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        main(*map(int, sys.argv[1:]))
