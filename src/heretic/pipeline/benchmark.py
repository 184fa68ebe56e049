"""lm-eval tasks on a trial and on the original, on the same loaded weights, with standard errors of the difference."""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from heretic.errors import Interrupted, UserError, first_line
from heretic.files import write_text
from heretic.model.batching import out_of_memory
from heretic.model.chat_format import ChatFormat
from heretic.model.loading import load_tokenizer
from heretic.model.template import read_template
from heretic.model.thinking import MARKERS, open_block
from heretic.pipeline.run_context import RunContext
from heretic.progress import Stage
from heretic.runs.environment import versions
from heretic.scoring.comparison import paired_error
from heretic.session.session import Session

MAX_ROWS = 16  # questions are longer than prompts
MAX_LABEL_CHARACTERS = 80  # of the task names in a file's name


@dataclass(frozen=True)
class Tasks:
    """The tasks to run and how to run them."""

    names: Sequence[str]  # of tasks, groups or tags
    include: Path | None = None  # folder with the user's own task files
    limit: int | None = None  # maximum number of questions per task
    chat: bool = False  # use the chat template
    batch_size: int = 0  # 0: automatic


@dataclass(frozen=True)
class Row:
    """One metric of one task; errors are standard errors, None if unknown.

    If the metric is a mean over questions, the error of the difference is that of the paired differences: both models answer
    the same questions, so that the questions' difficulty cancels.
    """

    task: str
    metric: str
    questions: int
    original: float
    original_error: float | None
    ablated: float
    ablated_error: float | None
    difference_error: float | None
    higher_is_better: bool

    @property
    def difference(self) -> float:
        """Ablated minus original."""
        return self.ablated - self.original


@dataclass(frozen=True)
class Benchmark:
    """Results, and the file in the run's folder that holds them."""

    trial: int
    rows: list[Row]
    file: Path

    def as_dict(self) -> dict[str, Any]:
        """For --json and for the file."""
        return {"trial": self.trial, "tasks": [{**asdict(r), "difference": r.difference} for r in self.rows]}


def benchmark_trial(run_context: RunContext, trial: int | None, tasks: Tasks) -> Benchmark:
    """Run the tasks on the original and on a trial. Raises UserError if lm-eval is missing or a task fails."""
    manager = _task_manager(tasks)
    result, _ = run_context.result(trial)
    session = run_context.session()
    measured = []
    for name, edits in (
        ("Original", []),
        (f"Trial {result.number}", [run_context.search_space().from_params(result.params)]),
    ):
        with run_context.reporter.stage(f"{name}: {', '.join(tasks.names)}", None) as stage, session.applied(*edits):
            measured.append(_evaluate(session, run_context, manager, tasks, stage))
    label = re.sub(r"[^\w.-]+", "-", "+".join(tasks.names))[:MAX_LABEL_CHARACTERS]
    file = run_context.folder.path / "benchmarks" / f"trial-{result.number}.{label}.json"
    outcome = Benchmark(result.number, compare_results(*measured), file)
    file.parent.mkdir(mode=0o700, exist_ok=True)
    conditions = {"limit": tasks.limit, "chat": tasks.chat, "versions": versions()}
    write_text(file, json.dumps({**outcome.as_dict(), **conditions}, indent=2) + "\n", private=True)
    return outcome


def compare_results(original: Mapping[str, Any], ablated: Mapping[str, Any]) -> list[Row]:
    """Convert two results of lm-eval to rows, one for each task and metric."""
    rows = []
    for task, metrics in original["results"].items():
        for key, value in metrics.items():
            metric, _, kind = key.partition(",")
            other = ablated["results"].get(task, {}).get(key)
            if not kind or metric.endswith("_stderr") or not all(isinstance(v, (int, float)) for v in (value, other)):
                continue
            errors = [_finite_number(r["results"][task].get(f"{metric}_stderr,{kind}")) for r in (original, ablated)]
            before, after = (
                _values_per_question(r, task, metric, kind, v) for r, v in ((original, value), (ablated, other))
            )
            questions = original["n-samples"].get(task, {}).get("effective", 0)
            paired = None if before is None or after is None else paired_error(before, after)
            better = original["higher_is_better"].get(task, {}).get(metric)
            rows.append(
                Row(
                    task=task,
                    metric=metric if kind == "none" else f"{metric} ({kind})",
                    questions=questions,
                    original=float(value),
                    original_error=errors[0],
                    ablated=float(other),
                    ablated_error=errors[1],
                    difference_error=_unpaired_error(*errors) if paired is None else paired,
                    higher_is_better=better is not False,
                )
            )
    return rows


def _unpaired_error(a: float | None, b: float | None) -> float | None:
    """Return the error for independent samples: an upper estimate if both models answered the same questions."""
    return None if a is None or b is None else math.hypot(a, b)


def _values_per_question(
    result: Mapping[str, Any], task: str, metric: str, kind: str, value: float
) -> list[float] | None:
    """Return the metric of every question if the task's value is their mean, otherwise None."""
    samples = sorted(
        (s for s in result.get("samples", {}).get(task, []) if s["filter"] == kind), key=lambda s: s["doc_id"]
    )
    values = [_finite_number(s.get(metric)) for s in samples]
    known = [v for v in values if v is not None]
    if not known or len(known) < len(values) or not math.isclose(statistics.fmean(known), value, abs_tol=1e-9):
        return None
    return known


def _finite_number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _task_manager(tasks: Tasks) -> Any:
    """Return lm-eval's index of tasks. Raises UserError without lm-eval or for an unknown task."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UserError(
            "Benchmarks need the package lm_eval.", code="missing-package", fix="pip install lm_eval"
        ) from None
    if tasks.include is not None and not tasks.include.is_dir():
        raise UserError(
            "The folder of tasks does not exist.",
            code="no-task-folder",
            where=str(tasks.include),
            fix="pass an existing folder to --include-path",
        )
    include_path = str(tasks.include.resolve()) if tasks.include else None
    manager = TaskManager(include_path=include_path, include_defaults=False)
    if not set(tasks.names) <= set(manager.all_tasks):  # reading lm-eval's thousands of tasks takes seconds
        manager = TaskManager(include_path=include_path)
    for name in tasks.names:
        if name not in manager.all_tasks:
            raise UserError(
                f"lm-eval has no task '{name}'.",
                code="unknown-task",
                where="--tasks",
                fix="list its tasks with lm-eval ls tasks; add your own with --include-path FOLDER",
            )
    return manager


def render_question(chat: ChatFormat, messages: Sequence[Mapping[str, str]]) -> str:
    """Render a task's conversation as in the study: close a thinking block that the template opens.

    Omits the study's response prefix and system prompt, since tasks have their own.
    """
    text = replace(chat, system_prompt="", response_prefix="").conversation(messages)
    opened = open_block(text, messages[-1]["content"])
    closed = opened and MARKERS[opened].strip() in chat.response_prefix
    return text + MARKERS[opened] if closed else text


def _evaluate(session: Session, run_context: RunContext, manager: Any, tasks: Tasks, stage: Stage) -> Any:
    """Return lm-eval's results for the model in its current state; suppresses its output, checks for a stop at every pass."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    model_context = session.context
    model, settings = model_context.language_model, model_context.settings
    trusted = model.checkpoint.model in settings.trust_remote_code
    tokenizer = load_tokenizer(model.checkpoint, trusted, read_template(settings))  # a copy: lm-eval changes it

    class ChatModel(HFLM):
        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            if add_generation_prompt:
                return render_question(model_context.chat, chat_history)
            return str(super().apply_chat_template(chat_history, add_generation_prompt))

    def before_forward(*_: object) -> None:
        run_context.stop.check()
        stage.advance()

    quiet = io.StringIO()
    handle = model.model.register_forward_pre_hook(before_forward)
    try:
        with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            rows = tasks.batch_size or min(MAX_ROWS, model_context.batcher.size)
            return simple_evaluate(
                model=ChatModel(pretrained=model.model, tokenizer=tokenizer, batch_size=rows),
                tasks=list(tasks.names),
                task_manager=manager,
                limit=tasks.limit,
                apply_chat_template=tasks.chat,
                random_seed=settings.seed,
                numpy_random_seed=settings.seed,
                torch_random_seed=settings.seed,
                fewshot_random_seed=settings.seed,
            )
    except (Interrupted, KeyboardInterrupt, UserError):
        raise
    except Exception as error:  # tasks, data sets and their code raise anything: lm-eval has no exceptions of its own
        if out_of_memory(error):
            raise UserError(
                "Out of memory.", code="out-of-memory", where="the benchmark", fix="pass --batch-size 1"
            ) from None
        raise UserError(
            f"lm-eval failed: {first_line(error)}",
            code="benchmark-failed",
            where=", ".join(tasks.names),
            fix="make the tasks' data sets available: lm-eval downloads them from the hub; or pass your own with --include-path",
        ) from error
    finally:
        handle.remove()
