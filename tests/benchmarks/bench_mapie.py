"""One job for both: from scores to certified thresholds, 100,000 units x 1,000 thresholds.

The loss of a unit at a threshold is "stopped there and wrong"; fixed sequence from the safest
threshold, exact binomial test. Each program runs in its own process; CPU seconds and peak memory
are what the operating system counts, the import of the program left out of the seconds. Run:

    python tests/benchmarks/bench_mapie.py [n_units] [n_thresholds]
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time

import numpy as np

RISK, DELTA = 0.05, 0.1


def data(n):
    rng = np.random.default_rng(0)
    scores = rng.random(n)
    wrong = rng.random(n) < 0.3 * (1.0 - scores)
    return scores, wrong


def ours(n, count):
    from adaptive.calibration import control_risk

    scores, wrong = data(n)
    thresholds = np.linspace(0.0, 0.99, count)[::-1]

    def losses(column):
        return wrong & (scores >= thresholds[column - 1])

    before = time.process_time()
    result = control_risk(losses, risk=RISK, delta=DELTA, loss_type="binary", n_columns=count + 1)
    seconds = time.process_time() - before
    return seconds, sorted(thresholds[np.flatnonzero(result.certified[1:])].tolist())


def mapie(n, count):
    from mapie.risk_control import BinaryClassificationController, BinaryRisk

    scores, wrong = data(n)
    stopped_and_wrong = BinaryRisk(
        risk_occurrence=lambda y_true, y_pred: y_pred * (y_true == 0),
        risk_condition=lambda y_true, y_pred: np.ones_like(y_true, dtype=bool),
        higher_is_better=False,
    )
    before = time.process_time()
    controller = BinaryClassificationController(
        predict_function=lambda x: np.column_stack([1.0 - x[:, 0], x[:, 0]]),
        risk=stopped_and_wrong,
        target_level=RISK,
        confidence_level=1.0 - DELTA,
        best_predict_param_choice=stopped_and_wrong,
        list_predict_params=np.linspace(0.0, 0.99, count),
        fwer_method="fixed_sequence",
    )
    controller.calibrate(scores[:, None], (~wrong).astype(int))
    seconds = time.process_time() - before
    return seconds, sorted(np.ravel(controller.valid_predict_params).tolist())


def measure(which, n, count):
    """Run one program in its own process; return its record."""
    command = [sys.executable, __file__, "--run", which, str(n), str(count)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main():
    n, count = (int(a) for a in (*sys.argv[1:], "100000", "1000")[:2])
    print(f"{n:,} units x {count:,} thresholds, risk {RISK}, delta {DELTA}")
    records = {which: measure(which, n, count) for which in ("ours", "mapie", "data")}
    base = records["data"]["peak_mb"]
    for which in ("ours", "mapie"):
        record = records[which]
        print(
            f"{which:6s} {record['seconds']:8.3f} s CPU  peak {record['peak_mb']:7.0f} MB "
            f"({len(record['valid'])} thresholds certified)"
        )
    print(f"NumPy and the data alone: peak {base:.0f} MB")
    same = np.allclose(records["ours"]["valid"], records["mapie"]["valid"])
    ratio = records["mapie"]["seconds"] / records["ours"]["seconds"]
    memory = records["mapie"]["peak_mb"] / records["ours"]["peak_mb"]
    print(f"same decision: {same}; time ratio {ratio:.1f}; memory ratio {memory:.1f}")


def run():
    which, n, count = sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    jobs = {"ours": ours, "mapie": mapie, "data": lambda n, _: (0.0, [float(data(n)[0][0])])}
    seconds, valid = jobs[which](n, count)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": seconds, "valid": valid, "peak_mb": peak}))


if __name__ == "__main__":
    run() if sys.argv[1:2] == ["--run"] else main()
