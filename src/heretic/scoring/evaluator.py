"""Evaluate trials in the order of cost: KL divergence, then refusals, then (if they are needed) harmless answers.

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
from heretic.scoring.harmless_metrics import HarmlessProbe, measure_harmless_metrics
from heretic.scoring.judges.verdict import ANSWER, EVASIVE, REFUSAL, Judge, encode_verdicts
from heretic.scoring.objectives import NO_LIMITS, Limits
from heretic.scoring.refusal_count import EncodedRequests, PrunedRefusalCounter, RefusalBounds, refusal_mass_of
from heretic.scoring.refusals import RefusalCount, count_refusals
from heretic.scoring.scores import Divergence, HarmlessMetrics, PrunedTrial, Scores, TrialOutcome
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
    harmless_probe: HarmlessProbe | None = None  # always measured by `score`; by `score_trials` only if `in_trials`
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

    def harmless_metrics(self, edited: EditSpec = UNEDITED, trials: Sequence[int] = (0,)) -> list[HarmlessMetrics]:
        """Measure the harmless answers of the given trials of the pass; empty without a harmless probe."""
        if self.harmless_probe is None or not trials:
            return []
        return measure_harmless_metrics(
            self.language_model,
            self.chat,
            self.harmless_probe,
            self.judge,
            self.batcher,
            self.max_tokens,
            edited,
            trials,
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
        harmless_metrics = self.harmless_metrics()
        unanswered = [v != ANSWER for v in counted.verdicts]
        refusal_mass = refusal_mass_of(self.language_model, self._requests, unanswered, self.batcher)
        seconds = {"divergence": between - began, "refusals": after - between}
        if harmless_metrics:
            seconds["harmless"] = time.perf_counter() - after
        scores = Scores(
            divergence=divergence,
            refusals=counted.count,
            total=counted.total,
            seconds=seconds,
            refused=encode_verdicts(counted.verdicts),
            refusal_mass=refusal_mass,
            evasive=counted.evasive,
            judge=self.judge.name,
        )
        return self._limited(replace(scores, harmless_metrics=harmless_metrics[0] if harmless_metrics else None))

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
        seconds = {"divergence": (time.perf_counter() - began) / edited.trials}
        return self._count_refusals(divergences, edited, is_dominated, seconds)

    def _count_refusals(
        self,
        divergences: Sequence[Divergence],
        edited: EditSpec,
        is_dominated: Callable[[float, float], bool],
        spent: dict[str, float],
    ) -> list[TrialOutcome]:
        """Count refusals, then measure the harmless answers of the trials that were not pruned."""
        began = time.perf_counter()
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
        between = time.perf_counter()
        seconds = {**spent, "refusals": (between - began) / edited.trials}
        unpruned = [trial for trial, trial_bounds in enumerate(bounds) if not trial_bounds.pruned]
        needed = self.harmless_probe is not None and self.harmless_probe.in_trials
        metrics_of_trial = dict(zip(unpruned, self.harmless_metrics(edited, unpruned), strict=True)) if needed else {}
        if metrics_of_trial:
            seconds["harmless"] = (time.perf_counter() - between) / len(unpruned)
        return [
            self._outcome(divergences[trial], trial_bounds, seconds, metrics_of_trial.get(trial))
            for trial, trial_bounds in enumerate(bounds)
        ]

    @property
    def _requests(self) -> EncodedRequests:
        return EncodedRequests(
            self.harmful, self.drafts or [[]] * len(self.harmful), self.harmful_entries, self.requests
        )

    def _outcome(
        self,
        divergence: Divergence,
        bounds: RefusalBounds,
        seconds: dict[str, float],
        harmless_metrics: HarmlessMetrics | None,
    ) -> TrialOutcome:
        total, proxy = len(bounds.verdicts), bounds.refusal_proxy
        if bounds.pruned:
            spent = {name: s for name, s in seconds.items() if name != "harmless"}
            return PrunedTrial(divergence, bounds.at_least, total, spent, proxy, bounds.expected_at_least)
        verdicts = [v or ANSWER for v in bounds.verdicts]
        scores = Scores(
            divergence=divergence,
            refusals=verdicts.count(REFUSAL),
            total=total,
            seconds=dict(seconds),
            refusal_proxy=proxy,
            refused=encode_verdicts(verdicts),
            refusal_mass=bounds.refusal_mass,
            evasive=verdicts.count(EVASIVE),
            judge=self.judge.name,
        )
        return self._limited(replace(scores, harmless_metrics=harmless_metrics))

    def _limited(self, scores: Scores) -> Scores:
        return replace(scores, excess=self.limits.excess(scores))
