"""Tiny checkpoints that exist only quantized, packed here as their formats say."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.tiny import COMMON, EXPERTS, tiny_tokenizer

WIDE = {**COMMON, "hidden_size": 128, "intermediate_size": 256}
BLOCK = 32
FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])  # e2m1; 8 more with the sign bit


def save_fp8(folder: Path) -> Path:
    """A Llama with its linear maps but the head's in e4m3, a scale for every block of 32 x 32 (as DeepSeek V3 is published)."""
    model = model_of("LlamaConfig", WIDE)
    tensors = dict(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            tensors[f"{name}.weight"], tensors[f"{name}.weight_scale_inv"] = fp8(module.weight.detach())
    told = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}
    return save(folder, model, tensors, told)


def save_mxfp4(folder: Path) -> Path:
    """A GPT-OSS with its experts in blocks of 32 fp4 numbers that share an exponent (OCP Microscaling 1.0)."""
    sizes = {**COMMON, **EXPERTS, "hidden_size": 64, "intermediate_size": 64, "num_local_experts": 4, "head_dim": 16}
    model = model_of("GptOssConfig", {**sizes, "sliding_window": 128})
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name.endswith(("gate_up_proj", "down_proj")):
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = mxfp4(tensor.mT)
        else:
            tensors[name] = tensor
    return save(folder, model, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})


def save_bnb(folder: Path, bits: int = 4) -> Path:
    """A Llama that bitsandbytes has quantized, as transformers saves it."""
    plain = folder.with_name(f"{folder.name}-plain")
    save(plain, model := model_of("LlamaConfig", WIDE), dict(model.state_dict()), None)
    how: dict[str, Any] = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"} if bits == 4 else {"load_in_8bit": True}
    config = transformers.BitsAndBytesConfig(**how)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(plain, quantization_config=config, device_map="cpu")
    loaded.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def save_named(folder: Path, method: str) -> Path:
    """A Llama that says that it is quantized in some way, with one tensor that bears it out."""
    model = model_of("LlamaConfig", WIDE)
    told = {"quant_method": method, "bits": 4, "group_size": 128}
    packed = {"model.layers.0.mlp.down_proj.qweight": torch.zeros(4, 4, dtype=torch.int32)}
    return save(folder, model, {**model.state_dict(), **packed}, told)


def save_compressed(folder: Path, preset: str = "W4A16") -> Path:
    """A Llama with its linear maps but the head's quantized by compressed-tensors, as llm-compressor saves it."""
    from compressed_tensors import quantization
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    model = model_of("LlamaConfig", WIDE)
    scheme = quantization.preset_name_to_scheme(preset, ["Linear"])
    told = quantization.QuantizationConfig(
        config_groups={"group_0": scheme}, ignore=["lm_head"], quantization_status="initialized"
    )
    quantization.apply_quantization_config(model, told)
    for module in (m for m in model.modules() if hasattr(m, "quantization_scheme")):
        how, weight = module.quantization_scheme.weights, module.weight.detach().float()
        more = {}
        if hasattr(module, "weight_global_scale"):
            more["global_scale"] = generate_gparam(weight.min(), weight.max())
            module.weight_global_scale.data.copy_(more["global_scale"])
        groups = weight.reshape(*module.weight_scale.shape, -1) if module.weight_scale.dim() == 2 else weight.flatten()
        scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), how, **more)
        module.weight_scale.data.copy_(scale.reshape(module.weight_scale.shape))
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    entry = json.loads(json.dumps(compressor.quantization_config.model_dump(), default=str))
    formats = {m.quantization_scheme.format.value for m in model.modules() if hasattr(m, "quantization_scheme")}
    entry |= {"quant_method": "compressed-tensors", "quantization_status": "compressed", "format": formats.pop()}
    return save(folder, model, dict(model.state_dict()), entry)


def save_mlx(folder: Path) -> Path:
    """A Llama as `mlx_lm.convert -q` writes it: 8 numbers of 4 bits in a U32, scales and biases by group, no method's name."""
    model = model_of("LlamaConfig", WIDE)
    tensors = dict(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            rows, columns = module.weight.shape
            tensors[f"{name}.weight"] = torch.zeros(rows, columns // 8, dtype=torch.uint32)
            for part in ("scales", "biases"):
                tensors[f"{name}.{part}"] = torch.zeros(rows, columns // 64, dtype=torch.bfloat16)
    save(folder, model, tensors, told := {"group_size": 64, "bits": 4, "mode": "affine"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization": told}))
    return folder


SAVED: dict[str, Callable[[Path], Path]] = {"fp8": save_fp8, "mxfp4": save_mxfp4, "bitsandbytes": save_bnb}
if importlib.util.find_spec("compressed_tensors") is not None:
    SAVED["compressed-tensors"] = save_compressed


def model_of(config: str, sizes: dict[str, Any]) -> Any:
    """A random model in bfloat16."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.08)
    return model.to(torch.bfloat16)


def save(folder: Path, model: Any, tensors: dict[str, Tensor], told: dict[str, Any] | None) -> Path:
    """The folder, with what the config says of the quantization."""
    folder.mkdir(parents=True)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict() | {"architectures": [type(model).__name__], "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config | ({"quantization_config": told} if told else {})))
    tiny_tokenizer().save_pretrained(folder)
    return folder


def fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight in e4m3 and the scales of its blocks."""
    rows, columns = weight.shape
    blocks = weight.float().reshape(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
    scale = blocks.abs().amax(dim=(1, 3), keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
    return (blocks / scale).reshape(rows, columns).to(torch.float8_e4m3fn), scale[:, 0, :, 0]


def mxfp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A tensor [..., columns] as [..., columns / 32, 16] bytes of two numbers each, and the exponents of the blocks plus 127."""
    blocks = weight.float().unflatten(-1, (-1, BLOCK))
    exponent = blocks.abs().amax(dim=-1).log2().floor() - 2
    scaled = blocks / exponent.exp2()[..., None]
    number = (scaled.abs()[..., None] - FP4).abs().argmin(dim=-1) + 8 * (scaled < 0)
    packed = number[..., 0::2] | (number[..., 1::2] << 4)
    return packed.to(torch.uint8), (exponent + 127).to(torch.uint8)


def unpacked(blocks: Tensor, scales: Tensor) -> Tensor:
    """What `mxfp4` has packed."""
    number = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2).long()
    value = FP4[number % 8] * (1 - 2 * (number // 8))
    return (value * (scales.float() - 127).exp2()[..., None]).flatten(-2)
