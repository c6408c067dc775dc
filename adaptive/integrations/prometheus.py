"""A monitor's figures for Prometheus, through its client library.

Needs ``pip install 'adaptive-control[prometheus]'``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, get_args

from adaptive._monitor_records import Event, Status, Watched
from adaptive.calibration._extras import optional

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

__all__ = ["MonitorMetrics"]


class MonitorMetrics:
    """Counters and gauges that follow a monitor.

    ``Monitor.for_policy(policy, on_event=metrics.event, on_unit=metrics.unit)``

    - ``adaptive_units_total{status, inside}``: finished units;
    - ``adaptive_audits_total``: units with an observed loss;
    - ``adaptive_loss_total``: the sum of their losses, and ``adaptive_labelled_total``, the sum of
      ones, each over the chance that its unit would be audited. The ratio of their increases is the
      risk over any window, also where audits become more frequent;
    - ``adaptive_evidence``: evidence of the test in force;
    - ``adaptive_status{status}``: 1 for the state the monitor is in, 0 for the others;
    - ``adaptive_events_total{kind}``: transitions.

    Losses and audits count units of the policy only, not those of a fallback.

    Parameters
    ----------
    registry : CollectorRegistry, optional
        The client library's default one if left out.

    Raises
    ------
    MissingExtraError
        If the client library is not installed.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        client = optional("prometheus_client")
        where: dict[str, Any] = {"registry": client.REGISTRY if registry is None else registry}
        self._units = client.Counter(
            "adaptive_units", "Finished units", ["status", "inside"], **where
        )
        self._audits = client.Counter("adaptive_audits", "Units with an observed loss", **where)
        self._loss = client.Counter("adaptive_loss", "Losses over chances of an audit", **where)
        self._labelled = client.Counter(
            "adaptive_labelled", "Ones over chances of an audit, of units with a loss", **where
        )
        self._evidence = client.Gauge("adaptive_evidence", "Evidence of the test in force", **where)
        self._status = client.Gauge("adaptive_status", "State of the monitor", ["status"], **where)
        self._events = client.Counter("adaptive_events", "Transitions", ["kind"], **where)
        self._set("ok")

    def unit(self, watched: Watched) -> None:
        """Count a finished unit, or the label of one that had finished before."""
        inside = "yes" if watched.inside else "no"
        if not watched.late:
            self._units.labels(watched.unit.status, inside).inc()
        if watched.unit.loss is not None and watched.unit.status != "fallback":
            self._audits.inc()
            self._loss.inc(max(0.0, watched.unit.loss) / watched.unit.probability)
            self._labelled.inc(1.0 / watched.unit.probability)
        self._evidence.set(watched.evidence)
        self._set(watched.status)

    def event(self, event: Event) -> None:
        """Count a transition."""
        self._events.labels(event.kind).inc()
        self._set(event.after)

    def _set(self, now: Status) -> None:
        for status in get_args(Status):
            self._status.labels(status).set(status == now)
