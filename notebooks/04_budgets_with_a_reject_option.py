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
# # Budgets with a reject option
#
# Often it is not the risk that is given but the money. A letter can be read by three classifiers,
# each dearer than the last, and what none of them is sure about goes to a person. How many images
# should stop where, so that the mean price stays within a budget and as little as possible is
# misread? EERO's allocators answer that; ranks turn the answer into thresholds; and what must hold
# is certified afterwards, the budget and the risk each by itself.

# %%
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from sklearn.datasets import load_digits
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split

from adaptive.calibration import (
    Trace,
    control_risk,
    exit_rate_threshold,
    marginal_thresholds,
    survivor_thresholds,
)
from adaptive.policies import (
    budget_thresholds,
    exit_stages,
    exponential_weights,
    geometric_allocation,
    inflated_thresholds,
    linear_programme,
    mean_cost_bound,
    unit_costs,
    unit_losses,
)

# %% [markdown]
# ## Three readers and a person
#
# The first looks at two rows of pixels, the second at four, the third at all of them. A person is
# the full computation: dear, and right by definition. Images in four parts: to train, to fit
# thresholds, to certify, and the traffic of tomorrow.

# %%
images, digits = load_digits(return_X_y=True)
train_x, rest_x, train_y, rest_y = train_test_split(images, digits, train_size=360, random_state=0)
fit_x, rest_x, fit_y, rest_y = train_test_split(rest_x, rest_y, train_size=450, random_state=0)
test_x, fresh_x, test_y, fresh_y = train_test_split(rest_x, rest_y, train_size=500, random_state=0)

seen = [slice(24, 40), slice(16, 48), slice(0, 64)]
readers = [LogisticRegression(C=0.01, max_iter=2000) for _ in seen[:2]]
readers.append(RandomForestClassifier(random_state=0))
for reader, pixels in zip(readers, seen, strict=True):
    reader.fit(train_x[:, pixels], train_y)
prices = [1.0, 2.0, 5.0, 40.0]  # cents, each with what was paid on the way there


def read(x, y):
    """What every reader says of every image."""
    chances = [
        reader.predict_proba(x[:, pixels]) for reader, pixels in zip(readers, seen, strict=True)
    ]
    scores = np.stack([chance.max(axis=1) for chance in chances], axis=1)
    wrong = np.stack([chance.argmax(axis=1) != y for chance in chances], axis=1)
    return Trace(scores=scores, losses={"misread": wrong}, costs=prices, cost_quantity="cents")


fit, test, fresh = read(fit_x, fit_y), read(test_x, test_y), read(fresh_x, fresh_y)
risks = np.append(fit.losses["misread"].mean(axis=0), 0.0)
print("misread by each reader alone:", risks.round(3).tolist(), "at", prices, "cents")

# %% [markdown]
# ## Shares of the traffic
#
# An allocator gets the mean risk of each stage, its price and the budget, and says which share of
# the images should stop where. The linear programme buys the least risk and puts everything on two
# stages; EERO's exponential weights are drawn towards a prior and use all of them; MSDNet's
# geometric shares do not look at the risks.

# %%
budget = 8.0
allocators = {
    "exponential weights (EERO)": partial(exponential_weights, temperature=0.04),
    "linear programme": linear_programme,
    "geometric (MSDNet)": geometric_allocation,
}
shares = {name: allocate(risks, prices, budget) for name, allocate in allocators.items()}
table = pd.DataFrame(shares, index=["first", "second", "third", "person"]).T
table.assign(cents=table.to_numpy() @ prices).round(3)

# %% [markdown]
# ## From shares to thresholds
#
# A threshold that lets a wanted share of *these* images stop lets a different share of tomorrow's
# stop. The conformal rank makes it right on average, and with `delta` it is right for all but that
# share of calibrations. On draws from a pool, where the true rate is known:

# %%
pool = np.unique(np.random.default_rng(0).normal(size=100_000))
rng = np.random.default_rng(1)
wanted, delta, trials = 0.3, 0.1, 2000
draws = rng.choice(pool, size=(trials, 200))
by_rank = [exit_rate_threshold(draw, wanted, delta=delta) for draw in draws]
by_quantile = np.quantile(draws, 1 - wanted, axis=1)
for name, thresholds in (("conformal rank", by_rank), ("plain quantile", by_quantile)):
    rates = 1 - np.searchsorted(pool, thresholds) / len(pool)
    print(f"{name}: fewer than {wanted:.0%} stop in {(rates < wanted).mean():.3f} of calibrations")
    kept = (rates < wanted).mean() <= delta + 3.1 * (delta * (1 - delta) / trials) ** 0.5
    assert kept == (name == "conformal rank")

# %% [markdown]
# Several exits make it harder, because what stops at the first does not come to the second. Three
# ways: each exit from all scores (`marginal_thresholds`: safe for the budget, whoever comes),
# the published inflation, and each exit from the scores of those that still run
# (`survivor_thresholds`: spends the budget, promises nothing).

# %%
budgets = np.linspace(14.0, 2.0, 16)
quantiles = {
    "marginal, conformal rank": marginal_thresholds,
    "inflated (EERO)": inflated_thresholds,
    "survivors": survivor_thresholds,
}
paths = {
    name: budget_thresholds(fit, budgets=budgets, quantiles=how, loss="misread")
    for name, how in quantiles.items()
}


def walk(rule, trace):
    """Mean price and mean loss for every budget of the path."""
    stages = [exit_stages(rule.with_knob(allowed), trace) for allowed in budgets]
    spent = np.array([unit_costs(where, trace).mean() for where in stages])
    lost = np.array([unit_losses(where, trace, loss="misread").mean() for where in stages])
    return spent, lost


figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
axes[0].plot(budgets, budgets, color="0.6", linewidth=1)
for (name, rule), mark in zip(paths.items(), "osv", strict=True):
    spent, lost = walk(rule, fresh)
    safe = name != "survivors"
    assert not safe or (spent <= budgets + 1.5).all()  # 1.5: three standard errors of the mean
    axes[0].plot(budgets, spent, marker=mark, markersize=4, label=name)
    axes[1].plot(spent, lost, marker=mark, markersize=4, label=name)
axes[0].set(xlabel="budget, cents per image", ylabel="spent on fresh images")
axes[1].set(xlabel="spent on fresh images, cents per image", ylabel="share of images misread")
axes[0].legend(fontsize="small")
plt.show()

# %% [markdown]
# On the left, what the safe thresholds leave on the table: images that stop early would have scored
# high later too, so fewer than allowed go on; and the published inflation is sized for the worst
# that so many images could do. They do not waste it, though. On the right, what is spent buys about
# as much whichever way it was decided: pick the budget by what is spent, not by what is allowed.
# (Where the curves become flat, more budget changes nothing: the pull towards the prior has had its
# way. A lower `temperature` pulls less.)
#
# ## What EERO's risk bound says, and what happens
#
# The published bound weighs each stage's mean risk with its share, as if stopping had nothing to
# do with being right. Routing by score does better here, and there is no law that it must: certify
# the routed risk by itself.

# %%
path = paths["survivors"]
stages = exit_stages(path.with_knob(budgets[np.abs(budgets - budget).argmin()]), fresh)
taken = np.bincount(stages, minlength=4) / len(stages)
routed = unit_losses(stages, fresh, loss="misread").mean()
print(f"shares times mean risks: {taken @ risks:.3f}")
print(f"images misread:          {routed:.3f}")
assert routed < taken @ risks

# %% [markdown]
# ## Two certificates
#
# On images that fitted nothing: at most 2 % misread, *and* a mean price that is not exceeded; both
# together with confidence 0.9, so each gets half of `delta`. The risk is tested along the path,
# from the largest budget down.

# %%
delta = 0.1
knobs = path.knobs(fit, size=len(budgets) + 1)  # the first sends everything to the person
walked = [exit_stages(path.with_knob(knob), test) for knob in knobs]
losses = np.stack([unit_losses(where, test, loss="misread") for where in walked], axis=1)
result = control_risk(
    losses,
    risk=0.02,
    delta=delta / 2,
    loss_type="binary",
    loss="share of images misread",
    unit="image",
)
print(result.certificate)
assert result.index is not None

# %% [markdown]
# The price is another statement. Its row was picked with the help of these very images, so a bound
# for one row would be too good to be true. A bound that holds for all rows at once costs a
# division of `delta` by their number.

# %%
each = delta / 2 / len(walked)
limits = [mean_cost_bound(where, test, delta=each) for where in walked]
print(f"allowed by the table: {knobs[result.index]:.1f} cents per image")
print(f"certified:            {limits[result.index]:.2f}")

chosen = exit_stages(path.with_knob(knobs[result.index]), fresh)
spent = unit_costs(chosen, fresh).mean()
lost = unit_losses(chosen, fresh, loss="misread").mean()
print(f"on fresh images:      {spent:.2f} cents, {lost:.3f} misread; a person reads ", end="")
print(f"{(chosen == 3).mean():.0%} of them")
assert spent <= limits[result.index]
assert lost <= 0.02 + 3 * (0.02 * 0.98 / len(fresh)) ** 0.5

# %% [markdown]
# Nothing here was a network: a trace is scores, losses and prices of anything that answers in
# stages. `ThresholdTable`, which `budget_thresholds` returns, is a stopping rule like any other,
# and runs in `generate` and `predict` too.
