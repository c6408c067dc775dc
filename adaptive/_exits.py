"""Exits on a model: where it may stop, how it is read there, and what shaped them."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from adaptive._device import follow
from adaptive._exits_files import ExitsFiles
from adaptive._families import Readout, layers_of
from adaptive._fingerprint import lineage, related
from adaptive.calibration import (
    AdaptiveError,
    InvalidArgumentError,
    InvalidTypeError,
)
from adaptive.calibration._validation import check_count
from adaptive.policies import Features
from adaptive.policies._hub import pushed

_FILES = ExitsFiles("exits.json", "exits.safetensors", noun="exits")
_attached: weakref.WeakKeyDictionary[PreTrainedModel, Exits] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class ExitsRecord:
    """Where exits come from.

    Parameters
    ----------
    model : str
        Lineage of the model they belong to: its fingerprint up to precision.
    units : tuple of str
        Hashes of the units (prompts) that shaped them. ``calibrate`` keeps these out of its test.
    settings : dict
        Training settings, seed included; empty for untrained exits.
    """

    model: str
    units: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Self:
        """Rebuild from the fields as JSON gives them."""
        return cls(model=raw["model"], units=tuple(raw["units"]), settings=raw["settings"])


class Exits(nn.Module):
    """Exits after chosen layers of a causal language model.

    At exit ``e`` the hidden state goes through the exit's translator, a low-rank correction of
    the residual stream that starts at zero, and then through the model's own final norm and head.
    A linear probe on the hidden state estimates whether that readout agrees with the full model.

    Parameters
    ----------
    layers : tuple of int
        Number of layers below each exit, ascending, each in 1..L-1.
    width : int
        Width of the residual stream.
    rank : int
        Rank of the translators; 0 reads the hidden state as it is.
    record : ExitsRecord
        Where they come from.

    Attributes
    ----------
    probe_weight, probe_bias : Tensor, float32 [n_exits, width] and [n_exits]
        ``hidden @ weight + bias`` is the logit of agreement.
    kept : Tensor, int64 [n_kept]
        The pruned vocabulary, most frequent first; empty if none was chosen.
    """

    def __init__(
        self, layers: Sequence[int], width: int, *, rank: int, record: ExitsRecord
    ) -> None:
        super().__init__()
        self.layers = tuple(int(layer) for layer in layers)
        self.rank = rank
        self.record = record
        count = len(self.layers)
        self.down = nn.Parameter(torch.zeros(count, rank, width), requires_grad=False)
        self.up = nn.Parameter(torch.zeros(count, width, rank), requires_grad=False)
        self.shift = nn.Parameter(torch.zeros(count, width), requires_grad=False)
        self.probe_weight = nn.Parameter(torch.zeros(count, width), requires_grad=False)
        self.probe_bias = nn.Parameter(torch.zeros(count), requires_grad=False)
        self.kept = nn.Parameter(torch.zeros(0, dtype=torch.int64), requires_grad=False)

    @property
    def trained(self) -> bool:
        """Whether the probes were trained; the default score means nothing before."""
        return bool(self.record.settings)

    def translate(self, exit: int, hidden: Tensor) -> Tensor:
        """Correct a hidden state ``[..., width]`` at an exit, in front of the final norm."""
        if self.rank == 0:
            return hidden
        given = hidden.to(self.down.dtype)  # translators stay float32 in a model of any precision
        correction = (given @ self.down[exit].T) @ self.up[exit].T + self.shift[exit]
        return hidden + correction.to(hidden.dtype)

    def probe(self, exit: int, hidden: Tensor) -> Tensor:
        """Logit of agreement with the full model, float32 ``[...]``, for ``[..., width]``."""
        logit: Tensor = hidden.float() @ self.probe_weight[exit] + self.probe_bias[exit]
        return logit

    def features(
        self,
        needs: frozenset[str],
        exit: int,
        hidden: Tensor,
        *,
        previous: Tensor | None,
        position: Tensor,
        readout: Readout,
        rows: list[int] | None = None,
    ) -> Features:
        """Compute what a policy asked for, for ``hidden [batch, width]``, and nothing else.

        Logits are formed for ``rows`` only, if given; for the others they are void.
        """
        logits = answer = pruned = head = None
        if "logits" in needs or "answer" in needs:
            states = self.translate(exit, hidden)
            logits = readout(states) if rows is None else readout.among(states, rows)
            answer = logits.argmax(dim=-1) if "answer" in needs else None
        elif "head" in needs:
            head = partial(readout.at, self.translate(exit, hidden))
        if "pruned_logits" in needs:
            pruned = self._pruned(readout)(self.translate(exit, hidden))
        return Features(
            stage=exit,
            position=position,
            probe=self.probe(exit, hidden) if "probe" in needs else None,
            hidden=hidden if "hidden" in needs else None,
            previous=previous if "previous" in needs else None,
            logits=logits,
            head=head,
            pruned_logits=pruned,
            answer=answer,
        )

    def _pruned(self, readout: Readout) -> Callable[[Tensor], Tensor]:
        """Readout over the kept vocabulary."""
        if self.kept.numel() == 0:
            raise InvalidArgumentError(
                "policy",
                "a score on the pruned vocabulary",
                "exits trained with `kept_vocabulary > 0`",
            )
        return readout.over(self.kept)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write ``exits.json`` and ``exits.safetensors`` into ``directory``, beside the model."""
        config = {"layers": list(self.layers), "width": self.down.shape[-1], "rank": self.rank}
        _FILES.write(directory, config | {"record": asdict(self.record)}, self)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str = "Upload exits",
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
        """Read exits saved by :meth:`save_pretrained` or uploaded by ``push_to_hub``.

        Parameters
        ----------
        directory : str or Path
            A directory, or ``namespace/name`` of a repository on the hub.
        revision : str, optional
            Branch, tag or commit on the hub. Name a commit where a certificate matters: a branch
            may come to hold another set of exits.
        token : str or bool, optional
            For a private repository; by default the one saved on this machine.
        **download
            As for ``huggingface_hub.snapshot_download``: ``cache_dir``, ``force_download``,
            ``local_files_only``.

        Raises
        ------
        CertificateError
            If there are none, or they are damaged or of an unknown schema.
        """
        return _FILES.read(directory, cls._built, revision=revision, token=token, **download)

    @classmethod
    def _built(cls, config: dict[str, Any], weights: dict[str, Tensor]) -> Self:
        record = ExitsRecord.from_dict(config["record"])
        exits = cls(config["layers"], config["width"], rank=config["rank"], record=record)
        exits.kept = nn.Parameter(weights["kept"], requires_grad=False)
        exits.load_state_dict(weights)
        return exits


def default_layers(layers: int) -> tuple[int, ...]:
    """Three exits, after a quarter, a half and three quarters of the layers."""
    return tuple(sorted({max(1, round(layers * part)) for part in (0.25, 0.5, 0.75)} - {layers}))


def layer_counts(layers: Sequence[int] | None, total: int) -> tuple[int, ...]:
    """Return the layers below each exit, those of :func:`default_layers` if none are given.

    Raises
    ------
    InvalidTypeError, InvalidArgumentError
        If they are no integers, not ascending, or out of range.
    """
    expected = f"ascending layer counts in 1..{total - 1}"
    try:
        chosen = default_layers(total) if layers is None else tuple(map(operator.index, layers))
    except TypeError as error:
        raise InvalidTypeError("layers", layers, expected) from error
    rising = all(a < b for a, b in pairwise(chosen))
    if not chosen or not rising or chosen[0] < 1 or chosen[-1] >= total:
        raise InvalidArgumentError("layers", chosen, expected)
    return chosen


@torch.inference_mode(False)  # a run under inference mode may load them, and they outlive it
def attach_exits(
    model: PreTrainedModel,
    layers: Sequence[int] | Exits | str | Path | None = None,
    *,
    rank: int = 0,
) -> Exits:
    """Give a model exits.

    The model itself is not changed: the exits are remembered beside it and go with it.

    Parameters
    ----------
    model : PreTrainedModel
        A causal language model of a supported family.
    layers : sequence of int, Exits, str or Path, optional
        Number of layers below each exit (ascending, each in 1..L-1); or exits, or the directory
        or hub repository they were saved in. ``None`` puts three exits at a quarter, a half and
        three quarters.
    rank : int
        Rank of the exits' translators (used when ``layers`` are numbers).

    Returns
    -------
    Exits
        Untrained if made here: train them with :func:`train_exits`.

    Raises
    ------
    InvalidArgumentError, InvalidTypeError
        If a layer or the rank is out of range or no integer, or the exits belong to another model.
    UnsupportedError
        If the model's family is not supported; the message names what is missing.
    """
    total = len(layers_of(model))
    if isinstance(layers, str | Path):
        layers = Exits.from_pretrained(layers)
    if isinstance(layers, Exits):
        exits = layers
        if not related(exits.record.model, lineage(model)):
            raise InvalidArgumentError(
                "exits",
                f"exits of model {exits.record.model}",
                f"exits of this model in any precision, {lineage(model)}",
            )
    else:
        chosen = layer_counts(layers, total)
        rank = check_count("rank", rank, least=0)
        record = ExitsRecord(model=lineage(model))
        exits = Exits(chosen, model.config.hidden_size, rank=rank, record=record)
    exits = exits.to(model.device)
    _attached[model] = exits
    return exits


def get_exits(model: PreTrainedModel) -> Exits | None:
    """Return a model's exits: attached ones, or those saved in the directory it was loaded from."""
    if model not in _attached:
        home = getattr(model.config, "_name_or_path", "")
        if not _FILES.beside(home):
            return None
        attach_exits(model, Path(home))
    follow(_attached[model], model.device)
    return _attached[model]


def detach_exits(model: PreTrainedModel) -> None:
    """Forget a model's exits and everything prepared for them.

    Exits saved in the directory the model was loaded from are found again when next needed.
    """
    from adaptive._tier import forget

    _attached.pop(model, None)
    forget(model)


class NoExitsError(AdaptiveError, RuntimeError):
    """A policy was passed for a model that has no exits."""


def require_exits(model: PreTrainedModel) -> Exits:
    """Return a model's exits.

    Raises
    ------
    NoExitsError
        If it has none.
    """
    exits = get_exits(model)
    if exits is None:
        raise NoExitsError(
            "this model has no exits: attach saved ones with `attach_exits(model, "
            "directory)`, train new ones with "
            "`train_exits(model, prompts)`, or let `calibrate(model, prompts)` do it"
        )
    return exits
