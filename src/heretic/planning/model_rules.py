"""Rules of the preflight about the model itself: what it is, which files are it, how it is quantized, whether it is here."""

from __future__ import annotations

from collections.abc import Iterator

from heretic.errors import UserError
from heretic.hardware.host import format_bytes
from heretic.model.quantization import require_bitsandbytes, require_package
from heretic.planning.preflight_facts import Finding, PreflightFacts


def model(facts: PreflightFacts) -> Iterator[Finding]:
    """What the model is, and whether it can be edited at all."""
    checkpoint = facts.checkpoint
    if checkpoint is None:
        return
    size = f"{checkpoint.parameters / 1e9:.2f} billion parameters, {format_bytes(checkpoint.nbytes)} on disk"
    method = checkpoint.quantized_by
    forms = ("full", "gguf", "lora") if checkpoint.is_dequantized else ("lora",)  # in which an export of it can be
    if method is None:
        yield Finding("ok", "model", f"{checkpoint.model}: {size}")
    elif facts.settings.quantization != "none":
        text = f"{checkpoint.model} comes quantized ({method}) and cannot be quantized once more."
        yield Finding("failure", "quantization", text, 'quantization = "none"')
    elif facts.settings.save_to and facts.settings.export_format not in forms:
        text = f"{checkpoint.model} exists only quantized ({method}): there are no full-precision weights to write an edit into."
        yield Finding("failure", "export", text, f'export_format = "{forms[0]}"')
    else:
        opened = ", opened while it is loaded" if checkpoint.is_dequantized else ""
        form = "a folder in bfloat16 or an adapter" if checkpoint.is_dequantized else "an adapter"
        yield Finding("ok", "model", f"{checkpoint.model}: {size}, quantized ({method}{opened}); an export is {form}.")


def other_weights(facts: PreflightFacts) -> Iterator[Finding]:
    """Files in the model's folder that another program would take for the model, and entries that the tensors do not bear out."""
    checkpoint = facts.checkpoint
    if checkpoint is None:
        return
    if checkpoint.rival:
        text = (
            f"{checkpoint.weights_name} is the model, as transformers has it; {checkpoint.rival} names other weights."
        )
        yield Finding("warning", "model", text, "delete the file that is not meant, with its shards")
    if checkpoint.leftover_quantization:
        text = (
            f"config.json says quantized ({checkpoint.leftover_quantization}), but the tensors are not: they are taken as they are, "
            "and an export leaves quantization_config out."
        )
        yield Finding("ok", "model", text)


def rewritten_while_quantized(facts: PreflightFacts) -> Iterator[Finding]:
    """Trials that rewrite weights, where these are quantized."""
    settings, method = facts.settings, facts.checkpoint.quantized_by if facts.checkpoint else None
    quantized = settings.quantization != "none" or (
        method and not (facts.checkpoint and facts.checkpoint.is_dequantized)
    )
    if settings.apply == "weights" and (quantized or (method and not settings.cache_weights)):
        text = "Quantized weights cannot be rewritten for a trial and put back."
        yield Finding("failure", "apply", text, 'apply = "operators"')


def missing_package(facts: PreflightFacts) -> Iterator[Finding]:
    """Quantization without the package that does it."""
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
    """Room for weights that are still on the hub."""
    checkpoint = facts.checkpoint
    if checkpoint is None or checkpoint.is_local or any(tensor.file for tensor in checkpoint.tensors.values()):
        return
    cache, needed = facts.hub_cache, checkpoint.nbytes
    if cache.free < needed:
        text = f"{format_bytes(needed)} are to be downloaded, but only {format_bytes(cache.free)} are free for {cache.path}."
        yield Finding("failure", "model", text, "set HF_HUB_CACHE to a folder on a larger disk")
    else:
        yield Finding("ok", "model", f"{format_bytes(needed)} are to be downloaded to {cache.path}.")
