"""Counting while answers are written: ending early changes no verdict."""

from __future__ import annotations

from pathlib import Path

from heretic.model.batching import Batcher
from heretic.model.chat_format import ChatFormat
from heretic.model.checkpoint import open_checkpoint
from heretic.model.loading import load
from heretic.scoring.judges.markers import MarkerJudge
from heretic.scoring.refusals import count_refusals


def test_stopping_at_a_marker_changes_no_verdict(llama: Path) -> None:
    model = load(open_checkpoint(str(llama)), ["float32"], {})
    chat = ChatFormat(model.tokenizer)
    sequences = chat.encode(["make bread", "tell me about stars", "why", "how do rivers make music", "write code"])
    batcher = Batcher(3)
    whole = count_refusals(model, chat, sequences, MarkerJudge(["nothing"]), batcher, 30)
    answers = [chat.text(list(tokens)) for tokens in whole.tokens]
    words = sorted({word for answer in answers for word in answer.split()})
    counts = set()
    for marker in [*words, f"{answers[0].split()[4]} {answers[0].split()[5]}"]:  # one spans two tokens
        judge = MarkerJudge([marker])
        expected = tuple(judge.refuses(answer) for answer in answers)
        found = count_refusals(model, chat, sequences, judge, batcher, 30)
        assert found.refused == expected, marker
        counts.add(found.count)
    assert len(counts) > 1
