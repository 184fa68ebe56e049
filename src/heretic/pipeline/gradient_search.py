"""The walk of a study: read from it, gone on with from the run's folder, or made, on the prompts that give the direction."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import optuna
import torch

from heretic.ablation.ablation import Ablation
from heretic.errors import OutOfMemory
from heretic.hardware.host import memory
from heretic.model.batching import free_memory
from heretic.model.device_errors import is_device_error
from heretic.model.forward import supports_mid_stack_start
from heretic.model.loading import LanguageModel
from heretic.pipeline.tensor_parallel import size
from heretic.planning.model_dims import SHARE_FOR_GRADIENTS, ModelDims
from heretic.runs.folder import RunFolder
from heretic.scoring.gradient_loss import Objective
from heretic.scoring.refusals import RefusalCount, count_refusals
from heretic.scoring.teacher_forcing import TeacherForcedTexts, answer_prefixes, log_probs_at
from heretic.search.gradient_path import GradientPath, PathPoint
from heretic.search.path_optimizer import MinedRefusals, OptimizerState, PathOptimizer
from heretic.session.caching import allocate_activation_cache
from heretic.session.session import ModelContext, Session
from heretic.storage.compute_once import LOCAL, ComputeOnce

log = logging.getLogger(__name__)

ANSWER_TOKENS = 16  # in which an answer to a training prompt must have declined
FEWEST_REFUSALS = 4  # of the training prompts


def run_gradient_search(
    study: optuna.Study, session: Session, folder: RunFolder, compute_once: ComputeOnce = LOCAL
) -> GradientPath | None:
    """The study's walk, made if it has none yet and no other worker makes it; None where the search begins with kernels
    alone."""
    settings = session.context.settings
    if settings.search.start == "kernels":
        return None
    with compute_once.once("the walk", lambda: GradientPath.load(study) is not None):
        gradient_path = GradientPath.load(study)
        if gradient_path is None:
            gradient_path = _search(session, folder)
            free_memory()  # what its passes kept
            gradient_path.save(study)
    if gradient_path.failure_reason:
        session.context.batcher.reporter.warning(f"The search begins with kernels: {gradient_path.failure_reason}")
    return gradient_path


def _search(session: Session, folder: RunFolder) -> GradientPath:
    model_context = session.context
    structure = model_context.language_model.structure
    if size() > 1:
        return GradientPath((), "under tensor parallelism it is not made; a study that has one keeps it.")
    if any(writer.offloaded for writer in structure.writers):
        return GradientPath(
            (), "part of the weights waits outside the devices, and gradients would bring all of it in."
        )
    problem = prepare(session)
    if problem is None:
        return GradientPath((), "the model declines hardly any of the prompts that give the direction.")
    try:
        return GradientPath(tuple(_optimize(session, folder, problem)))
    except OutOfMemory as error:
        if problem.objective.recompute_activations:
            return GradientPath((), error.what)
        log.info("blocks are computed twice: %s", error.what)
        try:
            return GradientPath(tuple(_optimize(session, folder, problem.with_gradient_checkpointing())))
        except OutOfMemory as again:
            return GradientPath((), again.what)
    except (RuntimeError, NotImplementedError) as error:
        if is_device_error(error):  # that passes, and a walk that was given up is given up for good
            raise
        log.info("no walk", exc_info=True)
        return GradientPath((), f"this model cannot be run backwards ({str(error).splitlines()[0]}).")


@dataclass(frozen=True)
class GradientProblem:
    """What the walk learns from: the objective, the declined prompts in its order, their places in `harmful_train`, and how
    passes over them keep what the original's blocks receive."""

    session: Session
    objective: Objective
    refused: Sequence[list[int]]
    prompt_indices: Sequence[int]
    reserved_bytes: Callable[[TeacherForcedTexts], TeacherForcedTexts]

    def mine_refusals(self, ablation: Ablation) -> tuple[list[MinedRefusals], int]:
        """What is still declined under an ablation in other words than those known from the original, and how many prompts are in
        whatever words."""
        model_context, known = self.session.context, self.objective.harmful.texts
        with self.session.applied(ablation):
            refusals = _refusals(model_context, self.refused)
        found = zip(refusals.tokens, refusals.refused, strict=True)
        words = [
            (row, list(tokens[: len(known[row])])) for row, (tokens, refused) in enumerate(found) if refused and tokens
        ]
        return [(row, text) for row, text in words if text != known[row]], refusals.count

    def add_refusal_targets(self, heard: Sequence[MinedRefusals]) -> Objective:
        """The objective with these refusals besides."""
        known = self.objective.harmful
        prompts = [*self.refused, *(self.refused[row] for row, _ in heard)]
        return replace(
            self.objective,
            harmful=self.reserved_bytes(TeacherForcedTexts.of(prompts, [*known.texts, *(t for _, t in heard)])),
        )

    def optimizer(self, keep: Callable[[OptimizerState], None]) -> PathOptimizer:
        """The walk as the settings say; `keep` receives its state after every step."""
        model_context = self.session.context
        gradient, components = model_context.settings.search.gradient, model_context.language_model.structure.components
        listen = self.mine_refusals if gradient.mine_refusals else None
        reporter, stop = model_context.batcher.reporter, model_context.batcher.stop
        return PathOptimizer(
            self.objective,
            components,
            gradient,
            model_context.settings.seed,
            reporter,
            stop,
            keep,
            listen,
            self.add_refusal_targets,
        )

    def with_gradient_checkpointing(self) -> GradientProblem:
        """The same with blocks computed twice, from the first one on."""
        known = self.objective
        harmless, harmful = (replace(taught, entries=None) for taught in (known.harmless, known.harmful))
        objective = replace(self.objective, harmless=harmless, harmful=harmful, recompute_activations=True)
        return replace(self, objective=objective, reserved_bytes=lambda taught: taught)


def _optimize(session: Session, folder: RunFolder, problem: GradientProblem) -> list[PathPoint]:
    """From where an earlier session or try has come to."""
    state = folder.load_path_state(session.context.batcher.reporter) or begin(session)
    state.remap_extra_refusals(problem.prompt_indices)
    return problem.optimizer(folder.save_path_state).run(state)


def begin(session: Session) -> OptimizerState:
    """Where the walk begins."""
    model_context = session.context
    kind = model_context.settings.search.gradient.direction
    return OptimizerState.initial(
        len(model_context.language_model.structure.components), session.operator_factory.directions, kind
    )


def prepare(session: Session) -> GradientProblem | None:
    """What the walk minimizes: prompts with the beginnings of the original's answers, and how to read an ablation off them.

    None where too few of the prompts are declined.
    """
    model_context = session.context
    gradient, model = model_context.settings.search.gradient, model_context.language_model
    asked, harmless = (model_context.encoded[role][: gradient.prompts] for role in ("harmful_train", "harmless_train"))
    refusals = _refusals(model_context, asked)
    places = [i for i, (d, t) in enumerate(zip(refusals.refused, refusals.tokens, strict=True)) if d and t]
    if len(places) < FEWEST_REFUSALS:
        return None
    refused = [asked[i] for i in places]
    harmful = TeacherForcedTexts.of(refused, [list(refusals.tokens[i][: gradient.refusal_tokens]) for i in places])
    answered = TeacherForcedTexts.of(
        harmless, answer_prefixes(model, harmless, model_context.batcher, gradient.kl_tokens)
    )
    original = log_probs_at(model, answered, model_context.batcher)
    rows, checkpoints = rows_with_gradients(model, max(map(len, (*harmful.sequences, *answered.sequences))))
    batcher = replace(model_context.batcher, size=min(rows, model_context.batcher.size))
    log.info("%d rows in a pass with gradients%s", batcher.size, ", blocks computed twice" if checkpoints else "")
    later = not checkpoints and supports_mid_stack_start(model.model, model.structure.blocks, harmless, batcher)

    def kept(taught: TeacherForcedTexts) -> TeacherForcedTexts:
        return (
            replace(taught, entries=allocate_activation_cache(model, taught.sequences, batcher, with_cache=False))
            if later
            else taught
        )

    objective = Objective(
        model, session.operator_factory, batcher, kept(answered), kept(harmful), original, checkpoints
    )
    return GradientProblem(session, objective, refused, places, kept)


def _refusals(model_context: ModelContext, asked: Sequence[list[int]]) -> RefusalCount:
    """Which of the prompts the model as it is now declines, and the words with which it does."""
    fewest = model_context.settings.search.gradient.refusal_tokens
    texts = dict(
        zip(
            map(tuple, model_context.encoded["harmful_train"]), model_context.prompts.harmful_train.prompts, strict=True
        )
    )
    return count_refusals(
        model_context.language_model,
        model_context.chat,
        asked,
        model_context.evaluator.judge,
        model_context.batcher,
        ANSWER_TOKENS,
        requests=[texts[tuple(prompt)] for prompt in asked],
        min_tokens=fewest,
    )


def rows_with_gradients(model: LanguageModel, tokens: int) -> tuple[int, bool]:
    """How many rows of so many tokens a pass with gradients takes, and whether blocks have to be computed twice for it."""
    shape = ModelDims.of(model.model.config.get_text_config(decoder=True), model.model)
    budget = int(SHARE_FOR_GRADIENTS * _free_memory(model))
    return shape.rows_with_gradients(budget, tokens, on_cpu=_on_cpu(model))


def _free_memory(model: LanguageModel) -> int:
    """Bytes free on the fullest device that the model runs on."""
    devices = {block_device for block_device in _devices(model) if block_device.type == "cuda"}
    return min((torch.cuda.mem_get_info(d)[0] for d in devices), default=memory()[1])


def _on_cpu(model: LanguageModel) -> bool:
    return all(device.type == "cpu" for device in _devices(model))


def _devices(model: LanguageModel) -> set[torch.device]:
    return {parameter.device for block in model.structure.blocks for parameter in block.parameters()}
