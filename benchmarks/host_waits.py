"""Host waits, kernel launches and bytes between GPUs, counted on pretend GPUs: by pass and by decoded token.

    python benchmarks/host_waits.py [--name after] [--out benchmarks/results/host_waits.json]

Tiny random models of four blocks (8 writers), 8 padded rows, float32; for the bytes also 128 rows of a vocabulary of 151,936 in
bfloat16. To count another commit: PYTHONPATH=OTHER/src, --name before. The file keeps what was counted under other names.
"""

from __future__ import annotations

import before_torch  # isort: skip  # noqa: F401

import json
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from common import head, options, write
from transformers import GenerationConfig

sys.path.append(str(Path(__file__).parents[1]))

from heretic.ablation.ablation import Ablation
from heretic.ablation.apply import apply_operators
from heretic.ablation.directions import Directions
from heretic.ablation.operator_factory import OperatorFactory
from heretic.model.batching import Batch, Batcher, EditSpec
from heretic.model.capture import last_token_residuals
from heretic.model.checkpoint import open_checkpoint
from heretic.model.decoding import StopCriteria, decode, verify_draft
from heretic.model.loading import LanguageModel, load
from heretic.scoring.divergence import measure_divergence
from heretic.scoring.gradient_loss import Objective
from heretic.scoring.teacher_forcing import TeacherForcedTexts, all_log_probs

tiny: Any = import_module("tests.tiny")
spread: Any = import_module("tests.helpers.spread").spread
PretendGpus: Any = import_module("tests.helpers.pretend_gpus").PretendGpus

MODELS = ("llama", "gemma3", "mixtral", "gpt2")
SEQUENCES = [[5 + (i * 7 + j) % 80 for j in range(8 + i % 3)] for i in range(8)]
TEXTS = [[5 + (i * 3 + j) % 80 for j in range(3)] for i in range(8)]
FEW, MANY = 25, 49  # tokens of two answers; a decoded token's counts are their difference by token
TRIALS = 4
LARGE_VOCABULARY, LARGE_ROWS = 151_936, 128


def main() -> None:
    """Count, print and write the JSON."""
    parser = options(__doc__, "host_waits.json", assets=False)
    parser.add_argument("--name", default="after")
    arguments = parser.parse_args()
    arguments.model = "tiny random models"
    report: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"counted": {}}
    counted: dict[str, Any] = {"models": {}}
    report["counted"][arguments.name] = counted
    for family in MODELS:
        for count in (1, 4):
            counted["models"][f"{family}, {count}"] = counts(family, count)
            print(family, count, flush=True)
            write({**report, **head(arguments)}, arguments.out)
    counted["bytes_to_first"] = large_vocabulary()
    write({**report, **head(arguments)}, arguments.out)


@contextmanager
def loaded(family: str, count: int, **changed: Any) -> Iterator[tuple[Any, LanguageModel]]:
    """A tiny model of the family on so many pretend GPUs."""
    dtype = torch.bfloat16 if changed else torch.float32
    name, sizes = tiny.FAMILIES.get(family) or tiny.MIXED[family]
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict(tiny.FAMILIES, {family: (name, {**sizes, **changed})}),
        PretendGpus(count) as gpus,
    ):
        path = tiny.save_tiny(Path(folder), family, dtype=dtype)
        dtypes = [str(dtype).removeprefix("torch.")]
        yield gpus, load(open_checkpoint(str(path)), dtypes, {"device_map": spread(family, count)})


def counts(family: str, count: int) -> dict[str, Any]:
    """Return the counts of every kind of pass of one model."""
    with loaded(family, count) as (gpus, model):
        structure = model.structure
        torch.manual_seed(0)
        directions = Directions(torch.nn.functional.normalize(torch.randn(4, structure.width), dim=-1))
        factory = OperatorFactory.prepare(directions, structure.writers, "norm_preserving")
        found: dict[str, Any] = {"writers": len(structure.writers), **dict(passes(gpus, model, factory))}
        operators = factory.operators(Ablation(dict.fromkeys(structure.components, (1.0,) * 4)))
        for name, how, trials in (
            ("generate", generate, 0),
            ("decode", decode, 0),
            ("decode, 4 trials", decode, TRIALS),
        ):
            with apply_operators(structure.writers, *[operators] * trials):
                found[name] = by_token(gpus, model, how, trials)
    return found


def passes(gpus: Any, model: LanguageModel, factory: OperatorFactory) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the counts of one pass of each kind."""
    batcher = Batcher(8, model.device)
    harmless, harmful = (TeacherForcedTexts.of(SEQUENCES, TEXTS) for _ in range(2))
    original = all_log_probs(model, harmless, batcher, "original")
    objective = Objective(model, factory, batcher, harmless, harmful, original.split(harmless.counts))
    layers, rows = model.structure.num_layers, range(len(SEQUENCES))

    def gradient() -> None:
        strengths = torch.full((len(model.structure.components), layers), 0.5, requires_grad=True)
        vector = torch.ones(model.structure.width, requires_grad=True)
        ablation = Ablation(dict(zip(model.structure.components, strengths, strict=True)), vector=vector)
        objective.evaluate(ablation, 0, rows, rows, wanted=[strengths, vector])

    def draft() -> None:
        texts = [[*sequence, *text] for sequence, text in zip(SEQUENCES, TEXTS, strict=True)]
        ended(verify_draft(model.model, batcher.batch(list(rows), texts), TEXTS, StopCriteria(32, {2})))

    with apply_operators(model.structure.writers, factory.operators(Ablation({"mlp": (0.5,) * layers}))):
        yield "divergence pass", of(gpus, lambda: measure_divergence(model, harmless, original, batcher))
        yield "draft pass", of(gpus, draft)
    yield "capture pass", of(gpus, lambda: ended(last_token_residuals(model, batcher.batch(list(rows), SEQUENCES))))
    yield "gradient pass, vector", of(gpus, gradient, passes=2)


def of(gpus: Any, work: Callable[[], Any], passes: int = 1) -> dict[str, Any]:
    """Return waits and launches of the second time that the work is done."""
    work()
    gpus.reset()
    work()
    return {
        "waits": sum(gpus.syncs["-"].values()) / passes,
        "launches": gpus.launches["-"] / passes,
        "lines": {f"{what}: {where}": n for (what, where), n in gpus.syncs["-"].most_common()},
    }


def ended(made: Any) -> Any:
    """Run what takes turns to its end; earlier commits have nothing that does."""
    if not isinstance(made, Generator):
        return made
    while True:
        try:
            next(made)
        except StopIteration as end:
            return end.value


def by_token(
    gpus: Any,
    model: LanguageModel,
    how: Callable[..., Any],
    trials: int,
    rows: int = 8,
    tokens: Sequence[int] = (FEW, MANY),
) -> dict[str, Any]:
    """Return the counts of one decoded token of all rows."""
    sequences = [SEQUENCES[i % len(SEQUENCES)] for i in range(rows)]
    found, lines = [], {}
    for number in tokens:
        batch = Batcher(rows, model.device).batch(list(range(rows)), sequences)
        if trials:
            of_row = [i % trials for i in range(rows)]
            known = (
                {"trials": of_row}
                if hasattr(Batch, "padded")
                else {"trial_of_row": torch.tensor(of_row).to(model.device)}
            )
            batch = replace(batch, edited=EditSpec(trials), **known)
        gpus.reset()
        ended(how(model.model, batch, number, set()))
        syncs = gpus.syncs["-"]
        lines = {f"{what}: {where}": n for (what, where), n in syncs.most_common()}
        to_first = sum(size for (_, _, to, _), size in gpus.peer_bytes.items() if to == 0)
        found.append((sum(syncs.values()), gpus.launches["-"], to_first))
    each = [(many - few) / (tokens[1] - tokens[0]) for few, many in zip(*found, strict=True)]
    return dict(zip(("waits", "launches", "bytes_to_first"), each, strict=True)) | {"lines": lines}


@torch.inference_mode()
def generate(model: Any, batch: Batch, tokens: int, _: object) -> None:
    """transformers' own loop."""
    config = GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=[95], pad_token_id=0)
    model.generate(input_ids=batch.input_ids, attention_mask=batch.attention_mask, generation_config=config)


def large_vocabulary() -> dict[str, Any]:
    """Return the bytes that reach the first of four GPUs by token, for many rows of a large vocabulary."""
    with loaded("llama", 4, vocab_size=LARGE_VOCABULARY) as (gpus, model):
        ways: dict[str, Callable[..., Any]] = {"generate": generate, "decode": decode}
        return {name: by_token(gpus, model, how, 0, LARGE_ROWS, (3, 5))["bytes_to_first"] for name, how in ways.items()}


if __name__ == "__main__":
    main()
