"""The memory plan against the peaks of whole studies on pretend GPUs, by phase and GPU.

    python benchmarks/plan_peaks.py [--only llama] [--plan] [--out benchmarks/results/plan_peaks.json]

Random models in bfloat16, with shapes for which weights, caches and activations are far above constants. A study has a gradient
search, one trial and an export; no answer ends early, which is what the plan assumes.
"""

from __future__ import annotations

import before_torch  # isort: skip  # noqa: F401

import gc
import itertools
import json
import sys
import tempfile
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from common import ROLES, head, options, write
from transformers import AutoModelForCausalLM

sys.path.append(str(Path(__file__).parents[1]))

from heretic.export import export, verify
from heretic.interrupt import StopSignal
from heretic.model import capture, decoding, forward
from heretic.model.turns import Turns
from heretic.pipeline.prepare import run_preflight
from heretic.pipeline.run import run
from heretic.planning.memory_model import DeviceMemory
from heretic.progress import NullReporter
from heretic.scoring import divergence, evaluator, gradient_loss, refusal_count
from heretic.scoring.judges.markers import MarkerJudge
from heretic.scoring.judges.verdict import REFUSAL
from heretic.scoring.refusal_proxy import MAX_DRAFT_TOKENS
from heretic.search import path_optimizer
from heretic.session import session
from heretic.settings.sources import resolve

tiny: Any = import_module("tests.tiny")
PretendGpus: Any = import_module("tests.helpers.pretend_gpus").PretendGpus

COMMON: dict[str, Any] = dict(
    vocab_size=32768, hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8,
    num_key_value_heads=2, head_dim=64, max_position_embeddings=1024, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    initializer_range=0.06, tie_word_embeddings=False,
)  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", COMMON),
    "gemma3": ("Gemma3TextConfig", {**COMMON, "sliding_window": 512, "tie_word_embeddings": True}),
    "mixtral": (
        "MixtralConfig",
        {**COMMON, "intermediate_size": 768, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
}
PROMPTS = 32  # in each of the four sets
WORDS = 24  # of the longest prompt
SHARED = 64  # words of the system prompt
EXPORT = "export"
UNLIKELY = 7  # a token id
SETTINGS = (
    "run_name=run", "n_trials=1", "max_response_length=24", "batch_size=32", 'dtypes=["bfloat16"]', "max_kl=1000.0",
    "trials_per_batch=1", 'response_prefix=""', "search.n_startup_trials=2", 'search.start="gradient"',
    "search.gradient.weights=[5]", "search.gradient.steps=1", "search.gradient.batch=16", "search.gradient.sparsity=0",
    "search.gradient.mine_refusals=false", "search.gradient.second_search=false",
)  # fmt: skip

# By phase, the functions whose innermost counts. In the export, which loads the model again, all counts as one phase.
PHASES: dict[str, Sequence[tuple[Any, str]]] = {
    "loading": [(session, "load")],
    "weight_stats": [(session, "operator_factory_for")],
    "residuals": [(capture, "last_token_residuals")],
    "gradients": [(gradient_loss.Objective, "evaluate")],
    "prefill": [
        (evaluator, "measure_divergence"),
        (divergence, "all_log_probs"),
        (session, "all_log_probs"),
        (decoding, "verify_draft"),
        (refusal_count, "verify_draft"),
    ],
    "decoding": [(decoding, "continue_decoding"), (refusal_count, "continue_decoding")],
    EXPORT: [(export, "verify")],
}


def main() -> None:
    """Measure every case, or plan them anew, and write the JSON after each."""
    parser = options(__doc__, "plan_peaks.json", assets=False)
    parser.add_argument("--only", default="", help="a family; the file keeps the others")
    parser.add_argument("--plan", action="store_true", help="plan anew for the peaks that the file holds")
    arguments = parser.parse_args()
    arguments.model = "random models"
    cases: dict[str, Any] = json.loads(arguments.out.read_text())["cases"] if arguments.out.exists() else {}
    for family, count, shared in itertools.product(FAMILIES, (1, 4), (0, SHARED)):
        if arguments.only in ("", family):
            name = f"{family}, {count}, {shared}"
            with tempfile.TemporaryDirectory() as folder:
                cases[name] = case(Path(folder), family, count, shared, cases.get(name) if arguments.plan else None)
            write({"cases": cases, **head(arguments)}, arguments.out)
            print(name, json.dumps(cases[name]), flush=True)


def case(folder: Path, family: str, count: int, shared: int, before: Any) -> dict[str, Any]:
    """Return planned and measured bytes besides the weights, by phase and GPU; measured by a study unless they are known."""
    kind, sizes = FAMILIES[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, kind)(**sizes), dtype=torch.bfloat16)
    model.save_pretrained(folder / "model")
    tiny.tiny_tokenizer().save_pretrained(folder / "model")
    del model
    gc.collect()
    assignments = [
        *SETTINGS,
        *prompts(folder / "prompts"),
        *(f"{key}={folder / path}" for key, path in (("model", "model"), ("runs_dir", "runs"), ("save_to", "out"))),
        f'system_prompt="{" ".join(words(0, shared))}"',
        device_map(count, tied=bool(sizes["tie_word_embeddings"])),
    ]
    resolved = resolve(None, assignments=assignments)
    with PretendGpus(count) as gpus, phases(gpus), largest_workload():
        plan = run_preflight(resolved.settings).plan
        if before is None:
            run(resolved, reporter=NullReporter(), stop=StopSignal())
    assert plan is not None
    found: dict[str, Any] = {"rows": plan.batch_size, "prompt": plan.prompt_tokens, "phases": {}}
    for phase in PHASES:
        peaks = (
            [peak - load.weights for peak, load in zip(gpus.phase_peak[phase], plan.loads, strict=True)]
            if not before
            else []
        )
        measured = before["phases"][phase]["measured"] if before else peaks
        found["phases"][phase] = {"planned": [planned(load, phase) for load in plan.loads], "measured": measured}
    found["weights"] = [load.weights for load in plan.loads]
    return found


def device_map(count: int, *, tied: bool) -> str:
    """Return the setting that gives each GPU as many blocks, the first the embedding, the last the head unless it is tied."""
    blocks, last = COMMON["num_hidden_layers"], count - 1
    table = {f"model.layers.{i}": i * count // blocks for i in range(blocks)}
    table |= {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": last, "lm_head": 0 if tied else last}
    return f"device_map={{{', '.join(f'{name!r}={gpu}' for name, gpu in table.items())}}}"


def planned(load: DeviceMemory, phase: str) -> int:
    """Bytes besides the weights that the plan has for a phase."""
    attached = load.operators + load.rounds
    if phase in ("prefill", "decoding"):
        return int(getattr(load, phase)) + attached
    if phase == EXPORT:
        return load.verification
    return int(getattr(load, phase))


@contextmanager
def largest_workload() -> Iterator[None]:
    """What the plan has to assume: answers of full length, drafts of full length that are rejected, prompts that share batches.

    Random weights in bfloat16 would not pass the checks of padding, prefix caching and export.
    """
    enable_caching = session.enable_caching

    def rejected_drafts(measuring: Any, texts: Sequence[Any]) -> Any:
        return enable_caching(measuring, [[UNLIKELY] * MAX_DRAFT_TOKENS for _ in texts])

    with ExitStack() as stack:
        for owner, name, value in (
            (path_optimizer, "MAX_EXTRA_WEIGHTS", 0),
            (MarkerJudge, "ends_early", False),
            (MarkerJudge, "verdicts", lambda _, exchanges: [REFUSAL] * len(exchanges)),
            (session, "enable_caching", rejected_drafts),
            (forward, "SAME_IN_HALF_PRECISION", 10.0),
            (forward, "PADDED_IN_HALF_PRECISION", 10.0),
            (verify, "ROUNDING_IN_HALF_PRECISION", 10.0),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


@contextmanager
def phases(gpus: Any) -> Iterator[None]:
    """Let the pretend GPUs keep the peaks of each phase."""

    def within(phase: str, function: Any) -> Any:
        def own() -> Any:
            return gpus.phase(EXPORT if gpus.phase_name == EXPORT else phase)

        def turns(made: Turns[Any]) -> Turns[Any]:
            while True:
                with own():  # others take their turns outside
                    try:
                        next(made)
                    except StopIteration as ended:
                        return ended.value
                yield

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with own():
                made = function(*args, **kwargs)
            return turns(made) if isinstance(made, Generator) else made

        return call

    with ExitStack() as stack:
        for phase, functions in PHASES.items():
            for owner, name in functions:
                stack.enter_context(mock.patch.object(owner, name, within(phase, getattr(owner, name))))
        yield


def words(number: int, count: int) -> list[str]:
    known = tiny.TEXT.split()
    return [known[(number * 7 + i * (1 + number % 5)) % len(known)] for i in range(count)]


def prompts(folder: Path) -> list[str]:
    folder.mkdir(parents=True)
    assignments, number = [], 0
    for role in ROLES:
        lines = []
        for i in range(PROMPTS):
            number += 1
            lines.append(" ".join(words(number, WORDS - i % 4)))
        (folder / f"{role}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        assignments.append(f"prompts.{role}.source={folder / role}.txt")
    return assignments


if __name__ == "__main__":
    main()
