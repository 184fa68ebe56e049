"""Every line of the README's usage is run on a tiny model; what the run leaves behind is what docs/run_folder.md says."""

from __future__ import annotations

import io
import re
import shlex
import webbrowser
from pathlib import Path

import optuna
import pytest
from huggingface_hub import constants
from safetensors import safe_open

from heretic.search.url import storage_url
from tests.command import heretic
from tests.docs.pages import ROOT

PAGE = ROOT / "docs/run_folder.md"
ELSEWHERE = {  # what cannot be run here in seconds, and where it is run
    "heretic benchmark RUN --tasks NAMES": "tests/scoring/test_benchmark.py",
    "heretic demo": "tests/demo/test_guarded_model.py",
}
NOT_DONE = {"heretic upload DIR user/name": "HF_HUB_OFFLINE"}  # named in its message
KEYS = """
refusal_markers = ["e"]
n_trials = 2
run_name = "usage"
store_responses = true
"""
TABLES = """
[search]
start = "gradient"
n_startup_trials = 2
[search.gradient]
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
        "FILE.gguf": "directions.gguf", "config.32b.toml": "config.toml", "+50": "+1", "50": "2", "3,7": "0,1",
    }  # fmt: skip
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # read from the environment when it was imported
    monkeypatch.setattr(webbrowser, "open", lambda url: True)
    lines = usage()
    assert len(lines) >= 20 and {*ELSEWHERE, *NOT_DONE} <= set(lines)
    for line in lines:
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
    check_folder(Path("runs/usage"))
    check_export(Path("out"))


def check_folder(folder: Path) -> None:
    """Every file, tensor and attribute of a run is on its page."""
    page = PAGE.read_text(encoding="utf-8")
    for path in folder.iterdir():
        name = path.name + ("/" if path.is_dir() else "")
        assert f"`{name}`" in page, f"docs/run_folder.md does not name {name}"
    tables = page.split("## Tensors")[1].split("\n## ")[0]
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            assert {"fingerprint", "sha256"} <= set(opened.metadata())
            for name in opened.keys():  # noqa: SIM118
                told = re.sub(r".*\.(exp_avg\w*|step)", r"*.\1", name)
                assert f"`{told}`" in tables, f"docs/run_folder.md does not name the tensor {name} of {file.name}"
    assert {f.name for f in folder.glob("*.safetensors")} == {
        "directions.safetensors", "baseline.safetensors", "walk.safetensors", "geometry.safetensors",
    }  # fmt: skip
    study = optuna.load_study(study_name="heretic", storage=storage_url("", folder))
    for name in study.user_attrs:
        assert (
            f"`{name}`" in page
            or f"`{name.rpartition(' ')[0]} N`" in page
            or f"`{name.partition(' ')[0]} NAME`" in page
        ), name
    for trial in study.get_trials(deepcopy=False):
        for name in trial.user_attrs:
            assert f"| `{name}` |" in page, f"docs/run_folder.md does not name the attribute {name}"
        for name in trial.user_attrs.get("scores", ()):
            assert f"`{name}`" in page, f"docs/run_folder.md does not name the score {name}"


def check_export(folder: Path) -> None:
    page = PAGE.read_text(encoding="utf-8").split("## An exported model")[1]
    for name in ("README.md", "manifest.json", "heretic/directions.safetensors"):
        assert (folder / name).is_file() and f"`{name}`" in page
