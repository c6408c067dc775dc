"""Pictures of calibrations, generations, traces and monitored runs, as scikit-learn has displays.

A display is made by one of its ``from_...`` constructors and drawn by ``plot(ax=None)``, which
returns a display that also keeps ``ax_``, ``figure_`` and ``artists_``. Plots need matplotlib
(``pip install 'adaptive-control[plots]'``), which is imported when the first one is drawn.
`calibration_report` puts a whole calibration on one HTML page.
"""

from __future__ import annotations

from adaptive._display import RiskPathDisplay
from adaptive._display_depth import ExitDepthDisplay, TokenDepthDisplay
from adaptive._display_scores import ReliabilityDisplay, ScoreMixtureDisplay
from adaptive._display_walk import Walk
from adaptive._monitor_display import MonitorDisplay
from adaptive._report import calibration_report

__all__ = [
    "ExitDepthDisplay",
    "MonitorDisplay",
    "ReliabilityDisplay",
    "RiskPathDisplay",
    "ScoreMixtureDisplay",
    "TokenDepthDisplay",
    "Walk",
    "calibration_report",
]
