"""Tiny classifiers of every supported Hugging Face family, and inputs for them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
)

CLASSES, LAYERS, VOCABULARY = 3, 4, 50
_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 24,
    "num_labels": CLASSES,
    "initializer_range": 0.4,
}
_DISTIL = {
    "vocab_size": VOCABULARY,
    "dim": 32,
    "n_layers": LAYERS,
    "n_heads": 2,
    "hidden_dim": 48,
    "max_position_embeddings": 24,
    "num_labels": CLASSES,
    "initializer_range": 0.4,
}
_IMAGE = {
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 8,
    "patch_size": 2,
    "num_channels": 1,
    "num_labels": CLASSES,
    "initializer_range": 0.4,
}
#: name: (model class, configuration class, settings)
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "bert": (BertForSequenceClassification, BertConfig, _TEXT),
    "albert": (AlbertForSequenceClassification, AlbertConfig, _TEXT | {"embedding_size": 16}),
    "albert-two-groups": (
        AlbertForSequenceClassification,
        AlbertConfig,
        _TEXT | {"embedding_size": 16, "num_hidden_groups": 2, "inner_group_num": 2},
    ),
    "roberta": (RobertaForSequenceClassification, RobertaConfig, _TEXT | {"pad_token_id": 1}),
    "xlm-roberta": (
        XLMRobertaForSequenceClassification,
        XLMRobertaConfig,
        _TEXT | {"pad_token_id": 1},
    ),
    "distilbert": (DistilBertForSequenceClassification, DistilBertConfig, _DISTIL),
    "vit": (ViTForImageClassification, ViTConfig, _IMAGE),
}


def tiny_encoder(name: str, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A model of the family with random weights, in evaluation mode."""
    kind, config, settings = FAMILIES[name]
    torch.manual_seed(seed)
    model: PreTrainedModel = kind(config(**settings | changes))
    return model.eval()


def some_inputs(model: PreTrainedModel, rows: int, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Images, or padded texts of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    if model.config.model_type == "vit":
        return {"pixel_values": torch.randn(rows, 1, 8, 8, generator=generator)}
    longest = 12
    ids = torch.randint(3, VOCABULARY, (rows, longest), generator=generator)
    lengths = torch.randint(3, longest + 1, (rows, 1), generator=generator)
    lengths[0] = longest
    mask = (torch.arange(longest)[None] < lengths).long()
    ids = torch.where(mask == 1, ids, model.config.pad_token_id)
    return {"input_ids": ids, "attention_mask": mask}


def rows_of(inputs: dict[str, torch.Tensor], rows: Any) -> dict[str, torch.Tensor]:
    """Some rows of a batch."""
    return {name: value[rows] for name, value in inputs.items()}
