"""Short hashes that tell a model, its exits and its texts from others."""

from __future__ import annotations

import functools
import hashlib
import json
import weakref
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

#: Words of eight bytes that are added up together, and that are held at a time.
_BLOCK, _SLAB = 1 << 14, 1 << 22
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
_remembered: weakref.WeakKeyDictionary[
    nn.Module, tuple[tuple[tuple[int, int], ...], dict[str, str]]
] = weakref.WeakKeyDictionary()


def text_hash(text: str) -> str:
    """Hash of a text."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:24]


def tokens_hash(tokens: Iterable[int]) -> str:
    """Hash of a token sequence."""
    return hashlib.sha256(",".join(map(str, tokens)).encode("ascii")).hexdigest()[:24]


def tensors_fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Hash of names, shapes, dtypes and all elements of tensors, the same on every device.

    Every block of words is summed with fixed odd weights modulo 2**64, so that no single element
    can change unnoticed; the sums are hashed. One pass at about the speed of memory.
    """
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype}".encode())
        for sums in _block_sums(tensor):
            digest.update(sums.cpu().numpy().tobytes())
    return digest.hexdigest()[:24]


def _block_sums(tensor: Tensor) -> Iterator[Tensor]:
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    whole = raw.numel() - raw.numel() % 8
    rest = torch.zeros(8, dtype=torch.uint8, device=raw.device)
    rest[: raw.numel() - whole] = raw[whole:]
    weights = _odd_weights().to(raw.device)
    aligned = raw[:whole] if raw.storage_offset() % 8 == 0 else raw[:whole].clone()
    for part in (aligned, rest):
        for slab in part.view(torch.int64).split(_SLAB):
            full = slab.numel() - slab.numel() % _BLOCK
            yield (slab[:full].view(-1, _BLOCK) * weights).sum(dim=1)
            yield (slab[full:] * weights[: slab.numel() - full]).sum()[None]


@functools.cache
def _odd_weights() -> Tensor:
    drawn = np.random.default_rng(0).integers(-(2**62), 2**62, size=_BLOCK, dtype=np.int64)
    return torch.from_numpy(2 * drawn + 1)


def model_fingerprint(model: nn.Module) -> str:
    """Fingerprint of a model: architecture and weights, dtype included, device not."""
    return _once(model, "own", lambda: _of_model(model, lambda tensor: tensor))


def lineage(model: nn.Module) -> str:
    """Fingerprints of a model's weights as rounded to bfloat16 and to float16, ``"a-b"``.

    The same model loaded in another precision shares at least one: see :func:`related`.
    """
    return "-".join(
        _once(model, str(dtype), lambda dtype=dtype: _of_model(model, _rounding(dtype)))  # type: ignore[misc]
        for dtype in (torch.bfloat16, torch.float16)
    )


def related(first: str, second: str) -> bool:
    """Whether two lineages are of the same weights up to precision."""
    return any(a == b for a, b in zip(first.split("-"), second.split("-"), strict=False))


def weights_fingerprint(module: nn.Module) -> str:
    """Fingerprint of a module's parameters."""
    return _once(module, "own", lambda: tensors_fingerprint(module.named_parameters()))


def _rounding(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor


def is_packed(tensor: Tensor) -> bool:
    """Whether a tensor is made of others, as quantised ones are of integers and scales."""
    return hasattr(tensor, "__tensor_flatten__")


def _plain_parts(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the tensors that one is made of."""
    if is_packed(tensor):
        for name in tensor.__tensor_flatten__()[0]:  # type: ignore[attr-defined]
            yield from _plain_parts(getattr(tensor, name))
    else:
        yield tensor


def _of_model(model: nn.Module, form: Callable[[Tensor], Tensor]) -> str:
    config = model.config.to_dict() if hasattr(model, "config") else {}  # type: ignore[operator,union-attr]
    kept = {
        key: value
        for key, value in config.items()
        if not key.startswith("_") and key not in _PASSING
    }
    text = json.dumps(kept, sort_keys=True, default=str) if kept else ""
    weights = tensors_fingerprint(
        (name, form(part))
        for name, parameter in model.named_parameters()
        for part in _plain_parts(parameter.detach())
    )
    return hashlib.sha256((text + weights).encode()).hexdigest()[:24]


def version_of(module: nn.Module) -> tuple[tuple[int, int], ...] | None:
    """Return what changes when a parameter is replaced or written to.

    ``None`` if a parameter was made under ``torch.inference_mode()``: it counts no writes.
    """
    parts = [part for parameter in module.parameters() for part in _plain_parts(parameter)]
    if any(part.is_inference() for part in parts):
        return None
    return tuple((part.data_ptr(), part._version) for part in parts)


def _once(module: nn.Module, kind: str, compute: Callable[[], str]) -> str:
    """Remember a fingerprint for as long as the parameters are known not to have changed."""
    version = version_of(module)
    if version is None:
        return compute()
    if module not in _remembered or _remembered[module][0] != version:
        _remembered[module] = (version, {})
    known = _remembered[module][1]
    if kind not in known:
        known[kind] = compute()
    return known[kind]
