"""One run for all tests of the report."""

from __future__ import annotations

from pathlib import Path

import pytest

from heretic.pipeline.run import Outcome
from tests.report.runs import hostile_run


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """A finished study; not to be changed."""
    folder: Path = tmp_path_factory.mktemp("reported")
    with pytest.MonkeyPatch.context() as patch:
        runtime = folder / "runtime"
        runtime.mkdir(mode=0o700)
        patch.setenv("XDG_RUNTIME_DIR", str(runtime))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.chdir(folder)
        return hostile_run(folder)
