"""Rotary tables: which schemes are known, and up to which length a text leaves them as they are."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

from adaptive._families._registry import family_of
from adaptive.calibration import UnsupportedError

#: Schemes whose tables do not depend on how long the text has grown.
_FIXED = frozenset({"default", "linear", "llama3", "yarn", "proportional"})
#: Schemes whose tables change at a length. Up to there they are as good as fixed.
_SWITCHING = frozenset({"dynamic", "longrope"})


def rotary_of(model: Any) -> Any:
    """Return the module with a model's rotary tables, or ``None`` where there is none."""
    native = family_of(model).native
    return None if native is None or native.rotary is None else attrgetter(native.rotary)(model)


def unknown_scheme(model: Any) -> str | None:
    """Return the name of a rotary scheme that is not known, if the model has one."""
    unknown = set(_schemes(rotary_of(model)).values()) - _FIXED - _SWITCHING
    return min(unknown) if unknown else None


def longest_text(model: Any) -> int | None:
    """Most slots, prompt included, of a text during which no rotary table changes."""
    limits = []
    for rotary in _rotaries(model):
        for kind, scheme in _schemes(rotary).items():
            if scheme == "dynamic":
                limits.append(rotary.original_max_seq_len - 1)
            elif scheme == "longrope":
                settings = rotary.config.rope_parameters
                settings = settings if kind is None else settings[kind]
                limits.append(settings["original_max_position_embeddings"])
    return min(limits, default=None)


def room_for(model: Any, most: int) -> int:
    """Slots that the model surely has a position for: ``most``, or fewer."""
    limits = (longest_text(model), getattr(model.config, "max_position_embeddings", None))
    return min([most, *(limit for limit in limits if limit is not None)])


def check_length(limit: int | None, max_length: int) -> None:
    """Refuse a text that may outgrow its rotary tables.

    Raises
    ------
    UnsupportedError
        Keys that wait for deeper layers would be rotated by other tables than ``generate`` uses.
    """
    if limit is not None and max_length > limit:
        raise UnsupportedError(
            f"a text of up to {max_length} tokens, prompt included, is not supported under a "
            f"policy for this model: its rotary tables change after {limit} tokens (`rope_type` "
            f"'dynamic' or 'longrope'). Ask for fewer new tokens or shorten the prompt"
        )


def _rotaries(model: Any) -> list[Any]:
    """Return all modules with rotary tables; where the inside is not known, by what they have."""
    if family_of(model).native is None:
        return [module for module in model.modules() if hasattr(module, "rope_type")]
    rotary = rotary_of(model)
    return [] if rotary is None else [rotary]


def _schemes(rotary: Any) -> dict[str | None, str]:
    found = getattr(rotary, "rope_type", {})
    return dict(found) if isinstance(found, dict) else {None: found}
