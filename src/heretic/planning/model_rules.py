"""Preflight rules about the model: its files, its quantization and its download."""

from __future__ import annotations

from collections.abc import Iterator

from heretic.errors import UserError
from heretic.hardware.host import format_bytes
from heretic.model.quantization import require_bitsandbytes, require_package
from heretic.planning.preflight_facts import Finding, PreflightFacts


def model(facts: PreflightFacts) -> Iterator[Finding]:
    """Report the model's size, and whether heretic can edit and export it."""
    checkpoint = facts.checkpoint
    if checkpoint is None:
        return
    size = f"{checkpoint.parameters / 1e9:.2f} billion parameters, {format_bytes(checkpoint.nbytes)} on disk"
    method = checkpoint.quantized_by
    forms = ("full", "gguf", "lora", "mlx") if checkpoint.is_dequantized else ("lora",)  # possible export formats
    if method is None:
        yield Finding("ok", "model", f"{checkpoint.model}: {size}")
    elif facts.settings.quantization != "none":
        text = f"{checkpoint.model} is already quantized ({method}) and cannot be quantized again."
        yield Finding("failure", "quantization", text, 'quantization = "none"')
    elif facts.settings.save_to and facts.settings.export_format not in forms:
        text = f"{checkpoint.model} is quantized ({method}) and has no full-precision weights for this export format."
        yield Finding("failure", "export", text, f'export_format = "{forms[0]}"')
    else:
        dequantized = ", dequantized during loading" if checkpoint.is_dequantized else ""
        form = "a folder in bfloat16 or an adapter" if checkpoint.is_dequantized else "an adapter"
        text = f"{checkpoint.model}: {size}, quantized ({method}{dequantized}). The export will be {form}."
        yield Finding("ok", "model", text)


def other_weights(facts: PreflightFacts) -> Iterator[Finding]:
    """Report ambiguous weight files, and a quantization in the config that the tensors do not have."""
    checkpoint = facts.checkpoint
    if checkpoint is None:
        return
    if checkpoint.rival:
        text = (
            f"heretic uses {checkpoint.weights_name}, as transformers does, but {checkpoint.rival} has other weights."
        )
        yield Finding("warning", "model", text, "delete the wrong file, with its shards")
    if checkpoint.leftover_quantization:
        text = (
            f"config.json has a quantization_config ({checkpoint.leftover_quantization}), but the tensors are not quantized. "
            "heretic ignores it and omits it from exports."
        )
        yield Finding("ok", "model", text)


def rewritten_while_quantized(facts: PreflightFacts) -> Iterator[Finding]:
    """Refuse trials that rewrite quantized weights."""
    settings, method = facts.settings, facts.checkpoint.quantized_by if facts.checkpoint else None
    quantized = settings.quantization != "none" or (
        method and not (facts.checkpoint and facts.checkpoint.is_dequantized)
    )
    if settings.apply == "weights" and (quantized or (method and not settings.cache_weights)):
        text = "A trial cannot rewrite and restore quantized weights."
        yield Finding("failure", "apply", text, 'apply = "operators"')


def readers(facts: PreflightFacts) -> Iterator[Finding]:
    """Refuse what cannot edit the modules that read the stream."""
    settings = facts.settings
    if settings.ablation.readers and settings.apply == "weights":
        yield Finding(
            "failure", "ablation.readers", "heretic rewrites only what writes to the stream.", 'apply = "operators"'
        )
    if settings.ablation.readers and settings.search.start == "kernels":
        text = "Kernels have no strengths for what reads the stream."
        yield Finding("failure", "ablation.readers", text, 'search.start = "gradient"')


def missing_package(facts: PreflightFacts) -> Iterator[Finding]:
    """Report a missing package for the quantization."""
    if facts.checkpoint and facts.checkpoint.quantized_by:
        try:
            require_package(facts.checkpoint)
        except UserError as error:
            yield Finding("failure", "model", error.what, error.fix, error.code)
    elif facts.settings.quantization != "none":
        try:
            require_bitsandbytes(facts.settings.quantization)
        except UserError as error:
            yield Finding("failure", "quantization", error.what, error.fix, error.code)


def download(facts: PreflightFacts) -> Iterator[Finding]:
    """Check the disk space for weights that are not downloaded yet."""
    cache, needed = facts.hub_cache, facts.to_download
    if not needed:
        return
    if cache.free < needed:
        text = f"The download needs {format_bytes(needed)}, but {cache.path} has only {format_bytes(cache.free)} free."
        yield Finding("failure", "model", text, "set HF_HUB_CACHE to a folder on a larger disk")
    else:
        yield Finding("ok", "model", f"heretic will download {format_bytes(needed)} to {cache.path}.")
