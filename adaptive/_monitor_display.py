"""A monitored run in one picture, for whoever is on call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from adaptive._display_axes import BLUE, GREEN, ORANGE, RED
from adaptive._monitor_journal import read_journal
from adaptive._monitor_records import Event, JournalError, Status
from adaptive.calibration._extras import optional

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS: dict[Status, str] = {
    "ok": "#d9ead3",
    "warn": "#fff2cc",
    "fallback": "#f4cccc",
    "probation": "#cfe2f3",
}
_MEANING: dict[Status, str] = {
    "ok": "ok: early exits on",
    "warn": "warn: early exits on, closer watch",
    "fallback": "fallback: full depth",
    "probation": "probation: early exits back on",
}
GREY = "#555555"
#: Weight of the newest loss in the recent risk.
_RECENT = 1 / 50
#: Share of the axis within which transitions are named together.
_NEAR = 0.06
#: Fewest labels that a recent risk is shown from.
_ENOUGH = 10


@dataclass(frozen=True)
class MonitorDisplay:
    """Risk beside the promise, evidence beside its levels, states as bands, events marked.

    Parameters
    ----------
    units : ndarray of int [n]
        Units finished, at every unit and at every label that came late.
    risk, shadow : ndarray [n]
        Recent observed loss (mean of about 50 labels), of the policy and, in fallback, of the
        early answers that were only compared; NaN elsewhere.
    mean : ndarray [n]
        Mean loss of the policy so far, a label counted by the units it stands for.
    evidence : ndarray [n]
    status : tuple of str
        State each unit ran in, or the label came in.
    outside : int
        Units the certificate does not apply to.
    events : tuple of Event
    promise, warn, alarm, resume : float
        The certified risk, and the levels of the evidence.

    Attributes
    ----------
    ax_, figure_, artists_
        What :meth:`plot` drew; artists are named risk, mean, shadow, promise, evidence, alarm,
        warn, recovery, resume, states, events.
    """

    units: NDArray[np.int64]
    risk: NDArray[np.float64]
    shadow: NDArray[np.float64]
    mean: NDArray[np.float64]
    evidence: NDArray[np.float64]
    status: tuple[Status, ...]
    outside: int
    events: tuple[Event, ...]
    promise: float
    warn: float
    alarm: float
    resume: float
    ax_: Any = field(default=None, repr=False, compare=False)
    figure_: Any = field(default=None, repr=False, compare=False)
    artists_: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_journal(cls, path: str | Path) -> Self:
        """Read a journal, also one that is being written.

        Raises
        ------
        JournalError
            If there is no journal, it is damaged, or no unit is in it yet.
        """
        records = read_journal(path)
        header = next(records, None)
        if header is None or header.get("kind") != "header":
            raise JournalError(f"{path} has no header: it is not a monitor's journal")
        lines = list(records)
        told = [line for line in lines if line["kind"] in ("unit", "label")]
        if not told:
            raise JournalError(f"{path} holds no units yet")
        status = _statuses(told)
        fallen = np.array([state == "fallback" for state in status])
        losses = np.array([np.nan if line["loss"] is None else line["loss"] for line in told])
        ran = {line["number"]: line["status"] for line in told if line["kind"] == "unit"}
        compared = np.array([ran[line["number"]] == "fallback" for line in told])
        own, other = np.where(compared, np.nan, losses), np.where(compared, losses, np.nan)
        chance = {line["number"]: line["probability"] for line in told if line["kind"] == "unit"}
        weights = np.array([1.0 / chance[line["number"]] for line in told])
        counted = np.where(np.isnan(own), 0.0, weights)
        counts, sums = np.cumsum(counted), np.cumsum(counted * np.nan_to_num(own))
        with np.errstate(invalid="ignore"):
            mean = sums / counts
        whole = np.array([line["kind"] == "unit" for line in told])
        if header["rules"]["audits"]["type"] != "ScoreAudits":
            weights = np.ones(len(told))  # of the newest labels, all as likely as each other
        return cls(
            units=np.cumsum(whole),
            risk=np.where(fallen, np.nan, _recent(own, weights, restart=fallen)),
            shadow=np.where(fallen, _recent(other, weights, restart=~fallen), np.nan),
            mean=mean,
            evidence=np.array([line["evidence"] for line in told]),
            status=status,
            outside=sum(not line["inside"] for line in told if line["kind"] == "unit"),
            events=tuple(Event.from_dict(event) for line in lines for event in line["events"]),
            promise=float(header["promise"]),
            warn=float(header["warn"]),
            alarm=float(header["alarm"]),
            resume=float(header["resume"]),
        )

    def plot(self, ax: tuple[Axes, Axes] | None = None) -> Self:
        """Draw risk above and evidence below, over the units in the order they finished.

        Needs matplotlib (``pip install 'adaptive-control[plots]'``).

        Parameters
        ----------
        ax : pair of Axes, optional
            One above the other, with a shared axis of units.

        Returns
        -------
        MonitorDisplay
            With ``ax_`` (a pair), ``figure_`` and ``artists_``.
        """
        top, bottom = _pair() if ax is None else ax
        artists: dict[str, Any] = {"states": self._shade(top)}
        self._shade(bottom)
        artists |= self._risks(top) | self._levels(bottom)
        artists["events"] = [self._mark(events, top, bottom) for events in self._grouped()]
        top.set_title(self.headline, loc="left", fontsize="medium", fontweight="bold")
        bottom.set_xlabel("units finished")
        bottom.set_xlim(0, max(int(self.units[-1]), 1))
        figure = top.figure
        figure.legend(
            list(artists["states"].values()),
            [_MEANING[state] for state in artists["states"]],
            loc="outside lower center",
            ncols=4,
            fontsize="small",
            frameon=False,
        )
        return replace(self, ax_=(top, bottom), figure_=figure, artists_=artists)

    def _risks(self, axes: Axes) -> dict[str, Any]:
        """Observed risk beside what is promised."""
        found: dict[str, Any] = {}
        (found["risk"],) = axes.plot(
            self.units, self.risk, color=BLUE, linewidth=2, label="delivered, last 50 labels"
        )
        (found["mean"],) = axes.plot(
            self.units, self.mean, color=BLUE, linewidth=0.8, label="delivered, so far"
        )
        if not np.isnan(self.shadow).all():
            (found["shadow"],) = axes.plot(
                self.units, self.shadow, color=GREY, label="early answers, not delivered"
            )
        found["promise"] = axes.axhline(
            self.promise, color=RED, linestyle="--", label=f"promised {self.promise:g}"
        )
        seen = [self.promise, *(np.nanmax(v, initial=0.0) for v in (self.risk, self.shadow))]
        axes.set_ylim(0, 1.45 * max(seen))  # room for the legend
        axes.set_ylabel("risk")
        axes.legend(loc="upper left", fontsize="small", ncols=2, framealpha=0.9)
        return found

    def _levels(self, axes: Axes) -> dict[str, Any]:
        """Evidence beside the levels at which it acts; a test that starts anew is a new line."""
        found: dict[str, Any] = {}
        fallen = np.array([state == "fallback" for state in self.status])
        own, back = (np.where(hidden, np.nan, self.evidence) for hidden in (fallen, ~fallen))
        (found["evidence"],) = axes.plot(
            self.units, own, color=BLUE, linewidth=2, label="that the promise is broken"
        )
        for name, level, words, colour in (
            ("alarm", self.alarm, "withdraw", RED),
            ("warn", self.warn, "warn", ORANGE),
        ):
            (found[name],) = axes.plot(
                self.units,
                np.where(fallen, np.nan, level),
                color=colour,
                linestyle="--",
                label=f"{words} at {level:g}",
            )
        if fallen.any():
            (found["recovery"],) = axes.plot(
                self.units, back, color=GREEN, linewidth=2, label="that it would hold again"
            )
            (found["resume"],) = axes.plot(
                self.units,
                np.where(fallen, self.resume, np.nan),
                color=GREEN,
                linestyle="--",
                label=f"resume at {self.resume:g}",
            )
        low = max(1e-4, float(self.evidence.min()))
        axes.set_yscale("log")
        axes.set_ylim(0.5 * low, 30 * max(self.alarm, self.resume, float(self.evidence.max())))
        axes.set_ylabel("evidence (log)")
        axes.legend(loc="upper left", fontsize="small", ncols=3, framealpha=0.9)
        return found

    def _grouped(self) -> list[list[Event]]:
        """Transitions, those too close for names of their own together."""
        groups: list[list[Event]] = []
        near = _NEAR * max(int(self.units[-1]), 1)
        for event in self.events:
            if groups and event.finished - groups[-1][0].finished < near:
                groups[-1].append(event)
            else:
                groups.append([event])
        return groups

    def _mark(self, events: Sequence[Event], top: Axes, bottom: Axes) -> Any:
        """Mark transitions on both axes and name them, once each, between them."""
        for axes in (top, bottom):
            for event in events:
                axes.axvline(event.finished, color="black", linewidth=0.8)
        return bottom.annotate(
            ", ".join(dict.fromkeys(event.kind for event in events)),
            (events[0].finished, 1.02),
            xycoords=("data", "axes fraction"),
            ha="center",
            va="bottom",
            fontsize="small",
        )

    @property
    def headline(self) -> str:
        """Where the run stands, in one line."""
        now, since = "ok", 0
        if self.events:
            now, since = self.events[-1].after, self.events[-1].finished
        recent, words = (
            (self.shadow[-1], "full depth delivered; early answers would miss")
            if now == "fallback"
            else (self.risk[-1], "last labels")
        )
        said = "too few labels to say" if np.isnan(recent) else f"{words} {recent:.2f}"
        return (
            f"Now: {now.upper()} since unit {since}. Risk: {said}, promised {self.promise:g}. "
            f"Outside the certificate: {self.outside} of {self.units[-1]}"
        )

    def _shade(self, axes: Axes) -> dict[Status, Any]:
        """Colour the stretches of each state; return one handle per state."""
        handles: dict[Status, Any] = {}
        starts = [0] + [
            i for i in range(1, len(self.status)) if self.status[i] != self.status[i - 1]
        ]
        for start, end in zip(starts, [*starts[1:], len(self.status)], strict=True):
            state = self.status[start]
            left, right = self.units[start] - 0.5, self.units[end - 1] + 0.5
            patch = axes.axvspan(left, right, color=_COLOURS[state], linewidth=0)
            handles.setdefault(state, patch)
        return handles


def _pair() -> tuple[Axes, Axes]:
    """Return two axes, one above the other, on a figure of their own."""
    pair = optional("matplotlib.pyplot").subplots(
        2, 1, sharex=True, figsize=(9.6, 6.0), layout="constrained"
    )[1]
    return pair[0], pair[1]


def _statuses(lines: Sequence[Mapping[str, Any]]) -> tuple[Status, ...]:
    """Return the state each line was put in: a late label is put in the state of its day."""
    found: list[Status] = []
    after: Status = "ok"
    for line in lines:
        found.append(line["status"] if line["kind"] == "unit" else after)
        after = line["after"]
    return tuple(found)


def _recent(
    losses: NDArray[np.float64], weights: NDArray[np.float64], *, restart: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Weighted mean of the newest labels; it begins anew after every stretch of ``restart``."""
    found, total, weight, count = np.full(losses.size, np.nan), 0.0, 0.0, 0
    for i, loss in enumerate(losses):
        if restart[i]:
            total, weight, count = 0.0, 0.0, 0
        elif not np.isnan(loss):
            count += 1
            share = max(_RECENT, 1 / count)
            total += share * (weights[i] * loss - total)
            weight += share * (weights[i] - weight)
        found[i] = total / weight if count >= _ENOUGH else np.nan
    return found
