"""What a run puts through the model: how many prompts of how many tokens, how many trials at a time, and the walk's steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from heretic.errors import UserError
from heretic.scoring import refusal_proxy as surrogate
from heretic.settings import Settings

if TYPE_CHECKING:
    from heretic.model.checkpoint import Checkpoint
    from heretic.prompts import PromptSets

CHARACTERS_PER_TOKEN = 3  # fewer than in English, so that the plan is on the safe side
TEMPLATE_TOKENS = 40
USUAL_TRAINING = 400  # prompts of each kind
MOST_TRIALS = 16  # that a run tries in one pass of its own accord: each is drawn without knowing how the others end


@dataclass(frozen=True)
class GradientSearchWorkload:
    """The walk by gradient: prompts of each kind in a step and in all, and tokens of their answers that are looked at."""

    batch: int
    prompts: int
    kl_tokens: int
    refusal_tokens: int


@dataclass(frozen=True)
class Workload:
    """Lengths in tokens and numbers of prompts.

    `prompt_tokens` are those of the longest prompt, `shared_tokens` begin all of them and are run once. `beyond` are, for the
    `requests` (harmful) and the `harmless` prompts of the evaluation, the tokens of all of them behind these; None where they were
    not counted. `training` prompts of each kind give the directions, `directions` of a layer in each of 1 + `rounds` rounds;
    `every`: of so many prompts the residuals are kept in RAM, each. `trials` share a pass; 0: as many as
    pay. `studied`: the geometry looks at the weights.
    """

    prompt_tokens: int
    new_tokens: int
    shared_tokens: int = 0
    requests: int = 100
    harmless: int = 100
    training: int = USUAL_TRAINING
    extra_tokens: tuple[int, int] | None = None
    kl_tokens: int = 1
    directions: int = 1
    rounds: int = 0
    every: int = 0
    trials: int = 0
    needs_weight_stats: bool = True
    gradient_search: GradientSearchWorkload | None = None

    @classmethod
    def of(cls, settings: Settings, longest: int) -> Workload:
        """From the settings and the longest prompt in characters; it has at most so many tokens with all that goes around it."""
        gradient = settings.search.gradient
        gradient_path = GradientSearchWorkload(
            gradient.batch, gradient.prompts, gradient.kl_tokens, gradient.refusal_tokens
        )
        return cls(
            prompt_tokens=prompt_tokens(settings, longest),
            new_tokens=settings.max_response_length,
            kl_tokens=settings.kl_tokens,
            directions=settings.directions.count,
            rounds=settings.directions.iterative_rounds,
            every=2 * USUAL_TRAINING if settings.directions.keeps_each else 0,
            trials=1 if settings.apply == "weights" else settings.trials_per_batch,
            needs_weight_stats=settings.ablation.geometry != "plain",
            gradient_search=None if settings.search.start == "kernels" else gradient_path,
        )

    def counted(self, settings: Settings, checkpoint: Checkpoint, prompts: PromptSets) -> Workload:
        """The same with the prompts' real numbers, and with their real lengths where the model's tokenizer is at hand.

        Raises UserError for a chat template that is missing or fails.
        """
        training = [len(prompts.harmful_train), len(prompts.harmless_train)]
        there = replace(
            self,
            requests=len(prompts.harmful_eval),
            harmless=len(prompts.harmless_eval),
            training=max(training),
            every=sum(training) if self.every else 0,
        )
        try:
            harmful, harmless, *others = _encoded(settings, checkpoint, prompts)
        except UserError as error:
            if error.code not in ("no-tokenizer", "damaged-tokenizer"):
                raise
            return there  # it may not be downloaded yet; loading says it better
        shared = len(_beginning([*harmful, *harmless, *others[0], *others[1]])) if len(harmful) > 1 else 0
        lengths = [len(tokens) for role in (harmful, harmless, *others) for tokens in role]
        return replace(
            there,
            prompt_tokens=max(lengths),
            shared_tokens=shared,
            extra_tokens=(sum(len(t) - shared for t in harmful), sum(len(t) - shared for t in harmless)),
        )

    @property
    def tail(self) -> int:
        """Tokens of the longest prompt that every row has for itself, at least one."""
        return max(1, self.prompt_tokens - self.shared_tokens)

    def trials_per_batch(self, batch: int) -> int:
        """Trials that share a pass, at most: as the settings say, else as many as a batch has room for."""
        if self.trials:
            return self.trials
        found = 1
        while found < MOST_TRIALS and 2 * found * self.requests <= batch:
            found *= 2
        return found

    def trial_rows(self, batch: int) -> int:
        """Rows of a batch of a trial's passes."""
        return min(batch, self.trials_per_batch(batch) * max(self.requests, self.harmless))

    def most_rows(self, batch: int) -> int:
        """Rows of the largest batch that is run."""
        return max(self.trial_rows(batch), min(batch, self.training))

    @property
    def tried_tokens(self) -> int:
        """Tokens behind a prompt that a pass may have besides."""
        return max(surrogate.MAX_DRAFT_TOKENS, self.kl_tokens - 1)

    def tokens_kept(self, kind: int) -> int:
        """Tokens behind the shared ones, with what is tried, of all evaluation prompts of a kind (0 harmful, 1 harmless)."""
        count = (self.requests, self.harmless)[kind]
        more = (surrogate.MAX_DRAFT_TOKENS, self.kl_tokens - 1)[kind]
        return (self.extra_tokens[kind] if self.extra_tokens else count * self.tail) + count * more


def prompt_tokens(settings: Settings, longest: int) -> int:
    """Upper estimate of the tokens of a prompt of `longest` characters with system prompt, prefix and chat template."""
    characters = longest + len(settings.system_prompt) + len(settings.response_prefix)
    return characters // CHARACTERS_PER_TOKEN + TEMPLATE_TOKENS


def _encoded(settings: Settings, checkpoint: Checkpoint, prompts: PromptSets) -> list[list[list[int]]]:
    """Token ids of harmful_eval, harmless_eval, harmful_train, harmless_train. Raises UserError where there is no tokenizer."""
    from heretic.model.chat_format import ChatFormat
    from heretic.model.loading import load_tokenizer
    from heretic.model.template import read_template

    trusted = checkpoint.model in settings.trust_remote_code
    tokenizer = load_tokenizer(checkpoint, trusted, read_template(settings))
    prefix = "" if settings.response_prefix == "auto" else settings.response_prefix
    chat = ChatFormat(tokenizer, settings.system_prompt, prefix)
    sets = (prompts.harmful_eval, prompts.harmless_eval, prompts.harmful_train, prompts.harmless_train)
    return [chat.encode(role.prompts) for role in sets]


def _beginning(sequences: Sequence[list[int]]) -> list[int]:
    """The tokens that all of them begin with, where it is worth running them once."""
    from heretic.model.batching import WORTH_SHARING, shared_tokens

    shared = shared_tokens(sequences)
    return shared if len(shared) >= WORTH_SHARING else []
