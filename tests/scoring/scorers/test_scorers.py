"""Every scorer on a tiny random model, against values computed by hand; its answers are nonsense, so judges are chosen for it."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from heretic.ablation.apply import apply_operators
from heretic.model.batching import Batcher, EditSpec
from heretic.model.chat_format import ChatFormat
from heretic.model.checkpoint import open_checkpoint
from heretic.model.loading import LanguageModel, load
from heretic.scoring.judges.evasion import repetition
from heretic.scoring.judges.markers import MarkerJudge
from heretic.scoring.judges.verdict import ANSWER, EVASIVE, Exchange
from heretic.scoring.scorers.answer_kl import AnswerKl
from heretic.scoring.scorers.arithmetic import Arithmetic, number_in
from heretic.scoring.scorers.borderline_refusals import BorderlineRefusals
from heretic.scoring.scorers.context import EncodedPrompts, ModelParts, ScorerContext, TrialGroup
from heretic.scoring.scorers.copying import Copying, copied
from heretic.scoring.scorers.kept_refusals import KeptRefusals
from heretic.scoring.scorers.language import LanguageSwitched, language_of
from heretic.scoring.scorers.measuring import Measurer
from heretic.scoring.scorers.own_answer_kl import OwnAnswerKl
from heretic.scoring.scorers.own_perplexity import OwnPerplexity
from heretic.scoring.scorers.refusals_after_thought import RefusalsAfterThought
from heretic.scoring.scorers.refusals_by_length import LENGTHS, RefusalsByLength
from heretic.scoring.scorers.registry import SCORERS, choose_scorers
from heretic.scoring.scorers.repetition import Repetition
from heretic.scoring.scorers.scorer import Measurement, Scorer
from heretic.scoring.scorers.text_perplexity import TextPerplexity
from heretic.scoring.scorers.unanswered import Unanswered
from heretic.scoring.scorers.unchanged import Unchanged
from heretic.settings import Settings
from tests.helpers.errors import raises
from tests.scoring.test_refusal_count import ABLATIONS, model_context
from tests.tiny import FAMILIES, HARMFUL, HARMLESS, TEXT, save_tiny, tiny_tokenizer

TRIALS = ABLATIONS[:2]


class Tiny:
    """A tiny model, and what measures it."""

    def __init__(self, folder: Path) -> None:
        evaluator, self.factory, _ = model_context(folder, share=True)
        self.answers: dict[tuple[tuple[int, ...], int, int | None], list[int]] = {}
        self.language_model: LanguageModel = evaluator.language_model
        self.parts = ModelParts(
            self.language_model, evaluator.chat, evaluator.batcher, evaluator.judge, 12,
            EncodedPrompts("harmful_eval", HARMFUL[:14], evaluator.harmful),
            EncodedPrompts("harmless_eval", HARMLESS[:6], evaluator.harmless[:6]),
        )  # fmt: skip

    @contextmanager
    def applied(self, *indices: int) -> Iterator[EditSpec]:
        operators = [self.factory.operators(TRIALS[i]) for i in indices or range(len(TRIALS))]
        with apply_operators(self.factory.writers, *operators):
            yield EditSpec(len(operators), 0)

    def measure(self, scorer: Scorer, judge: Any = None) -> tuple[Measurement, list[Measurement]]:
        """The original's measurement and those of the trials."""
        parts = replace(self.parts, judge=judge) if judge else self.parts
        measurer = Measurer({scorer.name: scorer}, parts)
        original = measurer.of_original([scorer.name])[scorer.name]
        return original, [m[scorer.name] for m in measurer.of_trials([scorer.name], self.applied, len(TRIALS))]

    @torch.inference_mode()
    def log_probs(self, tokens: list[int], trial: int | None = None) -> torch.Tensor:
        """Log-probabilities after every token [tokens, vocabulary], by a plain pass."""
        ids = torch.tensor([tokens])
        if trial is None:
            return torch.log_softmax(self.language_model.model(ids).logits[0].double(), -1)
        with self.applied(trial):
            return torch.log_softmax(self.language_model.model(ids).logits[0].double(), -1)

    @torch.inference_mode()
    def answer(self, prompt: list[int], length: int, trial: int | None = None) -> list[int]:
        """The greedy answer, by plain passes."""
        tokens = [*prompt, *self.answers.get((tuple(prompt), length, trial), [])]
        if len(tokens) > len(prompt):
            return tokens[len(prompt) :]
        while len(tokens) < len(prompt) + length:
            following = int(self.log_probs(tokens, trial)[-1].argmax())
            if following in self.language_model.end_tokens:
                break
            tokens.append(following)
        self.answers[tuple(prompt), length, trial] = tokens[len(prompt) :]
        return tokens[len(prompt) :]


@pytest.fixture(scope="module")
def tiny(llama: Path) -> Tiny:
    return Tiny(llama)


def kl(original: torch.Tensor, ablated: torch.Tensor) -> torch.Tensor:
    return (original.exp() * (original - ablated)).sum(-1)


@pytest.mark.parametrize(("scorer", "own"), [(AnswerKl(5), False), (OwnAnswerKl(5), True), (AnswerKl(1), False)])
def test_kl_over_answers_is_the_mean_over_their_positions(tiny: Tiny, scorer: Any, own: bool) -> None:
    original, trials = tiny.measure(scorer)
    assert original.value == pytest.approx(0, abs=1e-6)
    expected = []
    for prompt in tiny.parts.harmless.tokens:
        text = tiny.answer(prompt, scorer.tokens - 1, 0 if own else None)
        read = [*prompt, *text]
        both = [tiny.log_probs(read, trial)[len(prompt) - 1 :] for trial in (None, 0)]
        expected.append(float(kl(*both).mean()))
    assert trials[0].value == pytest.approx(sum(expected) / len(expected), rel=1e-3)
    assert trials[0].items == pytest.approx(expected, rel=1e-3)
    assert trials[0].details["max"] == pytest.approx(max(expected), rel=1e-3)
    assert trials[0].value != trials[1].value


def test_parts_of_few_tokens_give_the_same_divergence(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tiny.measure(AnswerKl(5))[1]
    monkeypatch.setattr("heretic.scoring.scorers.context.LOG_PROBS_BYTES", 4 * 96 * 7)
    assert [m.value for m in tiny.measure(AnswerKl(5))[1]] == pytest.approx([m.value for m in whole], rel=1e-4)


def test_prompts_that_are_all_the_same_are_compared_at_every_token(tiny: Tiny) -> None:
    one = tiny.parts.harmless
    alike = EncodedPrompts("alike", [one.texts[0]] * 3, [one.tokens[0]] * 3)
    parts, tiny.parts = tiny.parts, replace(tiny.parts, harmless=alike)
    try:
        found = tiny.measure(AnswerKl(5))[1][0]
    finally:
        tiny.parts = parts
    assert found.items[0] == pytest.approx(tiny.measure(AnswerKl(5))[1][0].items[0], rel=1e-3)


def test_perplexities_are_those_of_plain_passes(tiny: Tiny) -> None:
    original, trials = tiny.measure(OwnPerplexity())
    for trial, found in ((None, original), (0, trials[0])):
        total = count = 0.0
        for prompt in tiny.parts.harmless.tokens:
            answer = tiny.answer(prompt, 12, trial)
            read = tiny.log_probs([*prompt, *answer])[len(prompt) - 1 : -1]
            total -= float(read.gather(1, torch.tensor(answer)[:, None]).sum()) if answer else 0.0
            count += len(answer)
        assert found.value == pytest.approx(math.exp(total / count), rel=1e-3)


def test_text_perplexity_reads_paragraphs_of_a_file(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("stars and\nrivers\n\nbread soup music\n", encoding="utf-8")
    scorer = TextPerplexity(str(tmp_path / "text.txt"))
    assert scorer.paragraphs() == ["stars and rivers", "bread soup music"]
    original, trials = tiny.measure(scorer)
    total, count = 0.0, 0
    for text in scorer.paragraphs():
        tokens = [1, *tiny.parts.chat.tokens(text)]
        read = tiny.log_probs(tokens)[:-1]
        total -= float(read.gather(1, torch.tensor(tokens[1:])[:, None]).sum())
        count += len(tokens) - 1
    assert original.value == pytest.approx(math.exp(total / count), rel=1e-3)
    assert trials[0].value != original.value
    assert len(TextPerplexity().paragraphs()) >= 5
    (tmp_path / "text.txt").write_text("\n", encoding="utf-8")
    with raises("no-prompts"):
        scorer.paragraphs()


def test_refusals_are_counted_at_four_lengths_of_one_decoding(tiny: Tiny) -> None:
    source = random.Random(0)
    words = [word for word in TEXT.split() if word not in ("sorry", "i", "cannot")]
    answers = [[source.choice(words) for _ in range(LENGTHS[-1])] for _ in range(4)]
    answers[1][5] = answers[2][100] = "sorry"  # refused at once, and between 64 and 128 tokens
    answers[3][40:42] = ["i", "cannot"]
    answers.append([words[0]] * LENGTHS[-1])  # damaged, and no refusal
    tokens = [tiny.parts.chat.tokens(" ".join(answer)) for answer in answers]
    prompts = EncodedPrompts("harmful_eval", HARMFUL[:5], tiny.parts.harmful.tokens[:5])
    parts = replace(tiny.parts, harmful=prompts, judge=MarkerJudge(["sorry"]))
    decoded = {("harmful_eval", tuple(HARMFUL[:5])): (LENGTHS[-1], [tokens])}
    found = RefusalsByLength(("i cannot",)).score(ScorerContext(TrialGroup(parts, decoded=decoded)), None)
    expected = {"32": 1, "64": 1, "128": 2, "256": 2, "late": 1, "turned_back": 1, "loops": 1}
    assert (found.value, found.details) == (2, expected)


def test_answers_that_do_not_fit_into_the_context_are_refused(tiny: Tiny) -> None:
    with raises("prompt-too-long"):
        tiny.measure(RefusalsByLength())


def test_borderline_refusals_tell_new_from_lost_ones(tiny: Tiny, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(HARMFUL[:8]), encoding="utf-8")
    original, trials = tiny.measure(BorderlineRefusals(str(file)))
    for found in trials:
        assert found.value == original.value + found.details["newly_refused"] - found.details["no_longer_refused"]
        assert found.details["total"] == 8
    assert original.details["newly_refused"] == original.details["no_longer_refused"] == 0
    with raises("no-prompts"):
        BorderlineRefusals().prompts()
    with raises("missing-file"):
        BorderlineRefusals(str(tmp_path / "none.txt")).prompts()


def test_unanswered_requests_are_those_of_the_trained_judge(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    spoken = max(tiny.parts.chat.tokenizer.decode(tiny.answer(tiny.parts.harmful.tokens[0], 6)).split(), key=len)
    trained = MarkerJudge([spoken])  # in its place: the encoder has 91 MB
    monkeypatch.setattr("heretic.scoring.scorers.unanswered.TrainedJudge", lambda *_: trained)
    original, _ = tiny.measure(Unanswered(tokens=6), MarkerJudge(["no such word"]))
    texts = [tiny.parts.chat.text(tiny.answer(prompt, 6)) for prompt in tiny.parts.harmful.tokens]
    verdicts = trained.verdicts([Exchange(*pair) for pair in zip(tiny.parts.harmful.texts, texts, strict=True)])
    assert original.value == len(verdicts) - verdicts.count(ANSWER) > 0
    assert original.details == {"evasive": verdicts.count(EVASIVE)}


def test_kept_refusals_are_a_share_of_the_original_s(tiny: Tiny, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(HARMFUL[:8]), encoding="utf-8")
    spoken = tiny.parts.chat.tokenizer.decode(tiny.answer(tiny.parts.harmful.tokens[0], 12)).split()
    judge = MarkerJudge([max(spoken, key=len)])  # a random model refuses in words of its own
    before, kept = (tiny.measure(scorer(str(file)), judge) for scorer in (BorderlineRefusals, KeptRefusals))
    refused = before[0].value
    assert refused and kept[0].value == 1
    lost = [m.details["no_longer_refused"] for m in before[1]]
    assert [m.value for m in kept[1]] == pytest.approx([1 - n / refused for n in lost])


def test_nothing_is_lost_of_a_set_that_the_original_answers(tiny: Tiny) -> None:
    prompts = EncodedPrompts("kept_refusals", HARMFUL[:1], tiny.parts.harmful.tokens[:1])
    assert KeptRefusals().score(ScorerContext(TrialGroup(tiny.parts)), (prompts, [False])).value == 1


def test_scorers_of_harmless_answers_agree_with_plain_decoding(tiny: Tiny) -> None:
    prompts = tiny.parts.harmless.tokens
    before, after = ([tiny.answer(p, 12, trial) for p in prompts] for trial in (None, 0))
    assert tiny.measure(Repetition())[1][0].value == pytest.approx(sum(map(repetition, after)) / len(after))
    first, trials = tiny.measure(Unchanged(2))
    assert first.value == 1
    assert trials[0].items == tuple(float(a[:2] == b[:2]) for a, b in zip(before, after, strict=True))
    assert tiny.measure(LanguageSwitched())[0].value == 0


def test_languages_are_told_apart_by_script_and_frequent_words() -> None:
    assert language_of("This is the answer to your question, and it is not that long.") == "en"
    assert language_of("Das ist die Antwort auf die Frage, und sie ist nicht lang.") == "de"
    assert (
        language_of("C'est la réponse à la question que vous avez posée dans une lettre, et les mots sont pour vous.")
        == "fr"
    )
    assert language_of("Это ответ на ваш вопрос.") == "CYRILLIC"
    assert language_of("これは答えです") == language_of("这是答案") == "CJK"
    assert language_of("") == language_of("123 !") == language_of("xyz abc") == ""


def test_tasks_are_the_same_every_time_and_judged_exactly(tiny: Tiny) -> None:
    questions = Arithmetic(6).questions()
    assert questions == Arithmetic(6).questions() != Arithmetic(6, seed=1).questions()
    for question, value in questions:
        assert eval(question.split("What is ")[1].split("?")[0]) == value
    assert [number_in(a) for a in ("7", "3 + 4 = 7.", "\nThe answer is 1,024\nor 5", "-12", "no", "x7")] == [
        7,
        7,
        1024,
        -12,
        None,
        None,
    ]
    assert copied("Sure: Apple, river.", ["apple", "river"]) and not copied("apple stone river", ["apple", "river"])
    assert all(len(set(words)) == len(words) for _, words in Copying(6).questions())
    assert tiny.measure(Arithmetic(4))[0].value == 0 and len(tiny.measure(Copying(3))[0].items) == 3


def test_the_table_describes_every_scorer() -> None:
    assert list(SCORERS) == [scorer.name for scorer in SCORERS.values()]
    for scorer in SCORERS.values():
        assert (
            scorer.meaning
            and scorer.better in ("lower", "higher")
            and "." not in "".join((scorer.name, *scorer.details))
        )


def test_the_scorer_of_the_documentation_works_as_it_stands(tiny: Tiny, tmp_path: Path) -> None:
    page = (Path(__file__).parents[3] / "docs" / "scorers.md").read_text(encoding="utf-8")
    (tmp_path / "words.py").write_text(page.split("```python\n")[1].split("```")[0], encoding="utf-8")
    settings = Settings(scorer_files=[str(tmp_path / "words.py")], measures=["words"], scorers={"words": {"tokens": 4}})
    original, trials = tiny.measure(choose_scorers(settings).scorers["words"])
    assert original.value == 1 and trials[0].value > 0


def test_an_error_in_a_scorer_names_it(tiny: Tiny) -> None:
    class Broken(Scorer):
        name = "broken"

        def score(self, model: ScorerContext, baseline: Any) -> float:
            return 1 / 0

    with raises("scorer-failed"):
        tiny.measure(Broken())


def test_only_the_answer_after_a_thought_that_ended_is_judged(tiny: Tiny) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>", "sorry,", "I", "cannot", "sure"])
    answers = [
        "<think> sure sure </think> sorry, I cannot",
        "<think> sorry, I cannot </think> sure",
        "sorry, I cannot",
        "<think> sure sure",
        "<think> sure sure sure sure sure sure sure </think> sure",
    ]
    chat = replace(tiny.parts.chat, tokenizer=tokenizer, rows=0, response_prefix="<think> </think>")
    scorer, harmful = RefusalsAfterThought(8), tiny.parts.harmful
    prompts = EncodedPrompts("harmful_eval", harmful.texts[: len(answers)], harmful.tokens[: len(answers)])
    group = TrialGroup(replace(tiny.parts, chat=chat, judge=MarkerJudge(["sorry"]), harmful=prompts))
    known = [[tokenizer.convert_tokens_to_ids(word) for word in answer.split()] for answer in answers]
    group.decoded[scorer.name, tuple(prompts.texts)] = (8 + tiny.parts.max_tokens, [known])
    found = scorer.score(ScorerContext(group), None)
    assert isinstance(found, Measurement) and found.value == 2
    assert found.details == {"undecided": 2, "without_thought": 1, "thought": 4.5}


def test_answers_longer_than_a_sliding_window_are_those_of_plain_decoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a shared prefix the window would count the padding behind it."""
    name, sizes = FAMILIES["mistral"]
    monkeypatch.setitem(FAMILIES, "mistral", (name, {**sizes, "sliding_window": 48}))
    model = load(open_checkpoint(str(save_tiny(tmp_path / "m", "mistral"))), ["float32"], {})
    prompts = EncodedPrompts("own", HARMFUL[:6], ChatFormat(model.tokenizer).encode(HARMFUL[:6]))
    prompts = replace(prompts, tokens=[[*t[:1]] * 10 + t * (1 + i % 3) for i, t in enumerate(prompts.tokens)])

    def answers(prefix_caching: bool) -> list[list[int]]:
        batcher = Batcher(8, prefix_caching=prefix_caching)
        judge = MarkerJudge(["sorry"])
        parts = ModelParts(model, ChatFormat(model.tokenizer), batcher, judge, 8, prompts, prompts)
        return TrialGroup(parts).answers(prompts, 60)[0]

    assert answers(True) == answers(False)
