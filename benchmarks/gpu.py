"""Everything to measure on a machine with a GPU, in under 8 minutes: `benchmarks/gpu.sh` runs it.

    python benchmarks/gpu.py [--size 7b] [--folder DIR] [--seconds 420] [--out FILE]

A model with random weights in bfloat16 stands for a real one of its size; its study has the cost of a study in which no answer ends
early. After each step the report is written, so that a step that fails or runs out of time takes nothing with it:

    rates     the GPU's own: a large matrix product, a copy in its memory
    passes    prefill and decoding by the project's own loops, as shares of these rates, and decoding by CUDA graphs
    study     a whole run, with the peak of the GPU's memory and the seconds of every stage, beside what preflight planned
    bnb_4bit  loading in 4 bits and decoding
    compile   a decoding step under torch.compile
    tests     pytest -m gpu
"""

from __future__ import annotations

import before_torch  # isort: skip  # noqa: F401

import argparse
import gc
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, ROLES, head, write
from transformers import AutoModelForCausalLM, Qwen2Config

from heretic.interrupt import StopSignal
from heretic.model.batching import Batcher
from heretic.model.checkpoint import open_checkpoint
from heretic.model.decoding import decode
from heretic.model.decoding_graph import DecodingGraphs
from heretic.model.forward import hidden_states
from heretic.model.loading import LanguageModel, load
from heretic.model.turns import finish
from heretic.pipeline.run import run
from heretic.planning.preflight import PreflightReport
from heretic.progress import NullReporter, Stage
from heretic.settings.sources import resolve

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.tiny import TEXT, tiny_tokenizer

SIZES = {  # blocks, width, MLP, heads, key-value heads, vocabulary
    "tiny": (4, 32, 64, 4, 2, 128),
    "0.5b": (24, 896, 4864, 14, 2, 151936),
    "7b": (28, 3584, 18944, 28, 4, 152064),  # Qwen2.5-7B
}
PREFILL = (64, 48)  # rows, tokens
DECODING_ROWS = (1, 16, 64, 128)
NEW_TOKENS = 32
PROMPTS = {"train": 100, "eval": 50}
DEVICE = "cuda:0"


@dataclass
class PeakReporter(NullReporter):
    """Keeps seconds and peak memory [bytes] of every stage; a stage that comes several times keeps its largest peak."""

    seconds: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str, total: int | None) -> Iterator[Stage]:
        """See ProgressReporter."""
        torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        with super().stage(name, total) as stage:
            yield stage
        torch.cuda.synchronize()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began
        self.peaks[name] = max(self.peaks.get(name, 0), torch.cuda.max_memory_allocated())


def random_checkpoint(folder: Path, size: str) -> None:
    """Write a model with random weights in bfloat16 and a word tokenizer."""
    blocks, width, mlp, heads, kv_heads, vocabulary = SIZES[size]
    config = Qwen2Config(
        num_hidden_layers=blocks,
        hidden_size=width,
        intermediate_size=mlp,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=False,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def random_prompts(folder: Path) -> list[str]:
    """Write four prompt files of known words, 30 to 40 a prompt, and return their settings."""
    folder.mkdir(parents=True, exist_ok=True)
    words, assignments, number = TEXT.split(), [], 0
    for role in ROLES:
        lines = []
        for _ in range(PROMPTS[role.rpartition("_")[2]]):
            number += 1
            lines.append(
                " ".join(words[(number * 7 + i * (1 + number % 5)) % len(words)] for i in range(30 + number % 11))
            )
        (folder / f"{role}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        assignments.append(f"prompts.{role}.source={folder / role}.txt")
    return assignments


def best_of(times: int, action: Callable[[], object]) -> float:
    """Return the shortest time of an action in seconds, with the GPU's work."""
    action()
    shortest = float("inf")
    for _ in range(times):
        torch.cuda.synchronize()
        began = time.perf_counter()
        action()
        torch.cuda.synchronize()
        shortest = min(shortest, time.perf_counter() - began)
    return shortest


def rates(size: str) -> dict[str, float]:
    """Measure a matrix product in bfloat16 [FLOP/s] and a copy in the GPU's memory [bytes/s, read and written]."""
    n = 64 if size == "tiny" else 8192
    a, b = (torch.randn(n, n, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    product = best_of(5, lambda: a @ b)
    source = torch.empty(n * n * 8, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    copy = best_of(5, lambda: target.copy_(source))
    return {"flops": 2 * n**3 / product, "bandwidth": 2 * source.numel() / copy}


def opened(folder: Path, quantization: str = "none") -> LanguageModel:
    """Load the model on the GPU."""
    return load(open_checkpoint(str(folder)), ["bfloat16"], {"device_map": {"": DEVICE}}, quantization=quantization)


def passes(model: LanguageModel, measured: dict[str, float]) -> dict[str, Any]:
    """Measure a prefill and decoding at several numbers of rows, beside the GPU's own rates."""
    weights = sum(p.numel() for name, p in model.model.named_parameters() if "embed" not in name)
    size = sum(p.nbytes for name, p in model.model.named_parameters() if "embed" not in name)
    rows, tokens = PREFILL
    batcher = Batcher(rows, model.device, pad=model.pad)
    prefill = batcher.batch(list(range(rows)), [[5 + i % 50] * tokens for i in range(rows)])
    seconds = best_of(3, lambda: hidden_states(model.model, prefill, use_cache=False))
    flops = 2 * weights * rows * tokens / seconds
    found: dict[str, Any] = {
        "prefill": {
            "rows": rows,
            "tokens": tokens,
            "seconds": seconds,
            "flops": flops,
            "of_rate": flops / measured["flops"],
        },
        "decoding": [],
    }
    for count in DECODING_ROWS:
        batch = Batcher(count, model.device, pad=model.pad).batch(
            list(range(count)), [[5 + i % 50] * 8 for i in range(count)]
        )

        graphs = DecodingGraphs(enabled=True)

        def several(number: int, batch: Any = batch, by: DecodingGraphs | None = None) -> float:
            return best_of(3 if by else 1, lambda: finish(decode(model.model, batch, number, set(), graphs=by)))

        step = (several(NEW_TOKENS) - several(2)) / (NEW_TOKENS - 2)
        shorter = NEW_TOKENS // 2  # each captures once
        by_graphs = (several(NEW_TOKENS, by=graphs) - several(shorter, by=graphs)) / (NEW_TOKENS - shorter)
        found["decoding"].append(
            {
                "rows": count,
                "seconds_per_token": step,
                "seconds_per_token_by_graphs": by_graphs if graphs.enabled else None,
                "tokens_per_second": count / step,
                "bandwidth": size / step,
                "of_rate": size / step / measured["bandwidth"],
            }
        )
    return found


def study(folder: Path, trials: int) -> dict[str, Any]:
    """Run a study with gradient search and export; every stage's seconds and peak beside the plan's bytes."""
    reports: list[PreflightReport] = []
    reporter = PeakReporter()
    assignments = [
        f"model={folder / 'model'}", f"runs_dir={folder / 'runs'}", "run_name=gpu", f"n_trials={trials}",
        f"save_to={folder / 'out'}", "max_response_length=32", 'refusal_markers=["a","e","i","o","u"]', "max_kl=1000.0",
        *random_prompts(folder / "prompts"),
    ]  # fmt: skip
    began = time.perf_counter()
    outcome = run(
        resolve(None, assignments=assignments),
        force=True,
        reporter=reporter,
        stop=StopSignal(),
        on_preflight=reports.append,
    )
    seconds = time.perf_counter() - began
    plan = reports[0].plan
    return {
        "seconds": seconds,
        "trials": len(outcome.results),
        "verified": outcome.export.verification.divergence if outcome.export else None,
        "stages": reporter.seconds,
        "peaks": reporter.peaks,
        "plan": [load.total for load in plan.loads] if plan else None,
        "batch_size": plan.batch_size if plan else None,
    }


def bnb_4bit(folder: Path) -> dict[str, Any]:
    """Load in 4 bits, and decode."""
    model = opened(folder, "bnb_4bit")
    batch = Batcher(16, model.device, pad=model.pad).batch(list(range(16)), [[5] * 8] * 16)
    seconds = best_of(1, lambda: finish(decode(model.model, batch, NEW_TOKENS, set())))
    return {"bytes": torch.cuda.memory_allocated(), "seconds": seconds, "rows": 16, "tokens": NEW_TOKENS}


def compiled(model: LanguageModel) -> dict[str, float]:
    """Time a pass over one token a row, as it is and under torch.compile (16 rows, without a cache)."""
    tokens = torch.full((16, 1), 5, device=model.device)

    def step(module: Any) -> float:
        with torch.inference_mode():
            return best_of(5, lambda: module(input_ids=tokens, use_cache=False))

    return {"eager": step(model.model), "compiled": step(torch.compile(model.model))}


def gpu_tests() -> dict[str, Any]:
    """Run the tests that need a GPU."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    return {"status": done.returncode, "output": done.stdout[-2000:] + done.stderr[-500:]}


def measure(size: str, folder: Path, out: Path, report: dict[str, Any], seconds: float, *, tests: bool = True) -> None:
    """Run all steps and write `report` after each; a step does not begin after `seconds`."""
    began = time.perf_counter()
    loaded: list[LanguageModel] = []

    def attempt(name: str, action: Callable[[], Any]) -> None:
        if time.perf_counter() - began > seconds:
            report[name] = {"skipped": "no time left"}
        else:
            try:
                report[name] = action()
            except Exception as error:  # whatever it is belongs into the report, and the next step begins
                report[name] = {"error": f"{type(error).__name__}: {error}"[:1000]}
        gc.collect()
        torch.cuda.empty_cache()
        write(report, out)
        print(f"{time.perf_counter() - began:6.1f} s  {name}: {str(report[name])[:150]}", flush=True)

    attempt("rates", lambda: rates(size))
    attempt("checkpoint", lambda: random_checkpoint(folder / "model", size))
    attempt("loading", lambda: loaded.append(opened(folder / "model")))
    if loaded:
        attempt("passes", lambda: passes(loaded[0], report["rates"]))
        attempt("compile", lambda: compiled(loaded[0]))
        loaded.clear()
    attempt("study", lambda: study(folder, 2 if size == "tiny" else 8))
    attempt("bnb_4bit", lambda: bnb_4bit(folder / "model"))
    if tests:
        attempt("tests", gpu_tests)


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="7b")
    parser.add_argument(
        "--folder", type=Path, default=Path("/tmp/heretic-gpu"), help="for the model; about 35 GB at 7b"
    )
    parser.add_argument("--seconds", type=float, default=420.0)
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu.json")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("PyTorch sees no GPU here.")
    arguments.model = f"random-{arguments.size}"
    measure(arguments.size, arguments.folder, arguments.out, head(arguments), arguments.seconds)


if __name__ == "__main__":
    main()
