"""The members that a calibration's test visited, read off its certificate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from adaptive.calibration import Certificate, InvalidArgumentError


@dataclass(frozen=True)
class Walk:
    """Members in the order of the path, full computation first.

    Parameters
    ----------
    columns : tuple of int
        Members.
    means : tuple of float
        Mean loss of each on the test units.
    certified : tuple of bool
        Whether each is; full computation is by construction, unless it was tested.
    depths : tuple of float
        Mean depth of each; empty if the certificate records none.
    times : tuple of float or None
        Milliseconds per item of each, ``None`` where it was not timed; empty if none was.
    item : str
        What depths and times are per: token or input.
    steps : str
        What depths count: layers, stages or models.
    """

    columns: tuple[int, ...]
    means: tuple[float, ...]
    certified: tuple[bool, ...]
    depths: tuple[float, ...]
    times: tuple[float | None, ...]
    item: str
    steps: str

    @classmethod
    def of(cls, certificate: Certificate) -> Self:
        """Read a certificate.

        Raises
        ------
        InvalidArgumentError
            If nothing was tested, or several risks at once.
        """
        evidence = certificate.evidence
        visited = [int(column) for column in evidence.get("columns", ())]
        means = evidence.get("means", {}).get(certificate.loss)
        if not visited or means is None or isinstance(certificate.risk, dict):
            found = "several risks" if isinstance(certificate.risk, dict) else "no visited members"
            raise InvalidArgumentError(
                "certificate", found, "the certificate of a calibration that tested one risk"
            )
        # a risk that full computation has as well is tested there first
        start = [] if evidence.get("full_computation_tested") else [0]
        columns = (*start, *visited)
        depth = {int(j): float(value) for j, value in evidence.get("mean_depth", {}).items()}
        item = "input" if "full_computation_tested" in evidence else "token"
        timed = evidence.get(f"milliseconds_per_{item}", {})
        time = {int(j): float(value) for j, value in timed.items()}
        return cls(
            columns=columns,
            means=(*(0.0 for _ in start), *map(float, means)),
            certified=tuple(j in start or j in evidence["certified"] for j in columns),
            depths=tuple(depth[j] for j in columns) if depth else (),
            times=tuple(time.get(j) for j in columns) if time else (),
            item=item,
            steps=evidence.get("steps", "layers"),
        )
