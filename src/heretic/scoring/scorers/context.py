"""What a scorer works with: one model, ablated or not, its prompts, and its answers, decoded once for all scorers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from heretic.model.batching import UNEDITED, Batch, Batcher, EditSpec, parts_within, prefix_caching_if, shared_tokens
from heretic.model.chat_format import ChatFormat, check_length
from heretic.model.decoding import greedy
from heretic.model.forward import hidden_states, launch_head, log_probs_of
from heretic.model.loading import LanguageModel
from heretic.model.transfer import HostCopies, to_device
from heretic.model.turns import Turns
from heretic.scoring.divergence import measure_divergence, summarize
from heretic.scoring.judges.verdict import Exchange, Judge, Verdict
from heretic.scoring.scorers.scorer import Measurement
from heretic.scoring.teacher_forcing import TeacherForcedTexts, all_log_probs, last_hidden

LOG_PROBS_BYTES = 256 << 20  # of the original at once, while two models are compared

STAGES = ("Scorers: answers", "Scorers: likelihoods", "Scorers: original")  # on the screen and in run.log

# (indices of the trials) -> a context in which the model is ablated; without indices all trials share the passes.
Applied = Callable[..., AbstractContextManager[EditSpec]]


@dataclass(frozen=True)
class EncodedPrompts:
    """Prompts as text and as token ids."""

    name: str  # of the set, in messages and on the screen
    texts: Sequence[str]
    tokens: Sequence[list[int]]


@dataclass(frozen=True)
class ModelParts:
    """A loaded model and what its answers are measured with."""

    language_model: LanguageModel
    chat: ChatFormat
    batcher: Batcher
    judge: Judge
    max_tokens: int  # per answer, unless a scorer asks for another number
    harmful: EncodedPrompts
    harmless: EncodedPrompts


def unedited(*_: int) -> AbstractContextManager[EditSpec]:
    """Leave the model as it is."""
    return nullcontext(UNEDITED)


@dataclass
class TrialGroup:
    """Models that are decoded together: the trials of a batch, or the original alone."""

    parts: ModelParts
    applied: Applied = unedited
    count: int = 1
    # By set: the tokens per answer that were asked for, and the answers by trial.
    decoded: dict[tuple[str, tuple[str, ...]], tuple[int, list[list[list[int]]]]] = field(default_factory=dict)

    def answers(self, prompts: EncodedPrompts, tokens: int) -> list[list[list[int]]]:
        """Return the first `tokens` tokens of the greedy answers by trial and prompt."""
        key = (prompts.name, tuple(prompts.texts))
        length, known = self.decoded.get(key, (0, []))
        if length < tokens:
            length, known = tokens, self._decode(prompts, tokens)
            self.decoded[key] = (length, known)
        return [[answer[:tokens] for answer in answers] for answers in known]

    def keep(self, prompts: EncodedPrompts, answers: Sequence[list[int]]) -> None:
        """Use stored answers of one model, of `max_response_length` tokens."""
        self.decoded[prompts.name, tuple(prompts.texts)] = (self.parts.max_tokens, [list(answers)])

    def _decode(self, prompts: EncodedPrompts, tokens: int) -> list[list[list[int]]]:
        model, batcher, count = self.parts.language_model, self.parts.batcher, len(prompts.tokens)
        check_length(prompts.name, prompts.tokens, model.context, tokens)
        step = greedy(model, tokens)
        with (
            self.applied() as edited,
            prefix_caching_if(batcher, max(map(len, prompts.tokens)) + tokens < model.window),
        ):
            found = batcher.run_items(STAGES[0], prompts.tokens, step, edited=edited, decoding=True)
        return [[found[trial * count + i] for i in range(count)] for trial in range(self.count)]


@dataclass(frozen=True)
class ScorerContext:
    """One model, as a scorer sees it."""

    group: TrialGroup
    index: int = 0  # among the trials of the group
    original: ScorerContext | None = None  # None: this is the original, or the original is not in memory

    @property
    def parts(self) -> ModelParts:
        """The loaded model, chat format, batcher and judge."""
        return self.group.parts

    @property
    def harmful(self) -> EncodedPrompts:
        """The prompts of `prompts.harmful_eval`."""
        return self.parts.harmful

    @property
    def harmless(self) -> EncodedPrompts:
        """The prompts of `prompts.harmless_eval`."""
        return self.parts.harmless

    @property
    def max_tokens(self) -> int:
        """The run's `max_response_length`."""
        return self.parts.max_tokens

    @contextmanager
    def active(self) -> Iterator[EditSpec]:
        """Make the loaded model this one within the context, for passes of a scorer's own."""
        with self.group.applied(self.index) as edited:
            yield edited

    def encode(self, name: str, texts: Sequence[str]) -> EncodedPrompts:
        """Encode prompts of a scorer's own with the chat template."""
        return EncodedPrompts(name, texts, self.parts.chat.encode(texts))

    def answers(self, prompts: EncodedPrompts, tokens: int | None = None) -> list[list[int]]:
        """Return the token ids of the greedy answers, at most `tokens` each; decoded once for all scorers and trials."""
        return self.group.answers(prompts, tokens or self.max_tokens)[self.index]

    def text(self, tokens: Sequence[int]) -> str:
        """Decode the tokens of an answer."""
        return self.parts.chat.text(list(tokens))

    def texts(self, prompts: EncodedPrompts, tokens: int | None = None) -> list[str]:
        """Return the answers as text."""
        return [self.text(answer) for answer in self.answers(prompts, tokens)]

    def verdicts(self, prompts: EncodedPrompts, answers: Sequence[str]) -> list[Verdict]:
        """Let the run's judge decide on answers to the prompts."""
        return self.parts.judge.verdicts([Exchange(q, a) for q, a in zip(prompts.texts, answers, strict=True)])

    def log_likelihoods(self, prompts: Sequence[list[int]], texts: Sequence[list[int]]) -> list[Tensor]:
        """Compute the log-probability of every token of the texts after their prompts: float32 [tokens] each, on the CPU."""
        targets = TeacherForcedTexts.of(prompts, texts)
        language_model = self.parts.language_model
        model = language_model.model

        @torch.inference_mode()
        def picked(batch: Batch, hidden: Tensor) -> Tensor:
            wanted = torch.tensor([token for i in batch.rows for token in texts[i]])
            found = [
                p.gather(1, to_device(wanted[rows, None], p.device))[:, 0] for rows, p in log_probs_of(model, hidden)
            ]
            return torch.cat(found).float()

        def step(batch: Batch) -> Turns[list[Tensor]]:
            counts, copies = [len(texts[i]) for i in batch.rows], HostCopies()
            hidden = last_hidden(hidden_states(model, batch, use_cache=False)[0], counts)
            in_ram = yield from launch_head(model, hidden, lambda at_head: copies.copy(picked(batch, at_head)))
            copies.wait()
            return list(in_ram.split(counts))

        with self.active() as edited, _whole_texts(language_model, self.parts.batcher, prompts, targets.sequences):
            found = self.parts.batcher.run_items(STAGES[1], targets.sequences, step, edited=edited)
        return [found[i] for i in range(len(texts))]

    def divergence(self, prompts: Sequence[list[int]], texts: Sequence[list[int]]) -> Measurement:
        """Compute KL(original || this model) in nats at every token of the texts: mean, median, p95 and max over prompts.

        The prompts are compared in parts, so that the original's probabilities fit into memory. Needs `original`.
        """
        original, parts = self.original or self, self.parts
        vocabulary = parts.language_model.model.config.get_text_config(decoder=True).vocab_size
        per_prompt: list[float] = []
        for some in parts_within([len(text) for text in texts], LOG_PROBS_BYTES // (4 * vocabulary)):
            targets = TeacherForcedTexts.of([prompts[i] for i in some], [texts[i] for i in some])
            with _whole_texts(parts.language_model, parts.batcher, [prompts[i] for i in some], targets.sequences):
                with original.active():
                    log_probs = all_log_probs(parts.language_model, targets, parts.batcher, STAGES[2])
                with self.active() as edited:
                    found = measure_divergence(parts.language_model, targets, log_probs, parts.batcher, edited)
            per_prompt += found[0].per_prompt
        whole = summarize(torch.tensor(per_prompt, dtype=torch.float64))
        return Measurement(whole.mean, {"median": whole.median, "p95": whole.p95, "max": whole.max}, tuple(per_prompt))


def _whole_texts(
    model: LanguageModel, batcher: Batcher, prompts: Sequence[list[int]], sequences: Sequence[list[int]]
) -> AbstractContextManager[None]:
    """Turn prefix caching off within the context if the shared prefix reaches into the texts, whose hidden states are needed."""
    short = max(map(len, sequences)) < model.window
    return prefix_caching_if(batcher, short and len(shared_tokens(sequences)) < min(map(len, prompts)))
