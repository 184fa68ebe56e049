"""Every test has its own working folder and lock folder, and reaches no hub."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.helpers.postgres import Server, programs, server
from tests.helpers.pretend_cuda import has_compiler
from tests.tiny import save_prompts, save_tiny

# Files of the rooms that run whole studies, start other processes, or take seconds; everything in cli/ and pipeline/ does.
INTEGRATION = {
    "ablation/test_apply_bake.py",
    "ablation/test_bake.py",
    "export/test_control_vector.py",
    "export/test_export.py",
    "export/test_gguf.py",
    "export/test_lora.py",
    "export/test_manifest.py",
    "export/test_mlx.py",
    "export/test_spot_check.py",
    "export/test_upload.py",
    "hardware/test_locks.py",
    "model/test_batching.py",
    "model/test_block_capture.py",
    "model/test_block_loading.py",
    "model/test_capture.py",
    "model/test_config_reading.py",
    "model/test_forward.py",
    "model/test_loading.py",
    "model/test_moe.py",
    "model/test_quantization.py",
    "model/test_quantized_checkpoints.py",
    "model/test_weight_files.py",
    "planning/test_five_errors.py",
    "planning/test_memory_plan.py",
    "report/test_figures.py",
    "report/test_in_browser.py",
    "report/test_report.py",
    "report/test_server.py",
    "runs/test_status.py",
    "scoring/test_refusal_count.py",
    "scoring/test_teacher_forcing.py",
    "search/test_path_optimizer.py",
    "search/test_scheduler.py",
    "search/test_study.py",
    "session/test_caching.py",
    "session/test_encoding.py",
    "session/test_find_directions.py",
    "session/test_session.py",
    "storage/test_compute_once.py",
    "storage/test_compute_once_s3.py",
    "storage/test_heartbeat.py",
    "storage/test_rdb.py",
    "test_dist.py",
    "test_supply.py",
}
INTEGRATION_ROOMS = ("benchmarks", "cli", "gpu", "helpers", "pipeline")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test as `unit`, `integration`, `faults` or `docs` by its file."""
    for item in items:
        path = item.path.relative_to(Path(__file__).parent)
        room = path.parts[0]
        if room in ("faults", "docs"):
            item.add_marker(room)
        elif room in INTEGRATION_ROOMS or path.as_posix() in INTEGRATION:
            item.add_marker("integration")
        else:
            item.add_marker("unit")


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> None:
    """Exempt what is there before a module's tests from the product's own garbage collections, which are 8 % of a run here."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that a test does is seen outside it."""
    runtime = tmp_path / "runtime"
    runtime.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(
        "heretic.hardware.host.native_bfloat16", lambda: False
    )  # every machine takes the same number format
    for name in ("CI", "JPY_PARENT_PID", "JPY_SESSION_NAME"):  # where nobody is asked anything
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    torch.manual_seed(0)
    torch.set_num_threads(1)  # for models this small, threads only wait for each other


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in float32; not to be changed."""
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def prompt_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Four prompt files; not to be changed."""
    return save_prompts(tmp_path_factory.mktemp("prompts"))


@pytest.fixture
def config(llama: Path, prompt_files: dict[str, Path]) -> Path:
    """A config.toml in the working folder for a small study."""
    sources = "".join(f'[prompts.{role}]\nsource = "{path}"\n' for role, path in prompt_files.items())
    path = Path("config.toml")
    path.write_text(
        f'model = "{llama}"\nn_trials = 4\nmax_response_length = 6\nbatch_size = 4\ndevice_map = "cpu"\nearly_stopping = false\n'
        f'refusal_markers = ["sorry", "cannot", "bread"]\nresponse_prefix = ""\nmax_kl = 5.0\n{sources}'
        '[search]\nstart = "kernels"\nn_startup_trials = 2\npatience = 0\n'
    )
    return path


@pytest.fixture(scope="module")
def postgres() -> Iterator[Server]:
    """A PostgreSQL server of its own, which the module's tests share."""
    if programs() is None:
        if os.environ.get("CI"):
            pytest.fail("PostgreSQL is not installed, and in CI it must be: .ci/run installs it")
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    with server() as running:
        yield running


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test enters pretend GPUs (`tests.helpers.pretend_gpus`): all of them are visible, and g++ is here to build them."""
    if not has_compiler():
        if os.environ.get("CI"):
            pytest.fail("g++ is not installed, and in CI it must be: .ci/run installs it")
        pytest.skip("g++ is not installed: apt-get install g++")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
