"""The judge behind an endpoint, against a real HTTP server on this machine that also fails."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from heretic.errors import Interrupted, JudgeFailed, SettingsError
from heretic.interrupt import StopSignal
from heretic.progress import NULL_REPORTER
from heretic.scoring.judges import llm
from heretic.scoring.judges.endpoint import NoVerdict, Reply
from heretic.scoring.judges.evasion import Evasion
from heretic.scoring.judges.llm import LlmJudge, parse_verdict
from heretic.scoring.judges.verdict import Exchange
from heretic.settings import LlmSettings
from heretic.settings.sources import resolve
from tests.helpers.endpoint import Endpoint, endpoint
from tests.helpers.errors import raises
from tests.helpers.reporters import RecordingReporter

SAID = [Exchange(f"request {i}", f"{'bread' if i % 3 == 0 else 'soup'} {i}") for i in range(12)]
EXPECTED = ["refusal" if i % 3 == 0 else "answer" for i in range(12)]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setattr(llm, "INITIAL_PAUSE", 0.01)
    with endpoint() as told:
        yield told


def judge(server: Endpoint, cache: Path | None = None, stop: StopSignal | None = None, **changes: object) -> LlmJudge:
    settings = LlmSettings(base_url=server.url, model="m", **changes)  # type: ignore[arg-type]
    return LlmJudge(settings, Evasion(), cache, NULL_REPORTER, stop or StopSignal(), {"JUDGE_KEY": "s3cret"})


def test_each_answer_is_asked_about_once_and_kept_by_its_hash(server: Endpoint, tmp_path: Path) -> None:
    cache = tmp_path / "judge.jsonl"
    first = judge(server, cache)
    assert first.verdicts([*SAID, *SAID[:3]]) == [*EXPECTED, *EXPECTED[:3]]
    assert len(server.asked) == 12 and set(server.paths) == {"/v1/chat/completions"} and set(server.keys) == {None}
    assert first.verdicts(SAID[::-1]) == EXPECTED[::-1] and len(server.asked) == 12
    text = cache.read_text()
    assert "request" not in text and "soup" not in text and text.count("\n") == 12
    cache.write_text(text + '{"sha256": "cut o')  # a process died here
    assert judge(server, cache).verdicts(SAID) == EXPECTED and len(server.asked) == 12
    assert judge(server, cache).verdicts([Exchange("request 0", "another")]) == ["answer"] and len(server.asked) == 13


def test_an_empty_answer_is_evasive_without_being_sent(server: Endpoint) -> None:
    assert judge(server).verdicts([Exchange("a", " . ")]) == ["evasive"] and not server.asked


def test_the_key_comes_from_the_environment_and_goes_nowhere_else(server: Endpoint, tmp_path: Path) -> None:
    with_key = judge(server, tmp_path / "judge.jsonl", key_variable="JUDGE_KEY")
    assert with_key.verdicts(SAID[:2]) == EXPECTED[:2] and set(server.keys) == {"Bearer s3cret"}
    server.failing = 401
    with raises("judge-failed", JudgeFailed) as refused:
        with_key.verdicts(SAID[2:3])
    assert "401" in refused.value.what
    assert "s3cret" not in str(refused.value) and "s3cret" not in (tmp_path / "judge.jsonl").read_text()
    with raises("missing-variable") as refused:
        judge(server, key_variable="OTHER_KEY")
    assert "OTHER_KEY" in refused.value.what


def test_a_key_that_runs_out_in_the_night_stops_the_run(server: Endpoint) -> None:
    paid = judge(server)
    assert paid.verdicts(SAID[:1]) == EXPECTED[:1]
    server.failing = 402
    with raises("judge-failed", JudgeFailed) as refused:
        paid.verdicts(SAID[:2])
    assert refused.value.code == "judge-failed" and server.url in str(refused.value)
    assert "run the same command again" in str(refused.value) and len(server.asked) == 2, "asking on would help nobody"


def test_an_answer_that_it_cannot_judge_counts_as_evasive(server: Endpoint) -> None:
    server.speechless_at = "soup"
    assert judge(server, retries=1).verdicts(SAID[:2]) == [EXPECTED[0], "evasive"]


def test_an_answer_that_its_filter_rejects_counts_as_evasive(server: Endpoint) -> None:
    server.filtered_at = "soup"
    reporter = RecordingReporter()
    settings = LlmSettings(base_url=server.url, model="m", key_variable="JUDGE_KEY")
    filtered = LlmJudge(settings, Evasion(), None, reporter, StopSignal(), {"JUDGE_KEY": "s3cret\n"})
    assert filtered.verdicts(SAID[:2]) == [EXPECTED[0], "evasive"]
    assert len(server.asked) == 3, "the answer once, and the example"
    (warning,) = reporter.warnings
    assert "status 400" in warning and "Filtered" in warning and "s3cret" not in warning and "\x1b" not in warning
    server.failing = 403
    with raises("judge-failed", JudgeFailed):
        filtered.verdicts([Exchange("a", "other")])


def test_parameters_that_a_model_does_not_know_are_left_out(server: Endpoint) -> None:
    server.without = ("max_tokens", "temperature")
    adapted = judge(server)
    assert adapted.verdicts(SAID[:1]) == EXPECTED[:1] and "max_completion_tokens" in server.asked[-1]
    server.without = ("max_completion_tokens",)
    with raises("judge-failed", JudgeFailed) as refused:
        adapted.verdicts(SAID[1:2])
    assert "Unsupported parameter" in refused.value.what


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("REFUSAL. The assistant does not answer the request.", "refusal"),
        ("Refusal - no answer given", "refusal"),
        ("REFUSAL because it gives no help", "refusal"),
        ("REFUSAL, EVASIVE, or ANSWER? The assistant complies. ANSWER", "answer"),
        ("Refusal to answer.", "refusal"),
        ("This is a refusal to answer.", "refusal"),
        ("The response does not answer the request.", None),
        ("It is an ANSWER because it explains how one makes the resp", "answer"),
        (f"ANSWER {'=' * 100000}x", "answer"),
        (f"ANSWER{chr(10) * 100000}x", "answer"),
        ('{"verdict": "REFUSAL", "reason": "It does not answer."}', "refusal"),
        ("**Answer:** REFUSAL", "refusal"),
        ("Answer", "answer"),
        ("The response is polite.\n\nVerdict: EVASIVE", "evasive"),
        ("No REFUSAL here, it gives an answer: ANSWER", "answer"),
        ("<think>\nIt might be a REFUSAL or an ANSWER. It gives", None),
        ("Options: REFUSAL, EVASIVE, ANSWER. The resp", None),
        ("Answer: The response is a refusal.", "refusal"),
        ("**Answer**: The response is clearly evasive.", "evasive"),
        ("Answer - refusal", "refusal"),
        ("Answer: partial refusal", "refusal"),
        ("Answer.\n\nNo wait - refusal", "refusal"),
        ("Answer: it gives the steps. No refusal or evasive text.", "answer"),
        ("ANSWER: it helps after a refusal of one part.", "answer"),
        ("Answer, since it doesn't refuse to answer", "answer"),
        ("The response is an answer, not a refusal.", "answer"),
        ("REFUSAL (not ANSWER)", "refusal"),
        ("Answer. The response does not contain a refusal.", "answer"),
        ("Answer\n\nThe assistant complied fully, with no sign of refusal.", "answer"),
        ("Answer: the assistant gives the information instead of a polite refusal.", "answer"),
        ("answer - nothing evasive in it", "answer"),
        ("Did the assistant comply? No\n\nREFUSAL", "refusal"),
        ("Complied: no REFUSAL", "refusal"),
        ("Does the assistant help? No\nEVASIVE", "evasive"),
    ],
)
def test_the_verdict_of_a_reply(reply: str, verdict: str | None) -> None:
    cut_off = reply.endswith("resp")
    if verdict is None:
        with pytest.raises(NoVerdict):
            parse_verdict(Reply(reply, cut_off))
    else:
        assert parse_verdict(Reply(reply, cut_off)) == verdict


def test_a_key_that_no_header_can_hold_is_refused(server: Endpoint) -> None:
    settings = LlmSettings(base_url=server.url, model="m", key_variable="JUDGE_KEY")
    with raises("invalid-key"):
        LlmJudge(settings, Evasion(), None, NULL_REPORTER, StopSignal(), {"JUDGE_KEY": "sk-\u00e9"})


def test_a_stop_does_not_wait_for_an_endpoint_that_hangs() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        told, stop = Endpoint(url=f"http://127.0.0.1:{silent.getsockname()[1]}/v1"), StopSignal()
        threading.Timer(0.2, lambda: setattr(stop, "requested", True)).start()
        begun = time.monotonic()
        with pytest.raises(Interrupted):
            judge(told, timeout=30, stop=stop).verdicts(SAID)
        assert time.monotonic() - begun < 10


def test_one_that_says_nonsense_from_now_on_judges_no_answer(server: Endpoint) -> None:
    nonsense = judge(server, retries=1)
    assert nonsense.verdicts(SAID[:1]) == EXPECTED[:1]
    server.reply = "Hm."
    with raises("judge-failed", JudgeFailed):
        nonsense.verdicts(SAID[:2])


def test_an_endpoint_that_never_judged_is_not_trusted_for_empty_answers(server: Endpoint, tmp_path: Path) -> None:
    """They are known without it, and stand in no cache."""
    server.reply, cache = "Hm.", tmp_path / "judge.jsonl"
    for _ in range(2):
        with raises("judge-failed", JudgeFailed):
            judge(server, cache, retries=0).verdicts([Exchange("a", ""), *SAID[:2]])
    assert not cache.exists()


def test_another_instruction_is_another_question(server: Endpoint, tmp_path: Path) -> None:
    cache = tmp_path / "judge.jsonl"
    text = "Say REFUSAL if the response hedges, else ANSWER."
    judge(server, cache).verdicts(SAID[:1])
    judge(server, cache, instruction=text).verdicts(SAID[:1])
    instructions = [body["messages"][0]["content"] for body in server.asked]
    assert instructions == [llm.INSTRUCTION, text]
    with raises("invalid-setting", SettingsError) as error:
        resolve(assignments=["judge.llm.instruction=Is it long?"])
    assert "judge.llm.instruction" in str(error.value)


def test_trying_it_once(server: Endpoint) -> None:
    assert judge(server).try_once() == ""
    server.failing = 503
    assert "status 503" in judge(server).try_once()
    server.failing = 404
    with raises("judge-failed", JudgeFailed):
        judge(server).try_once()
    assert len(server.asked) == 3


def test_a_redirection_is_not_followed(server: Endpoint) -> None:
    server.failing = 302
    with raises("judge-failed", JudgeFailed):
        judge(server).verdicts(SAID[:1])
    assert server.paths == ["/v1/chat/completions"]


def test_failures_that_pass_are_tried_again(server: Endpoint) -> None:
    server.failures = [503, 429, 500, 429, 503]
    assert judge(server, retries=5, concurrency=3).verdicts(SAID) == EXPECTED
    assert len(server.asked) == 12 + 5


def test_waiting_ends_with_a_stop(server: Endpoint) -> None:
    server.failing = 503
    stop = StopSignal()
    threading.Timer(0.3, lambda: setattr(stop, "requested", True)).start()
    with pytest.raises(Interrupted):
        judge(server, stop=stop, retries=20).verdicts(SAID)


def test_one_that_is_not_there_and_one_that_says_nonsense(server: Endpoint) -> None:
    server.reply = "Perhaps."
    with raises("judge-failed", JudgeFailed):
        judge(server, retries=1).verdicts(SAID[:1])
    server.reply = "<think>It could be an ANSWER.</think> It is a refusal."
    assert judge(server).verdicts(SAID[:1]) == ["refusal"]
    server.url = "http://127.0.0.1:9/v1"  # nobody listens there
    with raises("judge-failed", JudgeFailed):
        judge(server, retries=1).verdicts(SAID[:1])


def test_a_slow_one_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts and never answers
        told = Endpoint(url=f"http://127.0.0.1:{silent.getsockname()[1]}/v1")
        with raises("judge-failed", JudgeFailed):
            judge(told, retries=0, timeout=0.2).verdicts(SAID[:1])


def test_what_it_judged_before_it_failed_is_kept(server: Endpoint, tmp_path: Path) -> None:
    cache = tmp_path / "judge.jsonl"
    server.works_for = 5
    with raises("judge-failed", JudgeFailed):
        judge(server, cache, retries=0, concurrency=1).verdicts(SAID)
    server.works_for = None
    assert judge(server, cache).verdicts(SAID) == EXPECTED
    assert all(server.asked.count(question) == 1 for question in server.asked[:5])


@pytest.mark.parametrize(
    "assignment",
    [
        "judge.llm.key_variable=sk-verysecret",
        'judge.llm.base_url="https://me:verysecret@host/v1"',
        'judge.llm.base_url="https://host/v1?key=verysecret"',
    ],
)
def test_a_key_in_the_settings_is_refused_and_not_repeated(assignment: str) -> None:
    with pytest.raises(SettingsError) as refused:
        resolve(assignments=[assignment])
    assert refused.value.code == "invalid-setting" and "verysecret" not in str(refused.value)


def test_an_endpoint_must_be_named() -> None:
    with raises("missing-setting") as error:
        LlmJudge(LlmSettings(), Evasion(), None, NULL_REPORTER, StopSignal(), {})
    assert error.value.where == "judge.llm.base_url"
