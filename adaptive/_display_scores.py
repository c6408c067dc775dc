"""What scores are worth: reliability per exit, and scores of agreeing and disagreeing tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from adaptive._display_axes import BLUE, COLOURS, MARKERS, ORANGE, axes, drawn
from adaptive.calibration import (
    BetaMixtureModel,
    InvalidArgumentError,
    ReliabilityCurve,
    Trace,
    fit_labelled_mixture,
    reliability_curve,
)
from adaptive.calibration._probability import equal_mass_edges

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = NDArray[np.float64]


@dataclass(frozen=True)
class ReliabilityDisplay:
    """How well each exit's score, read as a probability of agreement, is borne out.

    Parameters
    ----------
    curves : dict of int to ReliabilityCurve
        Per exit.
    limits : dict of int to (ndarray, ndarray)
        Per exit, lower and upper 95% limits of each bin's share: percentiles over resampled
        units, since tokens of one unit are not independent. Approximate, bin by bin.

    Attributes
    ----------
    ax_, figure_, artists_
        What :meth:`plot` drew; artists are named by exit.
    """

    curves: dict[int, ReliabilityCurve]
    limits: dict[int, tuple[Array, Array]]
    ax_: Any = field(default=None, repr=False, compare=False)
    figure_: Any = field(default=None, repr=False, compare=False)
    artists_: dict[int, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_trace(
        cls, trace: Trace, *, loss: str = "disagreement", n_bins: int = 10, rng: int = 0
    ) -> Self:
        """Compare scores with how often stopping there costs nothing.

        Parameters
        ----------
        trace : Trace
            Scores in [0, 1], or ``-inf`` where an exit has none; a 0/1 loss.
        loss : str
        n_bins : int
            Bins of about equal numbers of tokens; fewer where scores tie.
        rng : int
            Seed of the resampling.

        Raises
        ------
        InvalidArgumentError
            If the loss is not there or not 0/1, or no exit has scores in [0, 1].
        """
        curves, limits = {}, {}
        for exit in range(trace.n_exits):
            scores, agrees, kept = _of_exit(trace, exit, loss)
            if not scores.size:
                continue
            curves[exit] = reliability_curve(scores, agrees, n_bins=n_bins, equal_mass=True)
            unit = trace.unit_of_token[kept]
            limits[exit] = _unit_limits(scores, agrees, unit, n_bins=n_bins, rng=rng)
        if not curves:
            raise InvalidArgumentError("trace", "no finite score", "a trace with scores")
        return cls(curves, limits)

    def plot(self, ax: Axes | None = None) -> Self:
        """Draw one curve per exit over the diagonal.

        Needs matplotlib (``pip install 'adaptive-control[plots]'``).
        """
        ax = axes(ax, width=5.2, height=4.8)
        ax.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle="--")
        artists = {}
        for exit, curve in self.curves.items():
            colour = COLOURS[exit % len(COLOURS)]
            lower, upper = self.limits[exit]
            ax.fill_between(curve.predicted, lower, upper, color=colour, alpha=0.15, linewidth=0)
            (artists[exit],) = ax.plot(
                curve.predicted,
                curve.observed,
                marker=MARKERS[exit % len(MARKERS)],
                color=colour,
                markersize=5,
                label=f"exit {exit}, calibration error {curve.error:.3f}",
            )
        ax.set(
            xlabel="score, read as probability of agreement",
            ylabel="share of tokens that agree",
            xlim=(-0.02, 1.02),
            ylim=(-0.02, 1.02),
        )
        ax.set_aspect("equal")
        ax.legend(
            title="shaded: 95% limits, over units",
            title_fontsize="small",
            loc="lower right",
            fontsize="small",
            frameon=False,
        )
        return drawn(self, ax, artists)  # type: ignore[arg-type]


@dataclass(frozen=True)
class ScoreMixtureDisplay:
    """Scores of agreeing and of disagreeing tokens at one exit, with a Beta mixture.

    Parameters
    ----------
    agreeing, disagreeing : ndarray
        Scores, in [0, 1].
    mixture : BetaMixtureModel
        Components by increasing mean; the last stands for agreement.
    exit : int

    Attributes
    ----------
    ax_, figure_, artists_
        What :meth:`plot` drew; artists are named disagree, agree, and mixture_0, mixture_1, ...
    """

    agreeing: Array
    disagreeing: Array
    mixture: BetaMixtureModel
    exit: int
    ax_: Any = field(default=None, repr=False, compare=False)
    figure_: Any = field(default=None, repr=False, compare=False)
    artists_: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_trace(
        cls,
        trace: Trace,
        *,
        exit: int,
        loss: str = "disagreement",
        mixture: BetaMixtureModel | None = None,
    ) -> Self:
        """Part an exit's scores by a 0/1 loss.

        Parameters
        ----------
        trace : Trace
            Scores in [0, 1] at this exit.
        exit : int
        loss : str
        mixture : BetaMixtureModel, optional
            To draw over the scores, such as one fitted without labels; by default one component
            is fitted to each kind of token.

        Raises
        ------
        InvalidArgumentError
            If the exit has no scores in [0, 1], or the loss is not there or not 0/1.
        """
        if not 0 <= exit < trace.n_exits:
            raise InvalidArgumentError("exit", exit, f"in 0..{trace.n_exits - 1}")
        scores, agrees, _ = _of_exit(trace, exit, loss)
        if not scores.size:
            raise InvalidArgumentError("exit", exit, "an exit with scores; this one has none")
        fitted = fit_labelled_mixture(scores, agrees) if mixture is None else mixture
        return cls(scores[agrees], scores[~agrees], fitted, exit)

    def plot(self, ax: Axes | None = None) -> Self:
        """Draw both histograms as densities of all tokens, and each component at its weight.

        Needs matplotlib (``pip install 'adaptive-control[plots]'``).
        """
        ax = axes(ax)
        edges = np.linspace(0, 1, 31)
        total = self.agreeing.size + self.disagreeing.size
        artists: dict[str, Any] = {}
        kinds = (
            ("disagree", self.disagreeing, ORANGE, "//"),
            ("agree", self.agreeing, BLUE, None),
        )
        highest = 0.0
        for name, scores, colour, hatch in kinds:
            density = np.histogram(scores, edges)[0] / (total * np.diff(edges))
            highest = max(highest, float(density.max()))
            artists[name] = ax.stairs(
                density,
                edges,
                fill=True,
                facecolor=(colour, 0.3),
                edgecolor=colour,
                hatch=hatch,
                label=f"tokens that {name} ({scores.size / total:.0%})",
            )
        grid = np.linspace(0.002, 0.998, 499)
        weighted = np.exp(self.mixture.log_densities(grid)) * np.reshape(
            self.mixture.weights, (-1, 1)
        )
        for k, density in enumerate(weighted):
            last = k == len(weighted) - 1
            (artists[f"mixture_{k}"],) = ax.plot(
                grid,
                density,
                color=BLUE if last else ORANGE,
                linestyle="-" if last else "--",
                label=_beta_name(self.mixture, k),
            )
        ax.set(xlabel=f"score at exit {self.exit}", ylabel="density, all tokens", xlim=(0, 1))
        ax.set_ylim(0, 1.35 * highest)  # a Beta density may be infinite at 0 and 1
        ax.legend(loc="upper left", ncols=2, fontsize="small", frameon=False)
        return drawn(self, ax, artists)


def _of_exit(trace: Trace, exit: int, loss: str) -> tuple[Array, NDArray[np.bool_], Any]:
    """Scores, agreement and rows of the tokens that have a score at an exit."""
    if loss not in trace.losses:
        raise InvalidArgumentError("loss", loss, f"one of {', '.join(trace.losses)}")
    wrong = trace.losses[loss][:, exit]
    if not np.isin(wrong, (0, 1)).all():
        raise InvalidArgumentError("loss", loss, "a loss of 0 and 1")
    scores = trace.scores[:, exit].astype(np.float64)
    kept = np.flatnonzero(scores > -np.inf)
    scores = scores[kept]
    if scores.size and not 0.0 <= scores.min() <= scores.max() <= 1.0:
        raise InvalidArgumentError(
            "trace",
            f"scores in [{scores.min():.3g}, {scores.max():.3g}] at exit {exit}",
            "a trace of scores in [0, 1], such as the probe's",
        )
    return scores, wrong[kept] == 0, kept


def _unit_limits(
    scores: Array, agrees: NDArray[np.bool_], unit: Any, *, n_bins: int, rng: int, times: int = 200
) -> tuple[Array, Array]:
    """Percentiles of each non-empty bin's share of agreement over resampled units."""
    edges = equal_mass_edges(scores, n_bins)
    bins, n_bins = np.searchsorted(edges, scores, side="right"), edges.size + 1
    _, unit = np.unique(unit, return_inverse=True)
    count = int(unit.max()) + 1
    seen, agreed = np.zeros((count, n_bins)), np.zeros((count, n_bins))
    np.add.at(seen, (unit, bins), 1.0)
    np.add.at(agreed, (unit, bins), agrees.astype(np.float64))
    draws = np.random.default_rng(rng).multinomial(count, np.full(count, 1 / count), size=times)
    used = seen.any(axis=0)
    with np.errstate(invalid="ignore"):
        shares = (draws @ agreed[:, used]) / (draws @ seen[:, used])
    lower, upper = np.nanpercentile(shares, [2.5, 97.5], axis=0)
    return lower, upper


def _beta_name(mixture: BetaMixtureModel, k: int) -> str:
    return f"{mixture.weights[k]:.2f} · Beta({mixture.alpha[k]:.2f}, {mixture.beta[k]:.2f})"
