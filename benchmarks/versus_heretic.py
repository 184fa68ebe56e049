"""Our tool and heretic-llm 1.4.0 (PyPI) on the same model, prompts, system prompt, trials and seed, taking turns.

    python benchmarks/versus_heretic.py ASSETS [--trials 30] [--out benchmarks/results/versus_heretic.json]

ASSETS as for study.py. heretic-llm gets an environment of its own in the folder --work, which is kept. Both run as a
user would run them, each stopped while the other has its turn (--slice seconds), so that a noisy machine hurts both;
times are by clocks that stand still meanwhile. To look on: tail -f DIR/run-*/output.txt. Points of both fronts are then
reloaded from disk and measured by one scorer, `heretic evaluate`. Linux only (process groups, /proc).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import heretic_llm as peer
from common import ROLES, cpu_name, now, versions, write_prompts
from heretic_llm import Line, Point, clock_of, first_match, median
from study import point
from turns import Job, take_turns

from heretic.runs.status import read_status
from heretic.search.hypervolume import hypervolume_history
from heretic.search.pareto import pareto_front

SYSTEM_PROMPT = "You are a helpful assistant."  # heretic-llm's default; both get it
STARTUP_TRIALS = 10
MAX_KL = 0.5  # of the hypervolume, and of the points that are measured again
RUN = "run"
TOGETHER = 0.2  # seconds between lines of trials that ran in the same passes


def main() -> None:
    """Run both, measure both fronts, print tables, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("assets", type=Path)
    parser.add_argument("--model", default="qwen2.5-coder-0.5b-instruct")
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "default"),
        help="number format of both studies, or each tool's own",
    )
    parser.add_argument(
        "--their-dtype", choices=("float32", "default"), help="of heretic-llm, if another one is faster"
    )
    parser.add_argument("--batch-size", type=int, help="of heretic-llm, instead of its search for one")
    parser.add_argument("--train", type=int, default=100, help="prompts of each kind for the direction")
    parser.add_argument("--eval", type=int, default=50, help="prompts of each kind for the evaluation")
    parser.add_argument("--points", type=int, default=6, help="points of each front to measure again")
    parser.add_argument("--slice", type=float, default=60, help="seconds of a turn")
    parser.add_argument("--their-markers", action="store_true", help="count refusals by heretic-llm's list as well")
    parser.add_argument("--set", action="append", default=[], dest="extra", help="a setting of ours for the run")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "versus_heretic")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "versus_heretic.json")
    arguments = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda n, _: sys.exit(128 + n))
    work = arguments.work.resolve()
    python = peer.install(work / "heretic-llm-env")
    report = {
        "command": shlex.join(["python", "benchmarks/versus_heretic.py", "ASSETS", *given(parser, arguments)]),
        "date": now(),
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "platform": platform.platform()},
        "versions": {"ours": versions(), "theirs": peer.installed(python)},
        "settings": {
            **{k: getattr(arguments, k) for k in ("model", "trials", "tokens", "seed", "train", "eval", "slice")},
            **{"n_startup_trials": STARTUP_TRIALS, "dtype": arguments.dtype, "system_prompt": SYSTEM_PROMPT},
            "their_dtype": arguments.their_dtype or arguments.dtype,
            "batch_size": arguments.batch_size,
            "ours": arguments.extra,
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        },
    }
    race = Race(arguments, work, python)
    report |= race.run()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")  # should the second part fail
    report |= race.measure_again()
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    show(report)


def given(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> list[str]:
    """The options that differ from their defaults and change what is measured."""
    words: list[str] = []
    for action in parser._actions:
        value = getattr(arguments, action.dest, None)
        if not action.option_strings or value == action.default or action.dest in ("help", "work", "out"):
            continue
        for one in value if isinstance(value, list) else [value]:
            words += [action.option_strings[0]] if one is True else [action.option_strings[0], str(one)]
    return words


class Race:
    """Both studies, and the points that they came to."""

    def __init__(self, arguments: argparse.Namespace, work: Path, python: Path) -> None:
        self.arguments, self.python = arguments, python
        self.model = (arguments.assets / arguments.model).resolve()
        self.prompts, self.our_folder, self.their_folder = work / "prompts", work / "run-ours", work / "run-theirs"
        for folder in (self.prompts, self.our_folder, self.their_folder):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        write_prompts(arguments.assets / "prompts", self.prompts, arguments.train, arguments.eval)
        self.menus = peer.Menus(self.their_folder, arguments.points)
        # heretic-llm's settings in the environment begin with HERETIC_ like ours
        kept = {k: v for k, v in os.environ.items() if not k.startswith("HERETIC_")}
        self.environment = {**kept, "HF_HUB_OFFLINE": "1", "COLUMNS": "500", "PYTHONUNBUFFERED": "1"}
        self.our_front: list[Point] = []
        self.declined_before = 0

    def run(self) -> dict[str, Any]:
        """Both studies, taking turns; what their output and our study say about them."""
        ours, theirs = self._our_job(), self._their_job()
        take_turns((theirs, ours), self.arguments.slice)
        seen = read_status(RUN, str(self.our_folder / "runs"), {}).summary
        self.our_front = [Point(**point(r)) for r in pareto_front(seen.results)]
        report = {
            "ours": {**our_times(ours, self.our_folder), "declined_before": seen.original_refusals},
            "theirs": peer.times(theirs.lines),
        }
        for job, points, part in ((ours, self.our_front, "ours"), (theirs, self.menus.front, "theirs")):
            report[part] |= {"seconds_process": round(job.clock(), 1), "turns": len(job.turns), "peak_gb": job.peak_gb}
            picked = peer.pick(points)
            report[part] |= {"picked": picked and picked._asdict(), "front": [p._asdict() for p in points]}
        return report

    def measure_again(self) -> dict[str, Any]:
        """Points of both fronts, reloaded from disk and measured by our scorer; what that says about the fronts."""
        counted = {"our_markers": None} | (
            {"their_markers": peer.markers(self.python)} if self.arguments.their_markers else {}
        )
        original = {name: self._evaluate(self.model, by) for name, by in counted.items()}
        again: dict[str, list[dict[str, Any]]] = {"ours": [], "theirs": []}
        for p in peer.spread(self.our_front, self.arguments.points):
            folder = self._our_model(p)
            again["ours"].append({**p._asdict(), **{name: self._evaluate(folder, by) for name, by in counted.items()}})
            shutil.rmtree(folder)
        for p in peer.spread(self.menus.front, self.arguments.points):
            if folder_of := self.menus.saved.get(p.trial):
                measured = {name: self._evaluate(folder_of, by) for name, by in counted.items()}
                again["theirs"].append({**p._asdict(), **measured})
                shutil.rmtree(folder_of)
            else:
                print(f"heretic-llm did not save its trial {p.trial}", file=sys.stderr)
        return {
            "again": {"original": original, **again},
            "comparison": {name: compare(again, name, original[name]["refusals"]) for name in counted},
        }

    def _our_job(self) -> Job:
        arguments = self.arguments
        command = self._ours("run", str(self.model), "--trials", str(arguments.trials), "--save-to", "picked")
        command += ["--run-name", RUN, *self._measured(arguments.dtype)]
        for assignment in (
            f"search.n_startup_trials={STARTUP_TRIALS}",
            "search.patience=0",
            f"seed={arguments.seed}",
            *arguments.extra,
        ):
            command += ["--set", assignment]
        # It may try out by the wall clock how many trials to run together.
        return Job(command, self.our_folder, self.environment, whole_until="Trial ")

    def _their_job(self) -> Job:
        arguments = self.arguments
        text = peer.configuration(
            model=self.model,
            prompts=self.prompts,
            trials=arguments.trials,
            startup=STARTUP_TRIALS,
            tokens=arguments.tokens,
            seed=arguments.seed,
            system_prompt=SYSTEM_PROMPT,
            dtype=arguments.their_dtype or arguments.dtype,
            batch_size=arguments.batch_size,
        )
        (self.their_folder / "config.toml").write_text(text)
        command = [str(self.python.with_name("heretic"))]
        # its search for a batch size compares times by the wall clock
        whole_until = "" if arguments.batch_size else peer.START["batch_size"]
        return Job(command, self.their_folder, peer.environment(self.environment), self.menus, whole_until)

    def _ours(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "heretic", *words]

    def _measured(self, dtype: str = "float32") -> list[str]:
        """The settings that say what is measured: for the run, and for the scorer, which measures in float32."""
        words: list[str] = []
        for role in ROLES:
            words += ["--set", f"prompts.{role}.source={self.prompts / f'{role}.txt'}"]
            words += ["--set", f"prompts.{role}.split=train"]
        for assignment in (
            f"max_response_length={self.arguments.tokens}",
            f"system_prompt={SYSTEM_PROMPT}",
            *([f'dtypes=["{dtype}"]'] if dtype != "default" else ()),
        ):
            words += ["--set", assignment]
        return words

    def _our_model(self, p: Point) -> Path:
        """The folder with the model of one of our trials: what the run wrote, or an export."""
        picked = self.our_folder / "picked"
        if p == peer.pick(self.our_front) and picked.exists():
            return picked
        folder = self.our_folder / f"trial-{p.trial}"
        self._do(self._ours("export", str(self.our_folder / "runs" / RUN), "--trial", str(p.trial), "-o", str(folder)))
        return folder

    def _evaluate(self, model: Path, markers: Sequence[str] | None) -> dict[str, Any]:
        """Refusals and KL of a model folder, by `heretic evaluate`."""
        command = self._ours("evaluate", str(model), "--against", str(self.model), "--json", *self._measured())
        if markers:
            command += ["--set", f"refusal_markers={json.dumps(list(markers))}"]
        found = json.loads(self._do(command))
        return {"refusals": found["refusals"], "kl": float(found["divergence"]["mean"])}

    def _do(self, command: Sequence[str]) -> str:
        done = subprocess.run(command, cwd=self.our_folder, env=self.environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{shlex.join(command)}\nended with status {done.returncode}:\n{done.stdout}{done.stderr}"[-5000:])
        return done.stdout


def our_times(job: Job, folder: Path) -> dict[str, Any]:
    """From our stamped output: seconds of the start, of every trial, and when it had come how far.

    Trials that are printed together ran together; each gets its share. What the study does after the trials asked for, such
    as settling one that was left early, is charged to them in the mean.
    """
    trials = [line for line in job.lines if re.match(r"Trial \d+ \(\d+ of \d+\)", line.text)]
    if not trials:
        sys.exit("our run printed no trials")
    start = before = first_trial(job, folder)
    passes: list[list[Line]] = []
    for line in trials:
        if passes and line.clock - passes[-1][-1].clock < TOGETHER:
            passes[-1].append(line)
        else:
            passes.append([line])
    seconds: list[float] = []
    for together in passes:
        seconds += [(together[-1].clock - before) / len(together)] * len(together)
        before = together[-1].clock
    whole = [bool(re.match(r"Trial \d+ \(.*?\): \d+ of \d+ refused", line.text)) for line in trials]
    asked = first_match(trials[-1:], r"of (\d+)\)")
    return {
        "seconds_start": round(start, 1),
        "trials": len(trials),
        "trials_measured": sum(whole),
        "passes": len(passes),
        "seconds_trial_median": median(seconds),
        "seconds_trial_measured_median": median([s for s, w in zip(seconds, whole, strict=True) if w]),
        "seconds_trial_mean": round((before - start) / min(len(trials), int(asked[1]) if asked else len(trials)), 2),
        "seconds_trials": [round(s, 2) for s in seconds],
        "seconds_study": round(before, 1),
        "seconds_saved": clock_of(job.lines, "written to"),
        "peak_gb_study": trials[-1].peak_gb,
        "lines": [f"{line.clock:.1f} {line.text}" for line in trials],
    }


def first_trial(job: Job, folder: Path) -> float:
    """The running clock at which our first trial began: nothing is printed then, but the study says when it was."""
    with suppress(sqlite3.Error, TypeError, ValueError):
        study = sqlite3.connect(f"file:{folder / 'runs' / RUN / 'study.db'}?mode=ro", uri=True)
        began = study.execute("select min(datetime_start) from trials").fetchone()[0]
        study.close()
        if (clock := job.clock_at(datetime.fromisoformat(began).timestamp())) is not None:
            return clock
    return next((line.clock for line in job.lines if first_match([line], "original model declines")), 0.0)


def compare(again: Mapping[str, Sequence[Mapping[str, Any]]], by: str, before: int) -> dict[str, Any]:
    """The two re-measured fronts: hypervolumes, and which points of one nothing of the other matches in both."""
    points = {name: [(p["trial"], p[by]["refusals"], p[by]["kl"]) for p in again[name]] for name in ("ours", "theirs")}

    def unmatched(of: str, other: str) -> list[int]:
        return [
            trial
            for trial, refusals, kl in points[of]
            if not any(r <= refusals and k <= kl for _, r, k in points[other])
        ]

    worse, better = unmatched("theirs", "ours"), unmatched("ours", "theirs")
    volumes = {name: hypervolume([(k, r) for _, r, k in points[name]], before) for name in points}
    return {
        "ours_nowhere_worse": not worse,
        "their_trials_unmatched_by_ours": worse,
        "our_trials_unmatched_by_theirs": better,
        "hypervolume": volumes,
    }


def hypervolume(points: Sequence[tuple[float, int]], before: int) -> float | None:
    """The share of the rectangle (KL up to 0.5, refusals up to the original's) that (KL, refusals) points dominate."""
    if not before:
        return None
    shares = hypervolume_history(points, (MAX_KL, before))
    return round(shares[-1], 4) if shares else 0.0


def show(report: Mapping[str, Any]) -> None:
    """Print the tables."""
    ours, theirs, settings = report["ours"], report["theirs"], report["settings"]
    print(f"{settings['model']}, {settings['trials']} trials, seed {settings['seed']}; {report['machine']['cpu']}")
    print(f"\n{'':<34}{'ours':>12}{'heretic-llm':>13}{'ours/theirs':>13}")
    for key, name in (
        ("seconds_start", "start, up to the first trial (s)"),
        ("seconds_trial_median", "a trial, median (s)"),
        ("seconds_trial_mean", "a trial, mean (s)"),
        ("seconds_study", "up to the end of the study (s)"),
        ("seconds_saved", "picked model on disk (s)"),
        ("peak_gb_study", "peak memory, study (GB)"),
        ("peak_gb", "peak memory, with export (GB)"),
        ("trials_measured", "trials measured in full"),
        ("declined_before", "declined before, own count"),
    ):
        a, b = ours[key], theirs[key]
        ratio = f"{a / b:.2f}" if a is not None and b and not key.startswith(("trials", "refused")) else ""
        print(f"{name:<34}{a if a is not None else '-':>12}{b if b is not None else '-':>13}{ratio:>13}")
    print(f"\nheretic-llm: start {theirs['seconds_start_parts']}, batches of {theirs['batch_size']}")
    print(f"heretic-llm: a trial, median {theirs['seconds_trial_parts_median']}")
    if "again" not in report:
        return
    for by, compared in report["comparison"].items():
        original = report["again"]["original"][by]["refusals"]
        print(f"\nReloaded and measured again ({by.replace('_', ' ')}); the original declines {original}")
        for name in ("ours", "theirs"):
            points = [(Point(p["trial"], **p[by]), p) for p in report["again"][name]]
            picked = peer.pick([m for m, _ in points])
            for m, p in sorted(points, key=lambda pair: pair[0].refusals):
                mark = " <- fewest refusals at KL <= 0.1" if m == picked else ""
                own = f"its own: {p['refusals']} at {p['kl']:.4f}"
                print(f"  {name:<7} trial {m.trial:>3}: {m.refusals:>3} refusals at KL {m.kl:.4f} ({own}){mark}")
        print(f"  hypervolume: {compared['hypervolume']}")
        unmatched = compared["their_trials_unmatched_by_ours"]
        print(f"  ours nowhere worse: {f'no, not than their trials {unmatched}' if unmatched else 'yes'}")
        print(f"  our trials that nothing of theirs matches: {compared['our_trials_unmatched_by_theirs']}")


if __name__ == "__main__":
    main()
