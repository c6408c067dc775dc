"""Statistics for adaptive computation: arrays in, certificates out (no torch)."""

from adaptive.calibration._betting import (
    agrapa_log_p,
    agrapa_upper_bound,
    star_log_p,
    star_upper_bound,
    wsr_log_p,
    wsr_upper_bound,
)
from adaptive.calibration._binomial import (
    binomial_log_p,
    binomial_upper_bound,
    log_betainc,
    ratio_log_p,
)
from adaptive.calibration._certificate import Certificate
from adaptive.calibration._control import RiskControlResult, control_risk
from adaptive.calibration._errors import (
    AdaptiveError,
    CertificateError,
    CertificateMismatchError,
    InvalidArgumentError,
    InvalidTypeError,
    UnsupportedError,
)
from adaptive.calibration._methods import (
    AbstractRiskTest,
    ExactBinomial,
    GrowthBets,
    PredictableBets,
    TargetBets,
)
from adaptive.calibration._planning import minimum_units, plan_units
from adaptive.calibration._risk_curve import (
    DepartureCurve,
    RiskCurve,
    departure_curve,
    risk_curve,
    stop_stages,
)
from adaptive.calibration._testing import fixed_sequence
from adaptive.calibration._trace import (
    Trace,
)
from adaptive.calibration._trace_io import (
    load_trace,
    save_trace,
)

__all__ = [
    "AbstractRiskTest",
    "AdaptiveError",
    "Certificate",
    "CertificateError",
    "CertificateMismatchError",
    "DepartureCurve",
    "ExactBinomial",
    "GrowthBets",
    "InvalidArgumentError",
    "InvalidTypeError",
    "PredictableBets",
    "RiskControlResult",
    "RiskCurve",
    "TargetBets",
    "Trace",
    "UnsupportedError",
    "agrapa_log_p",
    "agrapa_upper_bound",
    "binomial_log_p",
    "binomial_upper_bound",
    "control_risk",
    "departure_curve",
    "fixed_sequence",
    "load_trace",
    "log_betainc",
    "minimum_units",
    "plan_units",
    "ratio_log_p",
    "risk_curve",
    "save_trace",
    "star_log_p",
    "star_upper_bound",
    "stop_stages",
    "wsr_log_p",
    "wsr_upper_bound",
]
