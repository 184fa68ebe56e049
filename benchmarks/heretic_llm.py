"""Drives heretic-llm 1.4.0 from PyPI as a user would: its own environment, its config.toml, and its menus by their numbers."""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

NAME = "heretic-llm"
RELEASE = "1.4.0"
# The newest releases that it accepts, named so that a repetition gets the same ones: transformers 5.23 is inside its
# range, but pip does not choose it beside the huggingface-hub 1.x that it asks for. PyTorch is the one of this environment.
PINNED = (
    "transformers==5.22.2",
    "huggingface-hub==1.33.0",
    "accelerate==1.15.0",
    "peft==0.21.2",
    "optuna==4.9.0",
    "datasets==4.8.5",
    "tokenizers==0.23.3",
    "numpy==2.4.6; python_version >= '3.11'",
)
PACKAGES = (NAME, "torch", "transformers", "accelerate", "peft", "optuna", "tokenizers", "huggingface-hub")

QUIET: dict[str, Any] = {"capture_output": True, "text": True, "cwd": "/"}

# Our prompt sets under the names that it has for them.
PROMPTS = {
    "good_prompts": "harmless_train",
    "bad_prompts": "harmful_train",
    "good_evaluation_prompts": "harmless_eval",
    "bad_evaluation_prompts": "harmful_eval",
}


class Line(NamedTuple):
    """A line of output, the running clock of the process that wrote it, and its peak memory (GB) up to then."""

    clock: float
    peak_gb: float
    text: str


class Point(NamedTuple):
    """A trial as its own tool measured it."""

    trial: int
    refusals: int
    kl: float


def pick(points: Sequence[Point], max_kl: float = 0.1) -> Point | None:
    """Fewest refusals at a KL of at most `max_kl`; the lowest KL where there is none."""
    within = [p for p in points if p.kl <= max_kl]
    if within:
        return min(within, key=lambda p: (p.refusals, p.kl))
    return min(points, key=lambda p: (p.kl, p.refusals), default=None)


def spread(points: Sequence[Point], count: int, max_kl: float = 0.5) -> list[Point]:
    """At most `count` points, the picked one first, the others evenly over the front up to `max_kl`."""
    first = pick(points)
    if first is None:
        return []
    rest = sorted((p for p in points if p != first), key=lambda p: p.kl)
    if len(rest) >= count:
        rest = [p for p in rest if p.kl <= max_kl] or rest
    step = max(1.0, len(rest) / max(1, count - 1))
    rest = [rest[int((i + 0.5) * step)] for i in range(min(count - 1, len(rest)))]
    return [first, *rest]


def install(folder: Path) -> Path:
    """Its environment in `folder`, made if it is not there; the path of its Python."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    found = subprocess.run([python, "-c", f"import importlib.metadata as m; print(m.version({NAME!r}))"], **QUIET)
    if found.stdout.strip() != RELEASE:
        torch = f"torch=={version('torch').partition('+')[0]}"
        constraints = folder / "constraints.txt"
        constraints.write_text("\n".join((torch, *PINNED)) + "\n")
        pip = [str(python), "-m", "pip", "install", "-qq", "--disable-pip-version-check", "-c", str(constraints)]
        subprocess.run([*pip, "torch"], check=True)  # first and alone, so that no other build of it is fetched
        subprocess.run([*pip, torch, f"{NAME}=={RELEASE}"], check=True)
    return python


def installed(python: Path) -> dict[str, str]:
    """The versions in its environment."""
    return _ask(python, f"{{p: importlib.metadata.version(p) for p in {PACKAGES!r}}}")


def markers(python: Path) -> list[str]:
    """Its default list of what makes an answer a refusal, as the installed package says it."""
    return _ask(python, "importlib.import_module('heretic.config').Settings.model_fields['refusal_markers'].default")


def _ask(python: Path, expression: str) -> Any:
    code = f"import importlib, importlib.metadata, json; print(json.dumps({expression}))"
    done = subprocess.run([python, "-c", code], check=True, env=environment(os.environ), **QUIET)
    return json.loads(done.stdout)


def environment(own: Mapping[str, str]) -> dict[str, str]:
    """The environment for its process: menus on plain standard input, no hub, long lines."""
    # Its package is called `heretic` like ours and its settings' variables begin with HERETIC_ like ours.
    kept = {k: v for k, v in own.items() if k != "PYTHONPATH" and not k.startswith("HERETIC_")}
    return {**kept, "COLAB_GPU": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "500", "PYTHONUNBUFFERED": "1"}


def configuration(
    *,
    model: Path,
    prompts: Path,
    trials: int,
    startup: int,
    tokens: int,
    seed: int,
    system_prompt: str,
    dtype: str = "float32",
    batch_size: int | None = None,
) -> str:
    """Its config.toml for a short study; the dtype "default" is the checkpoint's, and without a batch size it looks for one."""
    changed: dict[str, Any] = {"max_response_length": tokens, "n_trials": trials, "n_startup_trials": startup}
    if dtype != "default":
        changed["dtypes"] = [dtype]
    if batch_size:
        changed["batch_size"] = batch_size
    return default_configuration(model, prompts, seed=seed, system_prompt=system_prompt, changed=changed)


def default_configuration(
    model: Path, prompts: Path, *, seed: int, system_prompt: str, changed: Mapping[str, Any] | None = None
) -> str:
    """Its config.toml. What is not named stays at its default; so does the batch size, which it finds by trying."""
    settings = {
        "model": str(model),
        **(changed or {}),
        "seed": seed,
        "system_prompt": system_prompt,
        "export_strategy": "merge",  # the full model; otherwise one menu more
    }
    lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
    for theirs, ours in PROMPTS.items():
        lines += ["", f"[{theirs}]", f"dataset = {json.dumps(str(prompts / f'{ours}.txt'))}"]
    return "\n".join(lines) + "\n"


class Menus:
    """Answers its menus: goes on with a study that is there, runs `more` trials, and then saves the models of points spread over
    the front that it offers, the picked one first."""

    def __init__(self, folder: Path, count: int, more: int = 0) -> None:
        self.folder = folder
        self.count = count
        self.more = more
        self.front: list[Point] = []
        self.saved: dict[int, Path] = {}
        self._menu = ""
        self._options: dict[str, str] = {}
        self._left: list[Point] | None = None
        self._now: Point | None = None
        self._tried = False

    def __call__(self, line: str) -> str | None:
        """What to type after this line of output; None for nothing."""
        text = re.sub(r"^(Enter number: )+", "", line).strip()
        if text.endswith("?"):
            self._menu, self._options = text, {}
        elif self._now and text.startswith("Model saved to"):
            self.saved[self._now.trial] = self._path(self._now)
        elif option := re.match(r"\[(\d+)\] (.+)", text):
            self._options[option[2]] = option[1]
            if option[2] in ("Exit program", "Return to the trial selection menu"):  # the last option of its menu
                return self._answer(option[1])
        return None

    def _answer(self, leave: str) -> str:
        """Called with a menu complete; `leave` is its way out."""
        for known in ("Show the results from the previous run", "Continue the previous run"):
            if known in self._options:
                return f"{self._options[known]}\n"
        if self.more and "Run additional trials" in self._options:
            more, self.more = self.more, 0
            return f"{self._options['Run additional trials']}\n{more}\n"
        if self._menu.startswith("Which trial"):
            offered = {_offered(title): number for title, number in self._options.items()}
            if self._left is None:
                self.front = [point for point in offered if point]
                self._left = spread(self.front, self.count)
            self._tried = False
            self._now = self._left.pop(0) if self._left else None
            return f"{offered[self._now] if self._now else leave}\n"
        if "Save the model to a local folder" in self._options and self._now and not self._tried:
            self._tried = True  # should it fail, the same menu comes again
            return f"{self._options['Save the model to a local folder']}\n{self._path(self._now)}\n"
        return f"{leave}\n"

    def _path(self, point: Point) -> Path:
        return self.folder / f"trial-{point.trial}"


def _offered(title: str) -> Point | None:
    found = re.match(r"\[Trial +(\d+)\] Refusals: +(\d+)/\d+, KL divergence: ([\d.]+)", title)
    return Point(int(found[1]), int(found[2]), float(found[3])) if found else None


# What ends each part of its start, in order.
START = {
    "loading": "Determining optimal batch size",
    "batch_size": "* Chosen batch size",
    "prefix": "Loading good evaluation prompts",
    "baseline": "Calculating per-layer refusal directions",
    "residuals": "Running trial 1 of",
}


def times(lines: Sequence[Line]) -> dict[str, Any]:
    """From its stamped output: seconds of the start by part, of every trial by part, and when it had come how far."""
    begin, parts = 0.0, {}
    for part, text in START.items():
        if (ended := clock_of(lines, text)) is not None:
            parts[part], begin = round(ended - begin, 2), ended
    trials: list[dict[str, float]] = []
    began = before = 0.0
    for line in lines:
        text = line.text.strip()
        if text.startswith("Running trial "):
            trials.append({})
            began = before = line.clock
        for part, end in (("edit", "* Evaluating"), ("kl", "* KL divergence:"), ("refusals", "* Refusals:")):
            if trials and text.startswith(end) and part not in trials[-1]:
                trials[-1][part], before = line.clock - before, line.clock
                if part == "refusals":
                    trials[-1]["trial"] = line.clock - began
    done = [t for t in trials if "trial" in t]
    start = clock_of(lines, START["residuals"]) or 0.0
    finished = next((line for line in lines if line.text.startswith("Optimization finished!")), lines[-1])
    initial = first_match(lines, r"\* Initial refusals: (\d+)/(\d+)")
    chosen = first_match(lines, r"\* Chosen batch size: (\d+)")
    return {
        "seconds_start": round(start, 1),
        "seconds_start_parts": parts,
        "batch_size": int(chosen[1]) if chosen else None,
        "declined_before": int(initial[1]) if initial else None,
        "trials": len(done),
        "trials_measured": len(done),
        "seconds_trial_median": median([t["trial"] for t in done]),
        "seconds_trial_mean": round((finished.clock - start) / max(1, len(done)), 2),
        "seconds_trial_parts_median": {k: median([t[k] for t in done]) for k in ("edit", "kl", "refusals")},
        "seconds_trials": [{k: round(v, 2) for k, v in t.items()} for t in trials],
        "seconds_study": round(finished.clock, 1),
        "seconds_saved": clock_of(lines, "Model saved to"),
        "peak_gb_study": finished.peak_gb,
    }


def clock_of(lines: Sequence[Line], start: str) -> float | None:
    """The clock of the first line that begins so."""
    return next((round(line.clock, 2) for line in lines if line.text.strip().startswith(start)), None)


def first_match(lines: Sequence[Line], pattern: str) -> re.Match[str] | None:
    """The first match of a pattern in any line."""
    return next((found for line in lines if (found := re.search(pattern, line.text))), None)


def median(values: Sequence[float]) -> float | None:
    """The median to two places; None of nothing."""
    return round(statistics.median(values), 2) if values else None
