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
# # Calibrate and generate
#
# The main job from beginning to end, on the small language model that comes with the package: it
# completes functions of the Python standard library that it has not read. We state a promise,
# calibrate, read the certificate, generate under it, and then do what one cannot do in production:
# check the promise against full computation on prompts that nobody has touched.

# %%
import tempfile

import matplotlib.pyplot as plt
import numpy as np
import torch

from adaptive import (
    CertificateMismatchError,
    Policy,
    calibrate,
    generate,
    minimum_units,
)
from adaptive.displays import ExitDepthDisplay, RiskPathDisplay, TokenDepthDisplay
from adaptive.examples import POOL, load_model, load_prompts

model, tokenizer = load_model()
layers = model.config.num_hidden_layers

# %% [markdown]
# ## The promise comes first
#
# At most one token in ten, on average, may differ from what the full model would have chosen after
# the same words; and one calibration in ten may be misled. What is the least number of prompts for
# such a promise, if everything went perfectly? What went less than perfectly will need more.

# %%
risk, delta, new_tokens = 0.1, 0.1, 16
print("at the very least", minimum_units(risk, delta), "prompts in the test")

# %% [markdown]
# All prompts are drawn at random from one pool. Some are for calibration; the rest is kept back
# for the end and stands for the traffic of tomorrow.

# %%
prompts = load_prompts(160, rng=0)
calibration_prompts, fresh_prompts = prompts[:120], prompts[120:]
print(prompts[3])

# %% [markdown]
# ## Calibrate
#
# One call. It traces the model on a third of the prompts and lays out a path of thresholds; on the
# others each member of that path writes text for real, from the safest on, until the evidence no
# longer suffices.

# %%
policy = calibrate(
    model,
    calibration_prompts,
    risk,
    delta,
    mode="propagate",  # skipped layers are never computed: right for a CPU
    new_tokens=new_tokens,
    batch_size=32,
    members=6,
    pool=POOL,
    tokenizer=tokenizer,
    progress=False,
)
print(policy.certificate)

# %% [markdown]
# The picture shows the walk: each member that was tested, its measured risk, and how deep it went.
# The certified one need not be the last that passed: it is the fastest of those that passed, as
# measured on this machine.

# %%
RiskPathDisplay.from_certificate(policy.certificate).plot()
plt.show()

# %% [markdown]
# Where did its tokens stop?

# %%
ExitDepthDisplay.from_certificate(policy.certificate).plot()
plt.show()

# %% [markdown]
# ## Generate
#
# The policy goes where `model.generate` already is. Of each token it is known after how many exits
# it was settled.

# %%
inputs = tokenizer(fresh_prompts[0], return_tensors="pt", return_token_type_ids=False)
out = model.generate(
    **inputs,
    custom_generate=generate,
    policy=policy,
    max_new_tokens=new_tokens,
    return_dict_in_generate=True,
)
print("exits, full depth is 3:", out.exit_stages[0].tolist())
print(f"layers per token: {out.mean_depth:.2f} of {layers}; inside the promise: {out.certified}")
TokenDepthDisplay.from_output(out, model, tokenizer=tokenizer)

# %% [markdown]
# ## Promised and realised
#
# What did the early tokens of the fresh prompts lose? To see it, one full pass over each finished
# text says what the full model would have chosen at every place.


# %%
def share_that_differs(prompt):
    """Share of the generated tokens that the full model would have chosen differently."""
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    start = inputs.input_ids.shape[1]
    text = generate(model, **inputs, policy=policy, max_new_tokens=new_tokens)
    with torch.no_grad():
        chosen = model(text).logits[0, start - 1 : -1].argmax(dim=-1)
    return (chosen != text[0, start:]).float().mean().item()


losses = np.array([share_that_differs(prompt) for prompt in fresh_prompts])
error = losses.std(ddof=1) / len(losses) ** 0.5
print(f"promised: at most {risk} on average")
print(f"on {len(losses)} fresh prompts: {losses.mean():.3f}, standard error {error:.3f}")
assert losses.mean() <= risk + 3 * error

# %% [markdown]
# The promise is about the average. Prompts differ, and nothing was promised about a single one:

# %%
figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
places = np.arange(round(losses.max() * new_tokens) + 2)
axis.hist(losses, bins=(places - 0.5) / new_tokens, color="C0", edgecolor="white")
axis.axvline(losses.mean(), color="black", label="their mean")
axis.axvline(risk, color="C3", linestyle="--", label="promised for the mean")
axis.set(xlabel="share of a text's tokens that differ", ylabel="fresh prompts")
axis.legend()
plt.show()

# %% [markdown]
# ## What a certificate does not cover is refused
#
# It was earned with texts of a certain length, by greedy decoding, on this model. Anything else
# stops with the reason, unless you say that you go on without the certificate.

# %%
try:
    generate(model, **inputs, policy=policy, max_new_tokens=10 * new_tokens)
except CertificateMismatchError as refused:
    print(refused)

longer = generate(
    model,
    **inputs,
    policy=policy,
    max_new_tokens=2 * new_tokens,
    certified=False,
    return_dict_in_generate=True,
)
print("\nmarked as outside:", not longer.certified, longer.mismatches)

# %% [markdown]
# ## When the data cannot support the promise
#
# A much stricter promise from the same prompts: no error, and no weaker promise in its place. The
# answer is full computation, and the reason.

# %%
strict = calibrate(
    model,
    calibration_prompts,
    0.005,
    delta,
    mode="propagate",
    new_tokens=new_tokens,
    tokenizer=tokenizer,
    progress=False,
)
print(strict.certificate.notes[0])
assert not strict.certificate.holds

# %% [markdown]
# Trying promises one after another until one comes out spends a `delta` each time: that is what
# `DeltaLedger` keeps account of. Here nothing was spent, since the test was never begun.
#
# ## Save
#
# One JSON file, with the certificate in it.

# %%
with tempfile.TemporaryDirectory() as folder:
    policy.save_pretrained(folder)
    again = Policy.from_pretrained(folder)
assert again == policy
assert torch.equal(
    generate(model, **inputs, policy=again, max_new_tokens=new_tokens), out.sequences
)
