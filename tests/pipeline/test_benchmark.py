"""lm-eval's tasks on a tiny real run, and the errors of a difference."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from heretic.model.chat_format import ChatFormat
from heretic.pipeline.benchmark import compare_results, render_question
from tests.helpers.command import heretic
from tests.tiny import TEMPLATE, tiny_tokenizer

TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


def test_what_is_no_mean_of_questions_gets_the_error_of_two_independent_numbers() -> None:
    def found(value: float, error: float | str) -> dict[str, object]:
        return {
            "results": {"t": {"name": "t", "perplexity,none": value, "perplexity_stderr,none": error}},
            "n-samples": {"t": {"effective": 2}},
            "higher_is_better": {"t": {"perplexity": False}},
            "samples": {"t": [{"filter": "none", "doc_id": i, "perplexity": (1.0, 2)} for i in range(2)]},
        }

    (row,) = compare_results(found(10.0, 3.0), found(11.0, 4.0))
    assert (row.difference, row.difference_error, row.higher_is_better) == (1.0, 5.0, False)
    assert compare_results(found(10.0, "N/A"), found(11.0, 4.0))[0].difference_error is None


def test_a_question_closes_the_thinking_block_as_the_study_did() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace(
        "<|assistant|> ", "<|assistant|><think>{% if think is false %}</think>{% endif %}"
    )
    chat, asked = ChatFormat(tokenizer, "be good"), [{"role": "user", "content": "what is it"}]
    end = "<|end|><|assistant|><think>"
    assert render_question(chat.answering("\n</think>\n\nFinal answer:"), asked).endswith(f"{end}\n</think>\n\n")
    assert render_question(chat.answering("", {"think": False}), asked).endswith(f"{end}</think>")
    assert render_question(chat.answering("sure"), asked).endswith(end), "where the user has left it open, it stays so"
    assert "be good" not in render_question(chat, asked)


@pytest.fixture
def tasks() -> Path:
    """A folder with a task of twelve questions."""
    folder = Path("tasks")
    folder.mkdir()
    words = ["stars", "rivers", "bread", "soup", "code", "music"]
    rows = [
        {"question": f"what is {w} and", "choices": [f" {a}", f" {b}"], "answer": i % 2}
        for i, w in enumerate(words)
        for a, b in (("good", "bad"), ("small", "large"))
    ]
    file = folder / "questions.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "tiny_choice.yaml").write_text(TASK.format(name="tiny_choice", file=file.resolve()))
    return folder


def test_a_trial_is_measured_beside_the_original(
    config: Path, tasks: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    heretic(capsys, monkeypatch, "run", "--trials", "2", "--run-name", "mine")
    asked = ("benchmark", "mine", "--trial", "1", "--include-path", str(tasks))
    found = json.loads(heretic(capsys, monkeypatch, *asked, "--tasks", "tiny_choice", "--json").out)
    (row,) = found["tasks"]
    assert (row["task"], row["metric"], row["questions"]) == ("tiny_choice", "acc", 12)
    assert 0 <= row["original"] <= 1 and row["difference"] == pytest.approx(row["ablated"] - row["original"])
    assert row["difference_error"] is not None and row["original_error"] > 0
    kept = json.loads(Path("runs/mine/benchmarks/trial-1.tiny_choice.json").read_text())
    assert kept["tasks"] == found["tasks"] and kept["limit"] is None
    missing = heretic(capsys, monkeypatch, "benchmark", "mine", "--tasks", "x", "--include-path", "nowhere")
    assert missing.status == 1 and "[no-task-folder]" in missing.err and "nowhere" in missing.err
