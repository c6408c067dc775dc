"""A policy: score, rule, stages it asks at, treatment of skipped layers, certificate."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor

from adaptive.calibration import (
    Certificate,
    CertificateError,
    InvalidArgumentError,
    InvalidTypeError,
)
from adaptive.policies._base import (
    AbstractRule,
    AbstractScore,
    Features,
    Scope,
    State,
    check_exits,
    check_stage,
    held,
    named,
    part,
    tupled,
)
from adaptive.policies._hub import located, pushed

Mode = Literal["exact", "propagate", "verify"]
_FILE = "policy.json"
_SCHEMA = 1
_SLACK = 1e-3  # a cosine rounds to a little above 1


@dataclass(frozen=True)
class Policy:
    """A complete stopping policy, immutable once certified.

    Parameters
    ----------
    score : AbstractScore
        How settled the answer looks after a stage.
    rule : AbstractRule
        When to stop, given the scores.
    stages : tuple of int
        Exits at which the policy is asked, ascending, each in 0..K-2.
    mode : {"exact", "propagate", "verify"}
        What happens to the keys and values that a stopped token owes (see the runtime guide).
    certificate : Certificate, optional
        What is promised for this policy, and on what evidence.

    Raises
    ------
    InvalidArgumentError
        If ``stages`` is empty or not ascending, ``mode`` is unknown, a finite threshold lies
        above every value of the score, the score has to be asked at another exit first, or score
        or rule have entries for fewer exits than are asked.
    InvalidTypeError
        If score or rule are something else.
    """

    score: AbstractScore
    rule: AbstractRule
    stages: tuple[int, ...]
    mode: Mode = "exact"
    certificate: Certificate | None = None

    def __post_init__(self) -> None:
        for name, kind in (("score", AbstractScore), ("rule", AbstractRule)):
            if not isinstance(getattr(self, name), kind):
                expected = f"an instance of an {kind.__name__}"
                raise InvalidTypeError(name, getattr(self, name), expected)
            object.__setattr__(self, name, tupled(getattr(self, name)))
        object.__setattr__(self, "stages", check_stage(self.stages))
        check_exits(self.score, self.stages)
        check_exits(self.rule, self.stages)
        if self.mode not in get_args(Mode):
            raise InvalidArgumentError("mode", self.mode, f"one of {', '.join(get_args(Mode))}")
        threshold = getattr(self.rule, "threshold", None) if self.rule.on_score else None
        if threshold is not None and self.score.upper + _SLACK < threshold < math.inf:
            name = type(self.score).__name__
            expected = f"at most {self.score.upper:g}, the largest {name}, or inf to never stop"
            raise InvalidArgumentError("threshold", threshold, expected)
        if self.score.first not in (None, self.stages[0]):
            expected = (
                f"exits from {self.score.first} on, the `first` of {type(self.score).__name__}"
            )
            raise InvalidArgumentError("stages", self.stages, expected)

    @property
    def needs(self) -> frozenset[str]:
        """Features that the score or the rule reads."""
        return frozenset(self.score.needs) | frozenset(self.rule.needs)

    def needs_at(self, stage: int) -> frozenset[str]:
        """Features that are read at this exit: what a loop has to compute there."""
        return self.score.needs_at(stage) | frozenset(self.rule.needs)

    @property
    def scope(self) -> Scope:
        """Who shares a decision: "row", or "batch" (then the batch is part of the policy)."""
        return self.rule.scope

    def init(self, batch_size: int, *, device: torch.device) -> State:
        """State of score and rule at the start of a sequence."""
        score = self.score.init(batch_size, device=device)
        rule = self.rule.init(batch_size, device=device)
        return named(score, "score") | named(rule, "rule")

    def update(self, features: Features, state: State) -> tuple[Tensor, Tensor, State]:
        """Ask at one stage.

        Rows outside ``features.running`` keep their memory; what is returned for them is void.

        Returns
        -------
        stop : Tensor, bool [batch]
        score : Tensor, float32 [batch]
        state : State
        """
        given, score_state = self.score.score(features, part(state, "score"))
        score = given.float()  # as in a trace, so that both compare the same number
        stop, rule_state = self.rule.decide(features, score, part(state, "rule"))
        new = named(score_state, "score") | named(rule_state, "rule")
        return stop, score, held(new, state, features.running)

    def advance(self, state: State) -> State:
        """State after a token is finished."""
        score, rule = part(state, "score"), part(state, "rule")
        return named(self.score.advance(score), "score") | named(self.rule.advance(rule), "rule")

    def member(self, knob: float) -> Self:
        """Return the member of the policy's family at this knob, uncertified."""
        return replace(self, rule=self.rule.with_knob(knob), certificate=None)

    def to_dict(self) -> dict[str, Any]:
        """JSON form, certificate included."""
        return {
            "schema": _SCHEMA,
            "score": self.score.to_dict(),
            "rule": self.rule.to_dict(),
            "stages": list(self.stages),
            "mode": self.mode,
            "certificate": None if self.certificate is None else self.certificate.to_dict(),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Rebuild from :meth:`to_dict`.

        Raises
        ------
        CertificateError
            If the schema version is unknown or a field is missing.
        """
        if not isinstance(data, dict) or data.get("schema") != _SCHEMA:
            found = data.get("schema") if isinstance(data, dict) else type(data).__name__
            raise CertificateError(
                f"policy schema {found!r} is not readable by this version (it reads {_SCHEMA})"
            )
        try:
            certificate = data["certificate"]
            return cls(
                score=AbstractScore.from_dict(data["score"]),
                rule=AbstractRule.from_dict(data["rule"]),
                stages=tuple(data["stages"]),
                mode=data["mode"],
                certificate=None if certificate is None else Certificate.from_dict(certificate),
            )
        except (KeyError, TypeError) as error:
            raise CertificateError(f"the policy file is damaged: {error!r}") from error

    def save_pretrained(self, directory: str | Path) -> Path:
        """Write ``policy.json`` into ``directory``, whole or not at all; return its path."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / _FILE
        partial = folder / f".{_FILE}.partial"
        partial.write_text(
            json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n", encoding="utf-8"
        )
        partial.replace(target)
        return target

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str = "Upload policy",
    ) -> str:
        """Upload what :meth:`save_pretrained` writes to a repository on the hub, made if need be.

        Parameters
        ----------
        repo_id : str
            ``namespace/name``, such as that of the model.
        private, token, revision, create_pr, commit_message
            As for models in transformers; ``revision`` is the branch that is written to.

        Returns
        -------
        str
            Address of the commit.
        """
        return pushed(
            self.save_pretrained,
            repo_id,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
        )

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        **download: Any,
    ) -> Self:
        """Read a policy saved by :meth:`save_pretrained` or uploaded by ``push_to_hub``.

        Parameters
        ----------
        directory : str or Path
            A directory, or ``namespace/name`` of a repository on the hub.
        revision : str, optional
            Branch, tag or commit on the hub. Name a commit where a certificate matters: a branch
            may come to hold another policy.
        token : str or bool, optional
            For a private repository; by default the one saved on this machine.
        **download
            As for ``huggingface_hub.snapshot_download``: ``cache_dir``, ``force_download``,
            ``local_files_only``.

        Raises
        ------
        CertificateError
            If there is no readable policy in ``directory``.
        """
        path = located(directory, [_FILE], revision=revision, token=token, **download)
        path = path / _FILE if path.is_dir() else path
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise CertificateError(
                f"no policy at {path}: `save_pretrained` of a policy writes one"
            ) from error
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise CertificateError(f"{path} is not a policy file: {error}") from error
        return cls.from_dict(data)


def members(policy: Policy, knobs: Sequence[float]) -> tuple[Policy, ...]:
    """Return the members of a policy's family at the given knobs, in order."""
    return tuple(policy.member(knob) for knob in knobs)
