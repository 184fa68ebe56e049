"""The commands, as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from heretic import __version__
from heretic.cli import shorthand
from heretic.settings.layers import resolve
from tests.command import heretic

COMMANDS = ["run", "preflight", "status", "export", "chat", "compare", "evaluate", "config", "doctor", "demo"]


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
    assert "Settings from config.toml" in ran and "Front of 4 trials" in ran and "Chosen: trial" in ran
    run = next(Path("runs").iterdir())
    assert "complete" in do("status")
    status = json.loads(do("status", run.name, "--json"))
    assert status["done"] == 4 and status["front"]

    number = status["front"][0]["trial"]
    exported = do("export", run.name, "--trial", str(number), "-o", "model")
    assert "verified" in exported and (Path("model") / "manifest.json").is_file()
    evaluated = json.loads(do("evaluate", "model", "--against", str(llama), "--json"))
    assert evaluated["refusals"] == status["front"][0]["refusals"]
    assert evaluated["divergence"]["mean"] == pytest.approx(status["front"][0]["divergence"]["mean"], rel=1e-2)
    itself = json.loads(do("evaluate", str(llama), "--against", str(llama), "--json"))
    assert itself["divergence"]["max"] < 1e-6


def test_config_command(config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HERETIC_SEED", "7")
    heretic(capsys, monkeypatch, "config", "--set", "max_kl=0.3")
    monkeypatch.setattr("sys.argv", ["heretic", "config", "--set", "max_kl=0.3"])
    from heretic import cli

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
    assert found["versions"]["torch"] and "free" in found["ram"] and found["gpus"]
    assert "n_trials = 4" in found["settings"] and "hunter2" not in json.dumps(found)
    assert "hunter2" not in heretic(capsys, monkeypatch, "doctor").out
    config.write_text("n_trials = 'many'")
    broken = heretic(capsys, monkeypatch, "doctor")
    assert broken.status == 0 and "n_trials" in broken.out and "torch" in broken.out, "it works where settings do not"
