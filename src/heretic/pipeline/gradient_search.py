"""Gradient search of a study on the training prompts: load its path, resume it from the run's folder, or run it."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import optuna
import torch

from heretic.ablation.ablation import Ablation
from heretic.ablation.geometries import GEOMETRIES
from heretic.errors import OutOfMemory, UserError, first_line
from heretic.hardware import devices
from heretic.hardware.host import memory
from heretic.model.batching import Batcher, free_memory
from heretic.model.chat_format import CHECK_TOKENS, SEARCH_TOKENS
from heretic.model.device_errors import is_device_error
from heretic.model.forward import supports_mid_stack_start
from heretic.model.loading import LanguageModel
from heretic.planning import pass_memory
from heretic.planning.model_dims import ModelDims
from heretic.runs.folder import DENSE_PATH_STATE, PATH_STATE, RunFolder
from heretic.scoring.gradient_loss import Objective
from heretic.scoring.judges.registry import make_judge, with_evaluation_judge
from heretic.scoring.judges.verdict import Judge
from heretic.scoring.refusals import RefusalCount, count_refusals
from heretic.scoring.teacher_forcing import TeacherForcedTexts, answer_prefixes, log_probs_at
from heretic.search.gradient_path import GradientPath, PathPoint
from heretic.search.path_optimizer import MinedRefusals, OptimizerState, PathOptimizer
from heretic.session.caching import allocate_activation_cache
from heretic.session.model_context import ModelContext
from heretic.session.session import Session
from heretic.settings import AblationSettings, GradientSettings
from heretic.storage.compute_once import LOCAL, ComputeOnce

log = logging.getLogger(__name__)

TRY_AGAIN = "With more free memory, --fresh tries the gradient search again."
MIN_REFUSALS = 4  # refused training prompts that a search needs
MANY_UNANSWERED = 0.25  # share of the refused training prompts that may stay without an answer under the last point
LEFT_BY_SECOND = 0.5  # share of these that a second path may leave; its KL is often higher
# The second search: removing each layer's own direction in many layers takes out what the layers above would read. Few strong
# edits near the head change the first words of refusals at less KL, and can leave evasions (dev/LOG.md).
DENSE = {"direction": "per_layer", "sparsity": 0.0}


def run_gradient_search(
    study: optuna.Study, session: Session, folder: RunFolder, compute_once: ComputeOnce = LOCAL
) -> GradientPath | None:
    """Return the study's gradient path; run the search if the study has none, unless another worker runs it.

    Returns None if the settings start with kernels only. A failed search gives a path with a `failure_reason`.
    """
    settings = session.context.settings
    if settings.search.start == "kernels":
        return None
    with compute_once.once("the gradient path", lambda: GradientPath.load(study) is not None):
        gradient_path = GradientPath.load(study)
        if gradient_path is None:
            found = _search(session, folder)
            free_memory()  # release the memory of its passes
            # Another worker may have taken over while this one stood still; trials of the study use its path then.
            gradient_path = GradientPath.load(study)
            if gradient_path is None:
                found.save(study)
                gradient_path = found
    if gradient_path.failure_reason:
        without = " What reads the stream is not edited." if settings.ablation.readers else ""
        reason = f"The search starts with kernels: {gradient_path.failure_reason}{without}"
        session.context.batcher.reporter.warning(reason)
    return gradient_path


def _search(session: Session, folder: RunFolder) -> GradientPath:
    model_context = session.context
    structure = model_context.language_model.structure
    if any(writer.offloaded for writer in structure.writers):
        return GradientPath((), "part of the weights is offloaded, and gradients need all weights on the devices.")
    problem = prepare(session)
    if problem is None:
        return GradientPath((), f"the model refuses fewer than {MIN_REFUSALS} training prompts.")
    try:
        return _optimize(session, folder, problem)
    except OutOfMemory as error:
        if problem.objective.recompute_activations:
            return GradientPath((), f"{error.what} {TRY_AGAIN}")
        log.info("gradient checkpointing: %s", error.what)
        try:
            return _optimize(session, folder, problem.with_gradient_checkpointing())
        except OutOfMemory as second_error:
            return GradientPath((), f"{second_error.what} {TRY_AGAIN}")
    except (RuntimeError, NotImplementedError) as error:
        if is_device_error(error):  # temporary, while a failed search is final
            raise
        log.info("gradient search failed", exc_info=True)
        return GradientPath((), f"the model does not support gradients ({first_line(error)}).")


@dataclass(frozen=True)
class GradientProblem:
    """Objective of a gradient search and the prompts behind it."""

    session: Session
    objective: Objective
    refused: Sequence[list[int]]  # tokens of the refused prompts, in the objective's order
    prompt_indices: Sequence[int]  # their indices in `harmful_train`
    with_activation_cache: Callable[
        [TeacherForcedTexts], TeacherForcedTexts
    ]  # caches the inputs of the original's blocks

    def mine_refusals(self, ablation: Ablation) -> tuple[list[MinedRefusals], int]:
        """Return the refusals under an ablation that differ from the known ones, and the number of refused prompts."""
        model_context, known = self.session.context, self.objective.harmful.texts
        with self.session.applied(ablation):
            refusals = find_refusals(model_context, self.refused)
        answers = zip(refusals.tokens, refusals.refused, strict=True)
        texts = [
            (row, list(tokens[: len(known[row])]))
            for row, (tokens, refused) in enumerate(answers)
            if refused and tokens
        ]
        return [(row, text) for row, text in texts if text != known[row]], refusals.count

    def add_refusal_targets(self, mined: Sequence[MinedRefusals]) -> Objective:
        """Return the objective with these refusals as additional targets."""
        known = self.objective.harmful
        prompts = [*self.refused, *(self.refused[row] for row, _ in mined)]
        texts = TeacherForcedTexts.of(prompts, [*known.texts, *(text for _, text in mined)])
        return replace(self.objective, harmful=self.with_activation_cache(texts))

    @functools.cached_property
    def evaluation_judge(self) -> Judge:
        """The judge of `heretic evaluate`, but `words` instead of phrases, which see no evasions."""
        model_context = self.session.context
        settings = with_evaluation_judge(model_context.settings, "words")
        if settings != model_context.settings:
            try:
                return make_judge(settings)
            except UserError as error:  # such as an incomplete download, which does not stop a run
                model_context.batcher.reporter.warning(
                    f"{error.what} The judge of the search reads the answers instead."
                )
        return model_context.evaluator.judge

    def unanswered(self, ablation: Ablation) -> int:
        """Count the refused prompts that an ablation leaves unanswered, by `evaluation_judge`."""
        with self.session.applied(ablation):
            return self._unanswered("harmful_train", self.refused)

    @functools.cached_property
    def usually_unanswered(self) -> float:
        """How many of as many harmless prompts the original leaves unanswered: a weak model, or one that the judge misreads."""
        prompts = self.session.context.encoded["harmless_train"][: len(self.refused)]
        return self._unanswered("harmless_train", prompts) * len(self.refused) / len(prompts)

    def _unanswered(self, role: str, prompts: Sequence[list[int]]) -> int:
        model_context = self.session.context
        tokens = min(model_context.settings.max_response_length, CHECK_TOKENS)
        counted = _count_refusals(model_context, prompts, self.evaluation_judge, tokens, role=role)
        return counted.count + counted.evasive

    def optimizer(self, gradient: GradientSettings, save_state: Callable[[OptimizerState], None]) -> PathOptimizer:
        """Return the optimizer with these settings; `save_state` receives its state after every step."""
        model_context = self.session.context
        components = model_context.language_model.structure.components
        mine_refusals = self.mine_refusals if gradient.mine_refusals else None
        reporter, stop = model_context.batcher.reporter, model_context.batcher.stop
        return PathOptimizer(
            self.objective,
            components,
            gradient,
            model_context.settings.seed,
            reporter,
            stop,
            save_state,
            mine_refusals,
            self.add_refusal_targets,
        )

    def with_gradient_checkpointing(self) -> GradientProblem:
        """Return the same problem with gradient checkpointing and without activation caches."""
        harmless, harmful = (
            replace(texts, entries=None) for texts in (self.objective.harmless, self.objective.harmful)
        )
        objective = replace(self.objective, harmless=harmless, harmful=harmful, recompute_activations=True)
        return replace(self, objective=objective, with_activation_cache=lambda texts: texts)


def _optimize(session: Session, folder: RunFolder, problem: GradientProblem) -> GradientPath:
    """Run the search, and a second one if its last point leaves many prompts unanswered; returns the better path."""
    gradient = session.context.settings.search.gradient
    first = GradientPath(tuple(_path(session, folder, problem, gradient)))
    if not gradient.second_search:
        return first
    try:
        return _second_search(session, folder, problem, first)
    except (RuntimeError, OutOfMemory) as error:
        # Without memory, `_search` tries again with gradient checkpointing.
        checkpointing = problem.objective.recompute_activations
        temporary = is_device_error(error) if isinstance(error, RuntimeError) else not checkpointing
        if temporary:
            raise
        log.info("second search failed", exc_info=True)
        session.context.batcher.reporter.warning("The second gradient search failed. heretic keeps the first path.")
        return first


def _second_search(session: Session, folder: RunFolder, problem: GradientProblem, first: GradientPath) -> GradientPath:
    """Read answers under the path's last point; search again if many prompts are unanswered, and return the better path."""
    reporter, total = session.context.batcher.reporter, len(problem.refused)
    unanswered = problem.unanswered(first.points[-1].ablation)
    log.info("%d of %d training prompts are unanswered", unanswered, total)
    if unanswered <= MANY_UNANSWERED * total:
        return first
    usually = problem.usually_unanswered
    log.info("of as many harmless prompts the original leaves %.1f unanswered", usually)
    if unanswered - usually <= MANY_UNANSWERED * total:
        return first
    reporter.info(
        f"The last point leaves {unanswered} of {total} training prompts unanswered. heretic searches once more, with each "
        "layer's own direction and without the sparsity penalty."
    )
    dense = session.context.settings.search.gradient.model_copy(update=DENSE)
    second = GradientPath(tuple(_path(session, folder, problem, dense, DENSE_PATH_STATE)), second=True)
    left = problem.unanswered(second.points[-1].ablation)
    better = left - usually <= LEFT_BY_SECOND * (unanswered - usually)
    reporter.info(
        f"The second search leaves {left} unanswered. heretic keeps the {'second' if better else 'first'} path."
    )
    return second if better else first


def _path(
    session: Session, folder: RunFolder, problem: GradientProblem, gradient: GradientSettings, name: str = PATH_STATE
) -> Sequence[PathPoint]:
    """Run one search from its stored state of an earlier session or attempt, if there is one."""
    state = folder.load_path_state(session.context.batcher.reporter, name) or initial_state(session, gradient.direction)
    state.remap_extra_refusals(problem.prompt_indices)
    return problem.optimizer(gradient, functools.partial(folder.save_path_state, name=name)).run(state)


def initial_state(session: Session, direction: str) -> OptimizerState:
    """Return the optimizer's initial state for this kind of direction."""
    components = session.context.language_model.structure.components
    return OptimizerState.initial(len(components), session.operator_factory.directions, direction)


def prepare(session: Session) -> GradientProblem | None:
    """Return the problem of the gradient search: teacher-forced refusals and harmless answers of the original.

    Returns None if the original refuses fewer than MIN_REFUSALS of the prompts.
    """
    model_context = session.context
    gradient, model = model_context.settings.search.gradient, model_context.language_model
    # 1. Collect the original's refusals and the beginnings of its harmless answers
    requests, harmless = (
        model_context.encoded[role][: gradient.prompts] for role in ("harmful_train", "harmless_train")
    )
    refusals = find_refusals(model_context, requests)
    indices = [i for i, (r, t) in enumerate(zip(refusals.refused, refusals.tokens, strict=True)) if r and t]
    if len(indices) < MIN_REFUSALS:
        return None
    refused = [requests[i] for i in indices]
    harmful = TeacherForcedTexts.of(refused, [list(refusals.tokens[i][: gradient.refusal_tokens]) for i in indices])
    answered = TeacherForcedTexts.of(
        harmless, answer_prefixes(model, harmless, model_context.batcher, gradient.kl_tokens)
    )
    original = log_probs_at(model, answered, model_context.batcher)
    # 2. Fit the batches with gradients into memory
    texts = (harmful.sequences, answered.sequences)
    rows, checkpoints = rows_with_gradients(model, model_context.batcher, texts, model_context.settings.ablation)
    batcher = replace(model_context.batcher, size=min(rows, model_context.batcher.size))
    log.info("%d rows per pass with gradients%s", batcher.size, ", gradient checkpointing" if checkpoints else "")
    cached = not checkpoints and supports_mid_stack_start(model.model, model.structure.blocks, harmless, batcher)

    def with_activation_cache(texts: TeacherForcedTexts) -> TeacherForcedTexts:
        if not cached:
            return texts
        return replace(texts, entries=allocate_activation_cache(model, texts.sequences, batcher, with_cache=False))

    # 3. Build the objective
    objective = Objective(
        model,
        session.operator_factory,
        batcher,
        with_activation_cache(answered),
        with_activation_cache(harmful),
        original,
        checkpoints,
    )
    return GradientProblem(session, objective, refused, indices, with_activation_cache)


def find_refusals(model_context: ModelContext, requests: Sequence[list[int]]) -> RefusalCount:
    """Return which training prompts the model refuses in its current state, with the tokens of the answers."""
    min_tokens = model_context.settings.search.gradient.refusal_tokens
    return _count_refusals(model_context, requests, model_context.evaluator.judge, SEARCH_TOKENS, min_tokens)


def _count_refusals(
    model_context: ModelContext,
    requests: Sequence[list[int]],
    judge: Judge,
    tokens: int,
    min_tokens: int = 1,
    role: str = "harmful_train",
) -> RefusalCount:
    prompts = zip(map(tuple, model_context.encoded[role]), getattr(model_context.prompts, role).prompts, strict=True)
    texts = dict(prompts)
    room = model_context.language_model.context - max(map(len, requests))
    return count_refusals(
        model_context.language_model,
        model_context.chat,
        requests,
        judge,
        model_context.batcher,
        max(1, min(tokens, room)),
        requests=[texts[tuple(prompt)] for prompt in requests],
        min_tokens=min_tokens,
    )


def rows_with_gradients(
    model: LanguageModel, batcher: Batcher, kinds: Sequence[Sequence[list[int]]], edit: AblationSettings
) -> tuple[int, bool]:
    """Return the rows of a pass with gradients that fit into memory, and whether that needs gradient checkpointing."""
    dims = ModelDims.of(model.model.config.get_text_config(decoder=True), model.model)
    budget = int(pass_memory.SHARE_FOR_GRADIENTS * _free_bytes(model))
    longest = [max(map(len, sequences)) for sequences in kinds]
    prefixes = [len(prefix.tokens) if (prefix := batcher.shared_prefix(s)) else 0 for s in kinds]
    own = max(length - prefix for length, prefix in zip(longest, prefixes, strict=True))
    inputs = GEOMETRIES[edit.geometry].reads_inputs
    return pass_memory.rows_with_gradients(
        dims, budget, max(longest), own, on_cpu=_on_cpu(model), inputs=inputs, readers=edit.readers
    )


def _free_bytes(model: LanguageModel) -> int:
    """Return the free bytes of the model's fullest device."""
    gpus = {device for device in _devices(model) if devices.is_accelerator(device)}
    return min((devices.free_bytes(gpu) for gpu in gpus), default=memory()[1])


def _on_cpu(model: LanguageModel) -> bool:
    return all(device.type == "cpu" for device in _devices(model))


def _devices(model: LanguageModel) -> set[torch.device]:
    return {parameter.device for block in model.structure.blocks for parameter in block.parameters()}
