"""Products of few rows on a CPU: ours beside ``F.linear``, over the weights of some layers.

    python tests/benchmarks/bench_product.py             # one thread, CPU time
    python tests/benchmarks/bench_product.py --threads 2 # wall time
    python tests/benchmarks/bench_product.py --table     # the table of docs/benchmarks.md

Layers are those of a Llama (``--width``), more of them than a cache holds; the head is a product
with ``--vocabulary`` rows.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from workshop import Clock, command_line, ratio, rounds, shown, stamp

from adaptive._product import product

ROWS = (1, 2, 4, 6, 7, 8, 12, 13, 16, 24, 31, 32, 64, 128)

Form = Callable[[Tensor, Tensor, None], Tensor]


def weights(width: int, layers: int, vocabulary: int) -> dict[str, list[Tensor]]:
    """Weights of the layers, fused as they are run, and of the head."""
    inner = width * 8 // 3
    shapes = ((2 * width, width), (width, width), (inner, width), (inner, width), (width, inner))
    return {
        "layers": [torch.randn(shape) for _ in range(layers) for shape in shapes],
        "head": [torch.randn(vocabulary, width)],
    }


def run(form: Form, states: dict[int, Tensor], matrices: list[Tensor]) -> None:
    """Form every product once."""
    for weight in matrices:
        form(states[weight.shape[1]], weight, None)


@torch.no_grad()
def main() -> None:
    parser = command_line(__doc__, out="product.json", rounds=15)
    options = parser.parse_args()
    report: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    if options.table:
        print(table(report))
        return
    torch.set_num_threads(options.threads)
    clock = Clock("cpu")
    found: dict[str, Any] = {}
    for name, matrices in weights(options.width, 8, options.vocabulary).items():
        for count in ROWS:
            states = {width: torch.randn(count, width) for width in {w.shape[1] for w in matrices}}
            forms: dict[str, Form] = {"F.linear": F.linear, "product": product}
            variants = {key: partial(run, form, states, matrices) for key, form in forms.items()}
            times = rounds(variants, count=options.rounds, clock=clock)
            found.setdefault(name, {})[str(count)] = ratio(times["F.linear"], times["product"])
            print(f"    {name}, {count} rows: {shown(found[name][str(count)])}")
    report[f"{options.threads} threads"] = found | stamp(options)
    options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def table(report: dict[str, Any]) -> str:
    """Markdown table of the results."""
    columns = [(threads, part) for threads in report for part in ("layers", "head")]
    lines = [
        "| rows | " + " | ".join(f"{part}, {threads}" for threads, part in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for count in map(str, ROWS):
        cells = [shown(report[threads][part][count]) for threads, part in columns]
        lines.append(f"| {count} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
