"""Watching a certified policy in use: alarm, full depth, and back on evidence.

`Monitor.for_policy(policy)` makes a monitor from a policy's certificate; pass it to `generate` with
every call, or put the units of a loop of your own to it. The detectors that it bets with, audits
and the planner are in `adaptive.calibration`; the picture of a run is
`adaptive.displays.MonitorDisplay`, metrics are `adaptive.integrations.prometheus.MonitorMetrics`.
"""

from __future__ import annotations

from adaptive._monitor import Monitor
from adaptive._monitor_outcome import Outcome, Ticket
from adaptive._monitor_records import Event, JournalError, Unit, Watched

__all__ = [
    "Event",
    "JournalError",
    "Monitor",
    "Outcome",
    "Ticket",
    "Unit",
    "Watched",
]
