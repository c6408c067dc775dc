"""A monitored run on the shipped model, live: every unit is generated when it comes.

    python tests/benchmarks/monitor_live.py --out FOLDER --lives 3     # about 10 minutes per life
    python tests/benchmarks/monitor_live.py --out FOLDER --report      # table and picture

One policy is calibrated on Python functions. Then, in every life, prompts are put to
``generate(..., monitor=)`` four at a time: Python, then English prose until the alarm and 100 units
longer, then Python again until the monitor is content and 100 units longer. Prompts are not used
twice, nor are the calibration's. What readers were given is judged apart from the library: one pass
of the bare model over every delivered text, whether or not the monitor saw a label.

A life may be killed at any point and goes on where its journal ends.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monitor_records import LONGEST_PROMPT, NEW_TOKENS, POOL, RISK, SCORES, traffic
from monitor_shipped import AUDITS, PICTURE, save, summary

from adaptive import calibrate, generate
from adaptive._exits import require_exits
from adaptive._monitor_journal import read_journal
from adaptive.displays import MonitorDisplay
from adaptive.examples import load_model
from adaptive.monitoring import Event, Monitor
from adaptive.policies import Policy, Threshold

ROWS, QUIET, MOST, LONGER, TAIL = 4, 200, 1500, 100, 100
DELTA = 0.05


def policy_of(model: Any, tokenizer: Any, prompts: list[str], folder: Path) -> Policy:
    """The policy of all lives, calibrated once."""
    if not (folder / "policy.json").exists():
        stages = tuple(range(len(require_exits(model).layers)))
        calibrate(
            model,
            prompts,
            RISK,
            DELTA,
            policy=Policy(SCORES["saturation"], Threshold(), stages=stages, mode="propagate"),
            pool=POOL,
            new_tokens=NEW_TOKENS,
            batch_size=ROWS,
            members=6,
            tokenizer=tokenizer,
            progress=False,
        ).save_pretrained(folder)
    return Policy.from_pretrained(folder)


def kind_of(finished: int, events: list[Event]) -> str | None:
    """Traffic of the unit that comes next; ``None`` at the end of a life."""
    alarm = _first(events, "alarm", QUIET)
    if finished < QUIET:
        return "python"
    if alarm is None:
        return "prose" if finished < QUIET + MOST else None
    if finished < alarm + LONGER:
        return "prose"
    clear = _first(events, "clear", alarm + LONGER)
    end = alarm + LONGER + MOST if clear is None else clear + TAIL
    return "python" if finished < end else None


def _first(events: list[Event], kind: str, after: int) -> int | None:
    return next((e.finished for e in events if e.kind == kind and e.finished > after), None)


def live(
    model: Any, tokenizer: Any, policy: Policy, kinds: dict[str, list[str]], life: Path, audits: str
) -> None:
    """Live a life, or the rest of it."""
    seed = int(life.name.rsplit("-", 1)[1])
    rng = np.random.default_rng([20261128, seed])
    order = {kind: rng.permutation(len(texts)) for kind, texts in sorted(kinds.items())}
    life.mkdir(parents=True, exist_ok=True)
    journal, given = life / "journal.jsonl", life / "given.jsonl"
    events = _events(journal) if journal.exists() else []
    with Monitor.for_policy(
        policy, journal=journal, audits=AUDITS[audits], seed=seed, on_event=events.append
    ) as monitor:
        while (kind := kind_of(monitor.state.finished, events)) is not None:
            first, texts = monitor.state.finished, kinds[kind]
            chosen = [texts[order[kind][(first + i) % len(texts)]] for i in range(ROWS)]
            inputs = tokenizer(
                chosen, return_tensors="pt", padding=True, return_token_type_ids=False
            )
            start = time.process_time()
            output = generate(
                model,
                **inputs,
                policy=policy,
                monitor=monitor,
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                return_dict_in_generate=True,
            )
            spent = time.process_time() - start
            lines = [
                {
                    "number": seen.unit.number,
                    "kind": kind,
                    "status": seen.unit.status,
                    "inside": seen.inside,
                    "loss": loss,
                    "depth": seen.unit.depth,
                    "seconds": round(spent / ROWS, 4),
                }
                for seen, loss in zip(
                    output.monitored, delivered(model, inputs, output.sequences), strict=True
                )
            ]
            with given.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)


def _events(journal: Path) -> list[Event]:
    return [Event.from_dict(e) for line in read_journal(journal) for e in line.get("events", ())]


@torch.no_grad()
def delivered(model: Any, inputs: Any, sequences: torch.Tensor) -> list[float]:
    """Share of each row's new tokens that the bare model would not have chosen there."""
    begin = inputs["input_ids"].shape[1]
    new = sequences[:, begin:]
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(new)], dim=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=sequences, attention_mask=mask, position_ids=positions).logits
    wrong = logits[:, begin - 1 : -1].argmax(-1) != new
    end = model.generation_config.eos_token_id
    ended = (new == end) if end is not None else torch.zeros_like(wrong)
    own = (ended.cumsum(1) - ended.long()) == 0
    return ((wrong & own).sum(1) / own.sum(1)).tolist()


def facts(life: Path) -> dict[str, Any]:
    """What became of a life, in the words of `monitor_shipped.shift`."""
    events = _events(life / "journal.jsonl")
    lines = [json.loads(line) for line in (life / "given.jsonl").open(encoding="utf-8")]
    loss = {line["number"]: line["loss"] for line in lines}
    alarm = _first(events, "alarm", QUIET)
    back = (
        None
        if alarm is None
        else next(
            (
                line["number"]
                for line in lines
                if line["number"] > alarm and line["kind"] == "python"
            ),
            None,
        )
    )
    stop = QUIET + MOST if alarm is None else alarm
    until = np.array([loss[i] for i in range(QUIET, stop) if i in loss])
    after = [loss[i] for i in range(stop, back or stop) if i in loss]
    later = {k: None if back is None else _first(events, k, back) for k in ("resume", "clear")}
    return {
        "alarm_before_the_change": any(e.kind == "alarm" and e.finished <= QUIET for e in events),
        "units_to_warning": _less(_first(events, "warn", QUIET), QUIET),
        "units_to_alarm": _less(alarm, QUIET),
        "risk_before_the_change": float(np.mean([loss[i] for i in range(QUIET) if i in loss])),
        "risk_until_alarm": float(until.mean()),
        "excess_until_alarm": float((until - RISK).sum()),
        "risk_after_alarm": float(np.mean(after)) if after else 0.0,
        "resumed_on_the_other_traffic": sum(
            e.kind == "resume" and (back is None or e.finished <= back) for e in events
        ),
        "units_to_resume": _less(later["resume"], back or 0),
        "units_to_ok": _less(later["clear"], back or 0),
        "units": len(lines),
        "alarms": sum(e.kind == "alarm" for e in events),
        "seconds_per_unit": float(np.mean([line["seconds"] for line in lines])),
    }


def _less(value: int | None, start: int) -> int | None:
    return None if value is None else value - start


def report(folder: Path) -> None:
    """Table of all lives, and a picture of one."""
    rows: dict[str, Any] = {}
    for labels in AUDITS:
        lives = sorted(folder.glob(f"{_short(labels)}-*"))
        found = [facts(life) for life in lives]
        if found:
            rows[labels] = {"summary": summary(found), "lives": found}
            print(labels, json.dumps(rows[labels]["summary"]), flush=True)
    save("live", {"promise": RISK, "quiet": QUIET, "longer": LONGER, "rows": rows})


def picture(life: Path) -> None:
    """Draw a life, with what its traffic was, which the monitor was not told."""
    drawn = MonitorDisplay.from_journal(life / "journal.jsonl").plot()
    lines = [json.loads(line) for line in (life / "given.jsonl").open(encoding="utf-8")]
    prose = [line["number"] for line in lines if line["kind"] == "prose"]
    ends = (0, prose[0], prose[-1] + 1, lines[-1]["number"] + 1)
    words = ("Python", "English prose", "Python")
    for left, right, word in zip(ends, ends[1:], words, strict=False):
        for axes in drawn.ax_:
            axes.axvline(right, color="black", linestyle=":", linewidth=1)
        drawn.ax_[0].text((left + right) / 2, 0.003, f"traffic: {word}", ha="center", va="bottom")
    drawn.figure_.savefig(PICTURE, dpi=100)


def _short(labels: str) -> str:
    return labels.split(",")[0].replace(" ", "-")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--lives", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first life")
    parser.add_argument("--labels", choices=sorted(AUDITS), default=min(AUDITS))
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--picture", type=Path, help="the life that is drawn into the docs")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.picture is not None:
        picture(options.picture)
        return
    if options.report:
        report(options.out)
        return
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    model, tokenizer = load_model()
    calibration, kinds = traffic(0)
    kinds = {
        kind: [t for t in kinds[kind] if len(tokenizer(t)["input_ids"]) <= LONGEST_PROMPT]
        for kind in ("python", "prose")
    }
    policy = policy_of(model, tokenizer, calibration, options.out)
    assert policy.certificate is not None
    print(policy.certificate.summary, policy.certificate.index, flush=True)
    for number in range(options.first, options.first + options.lives):
        life = options.out / f"{_short(options.labels)}-{number}"
        live(model, tokenizer, policy, kinds, life, options.labels)
        print(life.name, json.dumps(facts(life)), flush=True)


if __name__ == "__main__":
    main()
