"""A loaded model made ready for a study: chat format, baseline, directions and workbench.

What the run's folder holds is read from there; only the rest is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from heretic.ablation.ablation import Ablation, Workbench
from heretic.ablation.attach import attach
from heretic.ablation.bake import Original, copies, from_checkpoint, rewrite
from heretic.ablation.directions import Directions
from heretic.errors import UserError
from heretic.finding import find_directions
from heretic.model.anatomy import Writer
from heretic.model.batching import AS_IT_IS, Batch, Batcher, Edited
from heretic.model.chat_format import ChatFormat, check_length, common_prefix
from heretic.model.checkpoint import Checkpoint
from heretic.model.decoding import decode, decoded_by_generate
from heretic.model.forward import can_share, padding_matters
from heretic.model.loading import LanguageModel, load
from heretic.parallel import agree, rank
from heretic.progress import Watcher
from heretic.prompts import PromptSets
from heretic.run_folder import Baseline, RunFolder
from heretic.savings import with_savings
from heretic.scoring.divergence import first_token_log_probs
from heretic.scoring.ladder import Ladder
from heretic.scoring.refusals import MarkerJudge
from heretic.scoring.surrogate import FEWEST_TOKENS, MOST_TOKENS
from heretic.search.shelf import ALONE, Shelf
from heretic.search.space import Space
from heretic.search.walk import Walk
from heretic.settings import Settings
from heretic.stop import Stop

# How many prompts of each kind, and how many tokens, show what all answers begin with.
PREFIX_PROMPTS = 8
PREFIX_TOKENS = 16
FEW_REFUSALS = 0.1  # share of the requests


@dataclass(frozen=True)
class LoadPlan:
    """What the memory plan decided about loading: number formats to try, from_pretrained's arguments, prompts per batch."""

    dtypes: Sequence[str]
    arguments: dict[str, Any]
    batch_size: int


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
        """Next-token log-probabilities of the ablated model on the harmless evaluation prompts [prompts, vocabulary]."""
        with self.applied(ablation):
            return first_token_log_probs(
                self.bench.language_model, self.bench.ladder.harmless, self.bench.batcher, "Ablated model's answers"
            )


def open_bench(
    settings: Settings,
    checkpoint: Checkpoint,
    prompts: PromptSets,
    plan: LoadPlan,
    watcher: Watcher,
    stop: Stop,
    response_prefix: str | None = None,
) -> Bench:
    """Load the model and encode the evaluation prompts; the answers' common beginning is found unless it is given."""
    language_model = load(
        checkpoint,
        plan.dtypes,
        plan.arguments,
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
    tokenizer = language_model.tokenizer
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)
    batcher = Batcher(plan.batch_size, language_model.device, pad=pad, stop=stop, watcher=watcher)
    chat = ChatFormat(tokenizer, settings.system_prompt)
    encoded = encode(prompts, chat, language_model.context, settings.max_response_length)
    if decoded_by_generate(language_model.model, language_model.device):
        watcher.say(
            "This model keeps no cache that can be handed on: transformers decodes every answer to its full length."
        )
    batcher.even = padding_matters(language_model.model, encoded["harmless_eval"], batcher)
    if batcher.even:
        watcher.warn(
            "Padding changes what this model answers, so only prompts of one length share a batch: this is slower."
        )
    if response_prefix is None:
        response_prefix = settings.response_prefix
        if response_prefix == "auto":
            response_prefix = find_prefix(language_model, encoded, batcher)
    if response_prefix:
        watcher.say(f"Answers are made to begin with {response_prefix!r}.")
        chat = chat.with_prefix(response_prefix)
        encoded = encode(prompts, chat, language_model.context, settings.max_response_length)
    longest = max(len(tokens) for sequences in encoded.values() for tokens in sequences) + settings.max_response_length
    batcher.share = longest < language_model.window and can_share(
        language_model.model, encoded["harmless_eval"], batcher
    )
    judge = MarkerJudge(settings.refusal_markers)
    ladder = Ladder(
        language_model,
        chat,
        encoded["harmful_eval"],
        encoded["harmless_eval"],
        judge,
        batcher,
        settings.max_response_length,
    )
    return Bench(settings, language_model, chat, prompts, encoded, batcher, ladder)


def encode(prompts: PromptSets, chat: ChatFormat, context: int, new_tokens: int) -> dict[str, list[list[int]]]:
    """Token ids of all sets by their role. Raises UserError for a prompt that does not fit, with the answers decoded from it."""
    encoded = {}
    for prompt_set in prompts.all:
        encoded[prompt_set.role] = chat.encode(prompt_set.prompts)
        new = new_tokens if prompt_set is prompts.harmful_eval else 1
        check_length(prompt_set.role, encoded[prompt_set.role], context, new)
    return encoded


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
    with shelf.file("baseline.safetensors"):
        baseline = agree(lambda: folder.baseline(watcher))
        bench = open_bench(
            settings, checkpoint, prompts, plan, watcher, stop, baseline.response_prefix if baseline else None
        )
        if baseline is None:
            baseline = measure_baseline(bench)
            if rank() == 0:
                folder.keep_baseline(baseline)
    watcher.say(f"The original model declines {baseline.refusals} of {len(baseline.declined)} requests.")
    if baseline.refusals < FEW_REFUSALS * len(baseline.declined):
        watcher.warn(
            "It hardly declines anything, so there is little to remove; check prompts.harmful_eval and refusal_markers."
        )
    with shelf.file("directions.safetensors"):
        directions = agree(lambda: folder.directions(watcher))
        if directions is None:
            directions = directions_of(bench)
            if rank() == 0:
                folder.keep_directions(directions)
    writers = bench.language_model.anatomy.writers
    original = None
    if settings.apply == "weights":
        original = (
            copies(writers)
            if settings.cache_weights
            else from_checkpoint(_with_tensors(checkpoint), writers, bench.language_model.model)
        )
    workbench = workbench_of(bench, directions)
    return Session(bench, baseline, workbench, original, with_savings(bench.ladder, baseline.refusal_texts))


def directions_of(bench: Bench) -> Directions:
    """Directions as the settings want them, from the prompt sets for it. Raises UserError."""
    harmful, harmless = (bench.encoded[role] for role in ("harmful_train", "harmless_train"))
    return find_directions(bench.language_model, harmful, harmless, bench.batcher, bench.settings.directions)


def workbench_of(bench: Bench, directions: Directions) -> Workbench:
    """What gives the operators of the run's geometry for these directions."""
    model, edit = bench.language_model, bench.settings.ablation
    read, watcher = weight_reader(model), bench.batcher.watcher
    return Workbench.prepare(
        directions, model.anatomy.writers, edit.geometry, read, watcher, norm_aware=edit.norm_aware
    )


def measure_baseline(bench: Bench) -> Baseline:
    """Measure the original model."""
    log_probs = first_token_log_probs(bench.language_model, bench.ladder.harmless, bench.batcher)
    counted = bench.ladder.refusals(fewest_tokens=FEWEST_TOKENS)
    texts = tuple(
        list(tokens[:MOST_TOKENS]) if declined else []
        for tokens, declined in zip(counted.tokens, counted.declined, strict=True)
    )
    return Baseline(log_probs, counted.declined, texts, bench.chat.response_prefix)


def find_prefix(language_model: LanguageModel, encoded: Mapping[str, list[list[int]]], batcher: Batcher) -> str:
    """What the model's answers to harmful and harmless prompts alike begin with; empty if nothing."""
    asked = [*encoded["harmful_train"][:PREFIX_PROMPTS], *encoded["harmless_train"][:PREFIX_PROMPTS]]

    def step(batch: Batch) -> list[str]:
        tokens = decode(language_model.model, batch, PREFIX_TOKENS, language_model.end_tokens)
        # Special tokens are kept: thinking blocks and channels are made of them.
        return [str(language_model.tokenizer.decode(t)) for t in tokens]

    return common_prefix(batcher.run("Looking for a common beginning of answers", asked, step))


def read_template(settings: Settings) -> str:
    """The chat template that the settings name; empty for the model's own. Raises UserError."""
    if not settings.chat_template:
        return ""
    try:
        return Path(settings.chat_template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The chat template cannot be read: {error}", where="chat_template") from None


def weight_reader(language_model: LanguageModel) -> Callable[[Writer], Sequence[Tensor]]:
    """How to get at a writer's matrices [width, inputs]: from memory, or from the checkpoint where they are offloaded."""

    def read(writer: Writer) -> Sequence[Tensor]:
        if not writer.offloaded:
            return writer.weights()
        original = from_checkpoint(_with_tensors(language_model.checkpoint), [writer], language_model.model)
        return [m for part in writer.parts if not part.is_bias for m in part.matrices(original(part.name))]

    return read


def _with_tensors(checkpoint: Checkpoint) -> Checkpoint:
    if checkpoint.gguf_file:
        raise UserError(
            "A GGUF file holds quantised tensors, from which weights cannot be put back exactly.",
            where="cache_weights",
            fix='cache_weights = true, apply = "operators", or the model as safetensors',
        )
    return checkpoint
