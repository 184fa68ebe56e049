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
from heretic.model.forward import can_begin_later
from heretic.model.loading import LanguageModel
from heretic.pipeline.tensor_parallel import size
from heretic.planning.model_dims import SHARE_FOR_GRADIENTS, ModelShape
from heretic.runs.folder import RunFolder
from heretic.scoring.gradient_loss import Objective
from heretic.scoring.refusals import RefusalCount, count_refusals
from heretic.scoring.teacher_forcing import Taught, beginnings, log_probs_at
from heretic.search.gradient_path import Point, Walk
from heretic.search.path_optimizer import Descent, Heard, State
from heretic.session.caching import entries_of
from heretic.session.session import Bench, Session
from heretic.storage.compute_once import ALONE, Shelf

log = logging.getLogger(__name__)

ANSWER_TOKENS = 16  # in which an answer to a training prompt must have declined
FEWEST_REFUSALS = 4  # of the training prompts


def find_walk(study: optuna.Study, session: Session, folder: RunFolder, shelf: Shelf = ALONE) -> Walk | None:
    """The study's walk, made if it has none yet and no other worker makes it; None where the search begins with kernels
    alone."""
    settings = session.bench.settings
    if settings.search.start == "kernels":
        return None
    with shelf.thing("the walk", lambda: Walk.of(study) is not None):
        walk = Walk.of(study)
        if walk is None:
            walk = _make(session, folder)
            free_memory()  # what its passes kept
            walk.keep(study)
    if walk.why_not:
        session.bench.batcher.watcher.warn(f"The search begins with kernels: {walk.why_not}")
    return walk


def _make(session: Session, folder: RunFolder) -> Walk:
    bench = session.bench
    anatomy = bench.language_model.anatomy
    if size() > 1:
        return Walk((), "under tensor parallelism it is not made; a study that has one keeps it.")
    if any(writer.offloaded for writer in anatomy.writers):
        return Walk((), "part of the weights waits outside the devices, and gradients would bring all of it in.")
    lesson = prepare(session)
    if lesson is None:
        return Walk((), "the model declines hardly any of the prompts that give the direction.")
    try:
        return Walk(tuple(_descend(session, folder, lesson)))
    except OutOfMemory as error:
        if lesson.objective.checkpoints:
            return Walk((), error.what)
        log.info("blocks are computed twice: %s", error.what)
        try:
            return Walk(tuple(_descend(session, folder, lesson.twice())))
        except OutOfMemory as again:
            return Walk((), again.what)
    except (RuntimeError, NotImplementedError) as error:
        if is_device_error(error):  # that passes, and a walk that was given up is given up for good
            raise
        log.info("no walk", exc_info=True)
        return Walk((), f"this model cannot be run backwards ({str(error).splitlines()[0]}).")


@dataclass(frozen=True)
class Lesson:
    """What the walk learns from: the objective, the declined prompts in its order, their places in `harmful_train`, and how
    passes over them keep what the original's blocks receive."""

    session: Session
    objective: Objective
    declined: Sequence[list[int]]
    places: Sequence[int]
    kept: Callable[[Taught], Taught]

    def listen(self, ablation: Ablation) -> tuple[list[Heard], int]:
        """What is still declined under an ablation in other words than those known from the original, and how many prompts are in
        whatever words."""
        bench, known = self.session.bench, self.objective.harmful.texts
        with self.session.applied(ablation):
            refusals = _refusals(bench, self.declined)
        found = zip(refusals.tokens, refusals.declined, strict=True)
        words = [
            (row, list(tokens[: len(known[row])]))
            for row, (tokens, declined) in enumerate(found)
            if declined and tokens
        ]
        return [(row, text) for row, text in words if text != known[row]], refusals.count

    def teach(self, heard: Sequence[Heard]) -> Objective:
        """The objective with these refusals besides."""
        known = self.objective.harmful
        prompts = [*self.declined, *(self.declined[row] for row, _ in heard)]
        return replace(self.objective, harmful=self.kept(Taught.of(prompts, [*known.texts, *(t for _, t in heard)])))

    def descent(self, keep: Callable[[State], None]) -> Descent:
        """The walk as the settings say; `keep` receives its state after every step."""
        bench = self.session.bench
        gradient, components = bench.settings.search.gradient, bench.language_model.anatomy.components
        listen = self.listen if gradient.listen else None
        watcher, stop = bench.batcher.watcher, bench.batcher.stop
        return Descent(
            self.objective, components, gradient, bench.settings.seed, watcher, stop, keep, listen, self.teach
        )

    def twice(self) -> Lesson:
        """The same with blocks computed twice, from the first one on."""
        known = self.objective
        harmless, harmful = (replace(taught, entries=None) for taught in (known.harmless, known.harmful))
        objective = replace(self.objective, harmless=harmless, harmful=harmful, checkpoints=True)
        return replace(self, objective=objective, kept=lambda taught: taught)


def _descend(session: Session, folder: RunFolder, lesson: Lesson) -> list[Point]:
    """From where an earlier session or try has come to."""
    state = folder.walk(session.bench.batcher.watcher) or begin(session)
    state.counted_by(lesson.places)
    return lesson.descent(folder.keep_walk).run(state)


def begin(session: Session) -> State:
    """Where the walk begins."""
    bench = session.bench
    kind = bench.settings.search.gradient.direction
    return State.begin(len(bench.language_model.anatomy.components), session.workbench.directions, kind)


def prepare(session: Session) -> Lesson | None:
    """What the walk minimises: prompts with the beginnings of the original's answers, and how to read an ablation off them.

    None where too few of the prompts are declined.
    """
    bench = session.bench
    gradient, model = bench.settings.search.gradient, bench.language_model
    asked, harmless = (bench.encoded[role][: gradient.prompts] for role in ("harmful_train", "harmless_train"))
    refusals = _refusals(bench, asked)
    places = [i for i, (d, t) in enumerate(zip(refusals.declined, refusals.tokens, strict=True)) if d and t]
    if len(places) < FEWEST_REFUSALS:
        return None
    declined = [asked[i] for i in places]
    harmful = Taught.of(declined, [list(refusals.tokens[i][: gradient.refusal_tokens]) for i in places])
    answered = Taught.of(harmless, beginnings(model, harmless, bench.batcher, gradient.kl_tokens))
    original = log_probs_at(model, answered, bench.batcher)
    rows, checkpoints = rows_with_gradients(model, max(map(len, (*harmful.sequences, *answered.sequences))))
    batcher = replace(bench.batcher, size=min(rows, bench.batcher.size))
    log.info("%d rows in a pass with gradients%s", batcher.size, ", blocks computed twice" if checkpoints else "")
    later = not checkpoints and can_begin_later(model.model, model.anatomy.blocks, harmless, batcher)

    def kept(taught: Taught) -> Taught:
        return (
            replace(taught, entries=entries_of(model, taught.sequences, batcher, with_cache=False)) if later else taught
        )

    objective = Objective(model, session.workbench, batcher, kept(answered), kept(harmful), original, checkpoints)
    return Lesson(session, objective, declined, places, kept)


def _refusals(bench: Bench, asked: Sequence[list[int]]) -> RefusalCount:
    """Which of the prompts the model as it is now declines, and the words with which it does."""
    fewest = bench.settings.search.gradient.refusal_tokens
    texts = dict(zip(map(tuple, bench.encoded["harmful_train"]), bench.prompts.harmful_train.prompts, strict=True))
    return count_refusals(
        bench.language_model,
        bench.chat,
        asked,
        bench.ladder.judge,
        bench.batcher,
        ANSWER_TOKENS,
        requests=[texts[tuple(prompt)] for prompt in asked],
        fewest_tokens=fewest,
    )


def rows_with_gradients(model: LanguageModel, tokens: int) -> tuple[int, bool]:
    """How many rows of so many tokens a pass with gradients takes, and whether blocks have to be computed twice for it."""
    shape = ModelShape.of(model.model.config.get_text_config(decoder=True), model.model)
    budget = int(SHARE_FOR_GRADIENTS * _free_memory(model))
    return shape.rows_with_gradients(budget, tokens, on_cpu=_on_cpu(model))


def _free_memory(model: LanguageModel) -> int:
    """Bytes free on the fullest device that the model runs on."""
    devices = {block_device for block_device in _devices(model) if block_device.type == "cuda"}
    return min((torch.cuda.mem_get_info(d)[0] for d in devices), default=memory()[1])


def _on_cpu(model: LanguageModel) -> bool:
    return all(device.type == "cpu" for device in _devices(model))


def _devices(model: LanguageModel) -> set[torch.device]:
    return {parameter.device for block in model.anatomy.blocks for parameter in block.parameters()}
