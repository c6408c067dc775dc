"""Coming back after an alarm: evidence that the risk is below the promise again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from numpy.typing import ArrayLike

from adaptive.calibration._edetector import Array, EDetectorState, Flags
from adaptive.calibration._errors import InvalidArgumentError
from adaptive.calibration._monitor import LifetimeRiskMonitor
from adaptive.calibration._state_io import pack_state, unpack_state
from adaptive.calibration._validation import as_floats, check_number, check_probability

_SHARES = (0.25, 0.5, 0.75, 0.9)


@dataclass(frozen=True)
class RecoveryTest:
    r"""Resume when the mean loss is below a bound again, with a promised chance of a wrong resume.

    During fallback the early answer is still compared with full depth, so every unit has a label.
    The mirror image of `LifetimeRiskMonitor`: factors
    :math:`1 - \frac{s}{B - m}(X_t - m)` for s in (0.25, 0.5, 0.75, 0.9), restarted with weights
    1/(t(t+1)), so that the units of the incident do not have to be won back.

    Parameters
    ----------
    bound : float
        Risk m to be undercut, in (lower, upper).
    beta : float
        P(resume, ever, while E[X | past] >= bound has held on every unit since the fallback
        began) <= beta. In (0, 1).
    lower, upper : float
        Ends of the loss.

    Examples
    --------
    >>> test = RecoveryTest(0.05, beta=0.05)
    >>> state = test.init()
    >>> while not test.resume(state)[0]:
    ...     state = test.update(state, [0.0])
    >>> int(state.units[0])
    85
    """

    bound: float
    beta: float = 0.05
    lower: float = 0.0
    upper: float = 1.0

    def __post_init__(self) -> None:
        low, high = check_number("lower", self.lower), check_number("upper", self.upper)
        if not low < check_number("bound", self.bound) < high:
            raise InvalidArgumentError("bound", self.bound, f"in ({low:g}, {high:g})")
        check_probability("beta", self.beta)

    @property
    def threshold(self) -> float:
        """1 / beta."""
        return 1.0 / self.beta

    def init(self, streams: int = 1) -> EDetectorState:
        """State at the beginning of a fallback."""
        return self._mirrored().init(streams)

    def update(
        self,
        state: EDetectorState,
        losses: ArrayLike,
        *,
        audited: ArrayLike | None = None,
        active: ArrayLike | None = None,
    ) -> EDetectorState:
        """State after one more unit per stream; parameters as `RiskMonitor.update`."""
        x = as_floats("losses", losses)
        try:
            return self._mirrored().update(state, -x, audited=audited, active=active)
        except InvalidArgumentError as error:
            if error.argument != "losses" or error.value == f"shape {x.shape}":
                raise
            allowed = f"finite and in [{self.lower:g}, {self.upper:g}]"
            raise InvalidArgumentError("losses", losses, allowed) from None

    def evidence(self, state: EDetectorState) -> Array:
        """Evidence for a risk below the bound [n_streams]; resume at `threshold`."""
        return self._mirrored().evidence(state)

    def resume(self, state: EDetectorState) -> Flags:
        """Whether the evidence has ever reached the threshold [n_streams]."""
        return self._mirrored().alarm(state)

    def restart(self, state: EDetectorState, streams: ArrayLike) -> EDetectorState:
        """State in which the chosen streams begin a new fallback, with a new promise."""
        return self._mirrored().restart(state, streams)

    def to_dict(self, state: EDetectorState) -> dict[str, Any]:
        """JSON-ready data of a state, exact to the last bit."""
        return pack_state(self, state)

    def from_dict(self, data: Mapping[str, Any]) -> EDetectorState:
        """State from `to_dict`; refuses one written by another test or other settings."""
        return unpack_state(self, data, EDetectorState)

    def _mirrored(self) -> LifetimeRiskMonitor:
        return _mirror(self.bound, self.beta, self.lower, self.upper)


@lru_cache(maxsize=256)
def _mirror(bound: float, beta: float, lower: float, upper: float) -> LifetimeRiskMonitor:
    """Return the monitor of the negative loss; kept, because it is asked for at every update."""
    bets = tuple(share / (upper - bound) for share in _SHARES)
    return LifetimeRiskMonitor(-bound, alpha=beta, lower=-upper, upper=-lower, bets=bets)
