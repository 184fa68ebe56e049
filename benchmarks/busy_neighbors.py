"""What waiting threads cost beside busy programs: steps of the gradient search, idle and beside one and two neighbors.

    python benchmarks/busy_neighbors.py [--quick] [--out benchmarks/results/busy_neighbors.json]

Two models made here: `small` does many small operations (4 layers, width 256), `large` does large matrix products (4 layers,
width 1024). Each is measured with two threads, with OpenMP's default way of waiting and with heretic's (`heretic/openmp.py`). A
neighbor is a process that keeps one PyTorch thread busy. Every measurement ends after at most BUDGET seconds, so that the whole
takes about four minutes on two cores that nothing else uses; --quick only tries it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

THREADS = 2
NEIGHBORS = (0, 1, 2)
BUSY = "import torch; torch.set_num_threads(1); a = torch.randn(256, 256)\nprint('busy', flush=True)\nwhile True: a @ a"
SHAPES = {"small": (256, 688), "large": (1024, 2816)}  # width, of the MLP
STEPS = {"small": 10, "large": 1}  # in a repetition
BUDGET, QUICK = 8.0, 1.0  # seconds of a measurement; one repetition is always made
MOST_REPETITIONS = 9
LINE = "{workload:6} {waiting:8} {neighbors} neighbors: {median:.4f} s a step ({min:.4f} to {max:.4f})"
WORDS = ("how", "do", "make", "tell", "about", "stars", "rivers", "bread", "soup", "music", "history", "please")  # fmt: skip


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one short repetition, no result file")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/busy_neighbors.json")
    parser.add_argument("--measure", type=float, metavar="SECONDS", help=argparse.SUPPRESS)  # in its own processes
    parser.add_argument("--models", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps({name: measure(arguments.models / name, name, arguments.measure) for name in SHAPES}))
        return
    from common import head, write

    from heretic.hardware.openmp import CHOICES, PASSIVE

    plain = {k: v for k, v in os.environ.items() if k not in CHOICES} | {"OMP_NUM_THREADS": str(THREADS)}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        arguments.model = make_models(Path(folder))
        for neighbors in NEIGHBORS:
            for waiting, environment in (("default", plain), ("passive", plain | PASSIVE)):
                with busy(neighbors):
                    found = in_process(Path(folder), QUICK if arguments.quick else BUDGET, environment)
                rows += [row(workload, waiting, neighbors, seconds) for workload, seconds in found.items()]
                for one in rows[-len(found) :]:
                    print(LINE.format(**one), flush=True)
    if not arguments.quick:
        report = {**head(arguments), "threads": THREADS, "steps": STEPS, "passive": PASSIVE, "rows": rows}
        write(report, arguments.out)


def row(workload: str, waiting: str, neighbors: int, seconds: list[float]) -> dict[str, Any]:
    """Seconds of a step, over the repetitions."""
    spread = {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)}
    return {"workload": workload, "waiting": waiting, "neighbors": neighbors, **spread, "repetitions": seconds}


@contextmanager
def busy(number: int) -> Iterator[None]:
    """Within the context so many processes keep one thread busy each."""
    command = [sys.executable, "-c", BUSY]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(number)]
    try:
        for process in running:
            assert process.stdout is not None and process.stdout.readline() == "busy\n"
        yield
    finally:
        for process in running:
            process.kill()
            process.communicate()


def in_process(models: Path, seconds: float, environment: dict[str, str]) -> dict[str, list[float]]:
    """Seconds of a step by workload, measured in a process of its own: OpenMP reads its environment once."""
    command = [sys.executable, __file__, "--measure", str(seconds), "--models", str(models)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def make_models(folder: Path) -> str:
    """Random Llamas with a word tokenizer, as folders; what they are, in words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.chat_template = "{% for m in messages %}<s> {{ m['content'] }} {% endfor %}"
    for name, (width, inner) in SHAPES.items():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=2000, hidden_size=width, intermediate_size=inner, num_hidden_layers=4, num_attention_heads=8,
            num_key_value_heads=4, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder / name)
        fast.save_pretrained(folder / name)
    return "random Llamas of 4 layers, widths 256 and 1024"


def measure(folder: Path, name: str, budget: float) -> list[float]:
    """Seconds of a step of the gradient search, by repetition; a first step does not count."""
    import torch

    from heretic.ablation.directions import Directions
    from heretic.ablation.operator_factory import OperatorFactory
    from heretic.interrupt import StopSignal
    from heretic.model.batching import Batcher
    from heretic.model.checkpoint import open_checkpoint
    from heretic.model.loading import load
    from heretic.progress import NULL_REPORTER
    from heretic.scoring.gradient_loss import Objective
    from heretic.scoring.teacher_forcing import TeacherForcedTexts, log_probs_at
    from heretic.search.path_optimizer import OptimizerState, PathOptimizer
    from heretic.settings import GradientSettings

    assert torch.get_num_threads() == THREADS
    model = load(open_checkpoint(str(folder)), ["float32"], {})
    vectors = torch.randn(model.structure.num_layers, model.structure.width, generator=torch.Generator().manual_seed(0))
    directions = Directions(torch.nn.functional.normalize(vectors, dim=-1))
    batcher = Batcher(16)
    asked = [[4 + (i + j) % len(WORDS) for j in range(16)] for i in range(32)]
    harmless, harmful = TeacherForcedTexts.of(asked, [[5] * 4] * 32), TeacherForcedTexts.of(asked, [[6] * 4] * 32)
    operator_factory = OperatorFactory.prepare(directions, model.structure.writers, "norm_preserving")
    objective = Objective(model, operator_factory, batcher, harmless, harmful, log_probs_at(model, harmless, batcher))
    components = model.structure.components
    search = PathOptimizer(objective, components, GradientSettings(batch=16), 0, NULL_REPORTER, StopSignal())
    state = OptimizerState.initial(len(components), directions, "free")
    search.step(state)
    found: list[float] = []
    end = time.perf_counter() + budget
    while not found or (time.perf_counter() < end and len(found) < MOST_REPETITIONS):
        began = time.perf_counter()
        for _ in range(STEPS[name]):
            search.step(state)
        found.append((time.perf_counter() - began) / STEPS[name])
    return found


if __name__ == "__main__":
    main()
