"""A process that puts units to a monitor until it is killed, and says what was acknowledged.

python monitored_life.py POLICY JOURNAL UNITS: prints each unit's number once it is on disk. The
loss of a unit is a function of its number alone, so that every life tells the same story.
"""

from __future__ import annotations

import random
import sys

from adaptive._monitor import Monitor
from adaptive._monitor_outcome import Outcome
from adaptive.policies import Policy


def outcome(number: int) -> Outcome:
    coin = random.Random(number).random
    bad = 60 <= number < 140
    return Outcome(float(coin() < (0.7 if bad else 0.02)), coin(), 2.0 + coin(), 8)


def live(monitor: Monitor, units: int) -> None:
    sizes = random.Random(0)
    while monitor.state.finished < units:
        ticket = monitor.begin(sizes.randint(1, 5))
        seen = monitor.finish(ticket, [outcome(number) for number in ticket.numbers])
        for watched in seen:
            sys.stdout.write(f"{watched.unit.number}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    policy = Policy.from_pretrained(sys.argv[1])
    with Monitor.for_policy(policy, journal=sys.argv[2], snapshot_every=37) as monitor:
        live(monitor, int(sys.argv[3]))
