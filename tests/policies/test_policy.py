"""The policy as a whole: composition, files, what is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from adaptive.calibration import CertificateError, InvalidArgumentError
from adaptive.policies import (
    FEATURES,
    AllOf,
    Features,
    LogitMargin,
    Margin,
    MaxProbability,
    MovingMean,
    Patience,
    Policy,
    ProbeScore,
    SampledExit,
    Threshold,
    members,
)


def test_composition_says_what_it_reads() -> None:
    policy = Policy(MovingMean(Margin(pruned=True), 0.5), AllOf((Threshold(), Patience(2))), (0, 1))
    assert policy.needs == {"pruned_logits", "answer"}
    assert policy.scope == "row"
    assert Policy(ProbeScore(), SampledExit(), (0,)).needs <= FEATURES


def test_members_are_uncertified_and_differ_by_the_knob() -> None:
    policy = Policy(ProbeScore(), Threshold(), stages=(0, 2))
    first, second = members(policy, (math.inf, 0.5))
    assert first == policy
    assert second == replace(policy, rule=Threshold(0.5))
    assert second.certificate is None


def test_state_of_score_and_rule_stay_apart() -> None:
    policy = Policy(MovingMean(ProbeScore(), 0.5), Threshold(0.7), stages=(0,))
    state = policy.init(2, device=torch.device("cpu"))
    assert set(state) == {"score.mean", "rule.knob"}
    features = Features(
        stage=0, position=torch.zeros(2, dtype=torch.int64), probe=torch.tensor([3.0, -3.0])
    )
    stop, score, state = policy.update(features, state)
    assert stop.tolist() == [True, False]
    torch.testing.assert_close(score, torch.sigmoid(torch.tensor([3.0, -3.0])))
    assert not state["score.mean"].isnan().any()
    assert policy.advance(state)["score.mean"].isnan().all()


@pytest.mark.parametrize("stages", [(), (1, 1), (2, 1), (-1, 0)])
def test_stages_are_checked(stages: tuple[int, ...]) -> None:
    with pytest.raises(InvalidArgumentError, match="`stages`"):
        Policy(ProbeScore(), Threshold(), stages=stages)


def test_a_threshold_above_every_score_is_refused() -> None:
    """EE-LLM's server fills in 40 for a probability and then never exits, without a word."""
    with pytest.raises(InvalidArgumentError, match="at most 1, the largest MaxProbability, or inf"):
        Policy(MaxProbability(), Threshold(40.0), stages=(0,))
    Policy(LogitMargin(), Threshold(40.0), stages=(0,))
    for threshold in (-1.0, 1.0, math.inf):
        Policy(MovingMean(MaxProbability(), 0.5), Threshold(threshold), stages=(0,))


def test_mode_is_checked() -> None:
    with pytest.raises(InvalidArgumentError, match="one of exact, propagate, verify"):
        Policy(ProbeScore(), Threshold(), stages=(0,), mode="fast")  # type: ignore[arg-type]


def test_files(tmp_path: Path) -> None:
    policy = Policy(ProbeScore(), Threshold(), stages=(0, 3), mode="propagate")
    path = policy.save_pretrained(tmp_path / "new")
    assert json.loads(path.read_text())["rule"]["threshold"] == "inf"
    assert Policy.from_pretrained(tmp_path / "new") == Policy.from_pretrained(path) == policy
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["policy.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a policy file"),
        ("[]", "schema 'list'"),
        ('{"schema": 99}', "schema 99 is not readable"),
        ('{"schema": 1}', "the policy file is damaged"),
        ('{"schema": 1, "certificate": null, "score": {"type": "Nothing"}}', "one of .*ProbeScore"),
    ],
)
def test_damaged_files_are_described(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "policy.json").write_text(text)
    with pytest.raises((CertificateError, InvalidArgumentError), match=message):
        Policy.from_pretrained(tmp_path)


def test_a_missing_file_is_described(tmp_path: Path) -> None:
    with pytest.raises(CertificateError, match="no policy at"):
        Policy.from_pretrained(tmp_path)
