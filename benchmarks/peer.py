"""heretic-llm 1.4.0 (PyPI) alone, with as many trials and seeds as asked for: models of its front, for quality.py --models.

    python benchmarks/peer.py ASSETS --trials 100 [--seeds 0] [--points 6] [--work DIR] [--after DIR]

The same settings as in versus_heretic.py, but for the batch size, which is given and not searched for. Its models are kept as
DIR/<seed>/trial-N; other work on the machine changes its seconds but not what it finds. --after goes on with a finished study of
its own that holds --done trials, such as the one of versus_heretic.py (run-theirs). To look on: tail -f DIR/*/output.txt.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import heretic_llm as peer
from common import head, options, write, write_prompts
from turns import Job, take_turns
from versus_heretic import STARTUP_TRIALS, SYSTEM_PROMPT


def main() -> None:
    """One study a seed; write the JSON after each."""
    parser = options(__doc__, "peer.json")
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--evaluation", type=int, default=50, help="prompts of each kind that the study sees")
    parser.add_argument("--points", type=int, default=6, help="models of the front to keep, of each seed")
    parser.add_argument("--after", type=Path, help="a folder with a study of its own to add trials to")
    parser.add_argument("--done", type=int, default=0, help="trials that the study of --after holds")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "peer")
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    if arguments.after and (arguments.after.resolve() == work / str(arguments.seeds[0]) or len(arguments.seeds) > 1):
        parser.error("--after goes on with one study, in another folder than it lies in")
    python = peer.install(work / "heretic-llm-env")
    report = head(arguments) | {"theirs": peer.installed(python), "system_prompt": SYSTEM_PROMPT, "studies": []}
    for seed in arguments.seeds:
        folder = work / str(seed)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_prompts(arguments.assets / "prompts", folder / "prompts", 100, arguments.evaluation)
        text = peer.configuration(
            model=(arguments.assets / arguments.model).resolve(),
            prompts=folder / "prompts",
            trials=arguments.trials,
            startup=STARTUP_TRIALS,
            tokens=arguments.tokens,
            seed=seed,
            system_prompt=SYSTEM_PROMPT,
        )
        (folder / "config.toml").write_text(f"batch_size = {arguments.batch}\n{text}")
        if arguments.after:
            shutil.copytree(arguments.after / "checkpoints", folder / "checkpoints")
        menus = peer.Menus(folder, arguments.points, arguments.trials - arguments.done if arguments.after else 0)
        job = Job([str(python.with_name("heretic"))], folder, peer.environment(os.environ), menus)
        take_turns([job], float("inf"))
        report["studies"].append(
            {
                "seed": seed,
                "trials": arguments.trials,
                **peer.times(job.lines),
                "seconds_process": round(job.clock(), 1),
            }
            | {"front": [p._asdict() for p in menus.front], "saved": [str(p) for p in menus.saved.values()]}
        )
        write(report, arguments.out)
        print(report["studies"][-1]["front"], flush=True)


if __name__ == "__main__":
    main()
