"""One decode step, taken apart: operators, their time, and what the host reads of the device.

    python tests/benchmarks/profile_step.py             # 24 layers, CPU
    python tests/benchmarks/profile_step.py --table     # the kept figures

Counts and times per token are those of a call with 33 tokens less those of a call with one, over
32: what the prompt, the checks of the arguments and the end of a call take is not in them. Times
are torch's profiler's own time of each operator, slower than without a profiler, the share of each
counts. A host read is a value of a tensor that Python asks for (`bool`, `item`, `tolist`, `cpu`):
on a device each waits for all that was queued.
"""

from __future__ import annotations

import functools
import json
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from workshop import PATTERNS, Prescribed, build, command_line, stamp

from adaptive import generate
from adaptive._tier import executor_for
from adaptive.policies import NoScore, Policy, ProbeScore, Threshold

TOKENS = 32
READS = ("__bool__", "__int__", "__float__", "__index__", "item", "tolist", "cpu", "numpy")
#: Operators by what they do; views and shapes, which compute nothing, are "no arithmetic".
KINDS = {
    "products": ("mm", "addmm", "bmm", "baddbmm", "linear", "matmul"),
    "attention": ("scaled_dot_product", "softmax", "flash"),
    "no arithmetic": (
        *("view", "reshape", "transpose", "permute", "slice", "select", "unsqueeze", "expand"),
        *("as_strided", "empty", "unflatten", "flatten", "narrow", "alias", "detach", "split"),
        *("squeeze", "unbind", "chunk", "resolve_conj", "resolve_neg", "numpy_T", "_to_copy"),
        *("is_nonzero", "item", "_local_scalar_dense", "lift_fresh", "to", "contiguous", "t"),
        *("_unsafe_view", "_reshape_alias", "result_type", "resize_", "broadcast_tensors"),
    ),
}


@contextmanager
def reads(found: Counter[str]) -> Iterator[None]:
    """Count where Python asks for values of tensors: the line of ours, or of transformers."""
    own = {name: getattr(torch.Tensor, name) for name in READS}

    def counting(name: str) -> Callable[..., Any]:
        def read(*args: Any, **kwargs: Any) -> Any:
            stack = traceback.extract_stack(limit=8)[:-1]
            frames = [f for f in stack if "/torch/" not in f.filename]
            line = frames[-1] if frames else stack[-1]
            found[f"{'/'.join(Path(line.filename).parts[-2:])}: {line.line}"] += 1
            return own[name](*args, **kwargs)

        return read

    for name in READS:
        setattr(torch.Tensor, name, counting(name))
    try:
        yield
    finally:
        for name, method in own.items():
            setattr(torch.Tensor, name, method)


def kind_of(operator: str) -> str:
    """What an operator does."""
    name = operator.removeprefix("aten::")
    for kind, names in KINDS.items():
        if name in names or (kind == "attention" and any(part in name for part in names)):
            return kind
    return "element by element"


def operators(work: Callable[[], Any]) -> tuple[Counter[str], Counter[str]]:
    """Calls and microseconds of every operator."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        work()
    calls: Counter[str] = Counter()
    spent: Counter[str] = Counter()
    for event in profiler.key_averages():
        if event.key.startswith("aten::"):
            calls[event.key] += event.count
            spent[event.key] += event.self_cpu_time_total
    return calls, spent


def step(call: Callable[[int], Any]) -> dict[str, Any]:
    """Take a step apart; ``call`` makes a text of so many tokens."""
    call(TOKENS + 1)
    seen: dict[int, Counter[str]] = {}
    for tokens in (1, TOKENS + 1):
        seen[tokens] = Counter()
        with reads(seen[tokens]):
            call(tokens)
    few, many = (operators(functools.partial(call, tokens)) for tokens in (1, TOKENS + 1))
    calls = {name: (count - few[0][name]) / TOKENS for name, count in many[0].items()}
    spent = {name: max(0.0, us - few[1][name]) / TOKENS for name, us in many[1].items()}
    whole = sum(spent.values())
    where = {at: (count - seen[1][at]) / TOKENS for at, count in seen[TOKENS + 1].items()}
    kinds: Counter[str] = Counter()
    kind_calls: Counter[str] = Counter()
    for name, us in spent.items():
        kinds[kind_of(name)] += us / whole
        kind_calls[kind_of(name)] += calls[name]
    return {
        "operators": sum(calls.values()),
        "host_reads": sum(where.values()),
        "read_where": {at: n for at, n in sorted(where.items(), key=lambda kv: -kv[1]) if n > 0},
        "kinds": {
            kind: {"calls": kind_calls[kind], "share": share} for kind, share in kinds.items()
        },
        "top": [
            {"name": name, "calls": calls[name], "us": us, "share": us / whole}
            for name, us in sorted(spent.items(), key=lambda pair: -pair[1])[:16]
        ],
    }


def table(report: dict[str, Any]) -> str:
    """The figures as they stand in the docs."""
    steps = report["steps"]
    kinds = ("products", "attention", "element by element", "no arithmetic")
    lines = [
        "| step | operators | host reads | "
        + " | ".join(f"{kind}: calls, share of time" for kind in kinds)
        + " |",
        "|---|---|---|" + "---|" * len(kinds),
    ]
    for name, found in steps.items():
        cells = [
            f"{found['kinds'][kind]['calls']:.0f}, {found['kinds'][kind]['share']:.1%}"
            for kind in kinds
        ]
        lines.append(
            f"| {name} | {found['operators']:.0f} | {found['host_reads']:.2f} | "
            + " | ".join(cells)
            + " |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = command_line(__doc__, out="profile_step.json", rows=1)
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(options.out.read_text())))
        return
    torch.set_num_threads(options.threads)
    model = build(options)
    executor_for(model)
    shape = (options.rows, options.prompt)
    ids = torch.randint(2, options.vocabulary, shape, device=options.device)
    common: dict[str, Any] = {"do_sample": False, "attention_mask": torch.ones_like(ids)}
    rule = Prescribed(PATTERNS["four depths mixed"])
    policies = {"full depth": Policy(NoScore(), Threshold(), stages=(2,))} | {
        f"three exits, `{mode}`": Policy(ProbeScore(), rule, stages=(0, 1, 2), mode=mode)
        for mode in ("propagate", "exact", "verify")
    }

    def under(policy: Policy) -> Callable[[int], Any]:
        return lambda tokens: generate(model, ids, policy=policy, max_new_tokens=tokens, **common)

    calls: dict[str, Callable[[int], Any]] = {
        "`model.generate`": lambda tokens: model.generate(ids, max_new_tokens=tokens, **common)
    }
    calls |= {name: under(policy) for name, policy in policies.items()}
    report: dict[str, Any] = stamp(options) | {"steps": {}}
    for name, call in calls.items():
        found = report["steps"][name] = step(call)
        print(f"{name}: {found['operators']:.1f} operators, {found['host_reads']:.2f} host reads")
        for at, count in found["read_where"].items():
            print(f"    {count:6.2f} reads  {at}")
        for row in found["top"]:
            print(f"    {row['share']:6.1%} {row['calls']:8.2f} calls  {row['name']}")
    options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
