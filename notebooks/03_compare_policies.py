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
# # Compare policies on one trace
#
# A trace holds what every exit said of every token, and whether it was right. Any stopping rule
# can be run over it in a second, without running the model again. Here a dozen prompts' worth of
# rules meet on the shipped model, beside two references that no rule can pass: the oracle, which
# knows in hindsight where each token was settled, and a coin, which knows nothing.

# %%
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np

from adaptive import Policy, Threshold, collect_trace, generate, get_exits
from adaptive.displays import ReliabilityDisplay
from adaptive.examples import load_model, load_prompts
from adaptive.policies import (
    BetaMixtureThreshold,
    Decay,
    Patience,
    ProbeScore,
    RandomStage,
    Saturation,
    ScheduledThreshold,
    budget_thresholds,
    exit_stages,
    oracle_stages,
    unit_costs,
    unit_losses,
)

model, tokenizer = load_model()

# %% [markdown]
# ## One trace, two halves
#
# The full model writes; the exits are asked along its text. Families that have something to fit
# (mixtures, budgets, the knobs to try) fit it on one half; all figures come from the other.

# %%
settings = {"new_tokens": 16, "batch_size": 16, "tokenizer": tokenizer, "progress": False}
prompts = load_prompts(96, rng=3)
layers = (*get_exits(model).layers, model.config.num_hidden_layers)


def traced(score):
    """Trace of the prompts, its measured seconds replaced by layers: the same on every machine."""
    trace = collect_trace(model, prompts, score=score, **settings)
    return replace(trace, costs=layers, cost_quantity="layers")


trace = traced(ProbeScore())
fit, test = trace.split([0.5, 0.5], rng=0)
print(test)
print("layers behind each stage:", test.costs)
print(
    "share of tokens that each exit gets wrong:", test.losses["disagreement"].mean(axis=0).round(2)
)

# %% [markdown]
# ## Is the score what it says?
#
# The probe's score is meant to be the probability that the exit agrees with the full model. If it
# is, one threshold means the same at every exit.

# %%
ReliabilityDisplay.from_trace(test, n_bins=6).plot()
plt.show()

# %% [markdown]
# ## Rules
#
# Each family has one knob, from safest to cheapest, and says itself which values are worth trying.


# %%
def curve(family, fit, test, size=24):
    """Mean loss and mean share of the full cost on the test half, for each value of the knob."""
    stages = [exit_stages(family.with_knob(knob), test) for knob in family.knobs(fit, size=size)]
    losses = np.array([unit_losses(where, test).mean() for where in stages])
    costs = np.array([unit_costs(where, test).mean() for where in stages])
    return losses, costs / test.costs[-1]


budgets = np.linspace(0.95, 0.45, 12) * fit.costs[-1]
families = {
    "threshold": Threshold(),
    "threshold, decaying with position": ScheduledThreshold(Decay(tau=4.0, length=16)),
    "posterior of a Beta mixture": BetaMixtureThreshold.fit(fit),
    "budget (EERO)": budget_thresholds(fit, budgets=budgets),
    "patience": Patience(),
    "a coin": RandomStage(),
}
curves = {name: curve(family, fit, test) for name, family in families.items()}

# %%
oracle = oracle_stages(test)
figure, axis = plt.subplots(figsize=(6.8, 4.2), layout="constrained")
for (name, (losses, costs)), mark in zip(curves.items(), "os^Dv.", strict=True):
    style = {"color": "0.6", "linestyle": ":"} if name == "a coin" else {}
    axis.plot(costs, losses, marker=mark, markersize=4, label=name, **style)
axis.plot(
    unit_costs(oracle, test).mean() / test.costs[-1],
    unit_losses(oracle, test).mean(),
    "k*",
    markersize=13,
    label="oracle, in hindsight",
)
assert unit_losses(oracle, test).sum() == 0
axis.set(xlabel="layers per token, share of all", ylabel="share of tokens that differ")
axis.set_ylim(-0.01, 0.3)
axis.legend(fontsize="small")
plt.show()

# %% [markdown]
# ## Is a difference a difference?
#
# Curves that cross and touch invite stories. Units are prompts, so compare two rules prompt by
# prompt, at knobs that lose about the same on the fit half, and look at the standard error.


# %%
def at_loss(family, level):
    """The cheapest member whose loss on the fit half is at most `level`."""
    found = family
    for knob in family.knobs(fit, size=60):
        member = family.with_knob(knob)
        if unit_losses(exit_stages(member, fit), fit).mean() <= level:
            found = member
    return found


level = 0.08
baseline = exit_stages(at_loss(Threshold(), level), test)
print(f"cost beside the threshold's at a loss of {level} on the fit half, with standard error:")
for name, family in families.items():
    where = exit_stages(at_loss(family, level), test)
    saved = (unit_costs(where, test) - unit_costs(baseline, test)) / test.costs[-1]
    error = saved.std(ddof=1) / len(saved) ** 0.5
    loss = unit_losses(where, test).mean()
    print(f"  {name:34} {saved.mean():+.3f} ± {error:.3f}   (loses {loss:.3f} on the test half)")

# %% [markdown]
# ## Another score
#
# A score is read while the model runs, so another one needs another trace, of the same prompts.
# `Saturation` needs no training at all: how little the hidden state still moves.

# %%
other = traced(Saturation())
other_fit, other_test = other.split([0.5, 0.5], rng=0)
figure, axis = plt.subplots(figsize=(6.8, 3.6), layout="constrained")
for name, parts in {"probe": (fit, test), "saturation": (other_fit, other_test)}.items():
    losses, costs = curve(Threshold(), *parts)
    axis.plot(costs, losses, "o-", markersize=4, label=name)
losses, costs = curves["a coin"]
axis.plot(costs, losses, ":", color="0.6", label="a coin")
axis.set(xlabel="layers per token, share of all", ylabel="share of tokens that differ")
axis.legend()
plt.show()

# %% [markdown]
# ## From the trace to the text
#
# Everything above was asked along the full model's own text. A policy at work writes its own. In
# `exact` mode the loop says of each token whether the full model would have chosen it, so the
# difference can be seen on the same prompts:

# %%
rule = at_loss(Threshold(), level)
policy = Policy(ProbeScore(), rule, stages=(0, 1, 2), mode="exact")
shares = []
for unit in test.unit_ids[:24]:
    prompt = prompts[trace.unit_ids.index(unit)]
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    out = generate(model, **inputs, policy=policy, max_new_tokens=16, return_dict_in_generate=True)
    known = out.agreement[out.agreement >= 0]
    shares.append(1 - known.float().mean().item())
foretold = unit_losses(exit_stages(rule, test), test)[:24]
gap = np.array(shares) - foretold
print(f"foretold by the trace {foretold.mean():.3f}, in real text {np.mean(shares):.3f}")
print(f"difference {gap.mean():+.3f} ± {gap.std(ddof=1) / len(gap) ** 0.5:.3f}")

# %% [markdown]
# That is why nothing is certified on a trace: `calibrate` tests every member on real generations,
# of prompts that chose nothing here. Compare families on a trace, take the simplest of those that
# do not differ, and hand it over: `calibrate(model, other_prompts, policy=policy)`.
