"""benchmarks/instrument.py on tiny models: folders that a tool has written are measured once, against the original."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.docs.pages import ROOT
from tests.tiny import save_prompts, save_tiny

MEASURES = '["own_answer_kl", "own_perplexity", "unchanged"]'


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """Options for a model with a folder that our tool has written before."""
    save_tiny(tmp_path / "assets" / "tiny")
    save_prompts(tmp_path / "assets" / "prompts")
    place = tmp_path / "work" / "tiny" / "seed-0" / "ours"
    other = save_tiny(place / "model", seed=1)
    (place / "made.json").write_text(json.dumps({"model": str(other), "seconds": 1.0, "cpu_seconds": 2.0}))
    limits = ["--train", "8", "--evaluation", "4", "--held-out", "4", "--tools", "ours"]
    places = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out.json")]
    shorter = ["--measure-set", "max_response_length=4", "--measure-set", f"measures={MEASURES}"]
    return [str(tmp_path / "assets"), "--model", "tiny", *limits, *places, *shorter]


def test_every_folder_is_measured_once(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import instrument

    instrument.main(words)
    rows = {row["tool"]: row for row in json.loads((tmp_path / "out.json").read_text())["rows"]}
    assert set(rows) == {"original", "ours"}
    ours, original = (rows[tool]["measured"] for tool in ("ours", "original"))
    for name in ("first_token_kl", "own_answer_kl"):
        assert original[name]["value"] == pytest.approx(0, abs=1e-5) and ours[name]["value"] > 0.1
    assert original["unchanged"]["value"] == 1
    assert rows["ours"]["made"]["cpu_seconds"] == 2

    monkeypatch.setattr(instrument.Original, "load", lambda *_: pytest.fail("measured again"))
    instrument.main(words)


def test_a_tool_is_interrupted_once_its_time_is_used_up(tmp_path: Path) -> None:
    import instrument_tools
    from turns import Job

    code = "import signal, sys; signal.signal(2, lambda *_: sys.exit(print('stopped')))\nwhile True: pass"
    job = instrument_tools.finished(Job([sys.executable, "-c", code], tmp_path, {}), cpu_seconds=0.3)
    assert [line.text for line in job.lines] == ["stopped"]
    assert job.clock() >= 0.3
