"""Every line of the README's usage block runs on a tiny model."""

from __future__ import annotations

import io
import re
import shlex
import webbrowser
from pathlib import Path

import pytest
from huggingface_hub import constants

from tests.docs.pages import ROOT
from tests.helpers.command import heretic

ELSEWHERE = {  # what cannot be run here in seconds, and where it is run
    "heretic benchmark RUN --tasks NAMES": "tests/pipeline/test_benchmark.py",
    "heretic": "tests/cli/ui/test_first_run.py",
    "heretic serve [RUN]": "tests/report/test_server.py",
    "heretic demo": "tests/pipeline/demo/test_guarded_model.py",
}
NOT_DONE = {"heretic upload DIR user/name": "HF_HUB_OFFLINE"}  # named in its message
KEYS = """
refusal_markers = ["e"]
n_trials = 2
run_name = "usage"
"""
TABLES = """
[search]
start = "gradient"
n_startup_trials = 2
[search.gradient]
second_search = false
weights = [0.5, 2.0]
steps = 2
batch = 4
refusal_tokens = 1
"""


def usage() -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8").split("## Usage\n")[1]
    block = re.match(r"\n((?:    .*\n)+)", text)
    assert block
    return [line.partition(" #")[0].strip() for line in block[1].splitlines()]


def variants(line: str) -> list[list[str]]:
    """The line as it may be typed: with each of the parts that may be left out, or, if that makes no difference, once."""
    parts = re.findall(r"\[([^\]]+)\]", line)
    bare = re.sub(r"\[[^\]]+\]", "", line)
    whole = re.sub(r"[\[\]]", "", line)
    exclusive = line.startswith("heretic config")
    return [shlex.split(text) for text in ([f"{bare} {part}" for part in parts] if exclusive else [whole])]


def test_the_usage_is_as_it_says(
    config: Path, llama: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    top, prompts = config.read_text().partition("[search]")[0].split("[prompts.", 1)
    top = re.sub(r"^(?:refusal_markers|n_trials|device_map) .*\n", "", top, flags=re.M)
    config.write_text(f"{top}{KEYS}[prompts.{prompts}{TABLES}")
    stands_for = {
        "MODEL": str(llama), "BASE": str(llama), "RUN": "usage", "N": "0", "DIR": "out", "DIR2": "out2", "FILE": "config.toml",
        "FILE.gguf": "directions.gguf", "config.32b.toml": "config.toml", "KEY": "seed", "+50": "+1", "50": "2", "3,7": "0,1",
    }  # fmt: skip
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # read from the environment when it was imported
    monkeypatch.setattr(webbrowser, "open", lambda url: True)
    for line in usage():
        if line in ELSEWHERE:
            assert (ROOT / ELSEWHERE[line]).is_file()
            continue
        for words in variants(line):
            arguments = [stands_for.get(word, word) for word in words[1:]]
            if arguments[0] == "compare":
                arguments[arguments.index("--prompts") + 1] = "tell me about bread"
            if "lora" in arguments:
                arguments[arguments.index("out")] = "adapter"
            if "ablation.geometry=plain" in arguments:
                arguments += ["--run-name", "plain"]
            monkeypatch.setattr("sys.stdin", io.StringIO("/quit\n"))
            ran = heretic(capsys, monkeypatch, *arguments)
            if line in NOT_DONE:
                assert ran.status == 1 and NOT_DONE[line] in ran.err
            else:
                assert ran.status == 0, f"{line}: {ran.err or ran.out[-400:]}"
