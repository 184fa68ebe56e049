"""Is bfloat16 right on this CPU? Seconds of a pass, noise of the KL and scores of the same trials, beside float32.

    python benchmarks/dtype.py ASSETS [--trials 5] [--tokens 32] [--seconds 20] [--set SETTING] [--out FILE]

100 + 100 direction prompts, 50 + 50 evaluation prompts. Both models are in memory at once, and their passes alternate.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import head, opened, options, write
from torch import Tensor
from trial import drawn, run

from heretic.hardware.cpu import native_bfloat16
from heretic.model.forward import supports_mid_stack_start
from heretic.pipeline.gradient_search import GradientProblem, initial_state, prepare
from heretic.scoring.divergence import divergences, first_token_log_probs
from heretic.scoring.evaluator import Scores
from heretic.search.path_optimizer import OptimizerState
from heretic.session.session import Session

FORMATS = ("float32", "bfloat16")
ROWS, TOKENS = 16, 40
DECODED = 8
OTHER_BATCHES = (1, 7)  # against one batch with all prompts


def main() -> None:
    """Measure, print, write the JSON."""
    parser = options(__doc__, "dtype.json")
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32, help="of an answer")
    parser.add_argument("--seconds", type=float, default=20, help="for the passes of one format")
    parser.add_argument("--set", action="append", default=[], dest="extra", help="a setting of both sessions")
    arguments = parser.parse_args()
    report: dict[str, Any] = head(arguments) | {
        "threads": torch.get_num_threads(),
        "native_bfloat16": native_bfloat16(),
    }
    with tempfile.TemporaryDirectory() as folder:
        sessions = {}
        for name in FORMATS:
            settings = [f"max_response_length={arguments.tokens}", f'dtypes=["{name}"]', *arguments.extra]
            sessions[name], _ = opened(arguments.assets, arguments.model, settings, Path(folder))
        report["caches"] = {name: caches(session) for name, session in sessions.items()}
        report["noise"] = noise(sessions)
        write(report, arguments.out)
        report["trials"] = trials(sessions, arguments.trials)
        write(report, arguments.out)
        problems = {name: prepare(session) for name, session in sessions.items()}
        if all(problems.values()):  # else the model refuses too few prompts for a gradient search
            report["gradient"] = gradients(sessions, problems)
        report["seconds"] = seconds(sessions, problems, arguments.seconds)
    write(report, arguments.out)
    print({name: report.get(name) for name in ("caches", "noise", "gradient", "seconds")})


def caches(session: Session) -> dict[str, bool]:
    """Which savings the format's rounding allows."""
    context = session.context
    model = context.language_model
    return {
        "prefix_caching": context.batcher.prefix_caching,
        "start_at_a_later_block": supports_mid_stack_start(
            model.model, model.structure.blocks, context.encoded["harmless_eval"], context.batcher
        ),
    }


def noise(sessions: dict[str, Session]) -> dict[str, Any]:
    """KL of the original against itself: in batches of other sizes, and in the other format."""
    found: dict[str, Any] = {}
    reference = {}
    for name, session in sessions.items():
        context = session.context
        prompts = context.encoded["harmless_eval"]
        plain = replace(context.batcher, prefix_caching=False)

        def log_probs(size: int, context: Any = context, prompts: Any = prompts, plain: Any = plain) -> Tensor:
            return first_token_log_probs(context.language_model, prompts, replace(plain, size=size))

        reference[name] = log_probs(len(prompts))
        for size in OTHER_BATCHES:
            found[f"{name}, batches of {size}"] = summary(divergences(reference[name], log_probs(size)))
        cached = first_token_log_probs(context.language_model, prompts, replace(context.batcher, size=len(prompts)))
        found[f"{name}, prefix caching"] = summary(divergences(reference[name], cached))
    found["bfloat16 against float32"] = summary(divergences(reference["float32"], reference["bfloat16"]))
    return found


def summary(values: Tensor) -> dict[str, float]:
    """Mean and maximum over the prompts, in nats."""
    return {"mean": float(values.mean()), "max": float(values.max())}


def trials(sessions: dict[str, Session], count: int) -> list[dict[str, Any]]:
    """Scores of the same random ablations, each with the directions of its own format."""
    scores: dict[str, list[Scores]] = {
        name: run(session, session.evaluator, drawn(session, count), 1) for name, session in sessions.items()
    }
    found = []
    for single, half in zip(*scores.values(), strict=True):
        different = sum(a != b for a, b in zip(single.refused, half.refused, strict=True))
        found.append(
            {name: {"kl": s.divergence.mean, "refusals": s.refusals, "seconds": s.seconds}
             for name, s in (("float32", single), ("bfloat16", half))}
            | {"other_verdicts": different, "of": single.total}
        )  # fmt: skip
        print(found[-1], flush=True)
    original = [session.baseline.verdicts for session in sessions.values()]
    found.append({"original": {name: s.baseline.refusals for name, s in sessions.items()},
                  "other_verdicts": sum(a != b for a, b in zip(*original, strict=True))})  # fmt: skip
    return found


def step(problem: GradientProblem, state: OptimizerState, rows: int) -> tuple[float, Tensor]:
    """Loss and gradients in the strengths of one minibatch, as in a step of the gradient search."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in state.tensors.items()}
    optimizer = problem.optimizer(problem.session.context.settings.search.gradient, lambda _: None)
    harmful, harmless = range(min(rows, len(problem.objective.harmful.texts))), range(rows)
    terms = problem.objective.evaluate(
        optimizer._ablation(leaves), 0, list(harmless), list(harmful), weight=0.1, wanted=list(leaves.values())
    )
    return terms.kl + 0.1 * terms.refusing, terms.gradients[list(leaves).index("strengths")].flatten()


def gradients(sessions: dict[str, Session], problems: dict[str, Any]) -> dict[str, Any]:
    """Loss of the same ablation and the cosine of the gradients in its strengths."""
    state = initial_state(sessions["float32"], sessions["float32"].context.settings.search.gradient.direction)
    state.strengths.fill_(0.3)
    (loss, single), (half_loss, half) = (step(problems[name], state, ROWS) for name in FORMATS)
    cosine = torch.nn.functional.cosine_similarity(single, half, dim=0)
    return {"loss": {"float32": loss, "bfloat16": half_loss}, "cosine": float(cosine)}


def seconds(sessions: dict[str, Session], problems: dict[str, Any], budget: float) -> dict[str, Any]:
    """Wall time of a pass of each kind; the formats alternate, so that other programs disturb both."""
    passes = {}
    for name, session in sessions.items():
        passes[name] = dict(kinds(session, problems[name]))
        for once in passes[name].values():
            once()
    found: dict[str, Any] = {}
    for kind in passes["float32"]:
        times: dict[str, list[float]] = {name: [] for name in FORMATS}
        end = time.perf_counter() + 2 * budget / 3
        while len(times["float32"]) < 3 or time.perf_counter() < end:
            for name in FORMATS:
                began = time.perf_counter()
                passes[name][kind]()
                times[name].append(time.perf_counter() - began)
        found[kind] = {n: {"best": min(t), "median": statistics.median(t), "passes": len(t)} for n, t in times.items()}
        print(kind, found[kind], flush=True)
    return found


def kinds(session: Session, problem: GradientProblem | None) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The passes of a study, by what they do."""
    model: Any = session.context.language_model.model
    rows = session.context.language_model.rows  # of the embedding
    ids = torch.randint(rows, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    state = initial_state(session, session.context.settings.search.gradient.direction)
    state.strengths.fill_(0.3)

    @torch.inference_mode()
    def forward() -> None:
        model(input_ids=ids, logits_to_keep=1)

    @torch.inference_mode()
    def decode() -> None:
        model.generate(input_ids=ids, max_new_tokens=DECODED, min_new_tokens=DECODED, do_sample=False, pad_token_id=0)

    yield f"forward, {ROWS} x {TOKENS} tokens", forward
    yield f"the same, then {DECODED} tokens decoded", decode
    if problem:
        yield f"gradient step, {ROWS} + {ROWS} prompts", lambda: step(problem, state, ROWS)


if __name__ == "__main__":
    main()
