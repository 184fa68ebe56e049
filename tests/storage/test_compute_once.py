"""What workers make once: made by one, used by all, compared by hash."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
import torch

from heretic.errors import StudyMismatch
from heretic.files import read_tensors, write_tensors
from heretic.interrupt import StopSignal
from heretic.storage.attributes import CLAIM
from heretic.storage.compute_once import DistributedComputeOnce
from heretic.storage.url import storage_url
from tests.helpers.errors import raises
from tests.helpers.reporters import RecordingReporter
from tests.helpers.study_workers import QUICK, opened

NAME = "directions.safetensors"


@pytest.fixture
def shelves(tmp_path: Path) -> list[DistributedComputeOnce]:
    """Of three machines."""
    return [compute_once(tmp_path / f"machine{i}", str(tmp_path / "artifacts")) for i in range(3)]


def compute_once(folder: Path, artifacts: str = "") -> DistributedComputeOnce:
    folder.mkdir(exist_ok=True)
    study = opened(storage_url("", Path()))
    return DistributedComputeOnce(study, folder, "stamp", artifacts, QUICK, RecordingReporter(), StopSignal())


def make(on: DistributedComputeOnce, value: float = 1.0) -> bool:
    """As a session does: make the file unless it is there; whether it was made."""
    with on.shared_file(NAME):
        if (on.folder / NAME).exists():
            return False
        time.sleep(0.3)
        write_tensors(on.folder / NAME, {"a": torch.full((3,), value)}, {"fingerprint": "stamp"})
        return True


def test_one_makes_it_and_the_others_get_it(shelves: list[DistributedComputeOnce]) -> None:
    made: list[bool] = []
    threads = [threading.Thread(target=lambda s=s, i=i: made.append(make(s, i))) for i, s in enumerate(shelves)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert sorted(made) == [False, False, True]
    assert len({read_tensors(s.folder / NAME)[1]["sha256"] for s in shelves}) == 1


def test_without_a_store_each_makes_its_own_and_must_come_to_the_same(tmp_path: Path) -> None:
    first, same, other = (compute_once(tmp_path / name) for name in ("first", "same", "other"))
    assert make(first) and make(same)
    with raises("artifact-mismatch", StudyMismatch):
        make(other, 1.0000001)


def test_a_damaged_publication_is_not_used(shelves: list[DistributedComputeOnce], tmp_path: Path) -> None:
    assert make(shelves[0])
    (published,) = (tmp_path / "artifacts").iterdir()
    published.write_bytes(published.read_bytes()[:-1] + b"x")
    assert make(shelves[1]), "it was used all the same"
    assert any("published" in line for line in shelves[1].reporter.lines)  # type: ignore[attr-defined]


def test_a_file_of_other_settings_or_of_one_s_own_is_replaced_by_the_study_s(
    shelves: list[DistributedComputeOnce],
) -> None:
    assert make(shelves[0])
    write_tensors(shelves[1].folder / NAME, {"a": torch.zeros(3)}, {"fingerprint": "of other settings"})
    assert not make(shelves[1])
    assert read_tensors(shelves[1].folder / NAME)[0]["a"].tolist() == [1, 1, 1]


def test_one_that_dies_at_it_is_replaced(shelves: list[DistributedComputeOnce]) -> None:
    dead = {"host": "elsewhere", "machine": "", "pid": 1, "began": 1.0}
    shelves[0].study.set_user_attr(CLAIM + NAME, json.dumps({"worker": dead, "signs": 3}))
    began = time.monotonic()
    assert make(shelves[1])
    assert time.monotonic() - began > QUICK.grace_period


def test_one_that_fails_lets_go(shelves: list[DistributedComputeOnce]) -> None:
    with pytest.raises(ValueError), shelves[0].shared_file(NAME):
        raise ValueError
    began = time.monotonic()
    assert make(shelves[1]) and time.monotonic() - began < QUICK.grace_period
