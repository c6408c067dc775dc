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
# # Write your own policy
#
# A stopping rule is four short methods. It then runs over traces, is calibrated and certified, is
# saved and read, and decides in `generate`, like those of the library: there is nothing to
# register. The idea tried out here: trouble comes in bursts. Where the last token had to go all the
# way, ask the next one for a higher score.

# %%
import math
import tempfile
from dataclasses import dataclass, replace

import matplotlib.pyplot as plt
import numpy as np
import torch

from adaptive import Policy, Threshold, calibrate, collect_trace, generate, get_exits
from adaptive.displays import RiskPathDisplay, TokenDepthDisplay
from adaptive.examples import POOL, load_model, load_prompts
from adaptive.policies import AbstractRule, ProbeScore, exit_stages, unit_costs, unit_losses

model, tokenizer = load_model()
prompts = load_prompts(200, rng=9)
settings = {"new_tokens": 12, "batch_size": 32, "tokenizer": tokenizer, "progress": False}

# %% [markdown]
# ## The rule
#
# `init` puts on the device what is compared and what is remembered, for every row of a batch.
# `decide` says which rows stop, without branching on values. `advance` is called when a token is
# done. `with_knob` and `knobs` make it a family, from safest (infinity: never stop early) to
# cheapest.


# %%
@dataclass(frozen=True)
class WaryAfterTrouble(AbstractRule):
    """Stop at a score of `threshold`, or `margin` more after a token that never stopped early."""

    threshold: float = math.inf
    margin: float = 0.1

    def init(self, batch_size, *, device):
        no = torch.zeros(batch_size, dtype=torch.bool, device=device)
        return {"threshold": torch.tensor(self.threshold, device=device), "wary": no, "done": no}

    def decide(self, features, score, state):
        stop = score >= state["threshold"] + self.margin * state["wary"]
        return stop, state | {"done": state["done"] | stop}

    def advance(self, state):
        return state | {"wary": ~state["done"], "done": torch.zeros_like(state["done"])}

    def with_knob(self, knob):
        return replace(self, threshold=knob)

    def knobs(self, trace, *, size):
        levels = np.linspace(0.99, 0.0, size - 1)
        return (math.inf, *np.unique(np.quantile(trace.scores, levels))[::-1].tolist())


# %% [markdown]
# ## Try it on a trace
#
# Is the idea any good? Beside the plain threshold, on prompts that will certify nothing.

# %%
shaping, certifying = prompts[:80], prompts[80:]
trace = collect_trace(model, shaping, **settings)
layers = (*get_exits(model).layers, model.config.num_hidden_layers)
trace = replace(trace, costs=layers, cost_quantity="layers")

figure, axis = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
depths, curves = np.linspace(6, 11, 21), {}
for family in (Threshold(), WaryAfterTrouble()):
    stages = [exit_stages(family.with_knob(knob), trace) for knob in family.knobs(trace, size=24)]
    costs = [unit_costs(where, trace).mean() for where in stages]
    losses = [unit_losses(where, trace).mean() for where in stages]
    axis.plot(costs, losses, "o-", markersize=4, label=type(family).__name__)
    curves[type(family)] = np.interp(depths, costs[::-1], losses[::-1])
axis.set(xlabel="layers per token", ylabel="share of tokens that differ")
axis.legend()
plt.show()

# %% [markdown]
# Is trouble bursty at all? How often does the third exit, the last one, disagree right after it
# disagreed, and how often otherwise?

# %%
wrong = trace.losses["disagreement"][:, -1].astype(bool)
within = np.ones(len(wrong), dtype=bool)
within[trace.offsets[:-1]] = False  # the first token of a text has none before it
before = np.roll(wrong, 1)
print(f"after a disagreement: {wrong[within & before].mean():.2f}", end=", ")
print(f"otherwise: {wrong[within & ~before].mean():.2f}")

gain = (curves[Threshold] - curves[WaryAfterTrouble]).mean()
print(f"tokens saved from disagreeing at equal depth, on average: {gain:+.4f}")
assert gain < 0.005

# %% [markdown]
# Bursty it is, but the probe seems to have noticed by itself: asking for more does not pay. So be
# it. The worth of trying is that it took ten lines and a second; and that a family which is no
# better cannot do harm, only end nearer to full depth, because what is promised is decided by the
# calibration.

# %% [markdown]
# ## What must hold
#
# Calibration keeps a bad idea harmless, but a rule has manners: at knob infinity it never stops
# early; a score that is not a number never stops; what it decides in the loop is what the trace
# foretold, as long as the text is the same.

# %%
never = exit_stages(WaryAfterTrouble(), trace)
assert (never == trace.n_exits).all()

rule = WaryAfterTrouble(threshold=0.8)
state = rule.init(1, device=torch.device("cpu"))
assert not rule.decide(None, torch.tensor([math.nan]), state)[0]

policy = Policy(ProbeScore(), rule, stages=(0, 1, 2), mode="exact")
compared = 0
for prompt in shaping[:12]:
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    out = generate(model, **inputs, policy=policy, max_new_tokens=12, return_dict_in_generate=True)
    alone = collect_trace(model, [prompt], **settings)
    foretold = exit_stages(rule, alone)
    decided = out.exit_stages[0, 1:].numpy()  # the first token is the prompt's, at full depth
    same = int(np.cumprod(out.agreement[0, 1:].numpy() == 1).sum()) + 1  # up to the first departure
    same = min(same, len(foretold), len(decided))
    assert (decided[:same] == foretold[:same]).all(), (decided, foretold)
    compared += same
print(f"{compared} decisions in the loop are those that the trace foretold")

# %% [markdown]
# ## Certify
#
# On other prompts. What is calibrated is the knob; the margin stays as it is.

# %%
policy = calibrate(
    model,
    certifying,
    0.12,
    0.1,
    policy=Policy(ProbeScore(), WaryAfterTrouble(), stages=(0, 1, 2)),
    mode="propagate",
    pool=POOL,
    members=5,
    **settings,
)
print(policy.certificate)
RiskPathDisplay.from_certificate(policy.certificate).plot()
plt.show()

# %% [markdown]
# ## Save, read, generate
#
# The file names the class; whoever reads it must have it imported. Without it the message says so.

# %%
with tempfile.TemporaryDirectory() as folder:
    policy.save_pretrained(folder)
    again = Policy.from_pretrained(folder)
assert again == policy
print(again.rule)

# %%
fresh = load_prompts(201, rng=9)[-1]
inputs = tokenizer(fresh, return_tensors="pt", return_token_type_ids=False)
out = generate(model, **inputs, policy=again, max_new_tokens=12, return_dict_in_generate=True)
print(f"{out.mean_depth:.2f} of {layers[-1]} layers per token; inside the promise: {out.certified}")
TokenDepthDisplay.from_output(out, model, tokenizer=tokenizer)

# %% [markdown]
# Scores, losses, tests and model families are open in the same way: "Extending" in the
# documentation has ten lines of each.
