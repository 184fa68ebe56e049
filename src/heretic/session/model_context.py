"""A loaded model with its prompts and scorers: what a study, an export and single measurements share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from heretic.errors import UserError
from heretic.interrupt import StopSignal
from heretic.model.batching import Batcher
from heretic.model.chat_format import ChatFormat, decoded_tokens
from heretic.model.checkpoint import Checkpoint
from heretic.model.decoding import decoded_by_generate
from heretic.model.forward import padding_sensitive, supports_prefix_caching
from heretic.model.loading import LanguageModel, load
from heretic.model.reader import reordered
from heretic.model.response_prefix import AnswerStart
from heretic.model.template import read_template, today_for
from heretic.model.unloading import unloaded_on_error
from heretic.planning.memory_plan import LoadPlan
from heretic.progress import ProgressReporter
from heretic.prompts.sets import PromptSets
from heretic.scoring.evaluator import TrialEvaluator
from heretic.scoring.judges.registry import JudgeContext, make_judge
from heretic.scoring.judges.verdict import Judge
from heretic.scoring.scorers.context import EncodedPrompts, ModelParts
from heretic.scoring.scorers.measuring import Measurer
from heretic.scoring.scorers.registry import ChosenScorers, choose_scorers
from heretic.session.encoding import encode, end_answers, start_answers
from heretic.settings import Settings


@dataclass(frozen=True)
class ModelContext:
    """A loaded model with its encoded prompts (token ids by role) and its evaluator."""

    settings: Settings
    language_model: LanguageModel
    chat: ChatFormat
    prompts: PromptSets
    encoded: Mapping[str, list[list[int]]]
    batcher: Batcher
    evaluator: TrialEvaluator
    chosen: ChosenScorers
    measurer: Measurer

    @property
    def answer_start(self) -> AnswerStart:
        """The common beginning of all answers."""
        chat = self.chat
        return AnswerStart(chat.response_prefix, chat.variables, chat.date, self.language_model.end_of_turn)


def load_model_context(
    settings: Settings,
    checkpoint: Checkpoint,
    prompts: PromptSets,
    plan: LoadPlan,
    reporter: ProgressReporter,
    stop: StopSignal,
    answer_start: AnswerStart | None = None,
    judge: Judge | None = None,
) -> ModelContext:
    """Load the model and encode the prompts; detect the answers' common beginning and create the judge if not given."""
    judge = judge or make_judge(settings, JudgeContext(None, reporter, stop))
    language_model = end_answers(_load_language_model(settings, checkpoint, plan, reporter), answer_start, reporter)
    batcher = Batcher(
        plan.batch_size,
        language_model.device,
        pad=language_model.pad,
        groups=language_model.groups,
        stop=stop,
        reporter=reporter,
    )
    with unloaded_on_error(language_model.model):
        return _prepare_context(settings, prompts, language_model, batcher, answer_start, judge)


def _prepare_context(
    settings: Settings,
    prompts: PromptSets,
    language_model: LanguageModel,
    batcher: Batcher,
    answer_start: AnswerStart | None,
    judge: Judge,
) -> ModelContext:
    reporter = batcher.reporter
    # 1. Encode the prompts, and find out what batches and caches the model allows
    date = answer_start.date if answer_start else today_for(language_model.tokenizer)  # a resumed study keeps its own
    chat = ChatFormat.of(language_model.tokenizer, settings, date=date, rows=language_model.rows)
    encoded = encode(prompts, chat, language_model.context, settings)
    if decoded_by_generate(language_model.model, language_model.device):
        reporter.info("This model has no reusable KV cache: transformers decodes every answer to its full length.")
    batcher.equal_lengths = padding_sensitive(language_model.model, encoded["harmless_eval"], batcher)
    if batcher.equal_lengths:
        reporter.warning(
            "Padding changes this model's answers, so only prompts of equal length share a batch. This is slower."
        )
    chat, encoded = start_answers(chat, encoded, answer_start, prompts, language_model, settings, batcher)
    longest = max(len(tokens) + decoded_tokens(role, settings) for role, rows in encoded.items() for tokens in rows)
    model, window = language_model.model, language_model.window
    batcher.prefix_caching = supports_prefix_caching(
        model, encoded["harmless_eval"], batcher, longest=longest, window=window
    )
    # 2. Prepare the scorers
    chosen = choose_scorers(settings)
    evaluator = TrialEvaluator(
        language_model,
        chat,
        encoded["harmful_eval"],
        encoded["harmless_eval"],
        judge,
        batcher,
        settings.max_response_length,
        requests=prompts.harmful_eval.prompts,
        limits=chosen.limits,
    )
    harmful, harmless = (
        EncodedPrompts(s.role, s.prompts, encoded[s.role]) for s in (prompts.harmful_eval, prompts.harmless_eval)
    )
    parts = ModelParts(language_model, chat, batcher, judge, settings.max_response_length, harmful, harmless)
    measurer = Measurer(chosen.scorers, parts)
    return ModelContext(settings, language_model, chat, prompts, encoded, batcher, evaluator, chosen, measurer)


def _load_language_model(
    settings: Settings, checkpoint: Checkpoint, plan: LoadPlan, reporter: ProgressReporter
) -> LanguageModel:
    """Load the model as planned; warn about modules that the edit may miss."""
    language_model = load(
        checkpoint,
        plan.dtypes,
        plan.arguments,
        quantization=plan.quantization,
        trust_remote_code=settings.trust_remote_code,
        chat_template=read_template(settings),
        readers=settings.ablation.readers,
        reporter=reporter,
    )
    language_model.graphs.enabled = settings.decoding_graphs
    if readers := [w.name for w in language_model.structure.writers if w.reads_stream]:
        kinds = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in readers))
        if settings.export_format == "gguf" and (name := reordered(language_model.structure.writers)):
            raise UserError(
                f"GGUF files split or reorder the rows of {name}, which heretic could not verify.",
                code="export-format-not-supported",
                where="ablation.readers",
                fix='export_format = "full", or ablation.readers = false',
            )
        reporter.info(f"heretic also edits {len(readers)} modules that read the stream: {kinds}.")
    if names := language_model.structure.unrecognized:
        reporter.warning(
            f"{len(names)} modules are named like output projections but do not affect the residual stream as expected. "
            f"They will not be edited (first: {names[0]})."
        )
    if names := language_model.structure.incomplete:
        reporter.warning(
            f"{len(names)} blocks do more than add their writers' outputs to one residual stream (first: {names[0]}). "
            "The edit may be incomplete; see docs/architectures.md."
        )
    return language_model
