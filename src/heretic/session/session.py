"""A loaded model made ready for a study: chat format, baseline, directions and workbench.

What the run's folder holds is read from there; only the rest is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from torch import Tensor

from heretic.ablation.ablation import Ablation, Workbench
from heretic.ablation.apply import attach
from heretic.ablation.bake import Original, copies, from_checkpoint, rewrite
from heretic.ablation.directions import Directions
from heretic.ablation.operator import Matrix
from heretic.ablation.residual_geometry import ResidualGeometry, Survey
from heretic.errors import UserError
from heretic.hardware.host import memory, spell_bytes
from heretic.interrupt import Stop
from heretic.model.architecture import Writer
from heretic.model.batching import AS_IT_IS, Batcher, Edited
from heretic.model.chat_format import ChatFormat
from heretic.model.checkpoint import Checkpoint
from heretic.model.decoding import decoded_by_generate
from heretic.model.distributed import agree, rank
from heretic.model.forward import can_share, padding_matters
from heretic.model.loading import LanguageModel, load
from heretic.model.response_prefix import AnswerStart
from heretic.model.template import read_template
from heretic.planning.memory_plan import LoadPlan
from heretic.progress import Watcher
from heretic.prompts import PromptSets
from heretic.runs.folder import BASELINE, RunFolder
from heretic.runs.stored_tensors import Baseline
from heretic.scoring.evaluator import Ladder
from heretic.scoring.harmless_metrics import Bystanders, Limits
from heretic.scoring.judges.registry import Surroundings, make_judge
from heretic.scoring.judges.verdict import Judge
from heretic.scoring.refusal_proxy import FEWEST_TOKENS, MOST_TOKENS
from heretic.scoring.teacher_forcing import Taught, all_log_probs, beginnings
from heretic.search.gradient_path import Walk
from heretic.search.space import Space
from heretic.session.caching import with_savings
from heretic.session.encoding import encode, most_new_tokens, start_answers
from heretic.session.find_directions import find_directions
from heretic.settings import Settings
from heretic.storage.compute_once import ALONE, Shelf

FEW_REFUSALS = 0.1  # share of the requests
COPIES = 3  # of the log-probabilities: original, ablated, written


@dataclass(frozen=True)
class Bench:
    """A loaded model with the prompts encoded for it (token ids by role) and everything that measures it."""

    settings: Settings
    language_model: LanguageModel
    chat: ChatFormat
    prompts: PromptSets
    encoded: Mapping[str, list[list[int]]]
    batcher: Batcher
    ladder: Ladder

    @property
    def start(self) -> AnswerStart:
        """How every answer begins."""
        return AnswerStart(self.chat.response_prefix, self.chat.variables)


@dataclass(frozen=True)
class Session:
    """A bench with what a study needs besides: the original's baseline, the directions, the operators' workbench, and the
    ladder that knows what the original said and does not compute again what no trial changes."""

    bench: Bench
    baseline: Baseline
    workbench: Workbench
    original: Original | None
    ladder: Ladder

    @contextmanager
    def applied(self, *ablations: Ablation) -> Iterator[Edited]:
        """Within the context the model is ablated, by hooks or by rewritten weights as the settings say.

        Gives how it is edited. Several ablations share the passes, each row having its own; rewritten weights hold one. Without
        any it is the original.
        """
        if not ablations:
            yield AS_IT_IS
            return
        writers, operators = self.workbench.writers, [self.workbench.operators(a) for a in ablations]
        touched = [w.layer for w in writers if any(w.name in found for found in operators)]
        edited = Edited(len(ablations), min(touched, default=self.bench.language_model.anatomy.num_layers))
        if self.original is None:
            with attach(writers, *operators):
                yield edited
        else:
            (only,) = operators
            with rewrite(writers, only, self.original):
                yield edited

    def space(self, walk: Walk | None) -> Space:
        """What this model's trials are drawn from."""
        anatomy = self.bench.language_model.anatomy
        return Space(self.bench.settings.search, anatomy.num_layers, anatomy.components, walk)

    def log_probs(self, ablation: Ablation) -> Tensor:
        """Log-probabilities of the ablated model where the divergence is taken [tokens, vocabulary]."""
        bench = self.bench
        with self.applied(ablation):
            return all_log_probs(bench.language_model, bench.ladder.taught, bench.batcher, "Ablated model's answers")


def open_bench(
    settings: Settings,
    checkpoint: Checkpoint,
    prompts: PromptSets,
    plan: LoadPlan,
    watcher: Watcher,
    stop: Stop,
    start: AnswerStart | None = None,
    judge: Judge | None = None,
) -> Bench:
    """Load the model and encode the evaluation prompts; the answers' common beginning is found unless it is given, and the judge
    is made unless there is one."""
    judge = judge or make_judge(settings, Surroundings(None, watcher, stop))
    language_model = load(
        checkpoint,
        plan.dtypes,
        plan.arguments,
        quantization=plan.quantization,
        trust_remote_code=settings.trust_remote_code,
        chat_template=read_template(settings),
        watcher=watcher,
    )
    if names := language_model.anatomy.not_understood:
        watcher.warn(
            f"{len(names)} modules look like writers, but not to the residual stream or in a way that is not understood; "
            f"they are left as they are, such as {names[0]}."
        )
    if names := language_model.anatomy.incomplete:
        watcher.warn(
            f"{len(names)} blocks do more than add their writers' outputs to one residual stream, such as {names[0]}: "
            "the edit may not reach all of it (docs/architectures.md)."
        )
    batcher = Batcher(plan.batch_size, language_model.device, pad=language_model.pad, stop=stop, watcher=watcher)
    chat = ChatFormat(language_model.tokenizer, settings.system_prompt, rows=language_model.rows)
    encoded = encode(prompts, chat, language_model.context, settings)
    if decoded_by_generate(language_model.model, language_model.device):
        watcher.say(
            "This model keeps no cache that can be handed on: transformers decodes every answer to its full length."
        )
    batcher.even = padding_matters(language_model.model, encoded["harmless_eval"], batcher)
    if batcher.even:
        watcher.warn(
            "Padding changes what this model answers, so only prompts of one length share a batch: this is slower."
        )
    chat, encoded = start_answers(chat, encoded, start, prompts, language_model, settings, batcher)
    longest = max(len(tokens) for sequences in encoded.values() for tokens in sequences) + most_new_tokens(settings)
    model, window = language_model.model, language_model.window
    batcher.share = can_share(model, encoded["harmless_eval"], batcher, longest=longest, window=window)
    limits = Limits(settings.constraints.max_over_refusals, settings.constraints.max_degenerate)
    bystanders = Bystanders(encoded["harmless_eval"], prompts.harmless_eval.prompts, limits)
    ladder = Ladder(
        language_model,
        chat,
        encoded["harmful_eval"],
        encoded["harmless_eval"],
        judge,
        batcher,
        settings.max_response_length,
        requests=prompts.harmful_eval.prompts,
        bystanders=bystanders,
    )
    return Bench(settings, language_model, chat, prompts, encoded, batcher, ladder)


def open_session(
    settings: Settings,
    checkpoint: Checkpoint,
    prompts: PromptSets,
    plan: LoadPlan,
    folder: RunFolder,
    watcher: Watcher,
    stop: Stop,
    shelf: Shelf = ALONE,
) -> Session:
    """Load the model and bring everything that a study needs, computing only what the run's folder does not hold, and what no
    other worker of the study makes."""
    judge = make_judge(settings, Surroundings(folder.path, watcher, stop))
    with shelf.file(BASELINE):
        baseline = agree(lambda: folder.baseline(watcher))
        start = baseline.start if baseline else None
        bench = open_bench(settings, checkpoint, prompts, plan, watcher, stop, start, judge)
        if baseline is None:
            baseline = measure_baseline(bench)
            if rank() == 0:
                folder.keep_baseline(baseline)
    evasive = f" and evades {baseline.evasive}" if baseline.evasive else ""
    watcher.say(f"The original model declines {baseline.refusals} of {len(baseline.declined)} requests{evasive}.")
    if baseline.refusals < FEW_REFUSALS * len(baseline.declined):
        watcher.warn(
            "It hardly declines anything, so there is little to remove; check prompts.harmful_eval and refusal_markers."
        )
    with shelf.file("directions.safetensors"):
        directions = agree(lambda: folder.directions(watcher))
        if directions is None:
            survey = Survey()
            directions = directions_of(bench, survey)
            if rank() == 0:
                folder.keep_directions(directions)
                folder.keep_geometry(survey.geometry(directions))
    writers = bench.language_model.anatomy.writers
    original = None
    if settings.apply == "weights":
        original = (
            copies(writers)
            if settings.cache_weights
            else from_checkpoint(_with_tensors(checkpoint), writers, bench.language_model.model)
        )
    workbench = workbench_of(bench, directions)
    return with_baseline(Session(bench, baseline, workbench, original, bench.ladder), baseline)


def with_baseline(session: Session, baseline: Baseline) -> Session:
    """The session measuring against this baseline."""
    bench = replace(session.bench, ladder=replace(session.bench.ladder, answered=baseline.answered))
    return replace(session, bench=bench, baseline=baseline, ladder=with_savings(bench.ladder, baseline.refusal_texts))


def directions_of(bench: Bench, survey: Survey | None = None) -> Directions:
    """Directions as the settings want them, from the prompt sets for it; `survey` sees what they are found in. Raises UserError."""
    harmful, harmless = (bench.encoded[role] for role in ("harmful_train", "harmless_train"))
    wanted = bench.settings.directions
    return find_directions(bench.language_model, harmful, harmless, bench.batcher, wanted, survey)


def geometry_of(bench: Bench) -> ResidualGeometry:
    """How the residuals that give the directions lie, measured anew."""
    survey = Survey()
    return survey.geometry(directions_of(bench, survey))


def workbench_of(bench: Bench, directions: Directions) -> Workbench:
    """What gives the operators of the run's geometry for these directions."""
    model, edit = bench.language_model, bench.settings.ablation
    read, watcher = weight_reader(model), bench.batcher.watcher
    return Workbench.prepare(
        directions, model.anatomy.writers, edit.geometry, read, watcher, norm_aware=edit.norm_aware
    )


def measure_baseline(bench: Bench) -> Baseline:
    """Measure the original model."""
    log_probs, answered = original_log_probs(bench)
    counted = bench.ladder.refusals(fewest_tokens=FEWEST_TOKENS)
    conduct = bench.ladder.conduct()
    texts = tuple(
        list(tokens[:MOST_TOKENS]) if declined else []
        for tokens, declined in zip(counted.tokens, counted.declined, strict=True)
    )
    return Baseline(
        log_probs=log_probs,
        verdicts=counted.verdicts,
        refusal_texts=texts,
        start=bench.start,
        answered=answered,
        conduct=conduct[0] if conduct else None,
    )


def original_log_probs(bench: Bench) -> tuple[Tensor, tuple[list[int], ...]]:
    """The model's log-probabilities [tokens, vocabulary] at the first `kl_tokens` tokens of its own answers to the harmless
    prompts, and these tokens. Raises UserError where they do not fit into the RAM."""
    model, batcher, harmless = bench.language_model, bench.batcher, bench.ladder.harmless
    answered = beginnings(model, harmless, batcher, bench.settings.kl_tokens)
    check_room(sum(map(len, answered)), bench)
    return all_log_probs(model, Taught.of(harmless, answered), batcher, "Baseline"), tuple(answered)


def check_room(tokens: int, bench: Bench) -> None:
    """Raise UserError where log-probabilities at so many tokens do not fit into the RAM that is free: those of the original stay,
    those of the ablated and of the written model are compared with them at the end."""
    vocabulary = bench.language_model.model.config.get_text_config(decoder=True).vocab_size
    needed, free = COPIES * tokens * vocabulary * 4, memory()[1]
    if needed > free and bench.settings.kl_tokens > 1:
        fitting = max(1, int(bench.settings.kl_tokens * free / needed))
        raise UserError(
            f"Log-probabilities at {tokens} tokens need {spell_bytes(needed)} of RAM. {spell_bytes(free)} are free.",
            code="insufficient-ram",
            where="kl_tokens",
            fix=f"kl_tokens = {fitting}, or use fewer prompts in prompts.harmless_eval",
        )


def weight_reader(language_model: LanguageModel) -> Callable[[Writer], Sequence[Matrix]]:
    """How to get at a writer's matrices [width, inputs]: from memory, or from the checkpoint where they are offloaded."""

    def read(writer: Writer) -> Sequence[Matrix]:
        if not writer.offloaded:
            return writer.weights()
        original = from_checkpoint(_with_tensors(language_model.checkpoint), [writer], language_model.model)
        return [m for part in writer.parts if not part.is_bias for m in part.matrices(original(part.name))]

    return read


def _with_tensors(checkpoint: Checkpoint) -> Checkpoint:
    if checkpoint.gguf_file or checkpoint.quantised_by:
        raise UserError(
            "The checkpoint is quantized, so heretic cannot restore the original weights exactly from it.",
            code="weights-not-restorable",
            where="cache_weights",
            fix='cache_weights = true, apply = "operators", or the model as safetensors',
        )
    return checkpoint
