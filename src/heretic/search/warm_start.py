"""What a study begins with when earlier runs searched a model of the same shape: the trials on their fronts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna

from heretic.errors import UserError
from heretic.files import read_tensors
from heretic.progress import Watcher
from heretic.run_folder import RunFolder
from heretic.search.attributes import WARM_START, warm_start_of
from heretic.search.damage import damaged_trials
from heretic.search.front import Result, front, results
from heretic.search.space import Space
from heretic.search.storage import connect, reading
from heretic.search.url import storage_url, study_name

MOST = 10  # trials


def warm_start(
    study: optuna.Study, space: Space, folder: RunFolder, width: int, watcher: Watcher
) -> list[dict[str, Any]]:
    """Parameters to begin with, from the runs beside `folder`; what was found once is stored, and found again on resumption.

    None for a search that begins with a walk alone, and for a study whose trials are under way.
    """
    if not space.search.warm_start or space.search.start == "gradient":
        return []
    kept = warm_start_of(study)
    if kept is None:
        found = [] if study.get_trials(deepcopy=False) else list(_found(space, folder, width, watcher))[:MOST]
        kept = {"params": [p for p, _ in found], "runs": sorted({name for _, name in found})}
        study.set_user_attr(WARM_START, json.dumps(kept))
    if kept["params"]:
        watcher.say(f"Beginning with {len(kept['params'])} trials of earlier runs: {', '.join(kept['runs'])}.")
    return list(kept["params"])


def _found(space: Space, folder: RunFolder, width: int, watcher: Watcher) -> Iterator[tuple[dict[str, Any], str]]:
    """Parameters and the run's name, each run's fewest refusals first, the runs in the order of their names."""
    for path in sorted(p.parent for p in folder.path.parent.glob("*/study.db")):
        if path.resolve() == folder.path.resolve() or _shape(path) != (space.num_layers, width):
            continue
        for result in _front(path, watcher):
            if (params := space.fitted(result.params)) is not None:
                yield params, path.name


def _shape(path: Path) -> tuple[int, int] | None:
    """Layers and width of a run's model, by its directions."""
    try:
        layers, width = read_tensors(path / "directions.safetensors")[0]["directions"].shape
    except (UserError, OSError, KeyError, ValueError):
        return None
    return layers, width


def _front(path: Path, watcher: Watcher) -> list[Result]:
    try:
        url = storage_url("", path)
        with reading(url):
            study = optuna.load_study(study_name=study_name("", path), storage=connect(url))
            return front(results(study, damaged_trials(study)))
    except UserError as error:
        watcher.warn(f"Not starting from the trials of run {path.name}: {error.what}")
        return []
