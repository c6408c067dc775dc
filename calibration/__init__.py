"""Statistics for adaptive computation: arrays in, certificates out (no torch)."""

from adaptive.calibration._bernstein import (
    maurer_pontil_log_p,
    maurer_pontil_upper_bound,
    normal_log_p,
    normal_upper_bound,
)
from adaptive.calibration._bet_tests import GrowthBets, MixtureBets, PredictableBets, TargetBets
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
from adaptive.calibration._hoeffding import (
    bentkus_log_p,
    bentkus_upper_bound,
    hoeffding_bentkus_log_p,
    hoeffding_bentkus_upper_bound,
    hoeffding_log_p,
    hoeffding_upper_bound,
    kl_hoeffding_log_p,
    kl_hoeffding_upper_bound,
)
from adaptive.calibration._mixture import (
    LossHistogram,
    beta_mixture_log_p,
    beta_mixture_log_wealth,
    constant_bet_log_wealth,
    mixture_log_p,
    mixture_upper_bound,
)
from adaptive.calibration._planning import minimum_units, plan_units
from adaptive.calibration._risk_curve import (
    DepartureCurve,
    RiskCurve,
    departure_curve,
    risk_curve,
    stop_stages,
)
from adaptive.calibration._risk_test import AbstractRiskTest
from adaptive.calibration._sum_tests import (
    Bentkus,
    BetaMixture,
    ExactBinomial,
    HoeffdingBentkus,
    KLHoeffding,
    MaurerPontil,
    NormalApproximation,
)
from adaptive.calibration._testing import fixed_sequence
from adaptive.calibration._trace import Trace
from adaptive.calibration._trace_io import load_trace, save_trace

__all__ = [
    "AbstractRiskTest",
    "AdaptiveError",
    "Bentkus",
    "BetaMixture",
    "Certificate",
    "CertificateError",
    "CertificateMismatchError",
    "DepartureCurve",
    "ExactBinomial",
    "GrowthBets",
    "HoeffdingBentkus",
    "InvalidArgumentError",
    "InvalidTypeError",
    "KLHoeffding",
    "LossHistogram",
    "MaurerPontil",
    "MixtureBets",
    "NormalApproximation",
    "PredictableBets",
    "RiskControlResult",
    "RiskCurve",
    "TargetBets",
    "Trace",
    "UnsupportedError",
    "agrapa_log_p",
    "agrapa_upper_bound",
    "bentkus_log_p",
    "bentkus_upper_bound",
    "beta_mixture_log_p",
    "beta_mixture_log_wealth",
    "binomial_log_p",
    "binomial_upper_bound",
    "constant_bet_log_wealth",
    "control_risk",
    "departure_curve",
    "fixed_sequence",
    "hoeffding_bentkus_log_p",
    "hoeffding_bentkus_upper_bound",
    "hoeffding_log_p",
    "hoeffding_upper_bound",
    "kl_hoeffding_log_p",
    "kl_hoeffding_upper_bound",
    "load_trace",
    "log_betainc",
    "maurer_pontil_log_p",
    "maurer_pontil_upper_bound",
    "minimum_units",
    "mixture_log_p",
    "mixture_upper_bound",
    "normal_log_p",
    "normal_upper_bound",
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
