"""Calibrate the timeline on the CPU: predict two passes of a small model from the CPU's rates, and measure them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from card_queue import Assumptions, Card, Timeline
from launch_log import Section
from sizes import Shape, checkpoint_of
from study_log import placed
from transformers import AutoModelForCausalLM

SMALL = Shape("Qwen2.5, 0.1B", 12, 768, 3072, 12, 4, 32000, dtype=torch.float32)
ROWS, TOKENS, AFTER = 16, 40, 90  # rows of a pass; tokens of a prompt; tokens in the cache at the decoding step
ROUNDS = 9


def calibrate() -> dict[str, Any]:
    """Predict and measure both passes, in one thread and float32."""
    torch.set_num_threads(1)
    with torch.inference_mode():
        kernel = launch_seconds()
        bandwidth = bandwidth_of_cpu()
        rows = {"prefill": ROWS * TOKENS, "decoding step": ROWS}
        cards = {name: Card("CPU", flops_of_cpu(each), bandwidth, 1.0, 1.0, "measured") for name, each in rows.items()}
        assumptions = Assumptions(launch=kernel, compute=1.0, memory=1.0, kernel=0.0, asynchronous=False)
        model = AutoModelForCausalLM.from_config(checkpoint_of(SMALL).config, dtype=torch.float32).eval()
        measured = {name: seconds_of(run) for name, run in passes(model, torch.device("cpu")).items()}
        with placed(SMALL, (SMALL.blocks,)) as shapes:
            logged: dict[str, Section] = {}
            for name, run in passes(shapes.language_model.model, torch.device("cuda:0")).items():
                shapes.log.take()
                run()
                (logged[name],) = shapes.log.take()
    found = {}
    for name, section in logged.items():
        line = Timeline([cards[name]], assumptions)
        line.replay(section.events)
        error = line.end / measured[name] - 1
        found[name] = {
            "measured": measured[name], "predicted": line.end, "error": error, "launches": section.launches,
            "flops": cards[name].flops,
        }  # fmt: skip
    return {
        "model": SMALL.name, "rows": ROWS, "tokens": TOKENS, "cached": AFTER, "passes": found,
        "bandwidth": bandwidth, "launch": kernel,
    }  # fmt: skip


def passes(model: Any, device: torch.device) -> dict[str, Callable[[], object]]:
    """A prefill, and a step of decoding after `AFTER` tokens."""
    ids = torch.ones(ROWS, TOKENS, dtype=torch.long, device=device)
    token = torch.ones(ROWS, 1, dtype=torch.long, device=device)
    long = torch.ones(ROWS, AFTER, dtype=torch.long, device=device)
    cache = model(long, attention_mask=torch.ones_like(long), use_cache=True, logits_to_keep=1).past_key_values
    mask = torch.ones(ROWS, AFTER + 1, dtype=torch.long, device=device)
    mask[:, 0] = 0  # padding, so that the mask is used

    def decode() -> object:
        made = model(token, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.crop(-1)
        return made

    padded = torch.ones_like(ids)
    padded[:, 0] = 0
    return {
        "prefill": lambda: model(ids, attention_mask=padded, use_cache=True, logits_to_keep=1),
        "decoding step": decode,
    }


def seconds_of(run: Callable[[], object]) -> float:
    """Fewest CPU seconds of a few runs after one: other programs share the machine."""
    run()
    taken = []
    for _ in range(ROUNDS):
        began = time.process_time()
        run()
        taken.append(time.process_time() - began)
    return min(taken)


def flops_of_cpu(rows: int) -> float:
    """FLOP/s of products of so many rows and the weights of as many MLPs as the model has, which fit into no cache."""
    x = torch.randn(rows, SMALL.hidden)
    weights = [torch.randn(SMALL.intermediate, SMALL.hidden) for _ in range(3 * SMALL.blocks)]
    taken = seconds_of(lambda: [torch.nn.functional.linear(x, w) for w in weights])
    return 2.0 * x.numel() * SMALL.intermediate * len(weights) / taken


def bandwidth_of_cpu() -> float:
    """Bytes/s of a kernel that reads 256 MiB and writes as much."""
    x, y = torch.randn(2**26), torch.empty(2**26)
    return 2.0 * x.nbytes / seconds_of(lambda: y.copy_(x))


def launch_seconds() -> float:
    """Seconds of the host a launch: a step of decoding of the same model with hardly any width, by its launches."""
    tiny = replace(SMALL, hidden=48, intermediate=48, heads=12, vocabulary=64)
    model = AutoModelForCausalLM.from_config(checkpoint_of(tiny).config, dtype=torch.float32).eval()
    with placed(tiny, (tiny.blocks,)) as shapes:
        run = passes(shapes.language_model.model, torch.device("cuda:0"))["decoding step"]
        shapes.log.take()
        run()
        (section,) = shapes.log.take()
    return seconds_of(passes(model, torch.device("cpu"))["decoding step"]) / section.launches
