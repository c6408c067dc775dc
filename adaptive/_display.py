"""The path of a calibration: risk and cost of its members, and which one is certified."""

from __future__ import annotations

from dataclasses import dataclass, field
from textwrap import fill
from typing import TYPE_CHECKING, Any, Self

from adaptive._display_axes import BLUE, GREEN, ORANGE, RED, axes, drawn
from adaptive._display_walk import Walk
from adaptive.calibration import Certificate

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class RiskPathDisplay:
    """Risk and cost of the members that a calibration's test visited.

    Parameters
    ----------
    walk : Walk
        The members: ``columns`` (full computation first), ``means`` (their measured risks),
        ``certified``, ``depths``, ``times`` (milliseconds), all tuples of the same length; the
        last two are empty where nothing is known.
    loss : str
        What the risk is the mean of.
    promise : float
        The certified level.
    index : int or None
        The member that is used, if one is certified.
    bound : float or None
        Upper confidence bound of its risk.

    Attributes
    ----------
    ax_, figure_, artists_
        What :meth:`plot` drew; artists are named risk, failed, promise, certified, depth, time,
        as far as there are such.

    Examples
    --------
    >>> from adaptive.calibration import control_risk
    >>> wrong = [[0, 0, 0]] * 55 + [[0, 0, 1]] * 5  # of 60 units, members 1 and 2 get 0 and 5 wrong
    >>> result = control_risk(wrong, risk=0.1, loss_type="binary")
    >>> display = RiskPathDisplay.from_certificate(result.certificate)
    >>> display.walk.certified, display.index
    ((True, True, False), 1)
    >>> display.plot().ax_.get_ylabel()  # doctest: +SKIP
    'risk: mean loss'
    """

    walk: Walk
    loss: str
    promise: float
    index: int | None
    bound: float | None
    ax_: Any = field(default=None, repr=False, compare=False)
    figure_: Any = field(default=None, repr=False, compare=False)
    artists_: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_certificate(cls, certificate: Certificate) -> Self:
        """Read the members a calibration visited off its certificate.

        A certificate of ``control_risk`` knows no costs; only risks are drawn then.

        Raises
        ------
        InvalidArgumentError
            If nothing was tested, or several risks at once.
        """
        walk = Walk.of(certificate)
        bound = (certificate.evidence.get("upper_bound") or {}).get(certificate.loss)
        assert isinstance(certificate.risk, float | int)
        return cls(
            walk=walk,
            loss=certificate.loss,
            promise=float(certificate.risk),
            index=certificate.index if certificate.holds else None,
            bound=None if bound is None or not certificate.holds else float(bound),
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
        columns, risks = self.walk.columns, self.walk.means
        artists = self._risks(ax)
        if self.walk.depths:
            share = ax.twinx()
            artists |= self._costs(share)
            share.set(ylabel="cost, share of full computation")
            share.yaxis.label.set_color("#9C6B00")  # orange is too light for letters
            ax.set_zorder(share.get_zorder() + 1)  # the star lies on top
            ax.patch.set_visible(False)
        ax.set(
            xlabel="member of the path, from safest to cheapest",
            ylabel=fill(f"risk: mean {self.loss}", 40),
        )
        ax.yaxis.label.set_color(BLUE)
        ax.set_ylim(1.15 * min(0.0, *risks), 1.15 * max(self.promise, self.bound or 0.0, *risks))
        ax.set_xticks(range(len(columns)), ["full", *map(str, columns[1:])])
        ax.legend(
            handles=list(artists.values()),
            loc="lower center",
            bbox_to_anchor=(0.5, 1.0),
            ncols=2,
            fontsize="small",
            frameon=False,
        )
        return drawn(self, ax, artists)

    def _risks(self, ax: Axes) -> dict[str, Any]:
        """Measured risks, the promise, and the member that is used."""
        artists: dict[str, Any] = {}
        style: dict[str, Any] = {"color": BLUE, "markersize": 6}
        (artists["risk"],) = ax.plot(
            self.walk.means, "o-", label="risk on test units, certified", **style
        )
        failed = [i for i, certified in enumerate(self.walk.certified) if not certified]
        if failed:
            (artists["failed"],) = ax.plot(
                failed,
                [self.walk.means[i] for i in failed],
                "o",
                mfc="white",
                label="risk on test units, not certified",
                **style,
            )
        artists["promise"] = ax.axhline(
            self.promise, color=RED, linestyle="--", label=f"promise {self.promise:g}"
        )
        if self.index is not None:
            artists["certified"] = self._star(ax, self.walk.columns.index(self.index))
        return artists

    def _star(self, ax: Axes, place: int) -> Any:
        risk = self.walk.means[place]
        upper = risk if self.bound is None else self.bound
        return ax.errorbar(
            [place],
            [risk],
            yerr=[[0.0], [max(0.0, upper - risk)]],
            fmt="*",
            color=GREEN,
            markersize=15,
            capsize=5,
            label="in use, with its upper bound",
            zorder=3,
        )

    def _costs(self, ax: Axes) -> dict[str, Any]:
        """Depth, and time where it was measured, both relative to full computation."""
        walk = self.walk
        shares = [depth / walk.depths[0] for depth in walk.depths]
        highest = max(shares)
        style: dict[str, Any] = {"color": ORANGE, "markersize": 5}
        (depth,) = ax.plot(shares, "s:", label=f"{walk.steps} per {walk.item}", **style)
        artists = {"depth": depth}
        timed = [(i, time) for i, time in enumerate(walk.times) if time is not None]
        if timed:
            full = timed[0][1]
            where, shares = [i for i, _ in timed], [time / full for _, time in timed]
            (artists["time"],) = ax.plot(
                where, shares, "^--", mfc="none", label=f"time per {walk.item}", **style
            )
            highest = max(highest, *shares)
        ax.set_ylim(0, 1.08 * highest)
        return artists
