# ---
# jupyter:
#   jupytext:
#     formats: py:percent,ipynb
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Watch for drift
#
# A certificate holds for traffic like that of its calibration. Whether today's is like it, somebody
# has to watch: with a promise about false alarms made beforehand, and with a plan for what happens
# when the alarm goes off. Here a policy is served to traffic that changes; then the detectors
# behind it are put to the test on streams whose truth is known.

# %%
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from adaptive import calibrate, collect_trace, generate
from adaptive.calibration import (
    BernoulliStream,
    RiskMonitor,
    ScoreDrift,
    SlowingDown,
    UniformAudits,
    early_warning_signals,
    plan_detection,
    simulate_fold,
    simulate_ou,
    try_monitor,
)
from adaptive.calibration.conformance import violation_limit
from adaptive.displays import MonitorDisplay
from adaptive.examples import POOL, load_model, load_prompts
from adaptive.monitoring import Monitor

model, tokenizer = load_model()
new_tokens, batch_size = 12, 8

# %% [markdown]
# ## A certified policy

# %%
prompts = load_prompts(310, rng=7)
policy = calibrate(
    model,
    prompts[:70],
    0.2,
    0.1,
    mode="propagate",
    pool=POOL,
    new_tokens=new_tokens,
    batch_size=32,
    members=3,
    tokenizer=tokenizer,
    progress=False,
)
print(policy.certificate.summary)

# %% [markdown]
# ## Served under a monitor
#
# The monitor is made from the policy alone and goes into every call. Each unit that is audited is
# compared with the full model afterwards; here all are, in production a share of them will do.
# First come prompts like those of the calibration; then a client sends the codes of the letters
# instead of the letters; then it is repaired. What the monitor does it says in the log.

# %%
usual, later, rest = prompts[70:110], prompts[110:238], prompts[238:]
codes = [" ".join(str(ord(letter)) for letter in prompt[:60]) for prompt in rest[:32]]
folder = tempfile.TemporaryDirectory()
journal = Path(folder.name) / "journal.jsonl"
monitor = Monitor.for_policy(
    policy, journal=journal, alpha=0.05, beta=0.1, audits=UniformAudits(1.0)
)


def serve(stream):
    """Generate in batches under the policy and its monitor; mean layers per token of each batch."""
    depths = []
    for start in range(0, len(stream), batch_size):
        inputs = tokenizer(
            stream[start : start + batch_size],
            return_tensors="pt",
            padding=True,
            padding_side="left",
            return_token_type_ids=False,
        )
        out = generate(
            model,
            **inputs,
            policy=policy,
            monitor=monitor,
            max_new_tokens=new_tokens,
            return_dict_in_generate=True,
        )
        depths.append(round(out.mean_depth, 1))
    return depths


for name, stream in (("usual", usual), ("codes", codes), ("usual again", later)):
    print(f"-- {name}")
    print("layers per token:", serve(stream))
    print(monitor)

# %%
MonitorDisplay.from_journal(journal).plot()
plt.show()
folder.cleanup()

# %% [markdown]
# After the alarm the loop runs at full depth, where nothing can be lost. Early answers are still
# compared there, and on evidence that the promise holds again the policy comes back.

# %%
happened = [event.kind for event in monitor.events]
assert "alarm" in happened or not policy.certificate.holds, happened

# %% [markdown]
# ## How long until it is noticed?
#
# This can be planned. Rare labels make it long.

# %%
watching = RiskMonitor(0.1, average_run_length=1e4)
for rate in (1.0, 0.1):
    print(f"labels for {rate:.0%} of the units:")
    print(plan_detection(watching, audit_rate=rate, factor=2.5, quiet=1000, rng=0), "\n")

# %% [markdown]
# ## Is the promise about false alarms kept?
#
# A `RiskMonitor` watches a thousand tenants at once; their risk is exactly what was promised, which
# is the worst that is not yet a breach. P(false alarm within T units) is at most T divided by the
# promised run length. The usual gauge beside it: an alarm when the mean of the last fifty losses is
# two standard errors above the promise.

# %%
bound, quiet, run_length, tenants = 0.1, 1000, 10_000, 1000
losses = BernoulliStream(bound, after=0.3).draw(quiet + 400, quiet, streams=tenants, rng=0)
trial = try_monitor(RiskMonitor(bound, average_run_length=run_length), losses, change=quiet)

sums = np.cumsum(losses[:quiet], axis=0)
gauge = (sums[50:] - sums[:-50]) / 50
limit = bound + 2 * (bound * (1 - bound) / 50) ** 0.5
by_gauge = (gauge > limit).any(axis=0).mean()

allowed = quiet / run_length
print(f"false alarms within {quiet} quiet units: {trial.false_alarms:.3f}, allowed {allowed}")
print(f"                           by the gauge: {by_gauge:.3f}")
print(f"units until the change is found, median {np.median(trial.delays):.0f}")
assert trial.false_alarms * tenants <= violation_limit(tenants, allowed)
assert by_gauge * tenants > violation_limit(tenants, allowed)

# %% [markdown]
# ## Without labels
#
# Scores are there for nothing. `ScoreDrift` compares them with the calibration's, and does not
# mistake the finite calibration for the truth. A quieter change than the last: a client that sends
# everything in capitals. One trace of the usual traffic, a part to fit and a part to serve, and one
# of the capitals.

# %%
settings = {"new_tokens": new_tokens, "batch_size": 32, "tokenizer": tokenizer, "progress": False}
trace = collect_trace(model, prompts[:130], **settings)
shouted = collect_trace(model, [prompt.upper() for prompt in rest[32:]], **settings)
fit, served = trace.split([0.6, 0.4], rng=0)
exit, phase = 2, 150
drift = ScoreDrift.fit(
    fit.scores[:, exit], fit.unit_of_token, average_run_length=2000, cells=4, rng=0
)


def evidence_of(*traces, rng):
    """Evidence after each text of a stream: texts drawn from one trace, then from the other."""
    state, path = drift.init(), []
    for trace in traces:
        features = drift.features(trace.scores[:, exit], trace.unit_of_token)
        for unit in rng.integers(trace.n_units, size=phase):
            state = drift.update(state, features[[unit]])
            path.append(drift.evidence(state)[0])
    return np.array(path)


paths = [evidence_of(served, shouted, rng=np.random.default_rng(seed)) for seed in range(5)]
figure, axis = plt.subplots(figsize=(6.8, 3.4), layout="constrained")
for path in paths:
    axis.semilogy(path, color="C0", alpha=0.7)
axis.axhline(drift.threshold, color="C3", linestyle="--", label="alarm")
axis.axvline(phase, color="black", linewidth=1, label="capitals begin")
axis.set(xlabel="texts", ylabel="evidence for a drift")
axis.legend()
plt.show()

delays = np.array([int(np.argmax(path >= drift.threshold)) - phase for path in paths])
print("mean score at this exit, usual and capitals:", end=" ")
print([round(float(part.scores[:, exit].mean()), 3) for part in (served, shouted)])
print("texts from the change to the alarm, five streams:", delays.tolist())
assert (delays > 0).all()

# %% [markdown]
# (Every text is one more moment at which a change may have begun, so the evidence rises with time
# even where there is none; the promised run length takes that into account.) An alarm says that
# inputs have moved, not that the promise is broken: a reason to label more.
#
# ## Early warning
#
# Some changes announce themselves: on the way to a tipping point a process returns to its mean more
# and more slowly. `early_warning_signals` draws the pictures of that literature, `SlowingDown` is a
# sequential test with a promised run length. One path that slides towards a fold, with what came
# before it as calibration:

# %%
rng = np.random.default_rng(4)
calm = simulate_ou(600, rate=2.0, noise=0.1, mean=1.0, rng=rng)[:, 0]
sliding = simulate_fold(600, start=1.0, end=0.02, noise=0.1, rng=rng)[:, 0]
detector = SlowingDown.fit(calm, average_run_length=10_000)
state, path = detector.init(), []
for value in sliding - np.sqrt(np.linspace(1.0, 0.02, 600)) + 1.0:  # its moving mean is known here
    state = detector.update(state, [value])
    path.append(detector.evidence(state)[0])
alarm = int(state.first_alarm[0])

signals = early_warning_signals(sliding)
figure, axes = plt.subplots(3, 1, figsize=(6.8, 5.4), sharex=True, layout="constrained")
axes[0].plot(sliding)
axes[0].set_ylabel("process")
axes[1].plot(np.arange(signals.window - 1, 600), signals.variance, label="variance")
axes[1].set_ylabel("rolling variance")
axes[2].semilogy(path)
axes[2].axhline(detector.threshold, color="C3", linestyle="--", label="alarm")
axes[2].set(ylabel="evidence", xlabel="time; the fold is just after the end")
axes[2].legend()
plt.show()
print(f"alarm at {alarm} of 600; trend of the variance {signals.tau['variance']:+.2f}")
assert 0 < alarm < 600

# %% [markdown]
# It warns of what slows down, and of nothing else: the changes above came without any warning, as
# releases and new clients do. Hence the risk monitor first, drift second, early warning third.
