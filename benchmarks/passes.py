"""What a pass over the evaluation prompts costs, with shared beginnings on and off and in batches of several sizes.

    python benchmarks/passes.py MODEL [--tokens 24] [--out benchmarks/results/passes.json]

MODEL is a model folder; the prompts are 60 of the bundled set `other_eval`. Each figure is the best of three.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from common import head, options, write

from heretic.model.batching import Batch, Batcher
from heretic.model.chat_format import ChatFormat
from heretic.model.checkpoint import open_checkpoint
from heretic.model.decoding import decode
from heretic.model.forward import can_share, next_token_log_probs
from heretic.model.loading import load
from heretic.prompts import load as load_prompts
from heretic.settings import PromptSource


def main() -> None:
    """Measure, print a table, write the JSON."""
    parser = options(__doc__, "passes.json", assets=False)
    parser.add_argument("model")
    parser.add_argument("--sizes", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--tokens", type=int, default=24)
    arguments = parser.parse_args()
    language_model = load(open_checkpoint(arguments.model), ["float32"], {"device_map": {"": "cpu"}})
    prompts = load_prompts("other_eval", PromptSource(source="bundled:other_eval", split="train[:60]")).prompts
    sequences = ChatFormat(language_model.tokenizer).encode(prompts)
    model = language_model.model
    rows: list[dict[str, Any]] = []
    for share in (False, True):
        if share and not can_share(model, sequences, Batcher(8)):
            print("this model cannot share beginnings")
            break
        for size in arguments.sizes:
            batcher = Batcher(size, share=share)
            prefill = best(batcher, sequences, lambda b: list(next_token_log_probs(model, b)))
            decoded = best(batcher, sequences, lambda b: decode(model, b, arguments.tokens, set()))
            rows.append({"shared": share, "batch": size, "prefill_s": prefill, "decode_s": decoded})
            print(f"shared={share!s:<5} batch={size:<3} prefill {prefill:5.1f} s, with decoding {decoded:5.1f} s")
    write(head(arguments) | {"passes": rows}, arguments.out)


def best(batcher: Batcher, sequences: list[list[int]], step: Callable[[Batch], list[Any]]) -> float:
    """Seconds of the fastest of three passes."""
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        batcher.run("", sequences, step)
        seconds.append(time.perf_counter() - began)
    return round(min(seconds), 2)


if __name__ == "__main__":
    main()
