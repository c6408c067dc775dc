"""One environment for every test: one thread, no network, fixed seeds."""

from __future__ import annotations

import os
import random
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TQDM_DISABLE"] = "1"

import numpy as np
import pytest
from hypothesis import settings

settings.register_profile("adaptive", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("adaptive")

SEED = 20_260_101


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    """Nothing should draw from the global generators; what does, draws the same each time."""
    random.seed(SEED)
    np.random.seed(SEED)  # noqa: NPY002
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(SEED)


@pytest.fixture
def rng() -> np.random.Generator:
    """A seeded generator, new for each test."""
    return np.random.default_rng(SEED)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs CUDA where there is none, without importing torch for the rest."""
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu:
            item.add_marker(pytest.mark.skip(reason="needs CUDA"))
