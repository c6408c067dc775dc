"""Tasks of the evaluation harness under a policy, on a tiny model and tiny tasks."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from adaptive import Exits, attach_exits, detach_exits, generate
from adaptive._exits import require_exits
from adaptive._families import layers_of
from adaptive.calibration import CertificateError
from adaptive.policies import Margin, Policy, Threshold

pytest.importorskip("lm_eval", reason="needs the extra `lm-eval`")
pytestmark = pytest.mark.filterwarnings("ignore")  # of the harness and its own dependencies

REQUESTS = [
    (("w4 w5 w6", "w7 w8 w9"), [4, 5, 6], [7, 8, 9]),
    (("w9", "w3"), [9], [3]),
    (("w2 w3 w4 w5", "w1 w2 w3 w4 w5"), [2, 3, 4, 5], [1, 2, 3, 4, 5]),
]


def language_model(model: Any, tokenizer: Any, policy: Any, **settings: Any) -> Any:
    from adaptive.integrations.lm_eval import AdaptiveLM

    return AdaptiveLM(model, policy, tokenizer=tokenizer, batch_size=2, device="cpu", **settings)


def plain_model(model: Any, tokenizer: Any) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(model, tokenizer=tokenizer, batch_size=2, device="cpu")


@pytest.mark.parametrize("mode", ["exact", "propagate", "verify"])
def test_full_depth_gives_the_full_models_likelihoods(
    helpers: Any, tokenizer: Any, mode: str
) -> None:
    model = helpers.shared("llama")
    found = language_model(model, tokenizer, helpers.never(mode))._loglikelihood_tokens(REQUESTS)
    plain = plain_model(model, tokenizer)._loglikelihood_tokens(REQUESTS, disable_tqdm=True)
    for (value, greedy), (other, other_greedy) in zip(found, plain, strict=True):
        assert value == pytest.approx(other, abs=1e-4)
        assert greedy == other_greedy


def test_likelihoods_are_those_of_the_exits_where_the_policy_stops(
    helpers: Any, tokenizer: Any
) -> None:
    """Against a walk in plain words over one full pass: exact mode keeps all keys and values."""
    model = helpers.shared("llama")
    policy = helpers.mixed(model, "exact")
    lm = language_model(model, tokenizer, policy)
    found = lm._loglikelihood_tokens(REQUESTS)
    exits, depths = require_exits(model).layers, []
    for (_, before, said), (value, greedy) in zip(REQUESTS, found, strict=True):
        seen: dict[int, torch.Tensor] = {}
        hooks = [
            layers_of(model)[layer - 1].register_forward_hook(
                lambda module, args, output, layer=layer, seen=seen: seen.update(
                    {layer: (output[0] if isinstance(output, tuple) else output)[0]}
                )
            )
            for layer in exits
        ]
        with torch.no_grad():
            full = model(input_ids=torch.tensor([before + said]), use_cache=False).logits[0]
        for hook in hooks:
            hook.remove()
        expected, best = 0.0, True
        for i, token in enumerate(said):
            slot = len(before) + i - 1
            logits, depth = full[slot], len(layers_of(model))
            for layer in exits if i > 0 else ():
                early = helpers.head(model, seen[layer][slot][None])[0]
                top = early.softmax(dim=-1).topk(2).values
                if float(top[0] - top[1]) >= policy.rule.threshold:
                    logits, depth = early, layer
                    break
            if i > 0:
                depths.append(depth)
            expected += float(logits.log_softmax(dim=-1)[token])
            best &= int(logits.argmax()) == token
        assert value == pytest.approx(expected, abs=1e-4)
        assert greedy is best
    assert lm.mean_depth == pytest.approx(sum(depths) / len(depths))
    assert len(set(depths)) > 1  # or the test would show nothing


def test_text_is_generated_under_the_policy(helpers: Any, tokenizer: Any) -> None:
    model = helpers.shared("llama")
    policy = helpers.mixed(model, "propagate")
    lm = language_model(model, tokenizer, policy)
    ids, mask = helpers.prompts()
    found = lm._model_generate(ids, attention_mask=mask, max_length=ids.shape[1] + 6, stop=["w999"])
    expected = generate(
        model,
        ids,
        attention_mask=mask,
        policy=policy,
        max_new_tokens=6,
        return_dict_in_generate=True,
    )
    assert torch.equal(found, expected.sequences)
    assert lm.mean_depth == pytest.approx(expected.mean_depth)
    assert 1 < lm.mean_depth < 6


def test_nothing_decoded_has_no_depth(helpers: Any, tokenizer: Any) -> None:
    lm = language_model(helpers.shared("llama"), tokenizer, helpers.never("exact"))
    assert lm.mean_depth != lm.mean_depth
    assert lm._loglikelihood_tokens([]) == []


@pytest.mark.slow
def test_whole_tasks_are_evaluated(helpers: Any, tokenizer: Any, tmp_path: Path) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    rows = [{"q": f"w{i} w{i + 1}", "a": f"w{i + 2}", "b": "w3"} for i in range(4, 9)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    common: dict[str, Any] = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": str(tmp_path / "rows.jsonl")},
        "test_split": "train",
        "doc_to_text": "{{q}}",
    }
    says = common | {
        "task": "says",
        "output_type": "generate_until",
        "doc_to_target": "{{a}}",
        "generation_kwargs": {"until": ["w999"], "max_gen_toks": 4, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    picks = common | {
        "task": "picks",
        "output_type": "multiple_choice",
        "doc_to_choice": "{{[a, b]}}",
        "doc_to_target": "0",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token = "w96"  # the harness ends answers with it
    model = helpers.tiny("llama", max_position_embeddings=64)
    tasks = [says, picks]
    manager = TaskManager(include_defaults=False)  # thousands of shipped tasks are not read
    limits = {"task_manager": manager, "bootstrap_iters": 0}
    results = [
        lm_eval.simple_evaluate(model=lm, tasks=tasks, **limits)["results"]
        for lm in (
            language_model(model, tokenizer, helpers.never("exact")),
            plain_model(model, tokenizer),
        )
    ]
    assert results[0].keys() == {"says", "picks"}
    for task, metric in (("says", "exact_match,none"), ("picks", "acc,none")):
        assert 0.0 <= results[0][task][metric] == results[1][task][metric] <= 1.0


def test_policy_and_exits_are_read_from_where_calibrate_writes_them(
    helpers: Any, tokenizer: Any, tmp_path: Path
) -> None:
    model = helpers.tiny("llama")
    exits = require_exits(model)
    policy = Policy(Margin(), Threshold(0.5), stages=(0, 2))
    policy.save_pretrained(tmp_path / "policy")
    exits.save_pretrained(tmp_path / "policy")
    exits.save_pretrained(tmp_path / "exits")
    detach_exits(model)
    lm = language_model(model, tokenizer, str(tmp_path / "policy"))
    assert lm.policy == policy
    assert require_exits(model).layers == exits.layers
    detach_exits(model)
    language_model(model, tokenizer, policy, exits=tmp_path / "exits")
    assert isinstance(require_exits(model), Exits)
    detach_exits(model)
    (tmp_path / "policy" / "exits.json").unlink()
    with pytest.raises(CertificateError, match="no exits in"):
        language_model(model, tokenizer, tmp_path / "policy")
    attach_exits(model, exits)


def test_the_harness_knows_the_name() -> None:
    from lm_eval.api.registry import get_model

    from adaptive.integrations.lm_eval import AdaptiveLM

    assert get_model("adaptive") is AdaptiveLM


def test_a_policy_is_not_changed_by_being_evaluated(helpers: Any, tokenizer: Any) -> None:
    policy = helpers.mixed(helpers.shared("llama"), "exact")
    lm = language_model(helpers.shared("llama"), tokenizer, policy)
    lm._loglikelihood_tokens(REQUESTS)
    assert lm.policy == replace(policy)
