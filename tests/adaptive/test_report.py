"""The page of a calibration: whole, self-contained, in the words of what was calibrated."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

pytest.importorskip("matplotlib")

from adaptive import Policy, Threshold, control_risk
from adaptive._cli import app
from adaptive.calibration import Certificate, CertificateError
from adaptive.displays import TokenDepthDisplay, calibration_report
from adaptive.policies import MaxProbability

OPEN = {"meta", "path", "use", "br"}  # elements without an end


class Page(HTMLParser):
    """Rows of tables, texts, and whether every element is closed in its turn."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: list[str] = []
        self.inside: list[str] = []
        self.addresses: list[str] = []
        self.feed(page)
        assert self.inside == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in OPEN:
            self.inside.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in OPEN:
            assert self.inside.pop() == tag

    def handle_data(self, data: str) -> None:
        if "tr" in self.inside and self.rows[-1]:
            self.rows[-1][-1] += data.strip()


def certificate(**evidence: Any) -> Certificate:
    """Of a test of arrays, with what `calibrate` adds."""
    losses = [[0.0, 0.0, 0.0]] * 58 + [[0.0, 0.0, 1.0]] * 2 + [[0.0, 1.0, 1.0]] * 30
    found = control_risk(losses[:88], risk=0.4, delta=0.1, loss_type="binary", rng=0)
    return replace(found.certificate, evidence=found.certificate.evidence | evidence)


def policy_with(found: Certificate) -> Policy:
    return replace(Policy(MaxProbability(), Threshold(0.9), stages=(0,)), certificate=found)


TOKENS = {
    "mean_depth": {"0": 12.0, "1": 8.0, "2": 6.0},
    "milliseconds_per_token": {"0": 20.0, "1": 15.0},
    "exit_layers": [4, 12],
    "exit_counts": {"1": [50, 50], "2": [75, 25]},
}
INPUTS = {
    "mean_depth": {"0": 3.0, "1": 2.0, "2": 1.5},
    "milliseconds_per_input": {"0": 0.2, "1": 0.1},
    "exit_layers": [1, 2, 3],
    "exit_counts": {"1": [20, 20, 20], "2": [40, 10, 10]},
    "steps": "models",
    "full_computation_tested": False,
}


@pytest.mark.parametrize(
    ("evidence", "depth", "time"),
    [
        (TOKENS, "layers per token", "ms per token"),
        (INPUTS, "models per input", "ms per input"),
    ],
)
def test_members_are_listed_in_the_words_of_what_was_calibrated(
    evidence: dict[str, Any], depth: str, time: str
) -> None:
    found = certificate(**evidence)
    page = Page(calibration_report(policy_with(found)))
    start = next(i for i, row in enumerate(page.rows) if row[0] == "member")
    assert page.rows[start][-2:] == [depth, time]
    full, first = page.rows[start + 1 : start + 3]
    assert full[0] == "full"
    assert full[4] == "by construction"
    assert first[0] == "1"
    assert float(first[1]) == pytest.approx(found.evidence["means"]["loss"][0], abs=1e-4)
    assert first[4] == ("yes" if 1 in found.evidence["certified"] else "no")
    assert page.tags.count("svg") == 2
    other = {"token": "per input", "input": "per token"}[time.split()[-1]]
    assert other not in " ".join(" ".join(row) for row in page.rows)


def test_the_page_needs_nothing_else() -> None:
    page = calibration_report(policy_with(certificate(**TOKENS)))
    found = Page(page)
    assert all(address.startswith("#") for address in found.addresses)  # marks of the pictures
    assert not {"script", "link", "img", "iframe", "object"} & set(found.tags)
    assert "url(http" not in page
    assert "default-src 'none'" in page


def test_what_a_certificate_holds_is_shown_as_text() -> None:
    hostile = "<script>alert(1)</script>"
    found = replace(certificate(**TOKENS), split={"pool": hostile}, notes=(hostile,))
    text = TokenDepthDisplay(hostile, (hostile,), (0,), (4, 12))
    page = calibration_report(policy_with(found), examples=[text])
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 4
    assert "script" not in Page(page).tags


def test_the_whole_certificate_is_at_the_end() -> None:
    found = certificate(**TOKENS)
    page = calibration_report(policy_with(found))
    (text,) = re.findall(r"as JSON</summary>\n<pre>(.*?)</pre>", page, re.DOTALL)
    parser = HTMLParser()
    read: list[str] = []
    parser.handle_data = read.append  # type: ignore[method-assign]
    parser.feed(text)
    assert json.loads("".join(read)) == json.loads(found.to_json())


def test_arrays_and_failures_have_a_page_too() -> None:
    bare = certificate()  # no depths, no times, no counts
    page = Page(calibration_report(policy_with(bare)))
    assert page.tags.count("svg") == 1
    failed = control_risk([[0.0, 1.0]] * 40, risk=0.1, loss_type="binary").certificate
    text = calibration_report(policy_with(failed))
    assert "nothing certified" in text
    untested = replace(bare, evidence={}, holds=False, index=None)
    assert "svg" not in Page(calibration_report(policy_with(untested))).tags


def test_a_policy_without_a_certificate_has_no_report() -> None:
    with pytest.raises(CertificateError, match="this policy has none"):
        calibration_report(Policy(MaxProbability(), Threshold(0.9), stages=(0,)))


def test_the_command_writes_the_page(tmp_path: Path) -> None:
    policy_with(certificate(**TOKENS)).save_pretrained(tmp_path / "policy")
    out = tmp_path / "page.html"
    done = CliRunner().invoke(app, ["report", str(tmp_path / "policy"), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert Page(out.read_text()).tags.count("svg") == 2
    refused = CliRunner().invoke(
        app, ["report", str(tmp_path / "policy"), "--out", str(out), "--prompt", "def"]
    )
    assert refused.exit_code != 0
    assert "together with `model`" in str(refused.exception)
