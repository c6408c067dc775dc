"""The path of a policy family, from full computation down, chosen on the fit split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adaptive.calibration import Trace
from adaptive.policies import Policy, exit_stages

#: How finely the knob is searched on the fit split.
GRID = 96
#: Predicted risks at which members are placed, in units of the promise.
_FIRST, _LAST = 0.4, 1.2


@dataclass(frozen=True)
class Path:
    """Knobs from safest to cheapest; the first never stops early.

    Parameters
    ----------
    knobs : tuple of float
    predicted : ndarray [n_members]
        Mean loss on the fit split along the full model's own text (a guess, not evidence).
    """

    knobs: tuple[float, ...]
    predicted: NDArray[np.float64]


def choose_path(
    policy: Policy,
    trace: Trace,
    *,
    risk: float,
    members: int,
    any_token: bool,
    seed: int = 0,
    batch_size: int = 1,
) -> Path:
    """Place members where their predicted risk is a given part of the promise.

    The test walks the path until the first failure, and every member it visits costs a real
    generation of the test split: a few members around the promise, not a fine grid.

    Parameters
    ----------
    policy : Policy
        Its rule's knob is what varies.
    trace : Trace
        Of the fit split.
    risk : float
        The promise.
    members : int
        At most this many, full computation not counted.
    any_token : bool
        Predict the share of units with any disagreement, not the share of tokens.
    seed : int
        Of the deployment, for rules that read noise.
    batch_size : int
        Units that decide together, for rules whose rows do.
    """
    knobs = policy.rule.knobs(trace, size=GRID)
    predicted = np.array(
        [
            _predicted(
                policy.member(knob), trace, any_token=any_token, seed=seed, batch_size=batch_size
            )
            for knob in knobs
        ]
    )
    return place_members(knobs, predicted, risk=risk, members=members)


def place_members(
    knobs: Sequence[float], predicted: NDArray[np.float64], *, risk: float, members: int
) -> Path:
    """Keep, of candidates from safest to cheapest, the cheapest within each part of the promise.

    Parameters
    ----------
    knobs : sequence of float
        The first never stops early.
    predicted : ndarray [n_knobs]
        Their mean loss on the fit split.
    risk, members
        As for :func:`choose_path`.
    """
    chosen = [0]
    for part in np.linspace(_FIRST, _LAST, members):
        cheapest = int(np.flatnonzero(predicted <= part * risk).max(initial=0))
        if cheapest > chosen[-1]:
            chosen.append(cheapest)
    return Path(tuple(knobs[i] for i in chosen), predicted[chosen])


def _predicted(
    policy: Policy, trace: Trace, *, any_token: bool, seed: int, batch_size: int
) -> float:
    """Mean loss of a member if the full model's text were its own."""
    wrong = token_losses(policy, trace, seed=seed, batch_size=batch_size)
    starts = np.concatenate(([0], np.cumsum(trace.lengths)[:-1]))
    sums = np.add.reduceat(wrong.astype(np.float64), starts)
    # the first token of a text is read off the prompt at full depth and is not in the trace
    return float(np.mean(sums > 0) if any_token else np.mean(sums / (trace.lengths + 1)))


def token_losses(
    policy: Policy, trace: Trace, *, seed: int = 0, batch_size: int = 1
) -> NDArray[np.bool_]:
    """Whether each token of a trace would differ from the full model's choice, ``[n_tokens]``."""
    stages = _stages(policy, trace, seed=seed, batch_size=batch_size)
    table = np.concatenate(
        [
            np.asarray(trace.losses["disagreement"], dtype=bool),
            np.zeros((trace.n_tokens, 1), dtype=bool),
        ],
        axis=1,
    )
    found: NDArray[np.bool_] = table[np.arange(trace.n_tokens), stages]
    return found


def _stages(policy: Policy, trace: Trace, *, seed: int, batch_size: int) -> NDArray[np.int64]:
    """Stage of each token; units that decide together are taken in the order of the trace."""
    if policy.scope == "row":
        return exit_stages(policy.rule, trace, stages=policy.stages, seed=seed)
    batches = (
        trace.select(np.arange(start, min(start + batch_size, trace.n_units)))
        for start in range(0, trace.n_units, batch_size)
    )
    parts = [exit_stages(policy.rule, part, stages=policy.stages, seed=seed) for part in batches]
    return np.concatenate(parts)
