"""Real generations of units under a policy, and the full model's word on each of their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from adaptive._deployment import Deployment
from adaptive._distributed import gathered, processes, require_equal, share
from adaptive._exits import Exits, get_exits
from adaptive._fingerprint import model_fingerprint
from adaptive._full_depth import agreement_along
from adaptive._generate import generate
from adaptive._inputs import Units, batches
from adaptive._output import AdaptiveOutput
from adaptive._progress import bar
from adaptive._run import Run
from adaptive._settings import exits_fingerprint
from adaptive._tier import Tier
from adaptive.policies import Policy, Saturation, Threshold


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


def full_depth_texts(
    model: PreTrainedModel,
    units: Units,
    exits: Exits,
    *,
    deployment: Deployment,
    tier: Tier | None = None,
    progress: bool = True,
    description: str = "full-depth text",
) -> list[tuple[int, ...]]:
    """Generate the full model's own text of every unit, by the loop that runs policies.

    Parameters
    ----------
    exits : Exits
        Of the model.
    model, units, deployment, tier, progress, description
        As for :func:`run_units`.

    Returns
    -------
    list of tuple of int
        Generated tokens, in the order of the units.
    """
    runs = run_units(
        model,
        units,
        replace(full_depth(exits), mode="propagate"),  # nothing is skipped, so nothing is settled
        deployment=deployment,
        labels=False,
        tier=tier,
        progress=progress,
        description=description,
    )
    return [run.tokens for run in runs]


def _rows(output: AdaptiveOutput, prompt: int) -> list[Run]:
    assert output.exit_stages is not None
    assert output.agreement is not None
    assert output.exit_scores is not None
    rows = []
    stages, agreement = output.exit_stages.cpu().numpy(), output.agreement.cpu().numpy()
    scores = output.exit_scores.cpu().numpy()
    for row, text in enumerate(output.sequences[:, prompt:].tolist()):
        n = int((stages[row] >= 0).sum())
        rows.append(Run(tuple(text[:n]), stages[row, :n], agreement[row, :n], scores[row, :n]))
    return rows


def _agreement(
    model: PreTrainedModel,
    output: AdaptiveOutput,
    ids: Tensor,
    mask: Tensor,
    names: Sequence[str],
    deployment: Deployment,
    tier: Tier | None,
) -> Tensor:
    """Compare a run with the full model's choices after the run's own prefixes."""
    assert output.exit_stages is not None
    chooser = deployment.prepared(model, ids, mask).chooser(names, deployment.seed)
    return agreement_along(
        model, output.sequences, mask, stages=output.exit_stages, chooser=chooser, tier=tier
    )
