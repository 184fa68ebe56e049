"""The commands, as a user types them."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from heretic import __version__
from heretic.cli.main import exit_status, machine_error, shorthand
from heretic.errors import EXIT_STATUSES
from heretic.settings.sources import resolve
from tests.helpers.command import heretic

COMMANDS = [
    "run",
    "preflight",
    "status",
    "export",
    "chat",
    "compare",
    "benchmark",
    "evaluate",
    "config",
    "doctor",
    "demo",
]


def test_shorthands() -> None:
    assert shorthand(["owner/model"], COMMANDS) == ["run", "owner/model"]
    assert shorthand(["--config", "x.toml"], COMMANDS) == ["run", "--config", "x.toml"]
    assert shorthand(["status"], COMMANDS) == ["status"]
    assert shorthand(["--help"], COMMANDS) == ["--help"]
    assert shorthand([], COMMANDS) == []
    Path("config.toml").touch()
    assert shorthand([], COMMANDS) == ["run"]


def test_a_whole_life(
    config: Path, llama: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def do(*arguments: str, status: int = 0) -> str:
        ran = heretic(capsys, monkeypatch, *arguments)
        assert ran.status == status, ran
        return ran.out

    assert do("--version") == f"heretic {__version__}"
    assert do("preflight").endswith("Ready.")
    report = json.loads(do("preflight", "--json"))
    assert report["verdict"] == "ready" and report["plan"]["loads"][0]["device"]["name"] == "cpu"

    ran = do()  # config.toml is found by itself
    assert "Settings from config.toml" in ran and "Pareto front of 4" in ran and "Selected: trial" in ran
    run = next(Path("runs").iterdir())
    assert "complete" in do("status")
    status = json.loads(do("status", run.name, "--json"))
    assert status["n_complete"] == 4 and status["pareto_front"]

    number = status["pareto_front"][0]["trial"]
    exported = do("export", run.name, "--trial", str(number), "-o", "model")
    assert "verified" in exported and (Path("model") / "manifest.json").is_file()
    evaluated = json.loads(do("evaluate", "model", "--against", str(llama), "--json"))
    assert evaluated["refusals"] == status["pareto_front"][0]["refusals"]
    assert evaluated["divergence"]["mean"] == pytest.approx(status["pareto_front"][0]["divergence"]["mean"], rel=1e-2)
    itself = json.loads(do("evaluate", str(llama), "--against", str(llama), "--json"))
    assert itself["divergence"]["max"] < 1e-6


def test_config_command(config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HERETIC_SEED", "7")
    heretic(capsys, monkeypatch, "config", "--set", "max_kl=0.3")
    monkeypatch.setattr("sys.argv", ["heretic", "config", "--set", "max_kl=0.3"])
    from heretic.cli import main as cli

    with pytest.raises(SystemExit):
        cli.main()
    text = capsys.readouterr().out
    assert "seed = 7  # HERETIC_SEED" in text
    assert "n_trials = 4  # config.toml:2" in text
    assert "max_kl = 0.3  # --set max_kl" in text
    assert 'select = "fewest_refusals_under_kl"  # default' in text
    Path("again.toml").write_text(text)
    assert resolve(Path("again.toml")).settings.seed == 7


def test_schema_is_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    schema = json.loads(heretic(capsys, monkeypatch, "config", "--schema").out)
    assert schema["additionalProperties"] is False and "n_trials" in schema["properties"]


def test_doctor_tells_of_the_machine_and_keeps_secrets(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HERETIC_STORAGE", "postgresql://me:hunter2@host/db")
    monkeypatch.setenv("HF_TOKEN", "hf_hunter2")
    found = json.loads(heretic(capsys, monkeypatch, "doctor", "--json").out)
    assert found["versions"]["torch"] and found["versions"]["numpy"] and "free" in found["ram"] and found["gpus"]
    assert "n_trials = 4" in found["settings"] and "hunter2" not in json.dumps(found)
    assert "hunter2" not in heretic(capsys, monkeypatch, "doctor").out
    config.write_text("n_trials = 'many'")
    broken = heretic(capsys, monkeypatch, "doctor")
    assert broken.status == 0 and "n_trials" in broken.out and "torch" in broken.out, "it works where settings do not"


def test_a_run_goes_on_by_its_name_and_says_so_to_scripts(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def do(*arguments: str, status: int = 0) -> dict[str, Any]:
        ran = heretic(capsys, monkeypatch, *arguments, "--json")
        assert ran.status == status, ran
        return json.loads(ran.out) if status == 0 else {"error": ran.err}

    monkeypatch.setenv("HERETIC_SEED", "7")
    first = do("run", "--trials", "2", "--run-name", "mine")
    assert first["run"] == "runs/mine" and first["trials"] == 2 and first["export"] is None
    monkeypatch.delenv("HERETIC_SEED")
    config.rename("elsewhere.toml")
    more = do(
        "mine", "--trials", "+2", "--save-to", "model"
    )  # without `run`, without the settings file, with another seed
    assert more["trials"] == 4 and more["pareto_front"]
    assert Path(more["export"]["written_to"]) == Path("model").resolve()
    kept = Path("runs/mine/config.toml").read_text()
    assert "n_trials = 4  # added later" in kept and "seed = 7  # HERETIC_SEED" in kept
    assert do("runs/mine")["trials"] == 4, "it is complete"
    exported = do("export", "mine", "--trial", "1", "-o", "other")
    assert exported["trial"] == 1 and exported["verification"]["divergence"] < 1e-5
    url = f"sqlite:///{Path('runs/mine/study.db').resolve()}"
    seen = do("status", "heretic", "--storage", url)
    assert (
        seen["n_complete"] == 4
        and seen["state"] == "complete"
        and seen["model"] == resolve(Path("elsewhere.toml")).settings.model
    )
    assert "[study-not-found]" in do("status", "other", "--storage", url, status=1)["error"]
    assert "[conflicting-options]" in do("mine", "--config", "elsewhere.toml", status=1)["error"]
    for wrong in ("+0", "many", "-3"):
        assert "[invalid-option]" in do("run", "mine", f"--trials={wrong}", status=1)["error"]
    watched = heretic(capsys, monkeypatch, "status", "mine", "--watch")
    assert watched.status == 0 and "trials per hour" in watched.out and "KL divergence" in watched.out


def test_the_shell_completes_commands_and_runs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("llama-1", "llama-2", "qwen"):
        (Path("runs") / name).mkdir(parents=True)
        (Path("runs") / name / "config.toml").touch()

    def complete(line: str) -> list[str]:
        monkeypatch.setenv("_HERETIC_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", line)
        monkeypatch.setenv("COMP_CWORD", str(line.count(" ")))
        return sorted(heretic(capsys, monkeypatch).out.split())

    assert complete("heretic co") == ["compare", "config"]
    assert complete("heretic export ll") == ["llama-1", "llama-2"]
    Path("config.toml").touch()
    assert complete("heretic sta") == ["status"], "also where `heretic` alone means `heretic run`"


def test_help_tells_the_exit_statuses_and_no_color_is_heeded() -> None:
    environment = {**os.environ, "FORCE_COLOR": "1"}
    command = [sys.executable, "-m", "heretic", "--help"]
    colored = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    plain = subprocess.run(
        command, env={**environment, "NO_COLOR": "1"}, capture_output=True, text=True, check=True
    ).stdout
    colors = re.compile(r"\x1b\[[0-9;]*3[0-7]m")
    assert colors.search(colored) and not colors.search(plain)
    assert all(f"{number} {meaning}" in " ".join(plain.split()) for number, meaning in EXIT_STATUSES.items())


def test_torchrun_is_refused(config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "4", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    ran = heretic(capsys, monkeypatch, "run")
    assert ran.status == 1 and ran.code == "started-by-torchrun" and not Path("runs").exists()


def test_a_device_that_fails_during_a_run_ends_it_with_a_message(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered")

    assert exit_status(fail) == 1 and "[device-failure]" in capsys.readouterr().err
    with pytest.raises(RuntimeError):
        exit_status(lambda: torch.ones(2).view(3))


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EMFILE, "Too many open files"),
        BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"),
        RuntimeError("can't start new thread"),
    ],
)
def test_a_limit_of_the_machine_is_named(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise error

    assert exit_status(fail) == 1 and "[machine-limit]" in capsys.readouterr().err


def test_a_deleted_current_folder_is_named(tmp_path: Path) -> None:
    code = "import os, sys; os.rmdir(os.getcwd()); sys.argv = ['heretic', 'status']; from heretic.cli.main import main; main()"
    (tmp_path / "gone").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "gone", capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1 and "[no-current-folder]" in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "out-of-memory"),
        (OSError("Cannot allocate memory (os error 12)"), "out-of-memory"),
        (OSError("unable to mmap 8 bytes: Cannot allocate memory (12)"), "out-of-memory"),
        (OSError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), "out-of-memory"),
        (OSError("No space left on device (os error 28)"), "disk"),
        (OSError("Too many open files (os error 24)"), "machine-limit"),
        (OSError(errno.ENOTCONN, "Transport endpoint is not connected", "/lost/x"), "disk"),
        (OSError(errno.ENOTCONN, "Transport endpoint is not connected"), None),
        (OSError(errno.EINVAL, "Invalid argument", "out of memory.txt"), None),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), None),
    ],
)
def test_errors_of_the_system_are_told_apart_also_by_their_text(error: OSError, code: str | None) -> None:
    found = machine_error(error)
    assert (found and found.code) == code
