"""Pictures of a calibration, in the manner of scikit-learn's displays."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from adaptive.calibration import Certificate, InvalidArgumentError

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class RiskPathDisplay:
    """Measured risk and mean depth of the members that the test visited.

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
        Upper confidence bound of its risk by a test that does not depend on the level. Valid on its
        own; the certifying test is sharper at the promise, so it may lie a little above it.
    """

    columns: tuple[int, ...]
    risks: tuple[float, ...]
    depths: tuple[float, ...]
    promise: float
    index: int | None
    bound: float | None

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
        columns = tuple(int(j) for j in evidence["columns"])
        risks = tuple(float(value) for value in evidence["means"][certificate.loss])
        depth = {int(j): float(value) for j, value in evidence["mean_depth"].items()}
        bound = (evidence.get("upper_bound") or {}).get(certificate.loss)
        assert isinstance(certificate.risk, float | int)
        return cls(
            columns=(0, *columns),
            risks=(0.0, *risks),
            depths=tuple(depth[j] for j in (0, *columns)),
            promise=float(certificate.risk),
            index=certificate.index if certificate.holds else None,
            bound=None if bound is None or not certificate.holds else float(bound),
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw risk (left axis) and depth (right axis) along the path.

        Needs matplotlib (``pip install 'adaptive-control[plots]'``).
        """
        if ax is None:
            from matplotlib import pyplot

            ax = pyplot.subplots(figsize=(6.4, 4.0), layout="constrained")[1]
        places = range(len(self.columns))
        (risk,) = ax.plot(places, self.risks, "o-", color="C0", label="risk on test prompts")
        line = ax.axhline(
            self.promise, color="C3", linestyle="--", label=f"promise {self.promise:g}"
        )
        handles: list[Any] = [risk, line]
        if self.index is not None:
            place = self.columns.index(self.index)
            upper = self.risks[place] if self.bound is None else self.bound
            bar = ax.errorbar(
                [place],
                [self.risks[place]],
                yerr=[[0.0], [max(0.0, upper - self.risks[place])]],
                fmt="*",
                color="C2",
                markersize=16,
                capsize=5,
                label="certified, with its upper bound",
                zorder=3,
            )
            handles.append(bar)
        depths = ax.twinx()
        (depth,) = depths.plot(places, self.depths, "s:", color="C7", label="mean depth")
        depths.set_ylabel("layers per token")
        depths.set_ylim(bottom=0)
        ax.set_ylim(bottom=0)
        ax.set_xticks(list(places), ["full", *map(str, self.columns[1:])])
        ax.set_xlabel("member of the path, from safest to cheapest")
        ax.set_ylabel("risk")
        ax.legend(handles=[*handles, depth], loc="lower right", fontsize="small")
        return ax


def save_figure(ax: Axes, path: Path) -> None:
    """Write a figure whole or not at all."""
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    figure = ax.get_figure()
    assert figure is not None
    figure.savefig(partial, dpi=150)  # type: ignore[union-attr]
    partial.replace(path)
