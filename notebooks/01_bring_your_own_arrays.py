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
# # Bring your own arrays
#
# You have configurations of some computation, ordered from safest to cheapest, and you have
# measured what each of them loses on some independent units. `control_risk` says which of them
# you may use, and with what promise. No model and no PyTorch are involved: the ground floor works
# on arrays.
#
# The example is a cascade on real data: a small classifier answers where it is sure, the others
# are passed on to a large one. The knob is the confidence that the small one needs; the loss is
# "the answer is wrong although the large classifier has it right".

# %%
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split

from adaptive.calibration import control_risk, minimum_units, plan_units

# %% [markdown]
# ## The two classifiers
#
# Both are trained on one part of the data. The rest is split once more: one half is the evidence
# for the certificate, the other stands for the traffic of tomorrow. Units are images drawn at
# random from this pool, so the promise is about this pool: for new writers, the writers would
# have to be the units.

# %%
images, digits = load_digits(return_X_y=True)
fit_x, rest_x, fit_y, rest_y = train_test_split(images, digits, train_size=500, random_state=0)
test_x, fresh_x, test_y, fresh_y = train_test_split(rest_x, rest_y, train_size=0.5, random_state=0)

pixels = slice(24, 40)  # the small classifier sees two rows of the image only
small = LogisticRegression(max_iter=5000).fit(fit_x[:, pixels], fit_y)
large = RandomForestClassifier(random_state=0).fit(fit_x, fit_y)
print(f"accuracy on fresh images: small {small.score(fresh_x[:, pixels], fresh_y):.3f}, ", end="")
print(f"large {large.score(fresh_x, fresh_y):.3f}")

# %% [markdown]
# ## The path
#
# Member 0 passes everything on: it is the full computation. From there on the confidence that the
# small classifier needs goes down. The path is fixed before the test images are looked at.

# %%
path = np.concatenate([[np.inf], np.linspace(0.999, 0.2, 40)])


def losses_and_cost(x, y):
    """Losses [n_units, n_columns] and the share of units that are passed on, [n_columns]."""
    probability = small.predict_proba(x[:, pixels])
    answer = small.classes_[probability.argmax(axis=1)]
    harm = (answer != y) & (large.predict(x) == y)
    stops = probability.max(axis=1)[:, None] >= path
    return (stops & harm[:, None]).astype(float), 1.0 - stops.mean(axis=0)


losses, passed_on = losses_and_cost(test_x, test_y)
losses.shape

# %% [markdown]
# ## How many images does a promise need?
#
# This can be answered before anything is measured.

# %%
risk, delta = 0.05, 0.1
print("at the very least:", minimum_units(risk, delta, loss_type="binary"))
print(
    "to certify a member with true risk 0.03, nine times in ten:",
    plan_units(risk, delta, true_risk=0.03, loss_type="binary"),
)
print("there are:", len(losses))

# %% [markdown]
# ## The certificate

# %%
result = control_risk(
    losses,
    risk=risk,
    delta=delta,
    loss_type="binary",
    costs=passed_on,
    loss="right answers lost",
    unit="image",
)
print(result.certificate)

# %% [markdown]
# The members up to the certified one were tested one after another, each at the full level, until
# the first failure.

# %%
fresh, fresh_passed_on = losses_and_cost(fresh_x, fresh_y)

figure, axis = plt.subplots(figsize=(6, 3.5), layout="constrained")
axis.plot(passed_on, losses.mean(axis=0), label="mean loss, test images")
axis.plot(fresh_passed_on, fresh.mean(axis=0), "--", label="mean loss, fresh images")
axis.axhline(risk, color="black", linewidth=0.8, label="promise")
axis.plot(passed_on[result.index], losses[:, result.index].mean(), "o", label="certified")
axis.set(xlabel="share of images passed on to the large classifier", ylabel="mean loss")
axis.invert_xaxis()
axis.legend()
plt.show()

# %%
print(f"promised: at most {risk}")
print(f"on fresh images: {fresh[:, result.index].mean():.4f}")
print(f"answered by the small classifier alone: {1 - fresh_passed_on[result.index]:.0%}")
assert result.index is not None

# %% [markdown]
# ## Does the promise hold?
#
# "With probability at least 0.9 over the draw of the calibration units" can be tried out where
# the truth is known. We draw 2,000 calibrations of 300 units from a law whose true risks we have
# chosen, and count how often the certified member's true risk exceeds the promise. The share must
# not exceed delta, up to the scatter of 2,000 draws.

# %%
truth = np.concatenate([[0.0], np.linspace(0.01, 0.10, 19)])  # true risk of each member


def share_of_broken_promises(choose, rng, trials=2000, n_units=300):
    """Share of calibrations whose chosen member has a true risk above the promise."""
    broken = 0
    for _ in range(trials):
        draw = rng.random((n_units, 1)) < truth  # strongly dependent along the path
        broken += truth[choose(draw)] > risk
    return broken / trials


def certified(draw):
    """The member that the certificate allows."""
    return control_risk(draw, risk=risk, delta=delta, loss_type="binary").index or 0


def tuned(draw):
    """The usual way: the cheapest member whose measured loss looks good enough."""
    return np.flatnonzero(draw.mean(axis=0) <= risk).max()


rng = np.random.default_rng(0)
by_certificate = share_of_broken_promises(certified, rng)
by_tuning = share_of_broken_promises(tuned, rng)
print(f"promises broken: {by_certificate:.3f} with the certificate (at most {delta})")
print(f"                 {by_tuning:.3f} when the threshold is tuned until it looks right")
assert by_certificate <= delta + 3 * (delta * (1 - delta) / 2000) ** 0.5
assert by_tuning > 3 * delta
