"""One process and two give the same trace and the same certificate."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from adaptive import _distributed
from adaptive._distributed import from_first, gathered, process, processes, require_equal, share

#: Runs in every process: a trace and a calibration, everything measured replaced by depths.
WORKER = """
import hashlib, json, sys
from dataclasses import replace
from pathlib import Path
import numpy as np
import torch
import adaptive._bench, adaptive._classifier_bench, adaptive._collect
from adaptive import ExitTraining, calibrate, collect_trace, get_exits
from adaptive._distributed import process, processes
from adaptive._schedule_costs import ScheduleCosts
from adaptive.calibration import DeltaLedger
from adaptive.classifiers import collect_predictions
from transformers import AutoModelForCausalLM, BertConfig, BertForSequenceClassification

out, start = Path(sys.argv[1]), sys.argv[2]
if start == "accelerate":
    from accelerate import PartialState
    PartialState()

def seconds(model, units, policies, **_):
    assert process() == 0  # only the first process measures
    return np.arange(len(policies), 0, -1)[None] * 1e-3

def seconds_per_row(stages, inputs, policies, **_):
    return seconds(stages, inputs, policies)

def schedule_costs(model, exits, policy, **_):
    assert process() == 0
    return ScheduleCosts(np.arange(1.0, len(exits.layers) + 2), np.full(len(exits.layers), 0.01))

adaptive._bench.seconds_per_token = seconds
adaptive._bench.schedule_costs = schedule_costs
adaptive._classifier_bench.seconds_per_row = seconds_per_row
adaptive._collect.stage_seconds = lambda model, exits, **_: np.arange(1.0, len(exits.layers) + 2)

def loaded(exits):
    folder = out / ("with" if exits else "without")
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()

rng = np.random.default_rng(4)
prompts = [rng.integers(2, 97, size=int(n)).tolist() for n in rng.integers(3, 9, size=90)]
trace = collect_trace(loaded(True), prompts, new_tokens=7, batch_size=8, do_sample=True)
ledger = DeltaLedger.open(out / f"ledger-{processes()}.json")
policy = calibrate(
    loaded(True), prompts, 0.3, 0.1, mode="propagate", new_tokens=7, batch_size=8, ledger=ledger
)
model = loaded(False)
training = ExitTraining(rank=2, steps=10, new_tokens=6, slots=400, batch_size=8)
own = calibrate(model, prompts, 0.4, 0.2, mode="propagate", new_tokens=6, training=training)

torch.manual_seed(0)
config = BertConfig(vocab_size=97, hidden_size=16, intermediate_size=32, num_hidden_layers=4,
                    num_attention_heads=2, num_labels=3)
classifier = BertForSequenceClassification(config).eval()
inputs = {"input_ids": torch.from_numpy(rng.integers(2, 97, size=(230, 6)))}
judge = calibrate(classifier, inputs, 0.3, 0.2, batch_size=16, progress=False)
answers = collect_predictions(classifier, inputs, batch_size=16, progress=False)
judged = answers.scores.tobytes() + answers.losses["disagreement"].tobytes()

def plain(policy):
    found = policy.to_dict()
    found["certificate"].pop("created")
    found["certificate"]["split"].get("ledger", {}).pop("entry", None)
    return found

record = {
    "processes": processes(),
    "fingerprint": trace.fingerprint(),
    "units": trace.n_units,
    "created": policy.certificate.created,
    "holds": [policy.certificate.holds, judge.certificate.holds],
    "policies": [plain(policy), plain(own), plain(judge)],
    "answers": hashlib.sha256(judged).hexdigest(),
    "bookings": len(ledger.entries()),
}
(out / f"{processes()}-{process()}.json").write_text(json.dumps(record))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, saved_planted: Path, tools: Any) -> Path:
    """A model with exits, the same without, and a ledger for each number of processes."""
    from adaptive.calibration import DeltaLedger

    out = tmp_path_factory.mktemp("processes")
    tools.model().save_pretrained(out / "without")
    tools.model().save_pretrained(out / "with")
    for name in ("exits.json", "exits.safetensors"):
        (out / "with" / name).write_bytes((saved_planted / name).read_bytes())
    for count in (1, 2):
        DeltaLedger.create(out / f"ledger-{count}.json", budget=0.5)
    (out / "worker.py").write_text(WORKER)
    return out


def launch(folder: Path, count: int, start: str) -> list[dict[str, Any]]:
    """Run the worker as torchrun does, and return what every process found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-P", "-m", "torch.distributed.run", f"--nproc-per-node={count}"]
    command += [f"--master-port={port}", str(folder / "worker.py"), str(folder), start]
    if count == 1:
        command = [sys.executable, "-P", str(folder / "worker.py"), str(folder), start]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, env=env, timeout=280, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return [json.loads((folder / f"{count}-{i}.json").read_text()) for i in range(count)]


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    """What a single process finds."""
    return launch(folder, 1, "none")[0]


@pytest.mark.slow
def test_two_processes_find_the_same(folder: Path, alone: dict[str, Any]) -> None:
    pytest.importorskip("accelerate", reason="needs the extra `distributed`")
    assert alone["holds"] == [True, True]
    assert alone["units"] > 80
    found = launch(folder, 2, "accelerate")
    assert len(found) == 2
    for record in found:
        assert record["processes"] == 2
        assert record["fingerprint"] == alone["fingerprint"]
        assert record["policies"] == alone["policies"]
        assert record["answers"] == alone["answers"]
        assert record["bookings"] == 1  # not one per process
    assert len({record["created"] for record in found}) == 1


DIFFERENT = """
import os
import torch
from torch import distributed
from transformers import LlamaConfig, LlamaForCausalLM
from adaptive import attach_exits, collect_trace
from adaptive._distributed import ProcessesDifferError, from_first, process

distributed.init_process_group("gloo")
torch.manual_seed(0)
config = LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=3,
                     num_attention_heads=2, eos_token_id=None)
model = LlamaForCausalLM(config).eval()
attach_exits(model, (1,))
try:
    collect_trace(model, [[3, 4 + process()]], new_tokens=4)
except ProcessesDifferError as error:
    assert "the 2 processes differ in dataset" in str(error), error
else:
    raise SystemExit("nobody noticed")

class Odd(Exception):
    def __init__(self, a, b):
        super().__init__(a)

def fails(error):
    raise error

for error, kind in ((ValueError("no"), ValueError), (Odd("no", 1), (Odd, RuntimeError))):
    try:
        from_first(lambda: fails(error))
    except kind as caught:
        assert "no" in str(caught)
    else:
        raise SystemExit("the error stayed behind")
"""


@pytest.mark.slow
def test_different_data_and_errors_reach_every_process(tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(DIFFERENT)
    launcher = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, "--nproc-per-node=2", str(tmp_path / "worker.py")]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]


def test_one_process_has_all_the_work() -> None:
    assert (process(), processes()) == (0, 1)
    assert list(share(range(5))) == [0, 1, 2, 3, 4]
    assert gathered({1: "a"}) == {1: "a"}
    assert from_first(lambda: 3) == 3
    require_equal({"anything": 1})


@pytest.mark.parametrize("count", [2, 3, 7])
def test_every_batch_belongs_to_one_process(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_distributed, "processes", lambda: count)
    seen = []
    for index in range(count):
        monkeypatch.setattr(_distributed, "process", lambda index=index: index)
        seen += list(share(range(5)))
    assert sorted(seen) == [0, 1, 2, 3, 4]
