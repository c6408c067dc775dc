"""The path of a calibration: risk and cost of its members, and which one is certified."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from adaptive._display_axes import BLUE, GREEN, ORANGE, RED, axes, drawn
from adaptive.calibration import Certificate, InvalidArgumentError

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class RiskPathDisplay:
    """Risk and cost of the members that a calibration's test visited.

    Parameters
    ----------
    columns : tuple of int
        Members, from safest to cheapest; 0 is full computation.
    risks, depths : tuple of float
        Mean loss on the test units, and mean number of layers per token.
    promise : float
        The certified level.
    index : int or None
        The certified member, if any.
    bound : float or None
        Upper confidence bound of its risk.
    times : tuple of float or None
        Measured milliseconds per token; ``None`` for members that were not timed. Certified
        members and full computation are.

    Attributes
    ----------
    ax_, figure_, artists_
        What :meth:`plot` drew; artists are named risk, promise, certified, depth, time.

    Examples
    --------
    >>> display = RiskPathDisplay((0, 1), (0.0, 0.02), (12.0, 8.0), 0.05, 1, 0.04)
    >>> display.plot().ax_.get_ylabel()  # doctest: +SKIP
    'risk'
    """

    columns: tuple[int, ...]
    risks: tuple[float, ...]
    depths: tuple[float, ...]
    promise: float
    index: int | None
    bound: float | None
    times: tuple[float | None, ...] = ()
    ax_: Any = field(default=None, repr=False, compare=False)
    figure_: Any = field(default=None, repr=False, compare=False)
    artists_: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_certificate(cls, certificate: Certificate) -> Self:
        """Read the members a calibration visited off its certificate.

        Raises
        ------
        InvalidArgumentError
            If the certificate records no visited members (nothing was tested).
        """
        evidence = certificate.evidence
        if "mean_depth" not in evidence or not evidence.get("columns"):
            raise InvalidArgumentError(
                "certificate",
                "no visited members",
                "the certificate of a calibration that tested some",
            )
        columns = (0, *(int(j) for j in evidence["columns"]))
        risks = tuple(float(value) for value in evidence["means"][certificate.loss])
        depth = {int(j): float(value) for j, value in evidence["mean_depth"].items()}
        timed = {int(j): float(v) for j, v in evidence.get("milliseconds_per_token", {}).items()}
        bound = (evidence.get("upper_bound") or {}).get(certificate.loss)
        assert isinstance(certificate.risk, float | int)
        return cls(
            columns=columns,
            risks=(0.0, *risks),
            depths=tuple(depth[j] for j in columns),
            promise=float(certificate.risk),
            index=certificate.index if certificate.holds else None,
            bound=None if bound is None or not certificate.holds else float(bound),
            times=tuple(timed.get(j) for j in columns) if timed else (),
        )

    def plot(self, ax: Axes | None = None) -> Self:
        """Draw risk (left) and cost as a share of full computation (right) along the path.

        Needs matplotlib (``pip install 'adaptive-control[plots]'``).

        Returns
        -------
        RiskPathDisplay
            With ``ax_``, ``figure_`` and ``artists_``.
        """
        ax = axes(ax)
        places = range(len(self.columns))
        artists: dict[str, Any] = {}
        (artists["risk"],) = ax.plot(
            places, self.risks, "o-", color=BLUE, label="risk on test units"
        )
        artists["promise"] = ax.axhline(
            self.promise, color=RED, linestyle="--", label=f"promise {self.promise:g}"
        )
        if self.index is not None:
            artists["certified"] = self._star(ax, self.columns.index(self.index))
        share = ax.twinx()
        artists |= self._costs(share)
        share.set(ylabel="cost, share of full computation", ylim=(0, 1.08))
        top = max(self.promise, *self.risks, self.bound or 0.0)
        share.yaxis.label.set_color("#9C6B00")  # orange is too light for letters
        ax.set(xlabel="member of the path, from safest to cheapest", ylabel="risk")
        ax.yaxis.label.set_color(BLUE)
        ax.set_ylim(0, 1.15 * top)
        ax.set_xticks(list(places), ["full", *map(str, self.columns[1:])])
        ax.legend(
            handles=list(artists.values()),
            loc="lower center",
            bbox_to_anchor=(0.5, 1.0),
            ncols=2,
            fontsize="small",
            frameon=False,
        )
        return drawn(self, ax, artists)

    def _star(self, ax: Axes, place: int) -> Any:
        upper = self.risks[place] if self.bound is None else self.bound
        return ax.errorbar(
            [place],
            [self.risks[place]],
            yerr=[[0.0], [max(0.0, upper - self.risks[place])]],
            fmt="*",
            color=GREEN,
            markersize=15,
            capsize=5,
            label="certified, with its upper bound",
            zorder=3,
        )

    def _costs(self, ax: Axes) -> dict[str, Any]:
        """Depth, and time where it was measured, both relative to full computation."""
        shares = [depth / self.depths[0] for depth in self.depths]
        style: dict[str, Any] = {"color": ORANGE, "markersize": 5}
        (depth,) = ax.plot(shares, "s:", label="mean depth", **style)
        artists = {"depth": depth}
        timed = [(i, time) for i, time in enumerate(self.times) if time is not None]
        if timed:
            full = timed[0][1]
            where, shares = [i for i, _ in timed], [time / full for _, time in timed]
            (artists["time"],) = ax.plot(
                where, shares, "^--", mfc="none", label="measured time", **style
            )
        return artists
