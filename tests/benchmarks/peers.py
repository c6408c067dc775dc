"""The conformance suite on this library and on installable peers; prints the table of the docs.

Every function is judged only on losses it is stated for, and called as its documentation says. Run:

    python tests/benchmarks/peers.py [replicates]
"""

from __future__ import annotations

import sys
import warnings
from importlib import metadata

import numpy as np
from scipy import stats

from adaptive.calibration import (
    binomial_log_p,
    binomial_upper_bound,
    control_risk,
    hoeffding_bentkus_log_p,
    hoeffding_bentkus_upper_bound,
    maurer_pontil_upper_bound,
    mixture_log_p,
    star_log_p,
    wsr_log_p,
    wsr_upper_bound,
)
from adaptive.calibration.conformance import (
    SCENARIOS,
    check_control,
    check_p_value,
    check_upper_bound,
)

BINARY = tuple(s for s in SCENARIOS if s.law.name == "" and s.tokens == 1)[:6]


def by_column(losses):
    return losses.sum(axis=0), losses.shape[0]


# --- ours ---------------------------------------------------------------------------------------


def our_p_values():
    yield (
        "binomial_log_p",
        "binary",
        False,
        lambda x, r: np.exp(binomial_log_p(*by_column(x), risk=r)),
    )
    yield (
        "hoeffding_bentkus_log_p",
        "bounded",
        False,
        lambda x, r: np.minimum(1, np.exp(hoeffding_bentkus_log_p(*by_column(x), risk=r))),
    )
    yield "wsr_log_p", "signed", True, lambda x, r: np.exp(wsr_log_p(x, risk=r, delta=0.1))
    yield "star_log_p", "signed", True, lambda x, r: np.exp(star_log_p(x, risk=r, delta=0.1))
    yield "mixture_log_p", "signed", False, lambda x, r: np.exp(mixture_log_p(x, risk=r))


def our_bounds():
    yield (
        "binomial_upper_bound",
        "binary",
        lambda x, d: binomial_upper_bound(*by_column(x), delta=d),
    )
    yield (
        "hoeffding_bentkus_upper_bound",
        "bounded",
        lambda x, d: hoeffding_bentkus_upper_bound(*by_column(x), delta=d),
    )
    yield (
        "maurer_pontil_upper_bound",
        "bounded",
        lambda x, d: maurer_pontil_upper_bound(x, delta=d),
    )
    yield "wsr_upper_bound", "signed", lambda x, d: wsr_upper_bound(x, delta=d)


def our_control(losses, risk, delta):
    return control_risk(losses, risk=risk, delta=delta, loss_type="binary").index


# --- peers --------------------------------------------------------------------------------------


def mapie_p_values():
    from mapie.risk_control.methods import compute_hoeffding_bentkus_p_value as peer

    yield (
        "compute_hoeffding_bentkus_p_value",
        "bounded",
        False,
        lambda x, r: peer(x.mean(axis=0), x.shape[0], r)[:, 0],
    )
    yield (
        "compute_hoeffding_bentkus_p_value(binary=True)",
        "binary",
        False,
        lambda x, r: peer(x.mean(axis=0), x.shape[0], r, binary=True)[:, 0],
    )


def mapie_bounds():
    from mapie.risk_control.methods import get_r_hat_plus as peer

    def bound(kind):
        def run(losses, delta):
            parts = []
            for block in np.array_split(losses, max(1, losses.shape[1] // 50), axis=1):
                grid = np.linspace(0.0, 1.0, block.shape[1] + 1)[1:]
                parts.append(peer(block, grid, "rcps", kind, delta, 0.25)[1])
            return np.concatenate(parts)

        return run

    for kind in ("hoeffding", "bernstein", "wsr"):
        yield f"get_r_hat_plus(bound={kind!r})", "bounded", bound(kind)


def mapie_controls():
    from mapie.risk_control._base_controller import ltt_procedure as peer

    def control(rule):
        def run(losses, risk, delta):
            table = losses[:, 1:]
            n = np.full((1, table.shape[1]), float(table.shape[0]))
            level = np.array([[risk]])
            valid, _ = peer(table.mean(axis=0)[None], level, delta, n, True, rule)
            return max(valid[0]) + 1 if valid[0] else None

        return run

    for rule in ("bonferroni", "bonferroni_holm", "fixed_sequence"):
        yield f"ltt_procedure({rule!r})", control(rule)


def other_bounds():
    from statsmodels.stats.proportion import proportion_confint

    def interval(method):
        return lambda x, d: proportion_confint(*by_column(x), alpha=2 * d, method=method)[1]

    yield "statsmodels", "proportion_confint('beta')", "binary", interval("beta")
    yield "statsmodels", "proportion_confint('wilson')", "binary", interval("wilson")
    yield "statsmodels", "proportion_confint('normal')", "binary", interval("normal")


def other_p_values():
    def t_test(losses, level):
        return np.nan_to_num(
            stats.ttest_1samp(losses, level, axis=0, alternative="less").pvalue, nan=1.0
        )

    def binomial_test(losses, level):
        return stats.binomtest(int(losses.sum()), losses.size, level, alternative="less").pvalue

    yield "scipy", "binomtest", "binary", binomial_test, False
    yield "scipy", "ttest_1samp (asymptotic)", "bounded", t_test, True


def rows(replicates):
    settings = {"replicates": replicates, "rng": 0}
    calls = {"batched": True, **settings}
    for name, laws, ordered, call in our_p_values():
        yield (
            "this library",
            check_p_value(call, name=name, laws=laws, ordered=ordered, **calls),
            laws,
        )
    for name, laws, call in our_bounds():
        yield "this library", check_upper_bound(call, name=name, laws=laws, **calls), laws
    setup = {"scenarios": BINARY, "settings": ((100, 0.1, 0.1),), **settings}
    yield "this library", check_control(our_control, name="control_risk", **setup), "binary"
    for name, laws, ordered, call in mapie_p_values():
        yield "MAPIE", check_p_value(call, name=name, laws=laws, ordered=ordered, **calls), laws
    for name, laws, call in mapie_bounds():
        yield "MAPIE", check_upper_bound(call, name=name, laws=laws, **calls), laws
    for name, call in mapie_controls():
        yield "MAPIE", check_control(call, name=name, **setup), "binary"
    for package, name, laws, call, batched in other_p_values():
        found = check_p_value(call, name=name, laws=laws, batched=batched, **settings)
        yield package, found, laws
    for package, name, laws, call in other_bounds():
        yield package, check_upper_bound(call, name=name, laws=laws, **calls), laws


def main():
    warnings.simplefilter("ignore")
    replicates = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    versions = {p: metadata.version(p) for p in ("MAPIE", "scipy", "statsmodels", "numpy")}
    print(f"{replicates} replicates per check; {versions}\n")
    print("| package | function | losses | checks held | the worst that did not |")
    print("|---|---|---|---|---|")
    for package, report, laws in rows(replicates):
        held = len(report.findings) - len(report.failures)
        worst = max(report.failures, key=lambda f: f.found - f.limit, default=None)
        text = (
            "" if worst is None else f"{worst.check}: {worst.found:.3g} (limit {worst.limit:.3g})"
        )
        print(
            f"| {package} | `{report.name}` | {laws} | {held} of {len(report.findings)} | {text} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
