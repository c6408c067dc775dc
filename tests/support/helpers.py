"""Tiny random models of every family, policies that stop at mixed depths, slow references."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache
from operator import attrgetter
from typing import Any
from unittest import mock

import torch
import transformers
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from adaptive import attach_exits
from adaptive._deployment import Deployment
from adaptive._exits import require_exits
from adaptive._families import Readout, family_of, layers_of
from adaptive._settings import fingerprints
from adaptive.calibration import Certificate
from adaptive.policies import Margin, Policy, Threshold

VOCABULARY = 97
LAYERS = 6
EXITS = (1, 2, 4)
#: Two tokens whose logits differ by less than this may change places in the last bits.
NEAR_TIE = 1e-4

_LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.25,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_GEMMA = _LLAMA | {"head_dim": 8, "tie_word_embeddings": False}
#: Caps and a window so small that they matter.
_GEMMA2 = _GEMMA | {
    "sliding_window": 7,
    "query_pre_attn_scalar": 6,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 5.0,
}
_OLD = {key: value for key, value in _LLAMA.items() if key != "num_key_value_heads"}

_OPT = _OLD | {"ffn_dim": 48, "init_std": 0.25, "word_embed_proj_dim": 32}
_GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": LAYERS,
    "n_head": 4,
    "n_positions": 2048,
    "initializer_range": 0.25,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}

#: Name of a row -> class prefix in transformers, changes to the configuration, config class.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", _LLAMA),
    "llama-tied-biased": (
        "Llama",
        _LLAMA | {"tie_word_embeddings": True, "attention_bias": True, "head_dim": 16},
    ),
    "qwen2": ("Qwen2", _LLAMA),
    "qwen3": ("Qwen3", _LLAMA | {"head_dim": 12}),
    "mistral": ("Mistral", _LLAMA | {"sliding_window": None}),
    "mistral-window": ("Mistral", _LLAMA | {"sliding_window": 7}),
    "phi": ("Phi", _LLAMA | {"num_key_value_heads": 4}),
    "phi3": ("Phi3", _LLAMA | {"sliding_window": None}),
    "gemma": ("Gemma", _GEMMA),
    "gemma2": ("Gemma2", _GEMMA2),
    "gemma3": ("Gemma3", _GEMMA | {"sliding_window": 7, "query_pre_attn_scalar": 8}),
    "gpt2": ("GPT2", _GPT2),
    "opt": ("OPT", _OPT),
    "opt-projected": ("OPT", _OPT | {"word_embed_proj_dim": 16}),
    "gpt-neox": ("GPTNeoX", _OLD),
    "qwen2-window": (
        "Qwen2",
        _LLAMA | {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2},
    ),
    "phi-normed": ("Phi", _LLAMA | {"qk_layernorm": True, "partial_rotary_factor": 0.25}),
    "phi3-window": ("Phi3", _LLAMA | {"sliding_window": 7, "partial_rotary_factor": 0.5}),
    "gemma3-tied-biased": (
        "Gemma3",
        _GEMMA
        | {
            "tie_word_embeddings": True,
            "attention_bias": True,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
            "sliding_window": 5,
        },
    ),
    "gpt2-scaled": ("GPT2", _GPT2 | {"scale_attn_by_inverse_layer_idx": True, "n_inner": 40}),
    "opt-bare": ("OPT", _OPT | {"enable_bias": False, "layer_norm_elementwise_affine": False}),
    "opt-post-norm": ("OPT", _OPT | {"do_layer_norm_before": False}),
    "gpt-neox-sequential": (
        "GPTNeoX",
        _OLD | {"use_parallel_residual": False, "attention_bias": False, "hidden_act": "relu"},
    ),
}
#: Rows that vary a detail of another row: their own layers are run by the generic tier as always.
VARIANTS = (
    "qwen2-window",
    "phi-normed",
    "phi3-window",
    "gemma3-tied-biased",
    "gpt2-scaled",
    "opt-bare",
    "gpt-neox-sequential",
)
NATIVE = tuple(name for name in MODELS if name != "opt-post-norm")

_CONFIGS = {"Gemma3": "Gemma3TextConfig"}
#: Last matrices of a layer's two branches, in the words of the families.
_OUT = ("o_proj", "down_proj", "out_proj", "fc2", "c_proj", "dense", "dense_4h_to_h")
#: Norms behind the branches (Gemma 2 and 3), which would undo any scaling of the matrices.
_POST = ("post_attention_layernorm", "post_feedforward_layernorm")


def tiny(name: str, *, exits: bool = True, **changes: Any) -> PreTrainedModel:
    """Return a random model whose deep layers say little, so that early exits often agree."""
    prefix, settings = MODELS[name]
    config = getattr(transformers, _CONFIGS.get(prefix, f"{prefix}Config"))(**settings | changes)
    kind = {"GPT2": "GPT2LMHeadModel"}.get(prefix, f"{prefix}ForCausalLM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = getattr(transformers, kind)(config).eval()
        plant(model)
    if exits:
        attach_exits(model, EXITS)
    return model


@cache
def shared(name: str) -> PreTrainedModel:
    """Return a model for tests that leave it as it is."""
    return tiny(name)


@torch.no_grad()
def plant(model: PreTrainedModel, *, scale: float = 0.3, start: int = 1) -> None:
    """Scale what the layers from ``start`` on add to the residual stream.

    Biases and the gains of norms are made random.
    """
    for index, layer in enumerate(layers_of(model)):
        posts = [module for path in _POST if (module := getattr(layer, path, None)) is not None]
        gemma = len(posts) == 2
        for path, parameter in layer.named_parameters():
            parts = path.split(".")
            if parts[-1] == "bias":
                parameter.normal_(std=0.1)
            if "norm" in parts[-2] or "ln_" in parts[-2]:
                parameter.add_(0.2 * torch.randn_like(parameter))
            if index >= start and not gemma and parts[-2] in _OUT:
                parameter.mul_(scale)
            if index >= start and gemma and parts[-2] in _POST:
                parameter.fill_(scale - 1.0)


def prompts(lengths: tuple[int, ...] = (11, 7, 10), *, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Left-padded random prompts: tokens and attention mask."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.randint(2, VOCABULARY, (len(lengths), width), generator=generator)
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        ids[row, : width - length] = 0
        mask[row, : width - length] = 0
    return ids, mask


@torch.no_grad()
def margins(model: PreTrainedModel) -> Tensor:
    """Margin score of every exit along a random text, ``[tokens, exits]``."""
    ids, _ = prompts((48,), seed=3)
    exits = require_exits(model)
    seen: dict[int, Tensor] = {}
    with ExitStack() as stack:
        for layer in exits.layers:
            module = layers_of(model)[layer - 1]

            def hook(module: nn.Module, args: Any, output: Any, layer: int = layer) -> None:
                seen[layer] = output[0] if isinstance(output, tuple) else output

            stack.callback(module.register_forward_hook(hook).remove)
        model(input_ids=ids, use_cache=False)
    top = [
        head(model, seen[layer][0]).float().softmax(dim=-1).topk(2, dim=-1).values
        for layer in exits.layers
    ]
    return torch.stack([value[:, 0] - value[:, 1] for value in top], dim=-1)


def head(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits of a hidden state, spelled out: norms, head, soft-cap."""
    family = family_of(model)
    for path in family.norms:
        norm = attrgetter(path)(model)
        hidden = hidden if norm is None else norm(hidden)
    logits = model.get_output_embeddings()(hidden)
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


@contextmanager
def reading_head() -> Iterator[list[int]]:
    """Rows of every product with the whole head that is formed in here, one number a product."""
    rows: list[int] = []
    read = Readout.__call__

    def counted(self: Readout, hidden: Tensor) -> Tensor:
        rows.append(hidden[..., 0].numel())
        return read(self, hidden)

    with mock.patch.object(Readout, "__call__", counted):
        yield rows


def mixed(model: PreTrainedModel, mode: str, *, quantile: float = 0.6) -> Policy:
    """Return a policy whose threshold lets about 40 percent of the checks pass."""
    threshold = float(margins(model).flatten().quantile(quantile))
    return Policy(Margin(), Threshold(threshold), stages=(0, 1, 2), mode=mode)


def never(mode: str) -> Policy:
    """Return a policy that is asked everywhere and never stops early."""
    return Policy(Margin(), Threshold(), stages=(0, 1, 2), mode=mode)


def certified(
    model: PreTrainedModel, policy: Policy, *, new_tokens: int, settings: Any = None, **fields: Any
) -> Policy:
    """The policy with a certificate as calibration writes it; greedy unless ``settings`` say more.

    ``fields`` replace what stands in the certificate.
    """
    deployment = Deployment(new_tokens, generation={"do_sample": False} | (settings or {}))
    written = {
        "holds": True,
        "risk": 0.2,
        "delta": 0.05,
        "loss": "share of tokens that differ from the full model's choice",
        "unit": "prompt",
        "method": "star",
        "procedure": "fixed-sequence",
        "n": 100,
        "index": 1,
        "evidence": {"knobs": ["inf", str(float(policy.rule.threshold))]},
        "bound": 1.0,
        "assumptions": ("independent units",),
        "split": {},
        "fingerprints": fingerprints(model, require_exits(model)),
        "decoding": deployment.settings(model) | {"mode": policy.mode},
    }
    return replace(policy, certificate=Certificate(**written | fields))


def own_cache(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> tuple[DynamicCache, Tensor]:
    """Keys and values and logits of the model's own forward pass over a text."""
    real = torch.ones_like(ids)
    real[:, : mask.shape[1]] = mask
    positions = (real.cumsum(dim=-1) - 1).clamp(min=0)
    cache = DynamicCache()  # without a config: windows mask, they do not drop
    with torch.no_grad():
        logits = model(
            input_ids=ids,
            attention_mask=real,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        ).logits
    return cache, logits


def kept(layer: CacheLayerMixin, width: int) -> tuple[Tensor, Tensor, slice]:
    """Keys and values from slot ``width`` on, and which slots they are: windows keep the last."""
    length = layer.get_seq_length()
    first = max(width, length - layer.keys.shape[2])
    assert first < length
    return (
        *(states[:, :, first - length :] for states in (layer.keys, layer.values)),
        slice(first, length),
    )


@torch.no_grad()
def propagate_slowly(
    model: PreTrainedModel, prompt: Tensor, new_tokens: int, threshold: float
) -> tuple[list[int], list[int], DynamicCache]:
    """Greedy text of one unpadded prompt in ``propagate`` mode, its exit stages, keys and values.

    The model's own forward pass, one token at a time. Once a token has stopped, every further
    layer still runs, which writes keys and values from the state it is given, and then its output
    is thrown away and that state handed on.
    """
    exits = require_exits(model)
    layers = layers_of(model)
    cache = DynamicCache()
    stopped: list[int] = []
    active = False

    def hook(index: int) -> Any:
        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            given = args[0] if args else kwargs["hidden_states"]
            is_tuple = isinstance(output, tuple)
            hidden = output[0] if is_tuple else output
            if active and stopped:
                hidden = given
            elif active and index + 1 in exits.layers:
                top = head(model, hidden[0, -1]).float().softmax(dim=-1).topk(2).values
                if float(top[0] - top[1]) >= threshold:
                    stopped.append(exits.layers.index(index + 1))
            return (hidden, *output[1:]) if is_tuple else hidden

        return after

    with ExitStack() as stack:
        for index, layer in enumerate(layers):
            handle = layer.register_forward_hook(hook(index), with_kwargs=True)
            stack.callback(handle.remove)
        logits = model(input_ids=prompt, past_key_values=cache, use_cache=True).logits
        tokens, stages = [int(logits[0, -1].argmax())], [len(exits.layers)]
        active = True
        for _ in range(new_tokens - 1):
            stopped.clear()
            newest = torch.tensor([[tokens[-1]]])
            logits = model(input_ids=newest, past_key_values=cache, use_cache=True).logits
            tokens.append(int(logits[0, -1].argmax()))
            stages.append(stopped[0] if stopped else len(exits.layers))
    return tokens, stages, cache


def near_ties(
    ours: Tensor,
    theirs: Tensor,
    scores: tuple[Tensor, ...],
    prompt: int,
    *,
    tolerance: float = NEAR_TIE,
) -> int:
    """Count rows that part from the reference at a near-tie; fail where it is not one.

    ``scores`` are the reference's processed logits, one ``[batch, vocabulary]`` per token.
    """
    count = 0
    length = min(ours.shape[1], theirs.shape[1])
    for row in range(ours.shape[0]):
        differ = (ours[row, :length] != theirs[row, :length]).nonzero()
        if len(differ) == 0:
            assert ours.shape == theirs.shape
            continue
        at = int(differ[0]) - prompt
        top = scores[at][row].topk(2).values
        gap = float(top[0] - top[1])
        assert gap < tolerance, f"row {row} departs at token {at}, where the margin is {gap:.2e}"
        count += 1
    return count
