"""Count the refusals of all trials in a pass, and prune a trial once its count is dominated.

1. One pass verifies the reference refusals as drafts: it decides the requests still refused in the same words, and
gives the proxy. 2. The other answers are decoded; a count only grows, so a trial stops once it is dominated.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from heretic.model.activation_cache import ActivationCache
from heretic.model.batching import Batch, Batcher, EditSpec, out_of_memory
from heretic.model.chat_format import ChatFormat
from heretic.model.decoding import DecodingState, Ended, StopCriteria, continue_decoding, decode, verify_draft
from heretic.model.loading import LanguageModel
from heretic.model.turns import Turns, take_turns
from heretic.scoring.judges.verdict import ANSWER, REFUSAL, Exchange, Judge, Verdict
from heretic.scoring.refusal_proxy import FIRST_TOKENS
from heretic.scoring.scores import RefusalProxy, expected_refusals

FirstPass = tuple[DecodingState, list[tuple[int, int]]]  # state after the drafts, and (trial, request) of its rows
IsDominated = Callable[[int, float], bool]  # (index of the trial in the pass, lower bound of its expected refusals)


@dataclass(frozen=True)
class EncodedRequests:
    """Harmful requests and the drafts of their refusals, as token ids."""

    prompts: Sequence[list[int]]
    drafts: Sequence[list[int]]  # first tokens of the original's refusal; empty where it answered
    entries: ActivationCache | None = None  # block inputs of the original for the requests with their drafts
    texts: Sequence[str] = ()  # the requests as text; empty if the judge does not read them

    @property
    def with_drafts(self) -> list[list[int]]:
        """Each request followed by its draft."""
        return [[*prompt, *text] for prompt, text in zip(self.prompts, self.drafts, strict=True)]


@dataclass
class RefusalBounds:
    """Measurements of one trial so far, by request; None: not known yet, or no draft."""

    verdicts: list[Verdict | None]
    mean_token_prob: list[float | None]  # of the draft's tokens
    exact_match: list[bool | None]  # whether greedy decoding reproduces the draft
    prefix_prob: list[float | None]  # joint probability of the draft's first tokens
    pruned: bool = False

    @classmethod
    def unknown(cls, requests: int) -> RefusalBounds:
        """Create the bounds of a trial of which nothing is measured yet."""
        return cls([None] * requests, [None] * requests, [None] * requests, [None] * requests)

    @property
    def at_least(self) -> int:
        """Number of requests known to be refused or evaded."""
        return sum(v is not None and v != ANSWER for v in self.verdicts)

    @property
    def refusal_mass(self) -> float | None:
        """Sum of the prefix probabilities over the requests not known to be unanswered; None without any draft."""
        if all(p is None for p in self.prefix_prob):
            return None
        return sum(p or 0.0 for p, v in zip(self.prefix_prob, self.verdicts, strict=True) if v is None or v == ANSWER)

    @property
    def expected_at_least(self) -> float:
        """Lower bound of `Scores.expected`; it never decreases."""
        return expected_refusals(self.at_least, self.refusal_mass)

    @property
    def refusal_proxy(self) -> RefusalProxy:
        """The refusal proxy of this trial."""
        known = [p for p in self.mean_token_prob if p is not None]
        return RefusalProxy(
            sum(m is True for m in self.exact_match), sum(known) / len(known) if known else 0.0, len(known)
        )


@dataclass
class PrunedRefusalCounter:
    """Counts the refusals of the trials that are applied to the model together."""

    language_model: LanguageModel
    chat: ChatFormat
    judge: Judge
    batcher: Batcher
    max_tokens: int
    requests: EncodedRequests
    edited: EditSpec
    is_dominated: IsDominated

    def __post_init__(self) -> None:
        count = len(self.requests.prompts)
        self.bounds = [RefusalBounds.unknown(count) for _ in range(self.edited.trials)]
        self._counting = False  # False while drafts are verified: no trial is pruned before its proxy is complete
        self._can_resume = True  # whether the cache can drop rejected draft tokens; recurrent states cannot

    def run(self) -> list[RefusalBounds]:
        """Count every trial until all its verdicts are known or it is pruned."""
        first_passes = self._verify_drafts()
        self._counting = True
        for trial in range(self.edited.trials):
            self._prune_if_dominated(trial)
        if first_passes:
            rows = sum(len(pairs) for _, pairs in first_passes)
            completed = self._resume(first_passes)
            first_passes.clear()  # frees the caches
            if not completed:
                self.batcher.reduce_batch(rows)
        while pairs := self._undecided_pairs():
            self._decode(pairs)
        return self.bounds

    def _resume(self, first_passes: Sequence[FirstPass]) -> bool:
        """Continue decoding from the first passes; False if memory ran out, then the open requests start over."""
        open_pairs = set(self._undecided_pairs())
        for answers, pairs in first_passes:
            answers.open_rows = {row for row, pair in enumerate(pairs) if pair in open_pairs}
        try:
            deque(take_turns(((None, self._continue(*each)) for each in first_passes), len(first_passes)), maxlen=0)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            return False
        return True

    def _verify_drafts(self) -> list[FirstPass]:
        """Verify all drafts; returns the passes' states if all are under way together, so that decoding can reuse their caches."""
        sequences = self.requests.with_drafts
        items = self.batcher.longest_first(sequences, self.edited)
        first_passes: list[FirstPass] = []

        def step(batch: Batch) -> Turns[list[None]]:
            together = self.batcher.rows_at_once(sequences, items) == len(items)
            if not together:  # perhaps since memory ran out: make room before this try
                first_passes.clear()
            pairs = batch.items
            answers = yield from self._verify_batch(batch, self._stop_criteria(pairs))
            for row, (trial, request) in enumerate(pairs):
                if probs := answers.likely[row]:
                    self.bounds[trial].mean_token_prob[request] = sum(probs) / len(probs)
                    self.bounds[trial].exact_match[request] = answers.matching[row]
                    self.bounds[trial].prefix_prob[request] = math.prod(probs[:FIRST_TOKENS])
            self._set_verdicts(answers, pairs)
            # A recurrent model's batch without drafts keeps its cache; that of another batch does not.
            self._can_resume = self._can_resume and answers.cache is not None
            if self._can_resume and together:
                first_passes.append((answers, pairs))
            else:
                first_passes.clear()
            return [None] * len(pairs)

        self.batcher.run_items(
            "Refusal proxy",
            sequences,
            step,
            edited=self.edited,
            entries=self.requests.entries,
            items=items,
            decoding=True,
        )
        return first_passes

    def _verify_batch(self, batch: Batch, limits: StopCriteria) -> Turns[DecodingState]:
        return verify_draft(self.language_model.model, batch, [self.requests.drafts[i] for i in batch.rows], limits)

    def _undecided_pairs(self) -> list[tuple[int, int]]:
        """Return the open (trial, request) pairs, most likely refusals first: they prune a trial soonest."""
        open_pairs = [
            (trial, request)
            for trial, trial_bounds in enumerate(self.bounds)
            if not trial_bounds.pruned
            for request, verdict in enumerate(trial_bounds.verdicts)
            if verdict is None
        ]
        return sorted(open_pairs, key=lambda pair: -(self.bounds[pair[0]].mean_token_prob[pair[1]] or 0.0))

    def _decode(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Decode as many of the first pairs as may be under way."""
        sequences = self.requests.with_drafts if self._can_resume else self.requests.prompts
        count = len(sequences)

        def step(batch: Batch) -> Turns[list[None]]:
            pairs = batch.items
            limits = self._stop_criteria(pairs)
            if self._can_resume:
                answers = yield from self._verify_batch(batch, limits)
                yield from self._continue(answers, pairs)
            else:
                ends = self.language_model.end_tokens
                tokens = yield from decode(self.language_model.model, batch, self.max_tokens, ends, limits.ended)
                self._judge_rows(pairs, range(len(pairs)), tokens)
            return [None] * len(pairs)

        items = [trial * count + request for trial, request in pairs]
        items = items[: self.batcher.rows_at_once(sequences, items)]
        entries = self.requests.entries if self._can_resume else None
        self.batcher.run_items(
            "Refusals", sequences, step, edited=self.edited, entries=entries, items=items, decoding=True
        )

    def _continue(self, answers: DecodingState, pairs: list[tuple[int, int]]) -> Turns[None]:
        model = self.language_model
        yield from continue_decoding(model.model, answers, self._stop_criteria(pairs), model.graphs)
        self._set_verdicts(answers, pairs)

    def _set_verdicts(self, answers: DecodingState, pairs: list[tuple[int, int]]) -> None:
        self._judge_rows(pairs, [row for row in range(len(pairs)) if row not in answers.open_rows], answers.tokens)

    def _judge_rows(self, pairs: list[tuple[int, int]], rows: Sequence[int], tokens: list[list[int]]) -> None:
        """Judge the finished answers of these rows; answers cut off by pruning get no verdict."""
        texts = self.requests.texts or [""] * len(self.requests.prompts)
        open_rows = [row for row in rows if self._is_undecided(*pairs[row])]
        exchanges = [Exchange(texts[pairs[row][1]], self.chat.text(tokens[row])) for row in open_rows]
        for row, verdict in zip(open_rows, self.judge.verdicts(exchanges), strict=True):
            trial, request = pairs[row]
            if self._is_undecided(trial, request):
                self.bounds[trial].verdicts[request] = verdict
                self._prune_if_dominated(trial)

    def _is_undecided(self, trial: int, request: int) -> bool:
        trial_bounds = self.bounds[trial]
        return trial_bounds.verdicts[request] is None and not trial_bounds.pruned

    def _prune_if_dominated(self, trial: int) -> None:
        if self._counting:
            self.bounds[trial].pruned = self.is_dominated(trial, self.bounds[trial].expected_at_least)

    def _stop_criteria(self, pairs: list[tuple[int, int]]) -> StopCriteria:
        """Stop an answer once its refusal is certain or its trial is pruned."""

        def ended(row: int, tokens: list[int]) -> bool:
            trial, request = pairs[row]
            trial_bounds = self.bounds[trial]
            if trial_bounds.pruned:
                return True
            if not self.judge.ends_early or not self.judge.is_final_refusal(self.chat.text(tokens)):
                return False
            trial_bounds.verdicts[request] = REFUSAL
            self._prune_if_dominated(trial)
            return True

        ending: Ended = ended
        return StopCriteria(self.max_tokens, self.language_model.end_tokens, ending)


def refusal_mass_of(
    language_model: LanguageModel, requests: EncodedRequests, unanswered: Sequence[bool], batcher: Batcher
) -> float | None:
    """Compute `RefusalBounds.refusal_mass` of a model whose verdicts are known; None without any draft."""
    if not any(requests.drafts):
        return None

    def step(batch: Batch) -> Turns[list[float]]:
        texts = [requests.drafts[i] for i in batch.rows]
        answers = yield from verify_draft(
            language_model.model, batch, texts, StopCriteria(1, language_model.end_tokens)
        )
        return [math.prod(probs[:FIRST_TOKENS]) if probs else 0.0 for probs in answers.likely]

    joint = batcher.run("Refusal proxy", requests.with_drafts, step)
    return sum(p for p, d in zip(joint, unanswered, strict=True) if not d)
