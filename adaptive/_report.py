"""A calibration as one HTML page that needs nothing else."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from adaptive._display import RiskPathDisplay
from adaptive._display_depth import ExitDepthDisplay, TokenDepthDisplay
from adaptive._display_walk import Walk
from adaptive.calibration import Certificate, CertificateError
from adaptive.calibration._extras import optional
from adaptive.policies import Policy

_TEMPLATE = Path(__file__).with_name("_report.html")
#: Of lists longer than this the first few are shown: the whole certificate ends the page.
_LONGEST, _FEW = 12, 3


def calibration_report(policy: Policy, *, examples: Sequence[TokenDepthDisplay] = ()) -> str:
    """Describe a calibration on one HTML page: promise, evidence, pictures, how to verify.

    Parameters
    ----------
    policy : Policy
        With a certificate.
    examples : sequence of TokenDepthDisplay
        Texts to show, each token in the colour of its depth.

    Returns
    -------
    str
        A whole page. It loads nothing and runs no script, and whatever the certificate or the
        texts hold is shown as text.

    Raises
    ------
    CertificateError
        If the policy has no certificate.
    MissingExtraError
        If there is something to draw and matplotlib is not installed.
    """
    certificate = policy.certificate
    if certificate is None:
        raise CertificateError("a report is about a certificate, and this policy has none")
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        certificate=certificate,
        summary=_summary(policy, certificate),
        pictures=_pictures(certificate),
        members=_members(certificate),
        walk=_walk(certificate),
        examples=[Markup(display.to_html()) for display in examples],  # escapes its text itself
        tables=[
            ("Decoding", _facts(certificate.decoding)),
            ("Split", _facts(certificate.split)),
            ("Fingerprints", _facts(certificate.fingerprints)),
            ("Versions", _facts(certificate.versions)),
        ],
    )


def _summary(policy: Policy, certificate: Certificate) -> list[tuple[str, str]]:
    risks = certificate.risk if isinstance(certificate.risk, dict) else None
    named = {certificate.loss: certificate.risk} if risks is None else risks
    rows = [("promise", " and ".join(f"mean {name} ≤ {risk:g}" for name, risk in named.items()))]
    rows += [
        ("confidence", f"{1 - certificate.delta:g}"),
        ("units tested", f"{certificate.n} ({certificate.unit}s)"),
        ("test", f"{certificate.method}, {certificate.procedure}"),
    ]
    if certificate.holds:
        bounds = certificate.evidence.get("upper_bound") or {}
        rows += [(f"upper bound of {name}", f"{value:.4g}") for name, value in bounds.items()]
    if certificate.cost is not None:
        walk = _walk(certificate)
        item = "token" if walk is None else walk.item
        rows.append(("measured cost", f"{1e3 * certificate.cost:.3g} ms per {item}"))
    rows += [("rule", str(policy.rule)), ("score", str(policy.score)), ("mode", policy.mode)]
    return rows


def _pictures(certificate: Certificate) -> list[tuple[Markup, str]]:
    walk = _walk(certificate)
    if walk is None:
        return []
    path = RiskPathDisplay.from_certificate(certificate)
    found = [(_svg(path), "Risk on the test units, and cost, along the path.")]
    if any(map(sum, certificate.evidence.get("exit_counts", {}).values())):
        depth = ExitDepthDisplay.from_certificate(certificate)
        run = "member in use" if certificate.holds else "last member tested"
        found.append(
            (_svg(depth), f"Where the {walk.item}s of the {run} stopped, in its test run.")
        )
    return found


def _walk(certificate: Certificate) -> Walk | None:
    """Members that one risk was tested on, if there are any."""
    tested = certificate.evidence.get("columns") and not isinstance(certificate.risk, dict)
    return Walk.of(certificate) if tested else None


def _svg(display: RiskPathDisplay | ExitDepthDisplay) -> Markup:
    """Draw a display as an SVG element; its texts are numbers and words of ours."""
    matplotlib = optional("matplotlib")
    figure = optional("matplotlib.figure").Figure(figsize=(5.4, 4.2), layout="constrained")
    display.plot(figure.subplots())
    drawn = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "adaptive"}):
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    svg = drawn.getvalue()
    return Markup(svg[svg.index("<svg") :])


def _members(certificate: Certificate) -> list[dict[str, Any]]:
    """One row per member the test visited; full computation first."""
    walk, evidence = _walk(certificate), certificate.evidence
    if walk is None:
        return []
    tests = dict(
        zip(
            map(int, evidence["columns"]),
            zip(evidence["log_p_values"], evidence["levels"], strict=True),
            strict=True,
        )
    )
    rows = []
    for place, column in enumerate(walk.columns):
        time = walk.times[place] if walk.times else None
        cells = {
            "name": str(column) if place else "full",
            "chosen": certificate.holds and column == certificate.index,
            "depth": f"{walk.depths[place]:.2f}" if walk.depths else "–",
            "time": "–" if time is None else f"{time:.3g}",
        }
        if column in tests:
            log_p, level = tests[column]
            cells |= {
                "mean": f"{walk.means[place]:.4f}",
                "p": f"{math.exp(log_p):.3g}",
                "level": f"{level:.3g}",
                "certified": "yes" if walk.certified[place] else "no",
            }
        else:
            cells |= {"mean": "0", "p": "–", "level": "–", "certified": "by construction"}
        rows.append(cells)
    return rows


def _facts(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and values as text, long lists counted."""
    return [(name.replace("_", " "), _shown(value)) for name, value in values.items()]


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_shown(inner)}" for name, inner in value.items()) or "–"
    if isinstance(value, Iterable) and not isinstance(value, str):
        items = list(value)
        long = len(items) > _LONGEST
        shown = ", ".join(map(_shown, items[: _FEW if long else _LONGEST]))
        more = f", … ({len(items)} in all)" if long else ""
        return (shown + more) or "–"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
