"""Families whose own layers are run, and of whose inside nothing is known: no native tier."""

from __future__ import annotations

from adaptive._families._family import Family

#: Each name has a tiny model in ``tests/contract/test_replayed_families.py``.
_AS_LLAMA = (
    "afmoe",
    "apertus",
    "arcee",
    "bitnet",
    "cwm",
    "deepseek_v2",
    "deepseek_v3",
    "diffllama",
    "dots1",
    "ernie4_5",
    "ernie4_5_moe",
    "exaone4",
    "exaone_moe",
    "flex_olmo",
    "glm",
    "glm4",
    "glm4_moe",
    "gpt_oss",
    "helium",
    "hunyuan_v1_dense",
    "hunyuan_v1_moe",
    "internlm3",
    "jais2",
    "llama4_text",
    "minimax_m2",
    "ministral",
    "ministral3",
    "mixtral",
    "nemotron",
    "olmo",
    "olmo2",
    "olmo3",
    "olmoe",
    "phimoe",
    "qwen2_moe",
    "qwen3_moe",
    "seed_oss",
    "smollm3",
    "solar_open",
    "stablelm",
    "starcoder2",
    "youtu",
)
_AS_GPT = ("bloom", "codegen", "falcon", "gpt_bigcode", "gpt_neo", "gptj")
_LAYERS, _NORM = "model.layers", ("model.norm",)

REPLAYED: tuple[Family, ...] = (
    Family(_AS_LLAMA, _LAYERS, _NORM),
    Family(_AS_GPT, "transformer.h", ("transformer.ln_f",)),
    Family(("mpt",), "transformer.blocks", ("transformer.norm_f",)),
    Family(("biogpt",), "biogpt.layers", ("biogpt.layer_norm",)),
    Family(("xglm",), _LAYERS, ("model.layer_norm",)),
    Family(("persimmon",), _LAYERS, ("model.final_layernorm",)),
    Family(("cohere", "cohere2"), _LAYERS, _NORM, factor="logit_scale"),
    Family(("hyperclovax",), _LAYERS, _NORM, factor="logits_scaling"),
    Family(("granite", "granitemoe", "granitemoeshared"), _LAYERS, _NORM, divisor="logits_scaling"),
    Family(("vaultgemma", "nanochat"), _LAYERS, _NORM, softcap="final_logit_softcapping"),
)
