"""The artifact store on S3, against a stand-in here; skipped without boto3 (`pip install boto3`)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
import torch

from heretic.files import write_tensors
from heretic.interrupt import StopSignal
from heretic.progress import NULL_REPORTER
from heretic.settings import WorkerSettings
from heretic.storage.compute_once import DistributedComputeOnce
from tests.helpers.errors import raises
from tests.helpers.s3_server import s3_server

pytest.importorskip("boto3")
STAMP = "0123456789ab"


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bytes]]:
    """What the store holds; boto3 is led to it as a user would lead it to a store of their own."""
    with s3_server() as (url, held):
        for name, value in (
            ("AWS_ENDPOINT_URL", url), ("AWS_ACCESS_KEY_ID", "me"), ("AWS_SECRET_ACCESS_KEY", "secret"),
            ("AWS_DEFAULT_REGION", "eu-central-1"), ("AWS_MAX_ATTEMPTS", "1"), ("AWS_EC2_METADATA_DISABLED", "true"),
        ):  # fmt: skip
            monkeypatch.setenv(name, value)
        yield held


def compute_once(root: Path, name: str, artifacts: str) -> DistributedComputeOnce:
    """A worker with a folder of its own."""
    (root / name).mkdir()
    study = optuna.create_study(study_name="s", storage=f"sqlite:///{root}/study.db", load_if_exists=True)
    return DistributedComputeOnce(study, root / name, STAMP, artifacts, WorkerSettings(), NULL_REPORTER, StopSignal())


@pytest.mark.parametrize("place", ["s3://bucket", "s3://bucket/some/prefix"])
def test_one_makes_it_and_the_other_gets_it(held: dict[str, bytes], tmp_path: Path, place: str) -> None:
    one, other = compute_once(tmp_path, "a", place), compute_once(tmp_path, "b", place)
    values = torch.randn(1000)
    with one.shared_file("directions.safetensors"):
        write_tensors(one.folder / "directions.safetensors", {"v": values}, {"fingerprint": STAMP})
    (path,) = held
    assert path.startswith(f"/{place.removeprefix('s3://')}/")
    with other.shared_file("directions.safetensors"):
        assert (other.folder / "directions.safetensors").read_bytes() == held[path], (
            "it is there before the context begins"
        )


def test_a_damaged_one_is_not_used(held: dict[str, bytes], tmp_path: Path) -> None:
    one, other = compute_once(tmp_path, "a", "s3://bucket"), compute_once(tmp_path, "b", "s3://bucket")
    with one.shared_file("d.safetensors"):
        write_tensors(one.folder / "d.safetensors", {"v": torch.ones(3)}, {"fingerprint": STAMP})
    (path,) = held
    held[path] = held[path][:-1] + b"x"
    with other.shared_file("d.safetensors"):
        assert not (other.folder / "d.safetensors").exists()
        write_tensors(other.folder / "d.safetensors", {"v": torch.ones(3)}, {"fingerprint": STAMP})


def test_a_store_that_is_away_is_said(held: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    one = compute_once(tmp_path, "a", "s3://bucket")
    with raises("artifacts-unwritable"), one.shared_file("d.safetensors"):
        write_tensors(one.folder / "d.safetensors", {"v": torch.ones(3)}, {"fingerprint": STAMP})
