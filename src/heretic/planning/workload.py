"""The workload of a run: numbers of prompts, tokens and trials per pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from heretic.ablation.geometries import GEOMETRIES
from heretic.ablation.geometries.conditional import BENIGN_KEYS
from heretic.errors import UserError
from heretic.scoring import refusal_proxy
from heretic.settings import Settings

if TYPE_CHECKING:
    from heretic.model.checkpoint import Checkpoint
    from heretic.prompts.sets import PromptSets
    from heretic.scoring.scorers.scorer import Scorer

MANY = 1 << 20  # prompts of a scorer's own: as many as fit into a batch
USUAL_PROMPT = 600  # characters, if the prompts cannot be read
CHARACTERS_PER_TOKEN = 3  # fewer than in English, so that the plan overestimates
TEMPLATE_TOKENS = 40
USUAL_TRAINING = 400  # prompts of each kind
MOST_TRIALS = 16  # automatic limit per pass, because trials in one pass are sampled without each other's results


@dataclass(frozen=True)
class GradientSearchWorkload:
    """The workload of the gradient search."""

    batch: int  # prompts of each kind per step
    prompts: int  # of each kind in total
    kl_tokens: int  # per harmless response
    refusal_tokens: int  # per refusal


@dataclass(frozen=True)
class Workload:
    """Lengths in tokens and numbers of prompts."""

    prompt_tokens: int  # of the longest prompt
    new_tokens: int  # generated per response
    shared_tokens: int = 0  # common prefix of all prompts, computed once
    requests: int = 100  # harmful evaluation prompts
    harmless: int = 100  # harmless evaluation prompts
    training: int = USUAL_TRAINING  # of each kind
    extra_tokens: tuple[int, int] | None = (
        None  # after the prefix, of all requests and all harmless prompts; None: unknown
    )
    kl_tokens: int = 1
    read_tokens: int = 1  # of an answer that both models read, for the KL divergence or another scorer
    directions: int = 1  # per layer and round
    rounds: int = 0  # iterative rounds after the first
    own_prompts: int = 0  # most prompts of a scorer's own, or of input maps
    every: int = 0  # prompts whose residuals are all kept in RAM
    trials: int = 0  # per pass; 0: automatic
    needs_weight_stats: bool = True  # of the geometry
    needs_input_maps: bool = False  # likewise
    readers: bool = False  # whether the modules that read the stream are edited
    gradient_search: GradientSearchWorkload | None = None

    @property
    def reads_inputs(self) -> bool:
        """Whether operators read the inputs of their modules."""
        return self.needs_input_maps or self.readers

    @classmethod
    def of(cls, settings: Settings, longest: int) -> Workload:
        """Estimate the workload from the settings and the length of the longest prompt in characters."""
        gradient, geometry = settings.search.gradient, GEOMETRIES[settings.ablation.geometry]
        gradient_path = GradientSearchWorkload(
            gradient.batch, gradient.prompts, gradient.kl_tokens, gradient.refusal_tokens
        )
        response = settings.max_response_length
        scorers = _scorers(settings)
        return cls(
            prompt_tokens=prompt_tokens(settings, longest),
            new_tokens=max([response, *(scorer.most_tokens(response) for scorer in scorers)]),
            kl_tokens=settings.kl_tokens,
            read_tokens=max([settings.kl_tokens, *(s.most_tokens(response) for s in scorers if s.needs_original)]),
            directions=settings.directions.count,
            rounds=settings.directions.iterative_rounds,
            own_prompts=max(MANY * any(s.has_own_prompts for s in scorers), BENIGN_KEYS * geometry.reads_inputs),
            every=2 * USUAL_TRAINING if settings.directions.keeps_each else 0,
            trials=1 if settings.apply == "weights" else settings.trials_per_batch,
            needs_weight_stats=geometry.needs == "weight_stats",
            needs_input_maps=geometry.reads_inputs,
            readers=settings.ablation.readers,
            gradient_search=None if settings.search.start == "kernels" else gradient_path,
        )

    def counted(self, settings: Settings, checkpoint: Checkpoint, prompts: PromptSets) -> Workload:
        """Return the workload with the real numbers of prompts and, if the tokenizer is available, their real lengths.

        Raises UserError for a chat template that is missing or fails.
        """
        training = [len(prompts.harmful_train), len(prompts.harmless_train)]
        counted = replace(
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
            return counted  # not downloaded yet, or loading will report it
        shared = len(_shared_prefix([*harmful, *harmless, *others[0], *others[1]])) if len(harmful) > 1 else 0
        lengths = [len(tokens) for role in (harmful, harmless, *others) for tokens in role]
        return replace(
            counted,
            prompt_tokens=max(lengths),
            shared_tokens=shared,
            extra_tokens=(sum(len(t) - shared for t in harmful), sum(len(t) - shared for t in harmless)),
        )

    @property
    def tail(self) -> int:
        """Tokens of the longest prompt after the shared prefix, at least one."""
        return max(1, self.prompt_tokens - self.shared_tokens)

    def trials_per_batch(self, batch: int) -> int:
        """Return the maximum number of trials per pass: from the settings, else as many as fit in a batch."""
        if self.trials:
            return self.trials
        count = 1
        while count < MOST_TRIALS and 2 * count * self.requests <= batch:
            count *= 2
        return count

    def trial_rows(self, batch: int) -> int:
        """Return the rows of a trial's passes."""
        return min(batch, self.trials_per_batch(batch) * self.most_prompts)

    @property
    def most_prompts(self) -> int:
        """Most prompts whose answers are decoded together."""
        return max(self.requests, self.harmless, self.own_prompts)

    @property
    def tried_tokens(self) -> int:
        """Maximum tokens that a pass adds to a prompt."""
        return max(refusal_proxy.MAX_DRAFT_TOKENS, self.kl_tokens - 1, self.read_tokens - 1)

    def tokens_kept(self, kind: int) -> int:
        """Return the cached tokens after the shared prefix of all evaluation prompts of a kind (0 harmful, 1 harmless)."""
        count = (self.requests, self.harmless)[kind]
        more = (refusal_proxy.MAX_DRAFT_TOKENS, self.kl_tokens - 1)[kind]
        return (self.extra_tokens[kind] if self.extra_tokens else count * self.tail) + count * more


def _scorers(settings: Settings) -> list[Scorer]:
    """Return the scorers that decode or read answers of their own; none if the settings name an invalid one."""
    from heretic.scoring.scorers.registry import choose_scorers

    try:
        chosen = choose_scorers(settings).scorers.values()
    except UserError:
        return []  # the preflight reports it
    return [scorer for scorer in chosen if not scorer.in_evaluator]


def prompt_tokens(settings: Settings, longest: int) -> int:
    """Return an upper estimate of the tokens of a prompt with `longest` characters, including the chat template."""
    characters = longest + len(settings.system_prompt) + len(settings.response_prefix)
    return characters // CHARACTERS_PER_TOKEN + TEMPLATE_TOKENS


def _encoded(settings: Settings, checkpoint: Checkpoint, prompts: PromptSets) -> list[list[list[int]]]:
    """Return the token ids of harmful_eval, harmless_eval, harmful_train and harmless_train.

    Raises UserError if there is no tokenizer, or a prompt exceeds the model's context.
    """
    from heretic.model.chat_format import ChatFormat, answer_tokens, check_different, check_length
    from heretic.model.loading import context_of, load_tokenizer
    from heretic.model.template import read_template

    trusted = checkpoint.model in settings.trust_remote_code
    tokenizer = load_tokenizer(checkpoint, trusted, read_template(settings))
    prefix = "" if settings.response_prefix == "auto" else settings.response_prefix
    chat = ChatFormat.of(tokenizer, settings).answering(prefix)
    sets = (prompts.harmful_eval, prompts.harmless_eval, prompts.harmful_train, prompts.harmless_train)
    encoded = [chat.encode(role.prompts) for role in sets]
    for role, tokens in zip(sets, encoded, strict=True):
        check_different(role.role, tokens)
        check_length(role.role, tokens, context_of(checkpoint.config), answer_tokens(role.role, settings))
    return encoded


def _shared_prefix(sequences: Sequence[list[int]]) -> list[int]:
    """Return the common prefix of all sequences, empty if it is too short to be worth sharing."""
    from heretic.model.batching import WORTH_SHARING, shared_tokens

    shared = shared_tokens(sequences)
    return shared if len(shared) >= WORTH_SHARING else []
