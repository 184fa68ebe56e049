"""Tiny random models of many families, with a tokenizer and a chat template, made in seconds and saved as real folders."""

from __future__ import annotations

from pathlib import Path

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
FAMILIES = {
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
WINDOWED = ("gemma2", "gemma3", "mistral")  # with windows of 8 tokens, shorter than most prompts of the tests


def tiny_model(family: str, seed: int = 0) -> transformers.PreTrainedModel:
    """A random float32 model; its weights are large enough that an edit visibly moves the logits."""
    name, arguments = FAMILIES[family]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(getattr(transformers, name)(**arguments))
    with torch.no_grad():
        for parameter in model.parameters():
            # Biases and norms too: an edit that forgets a bias must be seen.
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
    folder: Path, family: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32, **save: object
) -> Path:
    """A complete model folder."""
    tiny_model(family, seed).to(dtype).save_pretrained(folder, **save)
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
