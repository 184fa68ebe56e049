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
from heretic.search.front import Result, front, results
from heretic.search.space import Space
from heretic.search.storage import STORAGE_ERRORS, connect, storage_url, study_name

WARM_START = "heretic:warm_start"  # user attribute of the study: parameters, and the runs that they are from
MOST = 10  # trials


def warm_start(
    study: optuna.Study, space: Space, folder: RunFolder, width: int, watcher: Watcher
) -> list[dict[str, Any]]:
    """Parameters to begin with, from the runs beside `folder`; what was found once is stored, and found again on resumption.

    None for a search that begins with a walk alone, and for a study whose trials are under way.
    """
    if not space.search.warm_start or space.search.start == "gradient":
        return []
    stored = study.user_attrs.get(WARM_START)
    if stored is None:
        found = [] if study.get_trials(deepcopy=False) else list(_found(space, folder, width, watcher))[:MOST]
        stored = json.dumps({"params": [p for p, _ in found], "runs": sorted({name for _, name in found})})
        study.set_user_attr(WARM_START, stored)
    kept = json.loads(stored)
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
        storage = connect(storage_url("", path))
        return front(results(optuna.load_study(study_name=study_name("", path), storage=storage)))
    except (UserError, KeyError, *STORAGE_ERRORS) as error:
        watcher.warn(f"The run {path.name} cannot be begun with: {error}")
        return []
