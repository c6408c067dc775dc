"""Short hashes that tell a model, its exits and its texts from others."""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

_SAMPLE = 1024
#: What a config says of files, versions and outputs does not change what the model computes.
_PASSING = frozenset(
    {
        "architectures",
        "dtype",
        "torch_dtype",
        "transformers_version",
        "use_cache",
        "return_dict",
        "output_hidden_states",
        "output_attentions",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "id2label",
        "label2id",
        "problem_type",
        "is_encoder_decoder",
        "chunk_size_feed_forward",
    }
)
_models: weakref.WeakKeyDictionary[nn.Module, tuple[tuple[Any, ...], str]] = (
    weakref.WeakKeyDictionary()
)


def text_hash(text: str) -> str:
    """Hash of a text after trimming outer white space, so that near-duplicates of a unit meet."""
    return hashlib.sha256(text.strip().encode("utf-8")).hexdigest()[:24]


def tokens_hash(tokens: Iterable[int]) -> str:
    """Hash of a token sequence."""
    return hashlib.sha256(",".join(map(str, tokens)).encode("ascii")).hexdigest()[:24]


def tensors_fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Hash of names, shapes, dtypes and evenly spaced elements of tensors.

    Up to 1,024 elements of each tensor are read, so a model of any size takes milliseconds. It
    tells another training state or dtype apart, not a change of single weights made on purpose.
    """
    digest = hashlib.sha256()
    for name, tensor in tensors:
        flat = tensor.detach().reshape(-1)
        step = max(1, flat.numel() // _SAMPLE)
        sample = flat[::step].to(torch.float64 if flat.is_floating_point() else torch.int64)
        digest.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype}".encode())
        digest.update(sample.cpu().numpy().tobytes())
    return digest.hexdigest()[:24]


def model_fingerprint(model: nn.Module) -> str:
    """Fingerprint of a model: architecture and weights, dtype included, device not.

    Remembered until a parameter is replaced or written to.
    """
    version = tuple((parameter.data_ptr(), parameter._version) for parameter in model.parameters())
    if model in _models and _models[model][0] == version:
        return _models[model][1]
    config = model.config.to_dict() if hasattr(model, "config") else {}  # type: ignore[operator,union-attr]
    kept = {
        key: value
        for key, value in config.items()
        if not key.startswith("_") and key not in _PASSING
    }
    text = json.dumps(kept, sort_keys=True, default=str) if kept else ""
    found = hashlib.sha256(
        (text + tensors_fingerprint(model.named_parameters())).encode()
    ).hexdigest()[:24]
    _models[model] = (version, found)
    return found
