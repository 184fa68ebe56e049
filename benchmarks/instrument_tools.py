"""Makes the models that instrument.py measures: each tool at its defaults, as a user would run it, on the same prompts."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import heretic_llm as peer
from common import ROLES
from turns import Job

TEMAQ = "temaq-abliterated==1.1.1"
RUN = "run"
TEXTS = {"harmful": ("harmful_train", "harmful_eval"), "harmless": ("harmless_train", "harmless_eval")}


@dataclass(frozen=True)
class Task:
    """What a tool gets: a model, prompts, a seed, and the time of another tool."""

    model: Path
    prompts: Path  # folder with a file for each role
    folder: Path  # of this tool, model and seed
    environments: Path  # of peers
    seed: int
    system_prompt: str
    limits: Mapping[str, float]  # `seconds` and `cpu_seconds` for tools that can be limited
    batch_size: int | None = None  # of heretic-llm; None: it searches for one
    extra: Sequence[str] = ()  # further settings of ours

    def settings(self) -> list[str]:
        """Return the options of heretic that are not defaults: prompts, system prompt, seed."""
        words: list[str] = []
        for role in ROLES:
            words += ["--set", f"prompts.{role}.source={self.prompts / f'{role}.txt'}"]
            words += ["--set", f"prompts.{role}.split=train"]
        for assignment in (f"system_prompt={self.system_prompt}", f"seed={self.seed}", *self.extra):
            words += ["--set", assignment]
        return words


def made(task: Task, tool: str) -> dict[str, Any]:
    """Return how a tool made its model: folder, seconds, memory; runs the tool unless it has done so before.

    Raises:
        SystemExit: the tool failed, or wrote no model.
    """
    record = task.folder / "made.json"
    if not record.exists():
        shutil.rmtree(task.folder, ignore_errors=True)
        task.folder.mkdir(parents=True)
        before = cpu_seconds_of_children()
        job, told = TOOLS[tool](task)
        found = {
            **told,
            "seconds": round(job.clock(), 1),
            "cpu_seconds": round(cpu_seconds_of_children() - before, 1),
            "peak_gb": job.peak_gb,
        }
        if not (Path(found["model"]) / "config.json").exists():
            sys.exit(f"{tool} wrote no model into {found['model']}")
        record.write_text(json.dumps(found, indent=2) + "\n")
    loaded: dict[str, Any] = json.loads(record.read_text())
    return loaded


def cpu_seconds_of_children() -> float:
    """Return the CPU seconds of all processes that have ended, user and system."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def ours(task: Task) -> tuple[Job, dict[str, Any]]:
    """Run `heretic run`; the selected trial is its model."""
    words = ["run", str(task.model), "--save-to", "model", "--run-name", RUN, "--plain", *task.settings()]
    job = finished(Job([sys.executable, "-m", "heretic", *words], task.folder, own_environment()))
    return job, {"model": str(task.folder / "model"), **of_our_run(task.folder)}


def of_our_run(folder: Path) -> dict[str, Any]:
    """Return the number of trials of our run and what it says of its model."""
    study = sqlite3.connect(f"file:{folder / 'runs' / RUN / 'study.db'}?mode=ro", uri=True)
    try:
        counts = dict(study.execute("select state, count(*) from trials group by state").fetchall())
    finally:
        study.close()
    scores = json.loads((folder / "model" / "manifest.json").read_text())["scores"]["written"]
    return {
        "trials": sum(counts.values()),
        "says": {"refusals": scores["refusals"], "kl": scores["divergence"]["mean"]},
    }


def arditi(task: Task) -> tuple[Job, dict[str, Any]]:
    """Run arditi.py: one direction, strength 1, no search."""
    script = Path(__file__).with_name("arditi.py")
    words = [str(task.model), str(task.folder / "model"), *task.settings()]
    job = finished(Job([sys.executable, str(script), *words], task.folder, own_environment()))
    return job, {"model": str(task.folder / "model"), "says": json.loads(job.lines[-1].text)}


def heretic_llm(task: Task) -> tuple[Job, dict[str, Any]]:
    """Run heretic-llm until the limit, then press Ctrl+C; save the model with the fewest refusals at a KL of at most 0.1.

    CPU seconds, because neighbors slow the tools down unequally; at least one trial.
    """
    python = peer.install(task.environments / "heretic-llm-env")
    changed = {"batch_size": task.batch_size} if task.batch_size else {}
    text = peer.default_configuration(
        task.model, task.prompts, seed=task.seed, system_prompt=task.system_prompt, changed=changed
    )
    (task.folder / "config.toml").write_text(text)
    menus = peer.Menus(task.folder, 1)
    job = Job([str(python.with_name("heretic"))], task.folder, peer.environment(os.environ), menus)
    finished(
        job, task.limits["cpu_seconds"], ready=lambda: any("Running trial 2 of" in line.text for line in job.lines)
    )
    if not menus.saved:
        sys.exit(f"heretic-llm saved no model, see {task.folder / 'output.txt'}")
    ((trial, folder),) = menus.saved.items()
    point = next(p for p in menus.front if p.trial == trial)
    measured = peer.times(job.lines)
    return job, {
        "model": str(folder),
        "trials": measured["trials_measured"],
        "batch_size": measured["batch_size"],
        "says": {"refusals": point.refusals, "kl": point.kl},
        "versions": peer.installed(python),
    }


def temaq(task: Task) -> tuple[Job, dict[str, Any]]:
    """Run temaq-abliterated with the limit as its search's time budget; it picks the model itself."""
    program = installed_temaq(task.environments / "temaq-env")
    for kind, roles in TEXTS.items():
        texts = [(task.prompts / f"{role}.txt").read_text(encoding="utf-8") for role in roles]
        (task.folder / f"{kind}.txt").write_text("".join(texts), encoding="utf-8")
    words = [str(task.model), "--workdir", str(task.folder / "work"), "--output", str(task.folder / "model")]
    words += ["--select", "auto", "--verify", "full", "--seed", str(task.seed), "--eval-dtype", "bfloat16"]
    words += ["--harmful-file", str(task.folder / "harmful.txt"), "--harmless-file", str(task.folder / "harmless.txt")]
    words += ["--time-budget-min", f"{task.limits['seconds'] / 60:.1f}"]
    job = finished(Job([str(program), *words], task.folder, peer.environment(os.environ)))
    summary = json.loads((task.folder / "work" / "report" / "run_summary.json").read_text())
    selected: dict[str, Any] = next((each for each in summary["candidates"] if each["selected"]), {})
    return job, {
        "model": str(task.folder / "model"),
        "trials": summary["attempts"],
        "says": {key: selected.get(key) for key in ("refusal", "refusal_n", "kl", "kl_first")},
        "ended": "time" if summary["budget_stopped"] else "by itself",
    }


def installed_temaq(folder: Path) -> Path:
    """Return the program in its environment in `folder`, made if it is not there."""
    program = folder / "bin" / "temaq-abliterated"
    if not program.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        torch = f"torch=={version('torch').partition('+')[0]}"
        for packages in ((torch,), (torch, TEMAQ)):
            subprocess.run([str(folder / "bin" / "python"), "-m", "pip", "install", "-qq", *packages], check=True)
    return program


TOOLS: dict[str, Callable[[Task], tuple[Job, dict[str, Any]]]] = {
    "ours": ours,
    "arditi": arditi,
    "heretic-llm": heretic_llm,
    "temaq": temaq,
}


def own_environment() -> dict[str, str]:
    """Return the environment for our own commands."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HERETIC_")}
    return {**kept, "HF_HUB_OFFLINE": "1", "COLUMNS": "500", "PYTHONUNBUFFERED": "1"}


def finished(job: Job, cpu_seconds: float = float("inf"), ready: Callable[[], bool] = lambda: True) -> Job:
    """Run a job to its end; interrupt it once it has used so many CPU seconds and is ready for that."""
    interrupted = False
    try:
        job.resume()
        while not job.ended():
            if not interrupted and job.cpu_seconds() >= cpu_seconds and ready():
                job.signal(signal.SIGINT)
                interrupted = True
            time.sleep(0.2)
    finally:
        job.kill()
    return job
