"""Tiny random models of many families, with a tokenizer and a chat template, made in seconds and saved as real folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

TEXT = (
    "sorry i cannot help with that request sure here is an answer the a of and to in how do make write tell me about "
    "please what why when stars rivers bread soup code music history numbers letters good bad small large now"
)
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} <|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)
VOCABULARY = 96
COMMON = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", COMMON),
    "qwen2": ("Qwen2Config", COMMON),
    "qwen3": ("Qwen3Config", {**COMMON, "head_dim": 8}),
    "gemma3": ("Gemma3TextConfig", {**COMMON, "head_dim": 8, "sliding_window": 8}),
    "gemma2": ("Gemma2Config", {**COMMON, "head_dim": 8, "sliding_window": 8}),
    "olmo2": ("Olmo2Config", COMMON),
    "phi3": ("Phi3Config", COMMON),
    "mistral": ("MistralConfig", {**COMMON, "sliding_window": 8}),
    "gpt2": ("GPT2Config", dict(vocab_size=VOCABULARY, n_embd=32, n_layer=4, n_head=4, n_positions=256, bos_token_id=1,
                                eos_token_id=2, pad_token_id=0)),
    "gpt_neox": ("GPTNeoXConfig", {k: v for k, v in COMMON.items() if k != "num_key_value_heads"}),
}  # fmt: skip
EXPERTS = dict(num_experts_per_tok=2, moe_intermediate_size=24)
LATENT = dict(
    kv_lora_rank=16, q_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, n_group=1, topk_group=1
)
MAMBA = dict(mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=8)
LINEAR = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8)
# Blocks of unlike kinds: mixtures of experts, recurrences, convolutions.
MIXED: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", {**COMMON, **EXPERTS, "num_local_experts": 4}),
    "gpt_oss": ("GptOssConfig", {**COMMON, **EXPERTS, "num_local_experts": 4, "head_dim": 8, "sliding_window": 128}),
    "llama4": ("Llama4TextConfig", {**COMMON, "num_local_experts": 4, "num_experts_per_tok": 1, "head_dim": 8,
                                    "interleave_moe_layer_step": 2, "intermediate_size_mlp": 48}),
    "deepseek_v3": ("DeepseekV3Config", {**COMMON, **EXPERTS, **LATENT, "num_key_value_heads": 4, "n_routed_experts": 4,
                                         "first_k_dense_replace": 1}),
    "qwen3_next": ("Qwen3NextConfig", {**COMMON, **EXPERTS, **LINEAR, "num_experts": 4, "head_dim": 8,
                                       "shared_expert_intermediate_size": 24,
                                       "layer_types": ["linear_attention", "full_attention"] * 2}),
    "granitemoehybrid": ("GraniteMoeHybridConfig", {**COMMON, **MAMBA, "num_local_experts": 4, "num_experts_per_tok": 2,
                                                    "shared_intermediate_size": 24, "residual_multiplier": 0.5,
                                                    "layer_types": ["mamba", "attention"] * 2}),
    "lfm2": ("Lfm2Config", {**COMMON, "layer_types": ["conv", "full_attention"] * 2, "conv_L_cache": 3}),
}  # fmt: skip
WINDOWED = ("gemma2", "gemma3", "mistral")  # with windows of 8 tokens, shorter than most prompts of the tests


def tiny_model(family: str, seed: int = 0) -> transformers.PreTrainedModel:
    """A random float32 model; its weights are large enough that an edit visibly moves the logits."""
    name, arguments = {**FAMILIES, **MIXED}[family]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(getattr(transformers, name)(**arguments))
    with torch.no_grad():
        for parameter in model.parameters():
            # Biases and norms too: an edit that forgets a bias must be seen.
            parameter.nan_to_num_()  # some families leave parameters to their checkpoints
            parameter.add_(torch.randn_like(parameter) * (0.15 if parameter.ndim > 1 else 0.05))
    return model.float().eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A word tokenizer over a few dozen words."""
    specials = ["<pad>", "<s>", "</s>", "<unk>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.train_from_iterator([TEXT], trainers.WordLevelTrainer(vocab_size=VOCABULARY, special_tokens=specials))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.chat_template = TEMPLATE
    return fast


def save_tiny(
    folder: Path, family: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32, **save: Any
) -> Path:
    """A complete model folder."""
    torch.nn.Module.to(tiny_model(family, seed), dtype).save_pretrained(folder, **save)
    tiny_tokenizer().save_pretrained(folder)
    return folder


HARMFUL = [
    f"{v} {n} {e}" for v in ("make", "write", "tell") for n in ("bread", "soup", "bad", "code") for e in ("me", "now")
]
HARMLESS = [
    f"{v} {n} {e}" for v in ("what", "why", "how") for n in ("stars", "rivers", "music") for e in ("is", "do", "of")
]


def save_prompts(folder: Path) -> dict[str, Path]:
    """Four prompt files, disjoint."""
    folder.mkdir(parents=True, exist_ok=True)
    sets = {
        "harmful_train": HARMFUL[:16], "harmful_eval": HARMFUL[16:],
        "harmless_train": HARMLESS[:18], "harmless_eval": HARMLESS[18:],
    }  # fmt: skip
    paths = {}
    for role, prompts in sets.items():
        paths[role] = folder / f"{role}.txt"
        paths[role].write_text("\n".join(prompts) + "\n", encoding="utf-8")
    return paths
