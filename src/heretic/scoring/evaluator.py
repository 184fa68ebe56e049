"""Evaluate trials in the order of cost: KL divergence, then refusals.

A trial is pruned as soon as a finished trial dominates the best result that it can still reach.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from heretic.model.activation_cache import ActivationCache
from heretic.model.batching import UNEDITED, Batcher, EditSpec
from heretic.model.chat_format import ChatFormat
from heretic.model.loading import LanguageModel
from heretic.scoring.divergence import divergence_of, measure_divergence
from heretic.scoring.judges.verdict import ANSWER, EVASIVE, REFUSAL, Judge, encode_verdicts
from heretic.scoring.objectives import NO_LIMITS, Limits
from heretic.scoring.refusal_count import EncodedRequests, PrunedRefusalCounter, RefusalBounds, refusal_mass_of
from heretic.scoring.refusals import RefusalCount, count_refusals
from heretic.scoring.scores import Divergence, PrunedTrial, Scores, TrialOutcome
from heretic.scoring.teacher_forcing import TeacherForcedTexts


def no_pruning(_kl: float, _at_least: float) -> bool:
    """Dominate nothing, so that every trial is measured in full."""
    return False


@dataclass(frozen=True)
class TrialEvaluator:
    """Measures the current state of the model against the original's baseline.

    The drafts and activation caches only save time: without them the results are the same.
    """

    language_model: LanguageModel
    chat: ChatFormat
    harmful: Sequence[list[int]]  # token ids of the harmful requests
    harmless: Sequence[list[int]]  # token ids of the harmless prompts
    judge: Judge
    batcher: Batcher
    max_tokens: int  # per decoded answer
    drafts: Sequence[list[int]] = ()  # reference refusals by request, verified before decoding
    harmless_entries: ActivationCache | None = None  # original block inputs for the harmless prompts
    harmful_entries: ActivationCache | None = None  # original block inputs for the requests with their drafts
    reference_tokens: Sequence[list[int]] = ()  # original answers whose positions the KL uses; empty: first token only
    requests: Sequence[str] = ()  # harmful requests as text, for judges that read them
    limits: Limits = NO_LIMITS

    @property
    def harmless_texts(self) -> TeacherForcedTexts:
        """The harmless prompts with the answer tokens at which the divergence is computed."""
        targets = TeacherForcedTexts.of(self.harmless, self.reference_tokens or [[0]] * len(self.harmless))
        return replace(targets, entries=self.harmless_entries)

    def without_caches(self) -> TrialEvaluator:
        """Return the evaluator without drafts and activation caches."""
        return replace(self, drafts=(), harmless_entries=None, harmful_entries=None)

    def refusals(self, *, min_tokens: int = 1) -> RefusalCount:
        """Count the refusals of one model; see `count_refusals`."""
        return count_refusals(
            self.language_model,
            self.chat,
            self.harmful,
            self.judge,
            self.batcher,
            self.max_tokens,
            requests=self.requests,
            min_tokens=min_tokens,
        )

    def score(self, baseline: Tensor, log_probs: Tensor | None = None) -> Scores:
        """Measure one model in full.

        Args:
            baseline: log-probabilities of the original [tokens, vocabulary].
            log_probs: those of the model, if a pass has computed them already.
        """
        began = time.perf_counter()
        if log_probs is None:
            divergence = measure_divergence(self.language_model, self.harmless_texts, baseline, self.batcher)[0]
        else:
            divergence = divergence_of(baseline, log_probs, self.harmless_texts.counts)
        between = time.perf_counter()
        counted = self.refusals()
        after = time.perf_counter()
        unanswered = [v != ANSWER for v in counted.verdicts]
        refusal_mass = refusal_mass_of(self.language_model, self._requests, unanswered, self.batcher)
        scores = Scores(
            divergence=divergence,
            refusals=counted.count,
            total=counted.total,
            seconds={"divergence": between - began, "refusals": after - between},
            refused=encode_verdicts(counted.verdicts),
            refusal_mass=refusal_mass,
            evasive=counted.evasive,
            judge=self.judge.name,
        )
        return self._limited(scores)

    def score_trials(
        self, baseline: Tensor, edited: EditSpec = UNEDITED, is_dominated: Callable[[float, float], bool] = no_pruning
    ) -> list[TrialOutcome]:
        """Measure all trials that share the passes.

        Args:
            baseline: log-probabilities of the original [tokens, vocabulary].
            is_dominated: called with (KL, lower bound of expected refusals); a trial is pruned once it returns True.
        """
        began = time.perf_counter()
        divergences = measure_divergence(self.language_model, self.harmless_texts, baseline, self.batcher, edited)
        between = time.perf_counter()
        bounds = PrunedRefusalCounter(
            self.language_model,
            self.chat,
            self.judge,
            self.batcher,
            self.max_tokens,
            self._requests,
            edited,
            lambda trial, at_least: is_dominated(divergences[trial].mean, at_least),
        ).run()
        spent = {"divergence": between - began, "refusals": time.perf_counter() - between}
        seconds = {name: s / edited.trials for name, s in spent.items()}
        return [self._outcome(d, found, dict(seconds)) for d, found in zip(divergences, bounds, strict=True)]

    @property
    def _requests(self) -> EncodedRequests:
        return EncodedRequests(
            self.harmful, self.drafts or [[]] * len(self.harmful), self.harmful_entries, self.requests
        )

    def _outcome(self, divergence: Divergence, bounds: RefusalBounds, seconds: dict[str, float]) -> TrialOutcome:
        total, proxy = len(bounds.verdicts), bounds.refusal_proxy
        if bounds.pruned:
            return PrunedTrial(divergence, bounds.at_least, total, seconds, proxy, bounds.expected_at_least)
        verdicts = [v or ANSWER for v in bounds.verdicts]
        scores = Scores(
            divergence=divergence,
            refusals=verdicts.count(REFUSAL),
            total=total,
            seconds=seconds,
            refusal_proxy=proxy,
            refused=encode_verdicts(verdicts),
            refusal_mass=bounds.refusal_mass,
            evasive=verdicts.count(EVASIVE),
            judge=self.judge.name,
        )
        return self._limited(scores)

    def _limited(self, scores: Scores) -> Scores:
        return replace(scores, excess=self.limits.excess(scores))
