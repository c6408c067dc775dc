"""Real generations of units under a policy, and the full model's word on each of their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from adaptive._collect import choices_along, full_states
from adaptive._deployment import Deployment
from adaptive._distributed import gathered, processes, require_equal, share
from adaptive._exits import Exits, get_exits
from adaptive._fingerprint import model_fingerprint
from adaptive._generate import generate
from adaptive._inputs import Units, batches
from adaptive._output import AdaptiveOutput
from adaptive._progress import bar
from adaptive._settings import exits_fingerprint
from adaptive._tier import Tier
from adaptive.policies import Policy, Saturation, Threshold


@dataclass(frozen=True)
class Run:
    """One unit's generated text and what was decided along it.

    Parameters
    ----------
    tokens : tuple of int
        Generated tokens, end of text included, padding not.
    stages : ndarray of int64 [n]
        Exit of each token; the number of exits for full depth.
    agreement : ndarray of int8 [n]
        1 where the full model chooses the same token after the same own prefix, 0 where not.
    """

    tokens: tuple[int, ...]
    stages: NDArray[np.int64]
    agreement: NDArray[np.int8]

    @property
    def disagreement(self) -> float:
        """Share of the tokens that differ from the full model's choice after the same prefix."""
        return float(np.mean(self.agreement == 0))


def full_depth(exits: Exits) -> Policy:
    """Return the policy that never stops early and whose checks cost nothing."""
    return Policy(Saturation(), Threshold(), stages=(len(exits.layers) - 1,))


def require_same_work(model: PreTrainedModel, units: Units) -> None:
    """Check that all processes were given the same, before they wait for each other's results.

    Raises
    ------
    ProcessesDifferError
        If not.
    """
    if processes() > 1:
        exits = get_exits(model)
        described = None if exits is None else exits_fingerprint(exits)
        require_equal({"model": model_fingerprint(model), "exits": described, "dataset": units.ids})


def run_units(
    model: PreTrainedModel,
    units: Units,
    policy: Policy,
    *,
    deployment: Deployment,
    labels: bool = True,
    tier: Tier | None = None,
    progress: bool = True,
    description: str = "generating",
) -> tuple[Run, ...]:
    """Generate every unit's text under a policy.

    Parameters
    ----------
    model : PreTrainedModel
        With exits.
    units : Units
    policy : Policy
    deployment : Deployment
    labels : bool
        Compare every token with the full model's choice after the same own prefix. In ``exact``
        mode settling gives the choices; in ``propagate`` mode one full-depth pass over the text.
    tier : {"native", "generic"}, optional
    progress : bool
    description : str
        Title of the progress bar.

    Returns
    -------
    tuple of Run
        In the order of the units.
    """
    bare = replace(policy, certificate=None)
    found: dict[int, Run] = {}
    ids = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    pad = deployment.prepared(model, ids, torch.ones_like(ids)).pad
    everyone = batches(units, size=deployment.batch_size, pad=pad, device=model.device)
    own = -(-len(units) // processes())
    with bar(total=own, desc=description, unit="unit", progress=progress) as shown:
        for index, ids, mask in share(everyone):
            output = generate(
                model,
                ids,
                attention_mask=mask,
                policy=bare,
                tier=tier,
                return_dict_in_generate=True,
                **deployment.arguments([units.ids[i] for i in index]),
            )
            assert isinstance(output, AdaptiveOutput)
            if labels and policy.mode == "propagate":
                names = [units.ids[i] for i in index]
                output.agreement = _agreement(model, output, ids, mask, names, deployment, tier)
            found.update(zip(map(int, index), _rows(output, ids.shape[1]), strict=True))
            shown.update(len(index))
    found = gathered(found)
    return tuple(found[i] for i in range(len(units)))


def _rows(output: AdaptiveOutput, prompt: int) -> list[Run]:
    assert output.exit_stages is not None
    assert output.agreement is not None
    rows = []
    stages, agreement = output.exit_stages.cpu().numpy(), output.agreement.cpu().numpy()
    for row, text in enumerate(output.sequences[:, prompt:].tolist()):
        n = int((stages[row] >= 0).sum())
        rows.append(Run(tuple(text[:n]), stages[row, :n], agreement[row, :n]))
    return rows


@torch.no_grad()
def _agreement(
    model: PreTrainedModel,
    output: AdaptiveOutput,
    ids: Tensor,
    mask: Tensor,
    names: Sequence[str],
    deployment: Deployment,
    tier: Tier | None,
) -> Tensor:
    """Compare a run with the full model's choices after the run's own prefixes, in one pass."""
    assert output.exit_stages is not None
    prompt, length = ids.shape[1], output.sequences.shape[1]
    agreement = torch.where(output.exit_stages >= 0, 1, -1).to(torch.int8)
    if length - prompt < 2:
        return agreement
    prepared = deployment.prepared(model, ids, mask)
    text = output.sequences[:, : length - 1]
    states, readout = full_states(model, text, mask, (), tier=tier)
    chooser = prepared.chooser(names, deployment.seed)
    chosen = choices_along(states[-1], readout, text, prompt, chooser)
    same = (chosen == output.sequences[:, prompt + 1 :]).to(torch.int8)
    agreement[:, 1:] = torch.where(output.exit_stages[:, 1:] >= 0, same, -1)
    return agreement
