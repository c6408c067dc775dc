"""The tests that risk control knows by name, and the choice among them from declared facts."""

from __future__ import annotations

from adaptive.calibration._bet_tests import GrowthBets, MixtureBets, PredictableBets, TargetBets
from adaptive.calibration._errors import InvalidArgumentError, InvalidTypeError
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

TESTS: tuple[type[AbstractRiskTest], ...] = (
    ExactBinomial,
    TargetBets,
    PredictableBets,
    GrowthBets,
    MixtureBets,
    HoeffdingBentkus,
    KLHoeffding,
    Bentkus,
    MaurerPontil,
    BetaMixture,
    NormalApproximation,
)
_STAR_LIMIT = 20_000


def choose_test(
    method: str | AbstractRiskTest, *, loss_type: str, n_units: int, fixed_level: bool
) -> AbstractRiskTest:
    """Return the test for declared facts; the losses are never looked at.

    `"auto"` takes the exact binomial test for binary losses, target-recalculating bets where each
    test has one level known beforehand (`fixed_level`) and at most 20,000 units, WSR bets
    elsewhere (their cost is a cumulative sum, and the difference in power has then vanished).
    """
    if isinstance(method, AbstractRiskTest):
        return method
    if not isinstance(method, str):
        raise InvalidTypeError("method", method, "a name or an instance of AbstractRiskTest")
    if method == "auto":
        if loss_type == "binary":
            return ExactBinomial()
        return TargetBets() if fixed_level and n_units <= _STAR_LIMIT else PredictableBets()
    for test in TESTS:
        if test.name == method:
            return test()
    names = ", ".join(repr(name) for name in ("auto", *(test.name for test in TESTS)))
    raise InvalidArgumentError("method", method, f"one of {names}")
