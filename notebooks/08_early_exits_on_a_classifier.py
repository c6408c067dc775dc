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
# # Early exits on a classifier
#
# A classifier need not run all its layers on an image that is settled after two of them. Here a
# small vision transformer learns scikit-learn's handwritten digits; exits are trained on its
# layers, a policy is calibrated on other images, and the promise is compared with what happens on
# images that nobody has touched.

# %%
import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification

from adaptive import Policy, Threshold, calibrate, predict
from adaptive.classifiers import collect_predictions, train_classifier_exits
from adaptive.displays import RiskPathDisplay
from adaptive.policies import Margin, MaxProbability, NegativeEntropy, exit_stages, unit_losses

torch.manual_seed(0)

# %% [markdown]
# ## Data in five parts
#
# One part trains the model, one its exits, one is for looking at scores, one calibrates, one stands
# for the traffic of tomorrow. An image is a unit: the promise is about images drawn from this pool.

# %%
images, digits = load_digits(return_X_y=True)
images = torch.tensor(images / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
digits = torch.tensor(digits)
parts = torch.randperm(len(images)).split([700, 150, 150, 500, 297])
train, shape, look, draw, fresh = parts
names = ("train", "exits", "look", "draw", "fresh")
print({name: len(part) for name, part in zip(names, parts, strict=True)})

# %% [markdown]
# ## The model
#
# Eight layers are more than this problem needs, which is the point.

# %%
config = ViTConfig(
    hidden_size=64,
    num_hidden_layers=8,
    num_attention_heads=4,
    intermediate_size=128,
    image_size=8,
    patch_size=2,
    num_channels=1,
    num_labels=10,
    hidden_dropout_prob=0.0,
    initializer_range=0.1,  # so narrow a model learns faster than from the default, 0.02
)
model = ViTForImageClassification(config)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
epochs = 15
rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=epochs * 12)
for _ in range(epochs):
    for rows in train[torch.randperm(len(train))].chunk(12):
        loss = F.cross_entropy(model(pixel_values=images[rows]).logits, digits[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
model = model.eval()

full = predict(model, images[fresh])
error = (full.labels != digits[fresh]).float().mean()
print(f"error of the full model on fresh images: {error:.3f}")

# %% [markdown]
# ## Exits
#
# Without labels, each exit learns the model's own probabilities. The model does not change.

# %%
exits = train_classifier_exits(model, images[shape], layers=(2, 4, 6), progress=False)

# %% [markdown]
# ## Which score tells best when to stop?
#
# One trace holds what every stage says of every image; policies are compared on it without
# running the model again. (This is for looking. What is certified below is measured on real runs.)

# %%
figure, axis = plt.subplots(figsize=(6, 3.5), layout="constrained")
depths = np.array([2, 4, 6, 8])
for score in (MaxProbability(), Margin(), NegativeEntropy()):
    trace = collect_predictions(model, images[look], score=score, progress=False)
    path = [exit_stages(Threshold(knob), trace) for knob in Threshold().knobs(trace, size=60)]
    harm = [unit_losses(stops, trace).mean() for stops in path]
    axis.plot([depths[stops].mean() for stops in path], harm, label=type(score).__name__)
axis.set(xlabel="mean depth in layers", ylabel="disagreement with the full model")
axis.legend()
plt.show()

# %% [markdown]
# ## Calibrate
#
# Twice: on agreement with the full model, which needs no labels, and on the excess error over the
# full model, which does. There an image that the early answer gets right and the full model wrong
# counts as a gain.

# %%
risk, delta = 0.05, 0.1
policy = Policy(MaxProbability(), Threshold(), stages=(0, 1, 2))  # what is calibrated: its knob
settings = {"batch_size": 64, "members": 6, "progress": False}
agreement = calibrate(model, images[draw], risk, delta, policy=policy, **settings)
print(agreement.certificate, "\n")
correctness = calibrate(
    model,
    (images[draw], digits[draw]),
    risk,
    delta,
    policy=policy,
    loss="excess_error",
    **settings,
)
print(correctness.certificate)

# %%
RiskPathDisplay.from_certificate(agreement.certificate).plot()
plt.show()

# %% [markdown]
# ## Promised and realised

# %%
found = predict(model, images[fresh], policy=agreement, batch_size=64)
errors = [(run.labels != digits[fresh]).float().mean() for run in (found, full)]
differs = (found.labels != full.labels).float().mean()
print(f"disagreement: promised {risk}, on fresh images {differs:.4f}")
print(f"excess error on fresh images: {errors[0] - errors[1]:+.4f}")
print(f"layers per image: {found.mean_depth:.2f} of {full.mean_depth:.0f}")
times = agreement.certificate.evidence.get("milliseconds_per_input", {})
print("measured milliseconds per image, 0 is full computation:", times)
frame = found.to_frame()
frame.groupby("exit_stage").agg(images=("label", "size"), mean_score=("score", "mean"))

# %% [markdown]
# The promise is about the mean over images, with confidence 0.9 over the draw of the calibration
# images. On 297 fresh images the mean itself scatters; three standard errors are allowed here.

# %%
assert differs <= risk + 3 * (risk * (1 - risk) / len(fresh)) ** 0.5

# %% [markdown]
# ## Which images stop early?

# %%
order = torch.argsort(found.exit_stages)
figure, axes = plt.subplots(2, 8, figsize=(8, 2.6), layout="constrained")
for axes_row, chosen in zip(axes, (order[:8], order[-8:]), strict=True):
    for axis, i in zip(axes_row, chosen.tolist(), strict=True):
        axis.imshow(images[fresh[i], 0], cmap="gray_r")
        axis.set_title(f"{found.labels[i]} at {found.depths[i]:.0f}", fontsize="small")
        axis.axis("off")
plt.show()

# %% [markdown]
# ## Not a Hugging Face model?
#
# Anything that yields the logits of its stages will do: a module with a method `stages(batch)`, or
# a function. It is told which rows go on, so that the others need not be computed.


# %%
def layers_then_head(batch):
    keep = yield batch.flatten(1) @ weight + bias
    batch = batch if keep is None else batch[keep]
    yield model(pixel_values=batch).logits


small = LogisticRegression(max_iter=2000).fit(images[train].flatten(1), digits[train])
weight = torch.tensor(small.coef_.T, dtype=torch.float32)
bias = torch.tensor(small.intercept_, dtype=torch.float32)
cascade = calibrate(layers_then_head, images[draw], risk, delta, **settings)
found = predict(layers_then_head, images[fresh], policy=cascade)
print(cascade.certificate.summary)
print(f"answered by the linear model alone: {(found.exit_stages == 0).float().mean():.0%}")
