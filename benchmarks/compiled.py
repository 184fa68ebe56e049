"""Whether torch.compile pays here: prefill and decoding of a model as it is, and with its MLPs and norms compiled.

    python benchmarks/compiled.py ASSETS [--rows 16] [--tokens 40] [--out benchmarks/results/compiled.json]

Whole blocks are not compiled: each has its own place in the cache, so PyTorch compiles anew for every block until it gives up.
Operators are hooks on the writers' outputs and would come on top. Needs a C++ compiler.
"""

from __future__ import annotations

import before_torch  # isort: skip  # noqa: F401

import time
from typing import Any

import torch
from common import head, options, write
from transformers import AutoModelForCausalLM


def main() -> None:
    """Time both, print, write the JSON."""
    parser = options(__doc__, "compiled.json")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=40)
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(arguments.assets / arguments.model, dtype=torch.float32).eval()
    report: dict[str, Any] = head(arguments) | {"threads": torch.get_num_threads()}
    report["eager"] = timed(model.model, arguments.rows, arguments.tokens)
    for block in model.model.layers:
        for part in (block.mlp, block.input_layernorm, block.post_attention_layernorm):
            part.forward = torch.compile(part.forward, dynamic=True)
    began = time.perf_counter()
    timed(model.model, arguments.rows, arguments.tokens)
    report["seconds_first_time"] = round(time.perf_counter() - began, 1)
    report["compiled"] = timed(model.model, arguments.rows, arguments.tokens)
    write(report, arguments.out)
    print({name: report[name] for name in ("eager", "compiled", "seconds_first_time")})


@torch.inference_mode()
def timed(decoder: Any, rows: int, tokens: int) -> dict[str, float]:
    """Seconds of a prefill, and of a step of decoding after it; the fastest of some."""
    prompt, token = torch.randint(100, 1000, (rows, tokens)), torch.randint(100, 1000, (rows, 1))
    prefill, step = [], []
    for _ in range(4):
        began = time.perf_counter()
        cache = decoder(input_ids=prompt, use_cache=True).past_key_values
        prefill.append(time.perf_counter() - began)
    for _ in range(8):
        began = time.perf_counter()
        decoder(input_ids=token, past_key_values=cache, use_cache=True)
        step.append(time.perf_counter() - began)
    return {"prefill": round(min(prefill), 3), "step": round(min(step), 4)}


if __name__ == "__main__":
    main()
