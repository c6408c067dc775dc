"""The recipe for a Ray cluster, as the docs have it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from documents import ROOT, blocks, put_what_readers_bring
from transformers import AutoModelForCausalLM, AutoTokenizer

from adaptive import Trace, attach_exits, collect_trace, get_exits

pytest.importorskip("ray", reason="needs the extra `ray`")


@pytest.mark.slow
def test_the_recipe_gives_what_one_process_finds(tmp_path: Path) -> None:
    put_what_readers_bring(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "my-model")
    attach_exits(model, (1, 2))
    get_exits(model).save_pretrained(tmp_path / "my-policy")
    (recipe,) = [
        block.text for block in blocks(ROOT / "docs" / "ecosystem.md") if "import ray" in block.text
    ]
    before = "from pathlib import Path\n"
    before += "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
    before += "lines = Path('prompts.txt').read_text().splitlines()[:12]\n"
    script = before + recipe.replace("batch_size=64", "batch_size=6") + "merged.save('trace.npz')\n"
    (tmp_path / "recipe.py").write_text(script)
    command = [sys.executable, "-P", "recipe.py"]
    env = os.environ | {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    ran = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=280, check=False
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    merged = Trace.load(tmp_path / "trace.npz")
    lines = (tmp_path / "prompts.txt").read_text().splitlines()[:12]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "my-model")
    alone = collect_trace(model, lines, tokenizer=tokenizer, new_tokens=8, progress=False)
    assert sorted(merged.unit_ids) == sorted(alone.unit_ids)
    again = Trace.merge([alone])
    assert (merged.scores == again.scores).mean() > 0.9  # batches differ, and with them roundings
