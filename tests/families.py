"""Small random models of the architectures that are trained: their settings, and folders with their weights."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from dpo_ray.model.architecture import auto_class

SMALL = {
    "vocab_size": 261, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.2, "pad_token_id": 258, "bos_token_id": None, "eos_token_id": 256,
}  # fmt: skip


WINDOW = {"sliding_window": 6, "head_dim": 16}
MIXED = WINDOW | {"layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
PACKED: dict[str, dict[str, Any]] = {
    "gemma": {"head_dim": 16},
    "olmo2": {},
    "gpt2": {},
    "gpt_neox": {},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0},
    "hyperclovax": {"logits_scaling": 4.0},
    # Local attention
    "afmoe": MIXED | EXPERTS | {"num_dense_layers": 1},
    "cohere2": MIXED | {"logit_scale": 0.25},
    "exaone4": MIXED,
    "gemma2": MIXED | {"query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0},
    "gemma3_text": MIXED,
    "gemma4_text": WINDOW
    | {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "global_head_dim": 32,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 261,
    },
    "gpt_oss": MIXED | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "llama4_text": {
        "attention_chunk_size": 6,
        "head_dim": 16,
        "num_local_experts": 4,
        "intermediate_size_mlp": 96,
        "no_rope_layers": [1, 0],
        "layer_types": ["chunked_attention", "full_attention"],
        "attn_temperature_tuning": False,
        "interleave_moe_layer_step": 2,
    },
    "ministral": WINDOW,
    "mistral": WINDOW,
    "mixtral": WINDOW | {"num_local_experts": 4},
    "olmo3": MIXED,
    "phi3": {"sliding_window": 6},
    "qwen2": MIXED | {"use_sliding_window": True},
    "qwen3": MIXED | {"use_sliding_window": True},
    "smollm3": {"sliding_window": 6, "use_sliding_window": True, "no_rope_layers": [1, 0]},
    "starcoder2": {"sliding_window": 6},
    # Mixtures of experts
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "logits_scaling": 4.0},
    "olmoe": EXPERTS,
    "qwen2_moe": EXPERTS,
    "qwen3_moe": EXPERTS | {"head_dim": 16},
}
"""Settings by architecture, of those that compute packed rows."""

MAMBA = {
    "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_d_conv": 4,
    "mamba_expand": 2, "mamba_chunk_size": 8,
}  # fmt: skip
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "head_dim": 16, "layer_types": ["linear_attention", "full_attention"], "initializer_range": 0.1,
}  # fmt: skip
SHARED_EXPERT = EXPERTS | {"shared_expert_intermediate_size": 48}
PADDED: dict[str, dict[str, Any]] = {
    # Gated delta rule, linear attention
    "qwen3_next": LINEAR | SHARED_EXPERT,
    "qwen3_5_text": LINEAR,
    "qwen3_5_moe_text": LINEAR | SHARED_EXPERT,
    "olmo_hybrid": LINEAR | {"linear_num_key_heads": 4},
    "kimi_linear": {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_heads": 4,
        "linear_head_dim": 16,
        "num_key_value_heads": 4,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "num_experts": 4,
        "num_experts_per_token": 2,
        "moe_intermediate_size": 48,
    },
    "minimax": {
        "layer_types": ["linear_attention", "full_attention"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 16,
        "block_size": 8,
    },
    # Masks that depend on the content
    "doge": {},
    # State space models
    "mamba": {"state_size": 8},
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1, "chunk_size": 8},
    "falcon_mamba": {"state_size": 8},
    "bamba": MAMBA | {"attn_layer_indices": [1]},
    "granitemoehybrid": MAMBA
    | {
        "layer_types": ["mamba", "attention"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 48,
        "logits_scaling": 4.0,
    },
    "falcon_h1": MAMBA | {"mamba_d_ssm": 128, "head_dim": 16, "lm_head_multiplier": 0.25, "embedding_multiplier": 2.0},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "mamba_d_state": 8,
        "mamba_dt_rank": 8,
    },
    "nemotron_h": {
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "n_groups": 1,
        "ssm_state_size": 16,
        "chunk_size": 8,
        "head_dim": 16,
        "layers_block_type": ["mamba", "attention"],
    },
    # Other states
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": EXPERTS | {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "recurrent_gemma": {"lru_width": 64, "attention_window_size": 8, "head_dim": 16, "num_hidden_layers": 3},
    # Attention that is not exact, or not replaceable, in packed rows
    "llama4_text": PACKED["llama4_text"] | {"attn_temperature_tuning": True, "floor_scale": 4},
    "vaultgemma": MIXED | {"query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0},
    "bloom": {},
    "falcon": {"ffn_hidden_size": 96},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "window_size": 6, "num_heads": 4},
    "gptj": {"n_embd": 64, "n_head": 4, "n_layer": 2, "rotary_dim": 8},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2},
    "stablelm": {},
}
"""Settings by architecture, of those that compute padded batches."""

VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
QWEN_VISION = {
    "hidden_size": 32, "intermediate_size": 48, "depth": 1, "num_heads": 2, "patch_size": 14, "out_hidden_size": 64,
}  # fmt: skip
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
CLIP, SIGLIP = VISION | {"model_type": "clip_vision_model"}, VISION | {"model_type": "siglip_vision_model"}
COMPOSITE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gemma3": (MIXED, VISION),
    "gemma4": (PACKED["gemma4_text"], VISION | {"num_key_value_heads": 2, "head_dim": 16}),
    "idefics3": ({"model_type": "llama"}, VISION),
    "internvl": ({"model_type": "qwen2"}, VISION | {"image_size": [28, 28], "patch_size": [14, 14]}),
    "lfm2_vl": (PADDED["lfm2"] | {"model_type": "lfm2"}, SIGLIP | {"model_type": "siglip2_vision_model"}),
    "llama4": (
        PACKED["llama4_text"],
        VISION | {"vision_output_dim": 64, "projector_input_dim": 64, "projector_output_dim": 64},
    ),
    "llava": ({"model_type": "llama"}, CLIP),
    "llava_next": ({"model_type": "llama"}, CLIP),
    "mistral3": ({"model_type": "mistral", "sliding_window": None, "head_dim": 16}, VISION | {"model_type": "pixtral"}),
    "paligemma": ({"model_type": "gemma", "head_dim": 16}, SIGLIP),
    "qwen2_vl": (ROPE, {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2}),
    "qwen2_5_vl": (ROPE, QWEN_VISION),
    "qwen3_vl": (ROPE | {"head_dim": 16}, QWEN_VISION | {"deepstack_visual_indexes": [0]}),
    "qwen3_5": (LINEAR, QWEN_VISION),
    "smolvlm": ({"model_type": "llama"}, VISION),
}
"""Settings of the text and the vision part by architecture, of those with both."""
REPRESENTATIVE = {
    "bamba", "bloom", "falcon_h1", "gemma3", "granitemoehybrid", "jamba", "lfm2", "llama4_text", "llava", "mamba",
    "qwen2_5_vl", "qwen3_5", "qwen3_5_text", "qwen3_next", "recurrent_gemma",
}  # fmt: skip
"""Padded and composite architectures that each test covers; the others differ little and are slow."""
SETTINGS = PADDED | PACKED
"""Settings by architecture, of those for text only."""


def architectures(table: Iterable[str]) -> list[Any]:
    """The architectures of a table as parameters of a test, marked as slow unless they are representative."""
    return [pytest.param(name, marks=[] if name in REPRESENTATIVE else [pytest.mark.slow]) for name in table]


def small_config(architecture: str, settings: dict[str, Any] | None = None) -> Any:
    """Configuration of a small model; ``settings`` are those of the tables by default."""
    if architecture in COMPOSITE:
        text, vision = COMPOSITE[architecture]
        return AutoConfig.for_model(architecture, text_config=SMALL | text, vision_config=vision)
    return AutoConfig.for_model(architecture, **SMALL | (SETTINGS[architecture] if settings is None else settings))


def save_small_model(folder: Path, architecture: str, settings: dict[str, Any] | None = None) -> Path:
    """A random model of an architecture, whose attention, sinks included, and routing are far from uniform."""
    torch.manual_seed(0)
    config = small_config(architecture, settings)
    model = auto_class(config).from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("sinks") or ("router" in name and not parameter.any()):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return folder
