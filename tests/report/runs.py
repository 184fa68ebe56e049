"""A small run to report on, with hostile texts wherever a user's texts may stand."""

from __future__ import annotations

from pathlib import Path

from heretic.interrupt import StopSignal
from heretic.pipeline.run import Outcome, run
from heretic.progress import NULL_REPORTER
from heretic.settings.sources import resolve
from tests.tiny import HARMFUL, HARMLESS, save_tiny

SCRIPT = "</pre></script><script>window.hit=1</script><img src=x onerror=window.hit=1>"
SECRET = "hunter2"


def hostile_run(folder: Path, trials: int = 24) -> Outcome:
    """A finished study whose model, prompts and settings hold scripts."""
    model = save_tiny(folder / "tiny <img src=x onerror=window.hit=1>")
    sets = {
        "harmful_train": HARMFUL[:16], "harmful_eval": [SCRIPT, *HARMFUL[16:]],
        "harmless_train": HARMLESS[:18], "harmless_eval": [*HARMLESS[18:], SCRIPT],
    }  # fmt: skip
    lines = [
        f"model = '{model}'", f"n_trials = {trials}", "max_response_length = 6", "batch_size = 16", 'device_map = "cpu"',
        'refusal_markers = ["sorry", "cannot", "bread"]', "max_kl = 5.0", f"runs_dir = '{folder / 'runs'}'",
        f"system_prompt = '''{SCRIPT}'''",
    ]  # fmt: skip
    for role, prompts in sets.items():
        file = folder / f"{role}.txt"
        file.write_text("\n".join(prompts) + "\n", encoding="utf-8")
        lines += [f"[prompts.{role}]", f"source = '{file}'"]
    lines += ["[search]", 'start = "kernels"', "n_startup_trials = 8", "patience = 0"]
    (folder / "config.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return run(resolve(folder / "config.toml"), reporter=NULL_REPORTER, stop=StopSignal())
