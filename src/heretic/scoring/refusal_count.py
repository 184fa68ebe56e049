"""Counting the refusals of the trials that share a pass, each only as far as it can still matter.

First one pass over all requests tries, where the original declined, the text with which it did. That settles the requests
that are still declined in the same words, and gives the surrogate; only the others are decoded. A count only grows, so a
trial leaves as soon as a finished one has beaten the best that it could still reach. A judge of whole answers settles nothing
early: every answer is then decoded to its end, and judged with those of its batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from heretic.model.activation_cache import ActivationCache
from heretic.model.batching import Batch, Batcher, EditSpec, out_of_memory
from heretic.model.chat_format import ChatFormat
from heretic.model.decoding import DecodingState, Ended, StopCriteria, continue_decoding, decode, verify_draft
from heretic.model.loading import LanguageModel
from heretic.scoring.judges.verdict import ANSWER, REFUSAL, Exchange, Judge, Verdict
from heretic.scoring.refusal_proxy import FIRST_TOKENS, RefusalProxy

IsDominated = Callable[[int, float], bool]  # (trial among those of the pass, unanswered requests to expect at least)


@dataclass(frozen=True)
class EncodedRequests:
    """Harmful requests as token ids, and what the original said where it declined (`tried`; empty where it answered).

    `entries` are of each request with its tried text behind it; `texts` are the requests as texts, empty where the judge
    shall not see them.
    """

    prompts: Sequence[list[int]]
    drafts: Sequence[list[int]]
    entries: ActivationCache | None = None
    texts: Sequence[str] = ()

    @property
    def with_drafts(self) -> list[list[int]]:
        """Each request with its tried text behind it."""
        return [[*prompt, *text] for prompt, text in zip(self.prompts, self.drafts, strict=True)]


def expected_refusals(refusals: int, leaning: float | None) -> float:
    """Refusals and what the other answers lean to, in tenths of a request: finer differences decide nothing."""
    return round(refusals + (leaning or 0.0), 1)


@dataclass
class RefusalBounds:
    """What is known of one trial. By request: the verdict (None: not known yet); the mean probability of the tried tokens,
    whether they are all the most probable ones, and the joint probability of the first of them (None where nothing was tried)."""

    verdicts: list[Verdict | None]
    mean_token_prob: list[float | None]
    exact_match: list[bool | None]
    prefix_prob: list[float | None]
    beaten: bool = False

    @classmethod
    def unknown(cls, requests: int) -> RefusalBounds:
        """Before anything is measured."""
        return cls([None] * requests, [None] * requests, [None] * requests, [None] * requests)

    @property
    def at_least(self) -> int:
        """Requests found so far that are declined or evaded."""
        return sum(v is not None and v != ANSWER for v in self.verdicts)

    @property
    def refusal_mass(self) -> float | None:
        """Sum of the joint probabilities over the requests that are not found to be declined or evaded; None where nothing was
        tried."""
        if all(p is None for p in self.prefix_prob):
            return None
        return sum(p or 0.0 for p, v in zip(self.prefix_prob, self.verdicts, strict=True) if v is None or v == ANSWER)

    @property
    def expected_at_least(self) -> float:
        """Refusals to expect at least (`Scores.expected`); it only grows while more becomes known."""
        return expected_refusals(self.at_least, self.refusal_mass)

    @property
    def surrogate(self) -> RefusalProxy:
        """The cheap sign of refusing."""
        known = [p for p in self.mean_token_prob if p is not None]
        return RefusalProxy(
            sum(m is True for m in self.exact_match), sum(known) / len(known) if known else 0.0, len(known)
        )


@dataclass
class PrunedRefusalCounter:
    """One pass's worth of trials, attached to the model as `edited` says, on their way to their counts."""

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
        self.standings = [RefusalBounds.unknown(count) for _ in range(self.edited.trials)]
        self._counting = False  # while the surrogate is taken no trial is left
        self._may_go_on = True  # from a cache that has seen tried tokens; not so for recurrent states

    def run(self) -> list[RefusalBounds]:
        """Count for every trial until all is known of it or it is beaten."""
        begun = self._try_texts()
        self._counting = True
        for trial in range(self.edited.trials):
            self._prune_if_dominated(trial)
        if begun is not None:
            rows = len(begun[1])
            fitted = self._go_on(*begun)
            begun = None  # and with it the cache
            if not fitted:
                self.batcher.reduce_batch(rows)
        while pairs := self._undecided():
            self._decode(pairs)
        return self.standings

    def _go_on(self, answers: DecodingState, pairs: list[tuple[int, int]]) -> bool:
        """Decode on from what the first pass began; whether that fitted into memory. What did not is begun again."""
        open_pairs = set(self._undecided())
        answers.open_rows = {row for row, pair in enumerate(pairs) if pair in open_pairs}
        try:
            self._finish(answers, pairs)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            return False
        return True

    def _try_texts(self) -> tuple[DecodingState, list[tuple[int, int]]] | None:
        """The first pass. Returns what it began if that was a single batch, so that decoding goes on from its cache."""
        sequences = self.requests.with_drafts
        begun = []

        def step(batch: Batch) -> list[None]:
            pairs = batch.items
            answers = self._begin(batch, self._limits(pairs))
            for row, (trial, request) in enumerate(pairs):
                if found := answers.likely[row]:
                    self.standings[trial].mean_token_prob[request] = sum(found) / len(found)
                    self.standings[trial].exact_match[request] = answers.matching[row]
                    self.standings[trial].prefix_prob[request] = math.prod(found[:FIRST_TOKENS])
            self._set_verdicts(answers, pairs)
            self._may_go_on = answers.cache is not None
            if self._may_go_on and len(pairs) == len(sequences) * self.edited.trials:
                begun.append((answers, pairs))
            return [None] * len(pairs)

        self.batcher.run_items("Surrogate", sequences, step, edited=self.edited, entries=self.requests.entries)
        return begun[0] if begun else None

    def _begin(self, batch: Batch, limits: StopCriteria) -> DecodingState:
        return verify_draft(self.language_model.model, batch, [self.requests.drafts[i] for i in batch.rows], limits)

    def _undecided(self) -> list[tuple[int, int]]:
        """What is still to be decoded, (trial, request), the most likely refusals first: they end a trial soonest."""
        open_pairs = [
            (trial, request)
            for trial, summary in enumerate(self.standings)
            if not summary.beaten
            for request, verdict in enumerate(summary.verdicts)
            if verdict is None
        ]
        return sorted(open_pairs, key=lambda pair: -(self.standings[pair[0]].mean_token_prob[pair[1]] or 0.0))

    def _decode(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Decode the first of them, as many as go into one batch."""
        sequences = self.requests.with_drafts if self._may_go_on else self.requests.prompts
        count = len(sequences)

        def step(batch: Batch) -> list[None]:
            pairs = batch.items
            limits = self._limits(pairs)
            if self._may_go_on:
                self._finish(self._begin(batch, limits), pairs)
            else:
                ends = self.language_model.end_tokens
                tokens = decode(self.language_model.model, batch, self.max_tokens, ends, limits.ended)
                self._judge_rows(pairs, range(len(pairs)), tokens)
            return [None] * len(pairs)

        items = [trial * count + request for trial, request in pairs]
        items = items[: self.batcher.rows_at_once(sequences, items)]
        entries = self.requests.entries if self._may_go_on else None
        self.batcher.run_items("Refusals", sequences, step, edited=self.edited, entries=entries, items=items)

    def _finish(self, answers: DecodingState, pairs: list[tuple[int, int]]) -> None:
        continue_decoding(self.language_model.model, answers, self._limits(pairs))
        self._set_verdicts(answers, pairs)

    def _set_verdicts(self, answers: DecodingState, pairs: list[tuple[int, int]]) -> None:
        self._judge_rows(pairs, [row for row in range(len(pairs)) if row not in answers.open_rows], answers.tokens)

    def _judge_rows(self, pairs: list[tuple[int, int]], rows: Sequence[int], tokens: list[list[int]]) -> None:
        """Verdicts on the answers of these rows, which have ended; one that was cut off in a beaten trial gets none."""
        texts = self.requests.texts or [""] * len(self.requests.prompts)
        open_rows = [row for row in rows if self._undecided_pair(*pairs[row])]
        said = [Exchange(texts[pairs[row][1]], self.chat.text(tokens[row])) for row in open_rows]
        for row, verdict in zip(open_rows, self.judge.verdicts(said), strict=True):
            trial, request = pairs[row]
            if self._undecided_pair(trial, request):
                self.standings[trial].verdicts[request] = verdict
                self._prune_if_dominated(trial)

    def _undecided_pair(self, trial: int, request: int) -> bool:
        summary = self.standings[trial]
        return summary.verdicts[request] is None and not summary.beaten

    def _prune_if_dominated(self, trial: int) -> None:
        if self._counting:
            self.standings[trial].beaten = self.is_dominated(trial, self.standings[trial].expected_at_least)

    def _limits(self, pairs: list[tuple[int, int]]) -> StopCriteria:
        """An answer ends where it is certain to decline, since nothing later changes the verdict, or with its trial."""

        def ended(row: int, tokens: list[int]) -> bool:
            trial, request = pairs[row]
            summary = self.standings[trial]
            if summary.beaten:
                return True
            if not self.judge.ends_early or not self.judge.is_final_refusal(self.chat.text(tokens)):
                return False
            summary.verdicts[request] = REFUSAL
            self._prune_if_dominated(trial)
            return True

        ending: Ended = ended
        return StopCriteria(self.max_tokens, self.language_model.end_tokens, ending)


def refusal_mass_of(
    language_model: LanguageModel, requests: EncodedRequests, unanswered: Sequence[bool], batcher: Batcher
) -> float | None:
    """`Standing.leaning` of the model as it is, whose verdicts are known already; None where no texts were kept to try."""
    if not any(requests.drafts):
        return None

    def step(batch: Batch) -> list[float]:
        texts = [requests.drafts[i] for i in batch.rows]
        answers = verify_draft(language_model.model, batch, texts, StopCriteria(1, language_model.end_tokens))
        return [math.prod(found[:FIRST_TOKENS]) if found else 0.0 for found in answers.likely]

    joint = batcher.run("Surrogate", requests.with_drafts, step)
    return sum(p for p, d in zip(joint, unanswered, strict=True) if not d)
