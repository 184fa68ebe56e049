"""Device maps that spread the tiny models over several GPUs."""

from __future__ import annotations

TIED = ("gpt2", "gemma3", "gemma2", "lfm2")  # the head has the embedding's weights, so it lies on the same GPU


def spread(family: str, count: int = 4) -> dict[str, int]:
    """Four blocks over `count` GPUs, the embedding on the first, the head on the last unless it is tied to the embedding."""
    inner = {"gpt2": "transformer", "gpt_neox": "gpt_neox"}.get(family, "model")
    first, norm, last = ["model.embed_tokens", "model.rotary_emb"], "model.norm", count - 1
    if family == "gpt2":
        first, norm = ["transformer.wte", "transformer.wpe"], "transformer.ln_f"
    elif family == "gpt_neox":
        first, norm = ["gpt_neox.embed_in", "gpt_neox.emb_dropout", "gpt_neox.rotary_emb"], "gpt_neox.final_layer_norm"
    elif family == "lfm2":
        norm = "model.embedding_norm"
    elif family == "granitemoehybrid":
        first = ["model.embed_tokens"]
    blocks = {f"{inner}.{'h' if family == 'gpt2' else 'layers'}.{i}": i * count // 4 for i in range(4)}
    return {**dict.fromkeys(first, 0), **blocks, norm: last, "lm_head": 0 if family in TIED else last}
