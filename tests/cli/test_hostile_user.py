"""Every command, by somebody who gives it whatever there is: a message of a few lines, never a traceback, nothing lost."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest

from heretic.cli.main import mistyped, shorthand
from heretic.interrupt import StopSignal
from heretic.pipeline.run import run
from heretic.progress import NULL_REPORTER
from heretic.runs.status import read_status
from heretic.settings.sources import resolve
from heretic.storage.attributes import FINGERPRINT
from tests.helpers.command import Ran, heretic
from tests.tiny import save_prompts, save_tiny

Command = Callable[..., Ran]
ODD = "mödel ★ $(touch executed) 'a'"


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the one run is kept that the tests here get a copy of."""
    return tmp_path_factory.mktemp("kept")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with HF_HUB_OFFLINE, which these libraries read when they are imported: no name is waited for."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


@pytest.fixture
def made(config: Path, kept: Path) -> Path:
    """A run `mine` of two trials, and its export `out`."""
    if not (kept / "out").exists():
        options = {"run_name": "mine", "n_trials": 2, "save_to": "out"}
        run(resolve(config, options), reporter=NULL_REPORTER, stop=StopSignal())
        for name in ("runs", "out"):
            shutil.copytree(name, kept / name)
            shutil.rmtree(name)
    for name in ("runs", "out"):
        shutil.copytree(kept / name, name)
    return Path("runs/mine")


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    def call(*arguments: str) -> Ran:
        return heretic(capsys, monkeypatch, *arguments)

    return call


@pytest.fixture
def bad(made: Path) -> list[str]:
    """Things in the place of a file or a folder."""
    folder = Path("some folder")
    folder.mkdir()
    (folder / "in it").touch()
    Path("empty").touch()
    Path("binary.txt").write_bytes(bytes(range(256)) * 8)
    Path("dangling").symlink_to("nowhere")
    Path("circle").symlink_to("circle")
    return [
        "missing",
        "some folder",
        "empty",
        "binary.txt",
        "dangling",
        "circle",
        "empty/below",
        "x" * 300,
        "~nobody/x",
    ]


READ = [
    ["--config", "{}"], ["run", "--config", "{}"], ["preflight", "--config", "{}"], ["config", "--config", "{}"],
    ["config", "--from-manifest", "{}"], ["config", "--from-heretic", "{}"], ["evaluate", "--config", "{}"],
    ["geometry", "--config", "{}"], ["run", "{}"], ["preflight", "{}"], ["evaluate", "{}"], ["geometry", "{}"],
    ["evaluate", "--against", "{}"], ["status", "{}"], ["report", "{}"], ["export", "{}", "-o", "new"], ["chat", "{}"],
    ["compare", "{}", "--trials", "0", "--prompts", "hello"], ["benchmark", "{}", "--tasks", "arc_easy"],
    ["directions", "{}", "-o", "new.gguf"], ["reproduce", "{}"], ["reproduce", "out", "--base", "{}"],
    ["upload", "{}", "user/name", "--yes"], ["run", "--set", "chat_template={}"],
    ["run", "--set", "prompts.harmful_eval.source={}"], ["run", "--set", "judge.kind=classifier", "--set",
                                                        "judge.classifier.model={}"],
    ["status", "mine", "--storage", "sqlite:///{}"],
]  # fmt: skip


@pytest.mark.parametrize("arguments", READ, ids=" ".join)
def test_what_is_read(arguments: list[str], bad: list[str], command: Command) -> None:
    before = {p for p in Path().rglob("*") if "runs" not in p.parts}
    for place in bad:
        if place == "empty" and {"--config", "--from-heretic"} & set(arguments):
            continue  # an empty file holds no settings, which is no fault of its
        said = command(*(a.format(place) for a in arguments))
        assert said.status in (1, 2), (place, said)
        assert arguments[0] == "preflight" or said.err.startswith("Error:"), (place, said)
        assert len(said.err) < 1300, (place, said.err)
    assert {p for p in Path().rglob("*") if "runs" not in p.parts} == before, "something was written"
    assert Path("empty").stat().st_size == 0


WRITTEN = [
    ["report", "mine", "-o", "{}"], ["geometry", "mine", "--html", "{}"], ["directions", "mine", "-o", "{}", "--format", "gguf"],
    ["export", "mine", "-o", "{}"], ["reproduce", "out", "-o", "{}"], ["demo", "--folder", "{}"],
    ["run", "mine", "--save-to", "{}"],
]  # fmt: skip


@pytest.mark.parametrize("arguments", WRITTEN, ids=" ".join)
def test_what_is_written(arguments: list[str], bad: list[str], command: Command) -> None:
    folder = arguments[-2] in ("--folder", "--save-to") or arguments[0] in ("export", "reproduce")
    for place in ["empty/below", "x" * 300, "empty" if folder else "some folder", ".", "/proc/nothing/below"]:
        if arguments[0] == "demo" and place == ".":
            continue  # a folder like any other
        said = command(*(a.format(place) for a in arguments))
        assert said.status == 1 and said.err.count("Error:") == 1 and len(said.err) < 1300, (place, said)
    assert Path("empty").is_file() and [p.name for p in Path("some folder").iterdir()] == ["in it"]


NUMBERS = [
    (["run", "--trials", "²"], "[invalid-option]"), (["run", "--trials", "9" * 5000], "[invalid-option]"),
    (["run", "--trials", "-1"], "[invalid-option]"), (["run", "--trials", "1.5"], "[invalid-option]"),
    (["run", "--workers", "²"], "[invalid-option]"), (["run", "--workers", "-2"], "[invalid-option]"),
    (["run", "--set", "n_trials=-1"], "n_trials"), (["run", "--set", "seed=1e3"], "seed"),
    (["run", "--set", "max_kl=nan"], "max_kl"), (["run", "--set", "n_trials"], "[invalid-setting]"),
    (["run", "--set", "=3"], "[unknown-setting]"),
    (["run", "--set", "seed=" + "[" * 50_000], "seed"), (["run", "--set", "seed=3\nn_trials=4"], "seed"),
    (["run", "--run-name", "../mine"], "run_name"), (["run", "--run-name", ".", "--fresh"], "run_name"),
    (["preflight", "--devices", "-1x24GiB"], "[invalid-option]"), (["preflight", "--devices", ""], "[invalid-option]"),
    (["status", "--every", "nan"], "--every"), (["status", "--every", "inf"], "--every"), (["status", "--every", "-1"], "--every"),
    (["export", "mine", "-o", "new", "--trial", "-1"], "[trial-not-found]"),
    (["export", "mine", "-o", "new", "--trial", "x"], "--trial"),
    (["export", "mine", "-o", "new", "--trial", "1", "--trial", "99"], "[trial-not-found]"),
    (["export", "mine", "-o", "new", "--format", "zip"], "zip"), (["export", "mine"], "--output"),
    (["chat", "mine", "--tokens", "0"], "--tokens"), (["chat", "mine", "--trial", "99"], "[trial-not-found]"),
    (["compare", "mine", "--trials", "", "--prompts", "x"], "[invalid-option]"),
    (["compare", "mine", "--trials", "0,²", "--prompts", "x"], "[invalid-option]"),
    (["compare", "mine", "--trials", "0", "--prompts", ""], "[no-prompts]"),
    (["compare", "mine", "--trials", "0", "--prompts", "hello " * 400], "[prompt-too-long]"),
    (["benchmark", "mine", "--tasks", ","], "task"), (["benchmark", "mine", "--tasks", "x", "--limit", "0"], "--limit"),
    (["reproduce", "out", "--device-map", "moon"], "[device-not-there]"), (["demo", "--trials", "-3"], "n_trials"),
    (["status", "x" * 300], "[disk]"), (["status", "mine", "--storage", "nonsense"], "[unsupported-storage]"),
    (["upload", "out", "../../x"], "[invalid-repository-name]"), (["config", "--schema", "--defaults"], "[conflicting-options]"),
    (["stauts"], "[unknown-command]"), (["run", "--nonsense"], "--nonsense"), (["run", ""], "[no-model]"),
    (["directions", "mine", "-o", ""], "[unknown-format]"), (["report", "mine", "-o", ""], "[not-a-regular-file]"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "wanted"), NUMBERS, ids=lambda a: " ".join(a)[:60] if isinstance(a, list) else ""
)
def test_numbers_names_and_options(arguments: list[str], wanted: str, made: Path, command: Command) -> None:
    if arguments[:2] == ["run", ""]:
        Path("config.toml").unlink()
    said = command(*arguments)
    assert said.status in (1, 2) and wanted in said.err and len(said.err) < 1300, said
    assert not Path("new").exists()


def test_words_that_are_nearly_commands(made: Path) -> None:
    commands = ["run", "status", "report"]
    assert mistyped("reprot", commands) and not mistyped("owner/model", commands) and not mistyped("report", commands)
    assert mistyped("--config", ["config"]) is None
    made.rename("runs/reports")
    assert mistyped("reports", commands) is None, "a run may be called so"
    assert shorthand(["reports"], commands) == ["run", "reports"]


def test_a_run_is_found_from_inside_its_folder(made: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made)
    assert command("status", ".").status == 0
    said = command("export", ".", "-o", "model")
    assert said.status == 0 and Path("model/manifest.json").is_file(), said.err
    assert json.loads(Path("model/manifest.json").read_text())["run"] == "mine" and not list(Path().glob("tiny-*"))


def test_a_prompt_that_looks_like_something_else(made: Path, command: Command) -> None:
    for prompt in ("~nobody tell me", "what about notes.txt and this.txt", "tell me " * 60):
        said = command("compare", "mine", "--trials", "0", "--prompts", prompt, "--tokens", "3", "--json")
        assert said.status == 0 and json.loads(said.out)[0]["prompt"].split() == prompt.split(), said


def test_odd_names_from_end_to_end(tmp_path: Path, command: Command) -> None:
    home = tmp_path / "a b" / ODD
    model, sets = save_tiny(home / ODD), save_prompts(home / "prompts")
    lines = [f"[prompts.{role}]\nsource = {json.dumps(str(path))}\n" for role, path in sets.items()]
    settings = home / f"{ODD}.toml"
    settings.write_text(
        "max_response_length = 4\nn_trials = 1\nbatch_size = 8\ndevice_map = 'cpu'\nmax_kl = 5.0\n[search]\nstart = 'kernels'\n"
        + "".join(lines),
        encoding="utf-8",
    )
    name = "läuft gut"
    do = [
        "run",
        str(model),
        "-c",
        str(settings),
        "--run-name",
        name,
        "--set",
        f"runs_dir={home}/runs",
        "--save-to",
        f"{home}/out",
    ]
    assert (said := command(*do)).status == 0, said
    for arguments in (
        ["status", name, "--runs-dir", f"{home}/runs"], ["report", f"{home}/runs/{name}", "-o", f"{home}/{ODD}.html"],
        ["directions", name, "--runs-dir", f"{home}/runs", "-o", f"{home}/{ODD}.gguf"], ["reproduce", f"{home}/out"],
        ["compare", f"{home}/runs/{name}", "--trials", "0", "--prompts", str(sets["harmful_eval"]), "--tokens", "2"],
    ):  # fmt: skip
        said = command(*arguments)
        assert said.status == 0, said
    assert not Path("executed").exists() and not list(Path().iterdir())


def test_a_runs_settings_may_be_edited(made: Path, command: Command) -> None:
    file = made / "config.toml"
    kept = file.read_text()

    def edited(before: str, after: str) -> None:
        text = re.sub(rf"(?m)^{before} = [^#\n]*", f"{after}  ", kept)
        assert text != kept
        file.write_text(text)

    edited("n_trials", "n_trials = 3")
    said = command("run", "mine", "--json")
    assert said.status == 0 and json.loads(said.out)["trials"] == 3, said
    edited("seed", "seed = 11")
    for arguments in (["run", "mine"], ["export", "mine", "-o", "new"]):
        said = command(*arguments)
        assert said.status == 4 and "[study-mismatch]" in said.err and "seed" in said.err, said
    for line, code in (("max_kl = 'low'", "invalid-setting"), ("max_kl = ]", "invalid-toml")):
        edited("max_kl", line)
        place = file.read_text().splitlines().index(next(x for x in file.read_text().splitlines() if line in x)) + 1
        for arguments in (["run"], ["status"], ["report"], ["export", "-o", "new"], ["directions", "-o", "new.gguf"]):
            said = command(*arguments, "mine")
            assert said.status == 1 and f"[{code}] Where: {file}:{place}" in said.err, said
            assert code == "invalid-toml" or "'max_kl'" in said.err, said


def test_a_run_of_a_later_version(made: Path, command: Command) -> None:
    file = made / "config.toml"
    kept = file.read_text()
    file.write_text("of_later = 1\n" + kept)
    for arguments in (
        ["status"],
        ["run"],
        ["report"],
        ["export", "-o", "new"],
        ["chat"],
        ["directions", "-o", "new.gguf"],
    ):
        said = command(*arguments, "mine")
        assert said.status == 1 and said.code == "unknown-setting", said
        assert "runs/mine/config.toml:1" in said.err and "of_later" in said.err, said
    file.write_text(kept)
    study = optuna.load_study(study_name="heretic", storage=f"sqlite:///{made}/study.db")
    study.set_user_attr(FINGERPRINT, json.dumps({**json.loads(study.user_attrs[FINGERPRINT]), "format": 99}))
    for arguments in (["run", "mine", "--trials", "3"], ["status", "mine"], ["report", "mine"]):
        said = command(*arguments)
        assert said.status == 4 and said.code == "study-mismatch" and "format 99" in said.err, said


CHILD = """
import json, sys
from heretic.cli.main import main
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["heretic", *arguments]
    try:
        main()
    except SystemExit as finished:
        print("status", finished.code, flush=True)
"""


def test_a_terminal_that_can_do_little(made: Path) -> None:
    asked = [["status", "mine"], ["config"], ["doctor"], ["geometry", "mine"], ["preflight"], ["--help"], ["run", "--help"],
             ["run", "mine", "--trials", "3"], ["compare", "mine", "--trials", "0", "--prompts", "tell me"]]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if k != "FORCE_COLOR"}
    environment |= {"COLUMNS": "20", "LINES": "5", "TERM": "dumb", "NO_COLOR": "1", "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-c", CHILD, json.dumps(asked)]
    done = subprocess.run(command, env=environment, capture_output=True, timeout=120)
    said = (done.stdout + done.stderr).decode("ascii")
    assert "Traceback" not in said and "\x1b" not in said, said[-2000:]
    assert [line for line in said.splitlines() if line.startswith("status ")] == ["status 0"] * len(asked), said


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's shell and devices")
@pytest.mark.parametrize("arguments", ["config", "--help"])
@pytest.mark.parametrize(("what", "status"), [("| head -1", 0), (">&-", 0), ("<&-", 0), ("> /dev/full", 1)])
def test_standard_streams_that_are_closed_or_full(arguments: str, what: str, status: int) -> None:
    line = f"'{sys.executable}' -m heretic {arguments} {what}"  # one prints, one goes through rich
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60)
    assert done.returncode == status and "Traceback" not in done.stderr and "Exception" not in done.stderr, done.stderr
    assert not status or "No space left" in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's shell")
def test_a_run_goes_on_when_the_reader_of_its_output_ends(config: Path) -> None:
    line = f"'{sys.executable}' -m heretic run --run-name mine 2> err | head -1 > first; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], timeout=120)
    assert done.returncode == 0 and Path("first").read_text()
    assert read_status("mine", "runs", {}).summary.n_complete == 4
    assert len((Path("err").read_text() + Path("runs/mine/run.log").read_text()).split("reader of the output")) == 2
