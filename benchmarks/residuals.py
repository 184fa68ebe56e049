"""Prompts per second of capturing residuals, against a bare forward pass of the decoder over the same batches.

    python benchmarks/residuals.py ASSETS [--rounds 3] [--out benchmarks/results/residuals.json]

The two take turns, so that a noisy machine hurts both.
"""

from __future__ import annotations

import before_torch  # isort: skip  # noqa: F401

import statistics
import time

import torch
from common import head, options, write

from heretic.model.batching import Batch, Batcher
from heretic.model.capture import mean_residuals
from heretic.model.chat_format import ChatFormat
from heretic.model.checkpoint import open_checkpoint
from heretic.model.loading import load
from heretic.model.turns import Turns


def main() -> None:
    """Measure, print, write the JSON."""
    parser = options(__doc__, "residuals.json")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    model = load(open_checkpoint(str((arguments.assets / arguments.model).resolve())), ["float32"], {})
    lines = (arguments.assets / "prompts" / "harmful_train.txt").read_text().splitlines()[: arguments.prompts]
    sequences = ChatFormat(model.tokenizer).encode(lines)
    batcher = Batcher(64, model.device)

    @torch.inference_mode()
    def bare(batch: Batch) -> Turns[list[None]]:
        model.model.get_decoder()(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            use_cache=False,
        )
        yield
        return [None] * len(batch.rows)

    ways = {
        "bare forward pass": lambda: batcher.run("", sequences, bare),
        "residuals": lambda: mean_residuals(model, "", sequences, batcher),
        "residuals, beginning run once": lambda: shared(mean_residuals, model, sequences, batcher),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(arguments.rounds):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - began)
    rates = {name: round(len(sequences) / statistics.median(s), 2) for name, s in seconds.items()}
    report = head(arguments) | {
        "prompts": len(sequences),
        "prompts_per_second": rates,
        "share_of_bare": {name: round(rate / rates["bare forward pass"], 3) for name, rate in rates.items()},
    }
    write(report, arguments.out)
    for name in ways:
        print(f"{name:<32} {rates[name]:>7} prompts/s  {report['share_of_bare'][name]:.2f} of bare")


def shared(capture: object, model: object, sequences: list[list[int]], batcher: Batcher) -> None:
    """As a run does it where the start-up check allows it."""
    batcher.prefix_caching = True
    try:
        capture(model, "", sequences, batcher)  # type: ignore[operator]
    finally:
        batcher.prefix_caching = False


if __name__ == "__main__":
    main()
