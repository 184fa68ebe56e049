"""Uploading to a hub on loopback, what is sent, what is refused, what is never shown."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from heretic.export.upload import local_paths
from heretic.interrupt import StopSignal
from heretic.pipeline.run import run
from heretic.progress import NULL_REPORTER
from heretic.settings.sources import resolve
from tests.helpers.command import Ran, heretic
from tests.helpers.hub import TOKEN, Hub, Repository, running
from tests.helpers.terminal import Terminal
from tests.tiny import save_tiny


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub of this test's own, which the environment names."""
    with running() as found:
        for name, value in {
            "HF_ENDPOINT": found.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }.items():  # fmt: skip
            monkeypatch.setenv(name, value)
        yield found


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the one export is kept that the tests upload copies of."""
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def out(config: Path, kept: Path) -> Path:
    """An exported model in shards."""
    if not (kept / "out").exists():
        model = save_tiny(kept / "tiny", max_shard_size="40KB")
        chosen = resolve(config, {"model": str(model), "save_to": str(kept / "out"), "n_trials": 1, "run_name": "mine"})
        run(chosen, reporter=NULL_REPORTER, stop=StopSignal())
        shutil.copytree("runs", kept / "runs")
    return Path(shutil.copytree(kept / "out", "out"))


Upload = Callable[..., Ran]


@pytest.fixture
def upload(hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Upload:
    """`heretic upload ARGUMENTS`, without a terminal, in this process: the library's constants are as the environment says."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")

    def run_it(*arguments: str) -> Ran:
        ran = heretic(capsys, monkeypatch, "upload", *arguments)
        assert TOKEN not in ran.out + ran.err
        return ran

    return run_it


def error_of(ran: Ran) -> str:
    assert ran.status == 1 and ran.err.startswith("Error:") and len(ran.err) < 600
    return ran.err


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_everything_is_sent_and_it_is_private(hub: Hub, out: Path, upload: Upload) -> None:
    (out / ".env").write_text("secret")
    ran = upload("out", "someone/tiny", "--yes")
    assert ran.status == 0 and f"uploaded to {hub.url}/someone/tiny" in ran.out and "private" in ran.out
    repository = hub.repositories["someone/tiny"]
    assert repository.private
    assert repository.files == {name: data for name, data in contents(out).items() if name != ".env"}
    assert repository.commits[0] == "Card and manifest", "weights are never there without them"
    assert len(repository.commits) == 2 and "heretic/directions.safetensors" in repository.files
    assert not list(out.glob(".cache/**/*")) or all(".cache" not in name for name in repository.files)


def test_paths_of_the_machine_are_told_before_they_are_sent(hub: Hub, out: Path, upload: Upload) -> None:
    (out / "adapter_config.json").write_text(
        json.dumps({"base": {"name": ["/home/somebody/model", "owner/name", "/"]}})
    )
    assert "/home/somebody/model" in local_paths(out) and not {"owner/name", "/"} & set(local_paths(out))
    ran = upload("out", "someone/tiny", "--yes")
    assert ran.status == 0 and "paths of this machine" in ran.out + ran.err


def test_public_only_when_asked(hub: Hub, out: Path, upload: Upload) -> None:
    assert upload("out", "someone/tiny", "--yes", "--public").status == 0
    assert not hub.repositories["someone/tiny"].private
    assert "[repository-public]" in error_of(upload("out", "someone/tiny", "--yes"))


def test_a_private_repository_does_not_become_public_in_words_only(hub: Hub, out: Path, upload: Upload) -> None:
    upload("out", "someone/tiny", "--yes")
    assert "[repository-private]" in error_of(upload("out", "someone/tiny", "--yes", "--public"))
    assert hub.repositories["someone/tiny"].private


def test_only_files_that_the_export_wrote_are_sent(hub: Hub, out: Path, upload: Upload) -> None:
    (out / "diary.txt").write_text("private")
    Path("secret").write_text("key")
    (out / "notes.txt").symlink_to(Path("secret").resolve())
    sent = upload("out", "someone/tiny", "--yes")
    assert sent.status == 0 and "diary.txt" in sent.out
    assert {"diary.txt", "notes.txt"}.isdisjoint(hub.repositories["someone/tiny"].files)


def test_link_out_of_the_export_is_not_uploaded(hub: Hub, out: Path, upload: Upload) -> None:
    Path("secret").write_text("key")
    (out / "README.md").unlink()
    (out / "README.md").symlink_to(Path("secret").resolve())
    assert "[link-outside-folder]" in error_of(upload("out", "someone/tiny", "--yes"))
    assert not hub.repositories


def test_nothing_without_a_yes(hub: Hub, out: Path, upload: Upload) -> None:
    assert "--yes" in error_of(upload("out", "someone/tiny"))
    assert not hub.requests
    terminal = Terminal("upload", "out", "someone/tiny")
    terminal.answer("Upload it?", "")
    assert terminal.end() == 1 and "Nothing was uploaded" in terminal.said
    assert not hub.repositories
    terminal = Terminal("upload", "out", "someone/tiny")
    terminal.answer("Upload it?", "y")
    assert terminal.end() == 0 and "uploaded to" in terminal.said and TOKEN not in terminal.said
    assert hub.repositories["someone/tiny"].private


def test_it_goes_on_where_it_stopped(hub: Hub, out: Path, upload: Upload) -> None:
    hub.fails["/commit/"] = [400]
    hub.repositories["someone/tiny"] = Repository(True, {".gitattributes": b""})
    said = error_of(upload("out", "someone/tiny", "--yes"))
    assert "[hub-refused]" in said and "HTTP status 400" in said
    shards = len(list(out.glob("*.safetensors"))) + 1  # and the directions
    hub.fails["/commit/"] = []
    hub.fails["/store/"] = [403]
    said = error_of(upload("out", "someone/tiny", "--yes"))
    assert "[hub-refused]" in said and "HTTP status 403" in said
    assert set(hub.repositories["someone/tiny"].files) == {".gitattributes", "README.md", "manifest.json"}
    sent = len(hub.blobs)
    assert upload("out", "someone/tiny", "--yes").status == 0
    assert len(hub.blobs) == shards
    assert hub.count("PUT", "/store/") <= shards + 1 + (shards - sent), "what was there was sent again"
    before = hub.count("PUT", "/store/")
    assert "Resuming" in upload("out", "someone/tiny", "--yes").out
    assert hub.count("PUT", "/store/") == before


def test_weights_of_another_trial_do_not_stay_beside_the_card(hub: Hub, out: Path, upload: Upload) -> None:
    assert upload("out", "someone/tiny", "--yes").status == 0
    files = hub.repositories["someone/tiny"].files
    whole = set(files)
    manifest = json.loads(files["manifest.json"])
    manifest["written"] = {"format": "lora", "rank": 4, "sha256": {"adapter_model.safetensors": "0" * 64}}
    earlier = {"adapter_model.safetensors": b"of another trial", "adapter_config.json": b"{}"}
    manifest["files"] |= dict.fromkeys(earlier, "0" * 64)
    files |= {**earlier, "manifest.json": json.dumps(manifest).encode(), "picture.png": b"of the user"}
    again = upload("out", "someone/tiny", "--yes")
    assert again.status == 0 and "Removing 2 files" in again.out
    assert set(files) == {*whole, "picture.png"}


def test_an_export_of_another_version_is_uploaded_and_replaced(hub: Hub, out: Path, upload: Upload) -> None:
    file = out / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest |= {"versions": {"heretic": "99.1.0"}, "dtype": "float8", "settings": {"of_later": 1}}
    file.write_text(json.dumps(manifest))
    assert upload("out", "someone/tiny", "--yes").status == 0
    assert hub.repositories["someone/tiny"].files["manifest.json"] == file.read_bytes()
    assert upload("out", "someone/tiny", "--yes").status == 0


@pytest.mark.parametrize("card", [b"", b"---\nlicense: mit\n---\n", b"---\r\nlicense: mit\r\n---\r\n\r\n", b"---\n---"])
def test_a_repository_that_the_website_has_just_made_is_filled(
    hub: Hub, out: Path, upload: Upload, card: bytes
) -> None:
    hub.repositories["someone/new"] = Repository(True, {".gitattributes": b"x", "README.md": card})
    assert upload("out", "someone/new", "--yes").status == 0
    assert hub.repositories["someone/new"].files == {".gitattributes": b"x", **contents(out)}


@pytest.mark.parametrize(
    "card", [b"mine", b"---\nlicense: mit\n---\nmine", b"---\nlicense: mit\n", b"--- mine ---\n---\n"]
)
def test_a_repository_with_a_card_of_words_is_left_alone(hub: Hub, out: Path, upload: Upload, card: bytes) -> None:
    hub.repositories["someone/new"] = Repository(True, {".gitattributes": b"x", "README.md": card})
    assert upload("out", "someone/new", "--yes").code == "repository-not-ours"
    assert hub.repositories["someone/new"].files["README.md"] == card


def test_what_is_not_ours_is_left_alone(hub: Hub, out: Path, upload: Upload) -> None:
    hub.repositories["someone/other"] = Repository(True, {"model.safetensors": b"precious"})
    assert "[repository-not-ours]" in error_of(upload("out", "someone/other", "--yes"))
    manifest = json.loads((out / "manifest.json").read_text())
    hub.repositories["someone/other"].files["manifest.json"] = json.dumps({**manifest, "run": "another"}).encode()
    assert "[repository-not-ours]" in error_of(upload("out", "someone/other", "--yes"))
    assert hub.repositories["someone/other"].files["model.safetensors"] == b"precious"
    assert not hub.repositories["someone/other"].commits


def test_what_the_hub_refuses_is_said(hub: Hub, out: Path, upload: Upload, monkeypatch: pytest.MonkeyPatch) -> None:
    said = error_of(upload("out", "else/tiny", "--yes"))
    assert "[hub-refused]" in said and "else/tiny, HTTP status 403" in said and "You don't have the rights" in said
    hub.fails["/api/repos/create"] = [400]
    assert "as the test wants it" in error_of(upload("out", "someone/tiny", "--yes"))
    hub.fails["/api/repos/create"] = [404]
    said = error_of(upload("out", "someone/tiny", "--yes"))
    assert "[hub-refused]" in said and "someone/tiny, HTTP status 404" in said
    with monkeypatch.context() as patch:
        patch.setenv("HF_TOKEN", "hf_wrong")
        said = error_of(upload("out", "someone/tiny", "--yes"))
        assert "[hub-refused]" in said and "HTTP status 401" in said and "hf_wrong" not in said
    assert not hub.repositories


def test_what_is_known_here_is_said_without_asking_the_hub(
    hub: Hub, out: Path, upload: Upload, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert "[hub-offline]" in error_of(upload("out", "someone/tiny", "--yes"))
    with monkeypatch.context() as patch:
        patch.setenv("HF_TOKEN", "")
        assert "[no-token]" in error_of(upload("out", "someone/tiny", "--yes"))
    with monkeypatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        assert "[hub-unreachable]" in error_of(upload("out", "someone/tiny", "--yes"))
    assert "[invalid-repository-name]" in error_of(upload("out", "tiny", "--yes"))
    Path("empty").mkdir()
    assert "Where: empty" in error_of(upload("empty", "someone/tiny", "--yes"))
    assert "'nothing'" in error_of(upload("nothing", "someone/tiny", "--yes"))
    (out / "README.md").unlink()
    assert "[card-missing]" in error_of(upload("out", "someone/tiny", "--yes"))
    (out / "README.md").write_text("x")
    shard = next(out.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    assert "[export-changed]" in error_of(upload("out", "someone/tiny", "--yes"))
    assert not hub.requests


def test_the_model_of_a_run_and_export_with_upload(
    hub: Hub, out: Path, kept: Path, upload: Upload, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(kept / "runs", "runs")
    assert "runs/mine/models" in error_of(upload("mine", "someone/tiny", "--yes"))
    export = ("export", "mine", "-o", "runs/mine/models/trial-0", "--upload", "someone/a")
    assert "--yes" in error_of(heretic(capsys, monkeypatch, *export))
    assert not Path("runs/mine/models").exists(), "it is refused before the work, not after it"
    ran = heretic(capsys, monkeypatch, *export, "--yes", "--json")
    assert ran.status == 0, ran.err
    assert json.loads(ran.out)["uploaded_to"] == f"{hub.url}/someone/a" and hub.repositories["someone/a"].private
    assert upload("mine", "someone/b", "--yes").status == 0
    assert hub.repositories["someone/a"].files == hub.repositories["someone/b"].files
    shutil.copytree("runs/mine/models/trial-0", "runs/mine/models/trial-1")
    assert "--trial" in error_of(upload("mine", "someone/c", "--yes"))
    assert "runs/mine/models" in error_of(upload("mine", "someone/c", "--yes", "--trial", "7"))
    assert not any(TOKEN in p.read_text(errors="replace") for p in Path("runs").rglob("*.log"))


def test_a_model_on_the_hub_is_rebuilt_from_its_manifest_alone(
    hub: Hub, out: Path, upload: Upload, kept: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert upload(str(out), "someone/tiny", "--yes").status == 0
    before = len(hub.requests)
    ran = heretic(capsys, monkeypatch, "reproduce", "someone/tiny", "--base", str(kept / "tiny"), "--json")
    assert ran.status == 0, ran.err
    assert '"verdict": "identical"' in ran.out
    fetched = [path for method, path in hub.requests[before:] if method == "GET" and "/resolve/" in path]
    assert fetched and not any("safetensors" in path and "heretic/" not in path for path in fetched)
    ran = heretic(capsys, monkeypatch, "reproduce", f"{hub.url}/someone/none")
    assert (ran.status, ran.code) == (1, "hub-unreachable")
