"""What the package brings along to try things on: a small model, and prompts it has not read.

The model (2.9 million parameters, 12 layers, exits after layers 2, 4 and 7) was trained on a part
of the Python standard library; the prompts are first lines of functions of the part that was held
out. It is an ordinary model directory, and a subject for measurement, not a tool for writing code.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from adaptive._stdlib import held_out_functions
from adaptive.calibration import InvalidArgumentError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["POOL", "SHIPPED", "load_model", "load_prompts"]

#: Directory of the shipped model, as `from_pretrained` takes it.
SHIPPED = Path(__file__).parent / "shipped"
#: Where the prompts are drawn from, for `calibrate(pool=...)`.
POOL = "functions of held-out modules of the Python standard library"


def load_model() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the shipped model, in float32, and its tokenizer.

    Returns
    -------
    model : PreTrainedModel
        Its trained exits are found beside it.
    tokenizer : PreTrainedTokenizerBase
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not (SHIPPED / "model.safetensors").is_file():
        raise InvalidArgumentError("model", str(SHIPPED), "an installation with the shipped model")
    model = AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(SHIPPED)


def load_prompts(n: int, *, rng: int = 0, longest: int = 16) -> list[str]:
    """First lines of ``n`` functions of held-out modules of the running Python's library.

    Parameters
    ----------
    n : int
        Number of prompts, all different.
    rng : int
        Seed of the draw. Slices of one draw are disjoint: calibrate on one, check on another.
    longest : int
        Largest number of lines of the functions that the prompts are cut from, at least 5.

    Returns
    -------
    list of str

    Raises
    ------
    InvalidArgumentError
        If there are fewer than ``n``.

    Notes
    -----
    Functions of one module are alike. As units they are independent only as random draws from this
    named pool, so pass ``pool=POOL`` to `calibrate`, and the certificate says so.

    Examples
    --------
    >>> load_prompts(2, rng=5) == load_prompts(3, rng=5)[:2]
    True
    """
    generator = np.random.default_rng(rng)
    found = held_out_functions(n, rng=generator, maximum_lines=longest)
    return [prompt.text for prompt in found]
