"""Arditi et al. 2024 (arXiv 2406.11717) by heretic's API: one direction, strength 1 in every writer, no search of strengths.

    python benchmarks/arditi.py MODEL OUTPUT [--set KEY=VALUE ...]

The direction is the difference of means of one layer, unprojected, removed everywhere. As in appendix C of the paper the layer is
the best of the first 80 % on validation prompts (`prompts.*_eval`): the fewest refusals at a KL of at most 0.1. Unlike there, the
embedding is left alone, every second layer is tried, and refusals are counted in answers. The last line is JSON.
"""

from __future__ import annotations

import before_torch  # isort: skip  # noqa: F401

import argparse
import json
import os
from pathlib import Path

from heretic_llm import Point, pick

from heretic.interrupt import StopSignal
from heretic.pipeline.api import open_ablation_session
from heretic.progress import NULL_REPORTER
from heretic.settings.sources import resolve

PLAIN = ("ablation.geometry=plain", "ablation.norm_aware=false", "directions.project_harmless=false")
LAYERS = (0.2, 0.8)  # of the depth


def main() -> None:
    """Try the layers, write the model, print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--set", action="append", default=[], dest="settings")
    arguments = parser.parse_args()
    given = {"model": str(arguments.model), "runs_dir": str(arguments.output.parent / "runs")}
    resolved = resolve(None, given, [*arguments.settings, *PLAIN], os.environ)
    with open_ablation_session(resolved, reporter=NULL_REPORTER, stop=StopSignal()) as session:
        first, last = (round(share * session.num_layers) for share in LAYERS)
        points: list[Point] = []
        for layer in range(first, last + 1, 2):
            scores = session.score(session.ablation(layer, **dict.fromkeys(session.components, 1.0)))
            points.append(Point(layer, scores.refusals, scores.divergence.mean))
            print(points[-1], flush=True)
        best = pick(points)
        assert best is not None
        session.export(session.ablation(best.trial, **dict.fromkeys(session.components, 1.0)), arguments.output)
    print(json.dumps({"layer": best.trial, "refusals": best.refusals, "kl": best.kl, "tried": len(points)}))


if __name__ == "__main__":
    main()
