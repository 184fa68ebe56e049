"""A tiny random model of any decoder family of transformers, from the family's own config with small sizes put in."""

from __future__ import annotations

import before_torch  # isort: skip  # noqa: F401

import dataclasses
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

VOCABULARY = 96
LAYERS = 4

# By the names that configs use; a config gets those that it knows.
SMALL: dict[str, Any] = dict(
    vocab_size=VOCABULARY, hidden_size=32, d_model=32, n_embd=32, intermediate_size=48, n_inner=48, ffn_dim=48, d_ff=48,
    num_hidden_layers=LAYERS, n_layer=LAYERS, n_layers=LAYERS, num_layers=LAYERS, num_attention_heads=4, n_head=4, n_heads=4,
    num_key_value_heads=2, head_dim=8, kv_channels=8, max_position_embeddings=256, n_positions=256, n_ctx=256, max_seq_len=256,
    bos_token_id=1, eos_token_id=2, pad_token_id=0, sliding_window=8,
    # mixtures of experts
    num_experts=4, num_local_experts=4, n_routed_experts=4, moe_num_experts=4, num_experts_per_tok=2, top_k_experts=2, moe_k=2,
    moe_topk=2, moe_intermediate_size=24, moe_shared_expert_intermediate_size=24, n_shared_experts=1, num_shared_experts=1,
    n_group=1, topk_group=1, first_k_dense_replace=1, shared_intermediate_size=24, shared_expert_intermediate_size=24,
    expert_ffn_hidden_size=24, ffn_hidden_size=48, intermediate_size_mlp=48, dense_intermediate_size=48, zero_expert_num=2,
    # latent and sparse attention
    kv_lora_rank=16, q_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, index_n_heads=2, index_head_dim=16,
    index_topk=64, o_groups=2, o_lora_rank=8, attention_chunk_size=64,
    # recurrences and convolutions
    mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1, mamba_ngroups=1, mamba_chunk_size=8, mamba_d_ssm=64,
    mamba_num_heads=8, mamba_head_dim=8, mamba_expand=2, mamba_dt_rank=4, ssm_state_size=8, n_groups=1, state_size=8,
    chunk_size=8, n_mamba_heads=2, conv_L_cache=3, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
    linear_value_head_dim=8, lru_width=32, attention_window_size=16,
    # Gemma 3n and 4
    hidden_size_per_layer_input=8, vocab_size_per_layer_input=VOCABULARY, laurel_rank=8, num_kv_shared_layers=0,
    adapter_rank=4, num_mtp_layers=0, num_nextn_predict_layers=0, rotary_dim=4, dim_model_base=32,
)  # fmt: skip
SMALL_TOWER: dict[str, Any] = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, depth=2, num_layers=2, num_attention_heads=4, num_heads=4,
    num_key_value_heads=4, head_dim=8, image_size=28, patch_size=14, out_hidden_size=32, embed_dim=32, output_dim=32,
    max_position_embeddings=64, vocab_size=16, num_position_embeddings=64, projection_dim=32, vision_output_dim=32,
    projector_input_dim=32, projector_output_dim=32, position_embedding_size=64, fullatt_block_indexes=[1],
    deepstack_visual_indexes=[0], window_size=28,
)  # fmt: skip
SECTIONS = dict(rope_type="default", rope_theta=10000.0, mrope_section=[2, 1, 1])
LINEAR = ["linear_attention", "full_attention"] * 2

# What some families need besides.
OVERRIDES: dict[str, dict[str, Any]] = {
    "gemma2": dict(query_pre_attn_scalar=8), "gemma3_text": dict(query_pre_attn_scalar=8),
    "qwen3_next": dict(layer_types=LINEAR), "qwen3_5_text": dict(layer_types=LINEAR), "qwen3_5_moe_text": dict(layer_types=LINEAR),
    "lfm2": dict(layer_types=["conv", "full_attention"] * 2),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"] * 2, num_dense_layers=1),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1,
                  use_mamba_kernels=False),
    "bamba": dict(attn_layer_indices=[1, 3]),
    "granitemoehybrid": dict(layer_types=["mamba", "attention"] * 2, residual_multiplier=0.5),
    "granite": dict(residual_multiplier=0.5), "granitemoe": dict(residual_multiplier=0.5),
    "granitemoeshared": dict(residual_multiplier=0.5),
    "zamba2": dict(layers_block_type=["mamba", "hybrid"] * 2, num_mem_blocks=1, use_mamba_kernels=False),
    "zamba": dict(layers_block_type=["mamba", "hybrid"] * 2, use_mamba_kernels=False),
    "nemotron_h": dict(layers_block_type=["mamba", "moe", "attention", "moe"], use_mamba_kernels=False),
    "recurrent_gemma": dict(block_types=["recurrent", "attention"]),
    "llama4_text": dict(interleave_moe_layer_step=2, num_experts_per_tok=1),
    "gemma4_text": dict(num_global_key_value_heads=2, global_head_dim=8),
    "gemma3n_text": dict(num_kv_shared_layers=1, activation_sparsity_pattern=[0.0] * LAYERS),
    "starcoder2": dict(sliding_window=None),
    "mpt": dict(expansion_ratio=2), "falcon": dict(new_decoder_architecture=True, num_kv_heads=2),
    "kimi_linear": dict(layer_types=LINEAR), "bailing_hybrid": dict(layer_types=LINEAR),
    "qwen2_vl_text": dict(rope_parameters=SECTIONS), "qwen2_5_vl_text": dict(rope_parameters=SECTIONS),
    "glm4v_text": dict(rope_parameters=SECTIONS),
    "glm4v_moe_text": dict(rope_parameters={**SECTIONS, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5}),
    "mamba2": dict(num_heads=8, expand=2), "gpt_neo": dict(attention_types=[[["global", "local"], 2]], window_size=64),
    "zaya": dict(num_experts_per_tok=1),
    "dbrx": dict(attn_config=dict(kv_n_heads=2, rope_theta=10000.0, clip_qkv=8),
                 ffn_config=dict(ffn_hidden_size=48, hidden_size=32, moe_num_experts=4, moe_top_k=2)),
    "qwen4_exp_text": dict(indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=8, indexer_budget=64,
                           indexer_compress_ratio=4),
    "cohere_compass_text": dict(
        layer_types=["full_attention"] * LAYERS,
        rope_parameters=dict(full_attention={**SECTIONS, "partial_rotary_factor": 1.0}),
    ),
    "dots3_note_text": dict(n_group=1, topk_group=1),
}  # fmt: skip

# The same family with parts switched on that its config leaves out.
VARIANTS: dict[str, dict[str, Any]] = {
    "gemma4_text (experts)": dict(enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=24),
    "gemma4_text (shared keys)": dict(num_kv_shared_layers=2, layer_types=["sliding_attention", "full_attention"] * 2),
}

# Encoders, parts of something larger, speech and music: no chat model comes from these.
NOT_MEANT = {
    "bart", "bert", "bert-generation", "big_bird", "bigbird_pegasus", "blenderbot", "blenderbot-small", "camembert",
    "data2vec-text", "electra", "ernie", "marian", "mbart", "megatron-bert", "moshi", "musicgen", "musicgen_melody", "mvp",
    "pegasus", "plbart", "prophetnet", "reformer", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer",
    "trocr", "whisper", "xlm", "xlm-roberta", "xlm-roberta-xl", "xlnet", "xmod", "git", "gemma4_assistant",
    "gemma4_unified_assistant", "moss_transcribe_diarize", "got_ocr2", "gpt-sw3", "iquestcoder", "internlm3", "ctrl",
}  # fmt: skip
WITH_IMAGES = (
    "aya_vision", "cohere2_vision", "deepseek_vl", "gemma3", "gemma3n", "gemma4", "glm4v", "glm4v_moe", "idefics3", "internvl",
    "lfm2_vl", "llama4", "llava", "llava_next", "llava_onevision", "mistral3", "mistral4", "mllama", "paligemma", "qwen2_vl",
    "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "smolvlm", "kimi_k25", "minimax_m3_vl", "ovis2",
)  # fmt: skip


def families() -> list[str]:
    """Model types, the language models first; those with images are named `TYPE (images)`."""
    with_images = [f"{t} (images)" for t in WITH_IMAGES if t in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES]
    plain = [
        t
        for t, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()
        if t not in NOT_MEANT and "ConditionalGeneration" not in name and f"{t} (images)" not in with_images
    ]
    return [*plain, *VARIANTS, *with_images]


def tiny_config(family: str) -> PretrainedConfig:
    """The family's config with small sizes."""
    model_type, _, variant = family.partition(" ")
    return _small(CONFIG_MAPPING[model_type], SMALL, model_type, VARIANTS.get(family, {}) if variant else {})


def _small(
    config_class: Any, sizes: dict[str, Any], model_type: str, more: dict[str, Any] | None = None
) -> PretrainedConfig:
    known = {f.name for f in dataclasses.fields(config_class)} | set(getattr(config_class, "attribute_map", {}))
    values = {k: v for k, v in sizes.items() if k in known}
    mapped = getattr(config_class, "attribute_map", {})
    values = {
        k: v for k, v in values.items() if not (k in mapped and mapped[k] in values)
    }  # one of two names of a thing
    if {"kv_lora_rank", "num_key_value_heads"} <= known and sizes is SMALL:
        values["num_key_value_heads"] = values.get("num_attention_heads", 4)  # latent attention has no groups
    values |= OVERRIDES.get(model_type, {}) | (more or {})
    for i, name in enumerate(n for n in sorted(known) if n.endswith(("_token_id", "_token_index")) and n not in sizes):
        values[name] = VOCABULARY - 1 - i
    parts = {n: c for n, c in getattr(config_class, "sub_configs", {}).items()}
    defaults = config_class() if any(c is AutoConfig for c in parts.values()) else None
    for name, part in parts.items():
        given = type(getattr(defaults, name, None)) if part is AutoConfig else part
        if name in values or not isinstance(given, type) or not issubclass(given, PretrainedConfig):
            continue
        text = "text" in name or "llm" in name
        values[name] = _small(given, SMALL if text else SMALL_TOWER, given.model_type)
    return config_class(**values)


def tiny_model(family: str, seed: int = 0) -> PreTrainedModel:
    """A random float32 model; its weights are large enough that an edit visibly moves the logits."""
    torch.manual_seed(seed)
    config = tiny_config(family)
    images = family.endswith("(images)")
    auto = (
        AutoModelForImageTextToText
        if images or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
        else AutoModelForCausalLM
    )
    model = auto.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.nan_to_num_(0, 0, 0)  # some families leave parameters uninitialized
            parameter.clamp_(-2, 2)
            parameter.add_(torch.randn_like(parameter) * (0.15 if parameter.ndim > 1 else 0.05))
    return model


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """As many words as the vocabulary has, and a chat template: a model folder is not whole without."""
    words = {f"w{i}": i for i in range(VOCABULARY)}
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="w3")), eos_token="w2")
    made.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return made
