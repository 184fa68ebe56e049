"""What the benchmarks share: their options, the head of a report, and a session opened as `heretic run` opens it."""

from __future__ import annotations

import before_torch  # isort: skip  # noqa: F401

import argparse
import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from heretic.hardware.gpus import gpus_here
from heretic.interrupt import StopSignal
from heretic.pipeline.prepare import prepare_run
from heretic.progress import NULL_REPORTER
from heretic.runs.environment import now, versions
from heretic.runs.folder import RunFolder
from heretic.search.summary import StudyReporter
from heretic.session.session import Session, open_session
from heretic.settings.sources import resolve

ROLES = ("harmful_train", "harmless_train", "harmful_eval", "harmless_eval")
RESULTS = Path(__file__).parent / "results"


def options(doc: str | None, out: str, *, assets: bool = True) -> argparse.ArgumentParser:
    """A parser with the options that most benchmarks have."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    if assets:
        parser.add_argument("assets", type=Path, help="a folder with a model folder and four prompt files")
        parser.add_argument("--model", default="qwen2.5-coder-0.5b-instruct")
    parser.add_argument("--out", type=Path, default=RESULTS / out)
    return parser


def head(arguments: argparse.Namespace) -> dict[str, Any]:
    """How, when, where and with what a report was made."""
    script, *words = sys.argv
    shown = ["ASSETS" if word == str(getattr(arguments, "assets", None)) else word for word in words]
    return {
        "command": shlex.join(["python", f"benchmarks/{Path(script).name}", *shown]),
        "date": now(),
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "platform": platform.platform()},
        "gpus": [gpu.name for gpu in gpus_here()],
        "versions": versions(),
        "model": Path(arguments.model).name,
    }


def write(report: Mapping[str, Any], out: Path) -> None:
    """Write a report."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=2) + "\n")


def prompt_settings(assets: Path, train: int = 100, evaluation: int = 50) -> list[str]:
    """Assignments of the four prompt sets, and of float32, so that every CPU measures the same; later ones override it."""
    found = ['dtypes=["float32"]']
    for role in ROLES:
        source = (assets / "prompts" / f"{role}.txt").resolve()
        wanted = train if role.endswith("train") else evaluation
        found += [f"prompts.{role}.source={source}", f"prompts.{role}.split=train[:{wanted}]"]
    return found


def write_prompts(source: Path, target: Path, train: int, evaluation: int) -> None:
    """The first so many prompts of each set, as files in a folder. Raises SystemExit where there are fewer."""
    target.mkdir(parents=True, exist_ok=True)
    for role in ROLES:
        wanted = train if role.endswith("train") else evaluation
        text = (source / f"{role}.txt").read_text(encoding="utf-8")
        found = [line.strip() for line in text.splitlines() if line.strip()][:wanted]
        if len(found) < wanted:
            sys.exit(f"{role}.txt has {len(found)} prompts, {wanted} are wanted")
        (target / f"{role}.txt").write_text("\n".join(found) + "\n", encoding="utf-8")


def opened(
    assets: Path, model: str, assignments: Sequence[str], folder: Path, reporter: StudyReporter = NULL_REPORTER
) -> tuple[Session, RunFolder]:
    """A session as `heretic run` opens it, and its folder."""
    given = {"model": str((assets / model).resolve()), "runs_dir": str(folder)}
    settings = resolve(None, given, [*prompt_settings(assets), *assignments], {}).settings
    inputs = prepare_run(settings, force=False, reporter=reporter)
    inputs.folder.create()
    session = open_session(
        settings, inputs.checkpoint, inputs.prompts, inputs.plan, inputs.folder, reporter, StopSignal()
    )
    return session, inputs.folder


def cpu_name() -> str:
    """What the machine calls its processor."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
