"""Any task of lm-evaluation-harness, run under a policy.

In Python, pass a model to ``lm_eval.simple_evaluate``::

    lm = AdaptiveLM("my-model", policy="my-policy")
    results = lm_eval.simple_evaluate(model=lm, tasks=["gsm8k"])

On the command line this module is ``lm_eval`` with one more model, ``adaptive``::

    python -m adaptive.integrations.lm_eval run --model adaptive \
        --model_args pretrained=my-model,policy=my-policy --tasks gsm8k

Needs ``pip install 'adaptive-control[lm-eval]'``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from adaptive._display_depth import depths_of
from adaptive._exits import attach_exits, get_exits
from adaptive._generate import generate
from adaptive._output import AdaptiveOutput
from adaptive._progress import bar
from adaptive.calibration._extras import optional
from adaptive.policies import Policy

optional("lm_eval")
from lm_eval.api.registry import register_model  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

__all__ = ["AdaptiveLM"]

#: (context and continuation as text, tokens of the context, tokens of the continuation)
Request = tuple[tuple[str, str], list[int], list[int]]


@register_model("adaptive")
class AdaptiveLM(HFLM):
    """A causal language model of transformers that decodes under a policy.

    Generation tasks generate under the policy. Likelihood tasks make the policy's own decoding loop
    say the given continuation: the first token is read at full depth, every later one at the exit
    where the policy stops, with the keys and values that its mode leaves behind.

    Parameters
    ----------
    pretrained : str or PreTrainedModel
        As for ``HFLM``.
    policy : Policy, str or Path
        A policy, or where it was saved: a directory, or a repository on the hub.
    exits : str or Path, optional
        Where exits were saved, if they do not lie beside the model.
    certified : bool
        ``True`` refuses tasks outside what the certificate was earned under, such as longer
        texts. An evaluation measures, so by default it goes on.
    **settings
        As for ``HFLM`` (``batch_size``, ``device``, ``dtype``, ``tokenizer``, ...).

    Attributes
    ----------
    policy : Policy

    Notes
    -----
    Likelihoods cost one decoding step per token of a continuation, not one pass. In ``verify``
    mode the text is the full model's, and so are its likelihoods, in one pass.
    """

    def __init__(
        self,
        pretrained: Any,
        policy: Policy | str | Path,
        *,
        exits: str | Path | None = None,
        certified: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(pretrained, backend="causal", **settings)
        self.policy = policy if isinstance(policy, Policy) else Policy.from_pretrained(policy)
        self._certified = certified
        self._layers, self._tokens = 0.0, 0
        if exits is not None:
            attach_exits(self.model, exits)
        elif get_exits(self.model) is None and not isinstance(policy, Policy):
            attach_exits(self.model, policy)  # `adaptive calibrate` writes both into one folder

    @property
    def mean_depth(self) -> float:
        """Mean number of layers behind the tokens decoded so far, NaN before any."""
        return self._layers / self._tokens if self._tokens else float("nan")

    def _model_generate(self, context: Tensor, *args: Any, **settings: Any) -> Tensor:
        output = super()._model_generate(
            context,
            *args,
            custom_generate=generate,
            policy=self.policy,
            certified=self._certified,
            return_dict_in_generate=True,
            **settings,
        )
        self._count(_stages(output)[:, 1:])
        return output.sequences

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        if self.policy.mode == "verify":
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        size = override_bs or (self.batch_size if isinstance(self.batch_size, int) else 1)
        order = np.argsort([-len(request[2]) for request in requests], kind="stable")
        found: dict[int, tuple[float, bool]] = {}
        with bar(total=len(order), desc="likelihoods", progress=not disable_tqdm) as shown:
            for start in range(0, len(order), size):
                index = [int(i) for i in order[start : start + size]]
                answers = self._said([requests[i] for i in index])
                found.update(zip(index, answers, strict=True))
                shown.update(len(index))
        for i, answer in found.items():
            if requests[i][0] is not None:
                self.cache_hook.add_partial("loglikelihood", requests[i][0], answer)
        return [found[i] for i in range(len(requests))]

    def _said(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether it is the greedy one."""
        longest = max(len(said) for _, _, said in requests)
        contexts = [before[-max(1, self.max_length - len(said)) :] for _, before, said in requests]
        width = max(map(len, contexts))
        ids = torch.zeros(len(requests), width, dtype=torch.int64, device=self.device)
        mask, wanted = torch.zeros_like(ids), torch.zeros(len(requests), longest, dtype=torch.int64)
        for row, (context, (_, _, said)) in enumerate(zip(contexts, requests, strict=True)):
            ids[row, width - len(context) :] = torch.tensor(context)
            mask[row, width - len(context) :] = 1
            wanted[row, : len(said)] = torch.tensor(said)
        wanted = wanted.to(self.device)
        output = generate(
            self.model,
            ids,
            attention_mask=mask,
            policy=self.policy,
            certified=self._certified,
            logits_processor=LogitsProcessorList([_Say(wanted, width)]),
            max_new_tokens=longest,
            do_sample=False,
            eos_token_id=[],
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
        lengths = torch.tensor([len(said) for _, _, said in requests], device=self.device)
        beyond = torch.arange(longest, device=self.device) >= lengths[:, None]
        self._count(_stages(output).masked_fill(beyond, -1)[:, 1:])
        assert isinstance(output, AdaptiveOutput)
        logits = torch.stack(output.logits, dim=1)  # [batch, longest, vocabulary]
        logs = logits.log_softmax(dim=-1).gather(-1, wanted[..., None])[..., 0]
        greedy = logits.argmax(dim=-1) == wanted
        return [
            (float(logs[row, :n].sum()), bool(greedy[row, :n].all()))
            for row, n in enumerate(len(said) for _, _, said in requests)
        ]

    def _count(self, stages: Tensor) -> None:
        """Add exits of tokens to the mean depth; negative ones are no tokens."""
        depths = torch.tensor(depths_of(self.model), dtype=torch.float64, device=stages.device)
        kept = stages[stages >= 0]
        self._layers += float(depths[kept].sum())
        self._tokens += kept.numel()


def _stages(output: Any) -> Tensor:
    """Exit of every token; the first of a text belongs to its prompt's own pass."""
    assert isinstance(output, AdaptiveOutput)
    assert output.exit_stages is not None
    return output.exit_stages


class _Say(LogitsProcessor):
    """Lets each row say a given continuation.

    Parameters
    ----------
    wanted : Tensor, int64 [batch, n]
    prompt : int
        Slots of the prompt.
    """

    is_pure: ClassVar[bool] = True

    def __init__(self, wanted: Tensor, prompt: int) -> None:
        self._wanted = wanted
        self._prompt = prompt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Leave one token per row, whatever the scores are."""
        place = input_ids.shape[1] - self._prompt
        said = torch.full_like(scores, float("-inf"))
        return said.scatter(1, self._wanted[:, place, None], 0.0)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
