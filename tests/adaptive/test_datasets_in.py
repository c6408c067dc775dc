"""The verbs take datasets and loaders, and find in them what they find in lists."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from adaptive import ExitTraining, calibrate, collect_trace, train_exits
from adaptive._settings import exits_fingerprint

datasets = pytest.importorskip("datasets")
SMALL = ExitTraining(rank=2, steps=4, new_tokens=4, slots=100, batch_size=16)


def padded(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    """One left-padded batch with its mask, as a collator of tokenised prompts makes it."""
    longest = max(map(len, rows))
    ids = [[0] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


@pytest.fixture(scope="module")
def prompts(tools: SimpleNamespace) -> list[list[int]]:
    found: list[list[int]] = tools.prompts(80, seed=4, longest=7)
    return found


def forms(prompts: list[list[int]]) -> list[tuple[Any, dict[str, Any]]]:
    """The same prompts in other containers, and the arguments that go with them."""
    loader = DataLoader(prompts, batch_size=9, collate_fn=padded)  # type: ignore[arg-type]
    return [
        (datasets.Dataset.from_dict({"asked": prompts}), {"column": "asked"}),
        (datasets.Dataset.from_dict({"input_ids": prompts}), {}),
        (loader, {}),
    ]


def test_training(tools: SimpleNamespace, prompts: list[list[int]]) -> None:
    settings: dict[str, Any] = {"layers": (1, 3), "training": SMALL, "progress": False}
    expected = train_exits(tools.model(), prompts[:12], **settings)
    for dataset, how in forms(prompts[:12]):
        found = train_exits(tools.model(), dataset, **settings, **how)
        assert found.record.units == expected.record.units
        assert exits_fingerprint(found) == exits_fingerprint(expected)


def test_traces(planted: Any, prompts: list[list[int]]) -> None:
    expected = collect_trace(planted, prompts[:12], new_tokens=4, progress=False)
    for dataset, how in forms(prompts[:12]):
        found = collect_trace(planted, dataset, new_tokens=4, progress=False, **how)
        assert found.unit_ids == expected.unit_ids
        assert np.array_equal(found.scores, expected.scores)


def test_calibration(
    planted: Any, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "adaptive._bench.seconds_per_token",
        lambda model, units, policies, **_: np.arange(len(policies), 0, -1.0)[None],
    )
    settings: dict[str, Any] = {"risk": 0.4, "delta": 0.2, "new_tokens": 4, "progress": False}
    settings |= {"mode": "propagate", "members": 3, "batch_size": 16}
    expected = calibrate(planted, prompts, **settings)
    for dataset, how in forms(prompts):
        found = calibrate(planted, dataset, **settings, **how)
        assert found.rule == expected.rule
        assert found.certificate.fingerprints == expected.certificate.fingerprints
        assert found.certificate.split["test_units"] == expected.certificate.split["test_units"]
