"""A loaded model prepared for a study: chat format, baseline, directions and operator factory.

Results in the run folder are loaded; only missing ones are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from torch import Tensor

from heretic.ablation.ablation import Ablation
from heretic.ablation.apply import apply_operators
from heretic.ablation.bake import OriginalWeights, copy_weights, read_from_checkpoint, rewritten_weights
from heretic.ablation.directions import Directions
from heretic.ablation.geometries.conditional import InputMap
from heretic.ablation.operator import Operator
from heretic.ablation.operator_factory import OperatorFactory
from heretic.ablation.residual_geometry import GeometryRecorder
from heretic.errors import UserError
from heretic.hardware.host import format_bytes, memory
from heretic.interrupt import StopSignal
from heretic.model.architecture import ResidualWriter
from heretic.model.batching import UNEDITED, EditSpec
from heretic.model.checkpoint import Checkpoint
from heretic.model.lazy_tensor import LazyTensor
from heretic.model.loading import LanguageModel
from heretic.model.unloading import unloaded_on_error
from heretic.planning.memory_plan import LoadPlan
from heretic.progress import ProgressReporter
from heretic.prompts.sets import PromptSets
from heretic.runs.folder import BASELINE, RunFolder
from heretic.runs.stored_tensors import Baseline
from heretic.scoring.comparison import Comparison, compare
from heretic.scoring.evaluator import TrialEvaluator
from heretic.scoring.judges.registry import JudgeContext, make_judge
from heretic.scoring.refusal_proxy import MAX_DRAFT_TOKENS, MIN_DRAFT_TOKENS
from heretic.scoring.scorers.context import Applied
from heretic.scoring.scorers.scorer import Measurement
from heretic.scoring.teacher_forcing import TeacherForcedTexts, all_log_probs, answer_prefixes
from heretic.search.gradient_path import GradientPath
from heretic.search.space import SearchSpace
from heretic.session.baseline_report import report_baseline
from heretic.session.caching import enable_caching
from heretic.session.find_directions import find_directions
from heretic.session.input_maps import open_input_maps
from heretic.session.model_context import ModelContext, load_model_context
from heretic.settings import Settings
from heretic.storage.compute_once import LOCAL, ComputeOnce

LOG_PROB_COPIES = 3  # of the log-probabilities: original, ablated, written


@dataclass(frozen=True)
class Session:
    """A model context with the baseline and the operator factory of a study; its evaluator has caches."""

    context: ModelContext
    baseline: Baseline
    operator_factory: OperatorFactory
    original: OriginalWeights | None

    @property
    def evaluator(self) -> TrialEvaluator:
        """Measures trials."""
        return self.context.evaluator

    @contextmanager
    def applied(self, *ablations: Ablation) -> Iterator[EditSpec]:
        """Apply ablations within the context, by hooks or rewritten weights as the settings say, and yield the edit.

        Several ablations share the passes, one per row; rewritten weights support one. Without any the model is the original.
        """
        with self._applied([self.operator_factory.operators(a) for a in ablations]) as edited:
            yield edited

    @contextmanager
    def _applied(self, operators: Sequence[Mapping[str, Operator]]) -> Iterator[EditSpec]:
        if not operators:
            yield UNEDITED
            return
        writers = self.operator_factory.writers
        touched = [w.layer for w in writers if any(w.name in by_writer for by_writer in operators)]
        edited = EditSpec(len(operators), min(touched, default=self.context.language_model.structure.num_layers))
        if self.original is None:
            with apply_operators(writers, *operators):
                yield edited
        else:
            (only,) = operators
            with rewritten_weights(writers, only, self.original):
                yield edited

    def measure(self, names: Sequence[str], ablations: Sequence[Ablation]) -> list[dict[str, Measurement]]:
        """Measure these scorers on the ablated models, whose answers share the passes. Raises UserError."""
        if not names or not ablations:
            return [{} for _ in ablations]
        measurer = self.context.measurer
        operators = [self.operator_factory.operators(ablation) for ablation in ablations]
        if self.original is not None:  # rewritten weights hold one edit at a time
            return [measurer.of_trials(names, self._applier([one]), 1)[0] for one in operators]
        return measurer.of_trials(names, self._applier(operators), len(ablations))

    def compare(self, ablation: Ablation, names: Sequence[str]) -> tuple[Comparison, ...]:
        """Measure these scorers on the original and the ablated model. Raises UserError."""
        measurer = self.context.measurer
        original, (ablated,) = measurer.of_original(names), self.measure(names, [ablation])
        return tuple(c for name in names for c in compare(measurer.scorers[name], original[name], ablated[name]))

    def _applier(self, operators: Sequence[Mapping[str, Operator]]) -> Applied:
        return lambda *indices: self._applied([operators[i] for i in indices] or operators)

    def space(self, gradient_path: GradientPath | None) -> SearchSpace:
        """Return the search space of this model."""
        structure = self.context.language_model.structure
        return SearchSpace(self.context.settings.search, structure.num_layers, structure.components, gradient_path)

    def log_probs(self, ablation: Ablation) -> Tensor:
        """Compute the ablated model's log-probabilities at the divergence positions [tokens, vocabulary]."""
        model_context = self.context
        with self.applied(ablation):
            return all_log_probs(
                model_context.language_model,
                model_context.evaluator.harmless_texts,
                model_context.batcher,
                "Ablated model's answers",
            )


def open_session(
    settings: Settings,
    checkpoint: Checkpoint,
    prompts: PromptSets,
    plan: LoadPlan,
    folder: RunFolder,
    reporter: ProgressReporter,
    stop: StopSignal,
    compute_once: ComputeOnce = LOCAL,
) -> Session:
    """Load the model and prepare a study; compute only what neither the run folder nor another worker has."""
    judge = make_judge(settings, JudgeContext(folder.path, reporter, stop))
    with compute_once.shared_file(BASELINE):
        baseline = folder.load_baseline(reporter)
        start = baseline.start if baseline else None
        model_context = load_model_context(settings, checkpoint, prompts, plan, reporter, stop, start, judge)
        with unloaded_on_error(model_context.language_model.model):
            if baseline is None:
                baseline = measure_baseline(model_context)
                folder.save_baseline(baseline)
            elif baseline.harmless_answers:
                known = model_context.measurer.original
                known.group.keep(known.harmless, baseline.harmless_answers)
    with unloaded_on_error(model_context.language_model.model):
        report_baseline(baseline, reporter)
        return _prepare_session(model_context, baseline, checkpoint, folder, compute_once)


def _prepare_session(
    model_context: ModelContext,
    baseline: Baseline,
    checkpoint: Checkpoint,
    folder: RunFolder,
    compute_once: ComputeOnce,
) -> Session:
    settings, reporter = model_context.settings, model_context.batcher.reporter
    with compute_once.shared_file("directions.safetensors"):
        directions = folder.load_directions(reporter)
        if directions is None:
            recorder = GeometryRecorder()
            directions = find_model_directions(model_context, recorder)
            folder.save_directions(directions)
            folder.save_geometry(recorder.geometry(directions))
    writers = model_context.language_model.structure.writers
    original = None
    if settings.apply == "weights":
        original = (
            copy_weights(writers)
            if settings.cache_weights
            else read_from_checkpoint(checkpoint, writers, model_context.language_model.model)
        )
    model_context.measurer.of_original(model_context.chosen.of_trials)
    read = weight_reader(model_context.language_model)
    input_maps = open_input_maps(model_context, folder, compute_once, read)
    operator_factory = operator_factory_for(model_context, directions, input_maps)
    return with_baseline(Session(model_context, baseline, operator_factory, original), baseline)


def with_baseline(session: Session, baseline: Baseline) -> Session:
    """Return the session with this baseline, and caches rebuilt for it."""
    evaluator = replace(session.context.evaluator.without_caches(), reference_tokens=baseline.answered)
    cached = enable_caching(evaluator, baseline.refusal_texts)
    return replace(session, context=replace(session.context, evaluator=cached), baseline=baseline)


def find_model_directions(model_context: ModelContext, recorder: GeometryRecorder | None = None) -> Directions:
    """Compute the directions from the training prompts as the settings say. Raises UserError."""
    harmful, harmless = (model_context.encoded[role] for role in ("harmful_train", "harmless_train"))
    wanted = model_context.settings.directions
    return find_directions(model_context.language_model, harmful, harmless, model_context.batcher, wanted, recorder)


def operator_factory_for(
    model_context: ModelContext, directions: Directions, input_maps: Mapping[str, InputMap]
) -> OperatorFactory:
    """Create the operator factory of the run's geometry for these directions."""
    model, edit = model_context.language_model, model_context.settings.ablation
    read, reporter = weight_reader(model), model_context.batcher.reporter
    return OperatorFactory.prepare(
        directions,
        model.structure.writers,
        edit.geometry,
        read,
        reporter,
        norm_aware=edit.norm_aware,
        input_maps=input_maps,
    )


def measure_baseline(model_context: ModelContext) -> Baseline:
    """Measure the baseline of the original model."""
    log_probs, answered = original_log_probs(model_context)
    counted, original = model_context.evaluator.refusals(min_tokens=MIN_DRAFT_TOKENS), model_context.measurer.original
    texts = tuple(
        list(tokens[:MAX_DRAFT_TOKENS]) if refused else []
        for tokens, refused in zip(counted.tokens, counted.refused, strict=True)
    )
    return Baseline(
        log_probs=log_probs,
        verdicts=counted.verdicts,
        refusal_texts=texts,
        start=model_context.answer_start,
        answered=answered,
        harmless_answers=tuple(original.answers(original.harmless)),
    )


def original_log_probs(model_context: ModelContext) -> tuple[Tensor, tuple[list[int], ...]]:
    """Compute the log-probabilities [tokens, vocabulary] at the first `kl_tokens` tokens of the model's harmless answers.

    Returns:
        The log-probabilities, and the answers' tokens by prompt.

    Raises:
        UserError: if they do not fit into RAM.
    """
    model, batcher, harmless = model_context.language_model, model_context.batcher, model_context.evaluator.harmless
    answered = answer_prefixes(model, harmless, batcher, model_context.settings.kl_tokens)
    check_memory(sum(map(len, answered)), model_context)
    return all_log_probs(model, TeacherForcedTexts.of(harmless, answered), batcher, "Baseline"), tuple(answered)


def check_memory(tokens: int, model_context: ModelContext) -> None:
    """Raise UserError if the log-probabilities at this many tokens do not fit into free RAM.

    Three sets exist at once at the end: of the original, the ablated and the exported model.
    """
    vocabulary = model_context.language_model.model.config.get_text_config(decoder=True).vocab_size
    needed, free = LOG_PROB_COPIES * tokens * vocabulary * 4, memory()[1]
    if needed > free and model_context.settings.kl_tokens > 1:
        fitting = max(1, int(model_context.settings.kl_tokens * free / needed))
        raise UserError(
            f"Log-probabilities at {tokens} tokens need {format_bytes(needed)} of RAM. {format_bytes(free)} are free.",
            code="insufficient-ram",
            where="kl_tokens",
            fix=f"kl_tokens = {fitting}, or use fewer prompts in prompts.harmless_eval",
        )


def weight_reader(language_model: LanguageModel) -> Callable[[ResidualWriter], Sequence[LazyTensor]]:
    """Return a reader of a writer's matrices [width, inputs], from memory or, if offloaded, from the checkpoint."""

    def read(writer: ResidualWriter) -> Sequence[LazyTensor]:
        if language_model.loader is not None:
            language_model.loader.load(writer.layer)
        if not writer.offloaded:
            return writer.weights()
        original = read_from_checkpoint(language_model.checkpoint, [writer], language_model.model)
        return [m for part in writer.parts if not part.is_bias for m in part.matrices(original(part.name))]

    return read
