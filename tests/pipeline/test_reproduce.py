"""A model made again from its manifest: the same, nearly the same, another, refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from heretic.errors import NotReproduced, UserError
from heretic.files import sha256
from heretic.interrupt import StopSignal
from heretic.pipeline.reproduce import Reproduction, reproduce
from heretic.pipeline.run import run
from heretic.progress import NULL_REPORTER
from heretic.settings.sources import resolve
from tests.helpers.command import heretic
from tests.helpers.errors import raises
from tests.helpers.tiny_gguf import save_tiny_gguf
from tests.helpers.tiny_quantized import save_fp8, save_mxfp4
from tests.tiny import TEMPLATE, save_tiny


def export(config: Path, model: Path, *assignments: str) -> Path:
    options = {"model": str(model), "save_to": "out", "n_trials": 2}
    run(resolve(config, options, assignments), reporter=NULL_REPORTER, stop=StopSignal())
    return Path("out")


def again(path: Path, to: str | None = "again", **options: Any) -> Reproduction:
    return reproduce(path, Path(to) if to else None, reporter=NULL_REPORTER, stop=StopSignal(), **options)


def change(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("family", "assignment"),
    [
        ("llama", "search.direction_scope=['per_layer']"),
        ("gemma2", "search.direction_scope=['global']"),
        ("mixtral", "search.start=gradient"),
        ("gpt2", "ablation.geometry=plain"),
    ],
)
def test_the_same_bit_for_bit(config: Path, family: str, assignment: str, tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "m", family, dtype=torch.bfloat16, max_shard_size="20KB")
    out = export(
        config,
        base,
        assignment,
        "search.gradient.steps=3",
        "search.gradient.second_search=false",
        "refusal_markers=['sorry', 'bread', 'a', 'e', 'o']",
    )
    found = again(out / "manifest.json")
    assert found.verdict == "identical" and all(found.files.values()) and not found.changed
    for file in out.glob("*.safetensors"):
        assert sha256(file) == sha256(Path("again") / file.name)
    assert {p.name for p in Path("again").iterdir()} == {p.name for p in out.iterdir()}
    told = json.loads(Path("again/manifest.json").read_text())
    assert told["reproduced"]["verdict"] == "identical"
    assert told["files"].keys() >= {"README.md", "heretic/directions.safetensors", *found.files}
    shutil.rmtree(out)
    assert again(Path("again"), "third").verdict == "identical", "what was made again is as good as the first"
    assert not list(Path().glob(".*"))


def test_the_card_says_which_behavior_was_reduced(config: Path, llama: Path) -> None:
    export(config, llama, "search.start=kernels", "behavior=empty openings")
    assert again(Path("out")).verdict == "identical"
    for folder in ("out", "again"):
        text = (Path(folder) / "README.md").read_text()
        assert "tiny-llama, empty openings ablated" in text and "reduced on purpose: empty openings." in text
        assert json.loads((Path(folder) / "manifest.json").read_text())["behavior"] == "empty openings"
    with raises("invalid-setting") as refused:
        resolve(config, {}, ["behavior=<b>"])
    assert refused.value.where == "--set behavior"


@pytest.mark.parametrize("more", [("search.start=gradient",), ("export_format=lora",)])
def test_several_directions_are_made_again(config: Path, llama: Path, more: tuple[str, ...]) -> None:
    wanted = ("directions.method=self_organizing_map", "directions.count=2", "ablation.geometry=plain")
    words = "refusal_markers=['sorry', 'bread', 'a', 'e', 'o']"
    export(config, llama, *wanted, "search.gradient.steps=3", "search.gradient.second_search=false", words, *more)
    assert again(Path("out/manifest.json")).verdict == "identical"
    assert "2 orthogonal ones" in Path("out/README.md").read_text()


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the one export is kept that most tests change a copy of."""
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def out(config: Path, llama: Path, kept: Path) -> Path:
    """An export of the tiny Llama, to be changed."""
    if not (kept / "out").exists():
        shutil.copytree(export(config, llama, "search.attention.max_weight=[1.0, 1.5]"), kept / "out")
        shutil.rmtree("out")
    return Path(shutil.copytree(kept / "out", "out"))


def test_the_command_says_so_and_keeps_nothing_it_was_not_asked_for(
    out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = heretic(capsys, monkeypatch, "reproduce", "out")
    assert said.status == 0 and "bit-identical" in said.out and "model.safetensors: the same" in said.out
    said = heretic(capsys, monkeypatch, "reproduce", "out/manifest.json", "--json")
    assert json.loads(said.out)["verdict"] == "identical"
    assert {p.name for p in Path().iterdir()} - {"runs"} == {"config.toml", "out"}


def test_other_versions_are_named(out: Path) -> None:
    change(out / "manifest.json", lambda m: m["versions"].update(torch="1.0", left="2.0"))
    found = again(out, None)
    assert found.verdict == "identical"
    assert f'versions.torch: was "1.0", now "{torch.__version__}"' in found.changed


def test_what_rounding_explains_is_equal(out: Path) -> None:
    file = out / "model.safetensors"
    tensors = load_file(file)
    name = next(n for n in tensors if n.endswith("layers.1.self_attn.o_proj.weight"))
    tensors[name][0, 0] += 1e-6 * tensors[name].abs().max()
    save_file(tensors, file, metadata={"format": "pt"})
    change(out / "manifest.json", lambda m: m["written"]["sha256"].update({file.name: sha256(file)}))
    found = again(out)
    assert found.verdict == "equal" and found.difference is not None
    assert found.difference.differing == 1 and found.difference.tensor == name
    tensors[name][0, 0] += 1e-3
    save_file(tensors, file, metadata={"format": "pt"})
    found = again(out)
    assert found.verdict == "different" and "has been modified" in found.why
    change(out / "manifest.json", lambda m: m["written"]["sha256"].update({file.name: sha256(file)}))
    found = again(out)
    assert found.verdict == "different" and "1 of" in found.why and found.destination == Path("again")
    file.unlink()
    assert "difference is unknown" in again(out, None).why


def test_another_edit_is_different(
    out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stronger(manifest: dict[str, Any]) -> None:
        manifest["ablation"]["strengths"]["attention"] = [1.3] * 4

    change(out / "manifest.json", stronger)
    said = heretic(capsys, monkeypatch, "reproduce", "out")
    assert said.status == NotReproduced.exit_status and said.code == "not-reproduced" and "different" in said.out


def test_another_base_is_refused_unless_forced(out: Path, llama: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(llama, moved)
    assert again(out, None, base=str(moved)).verdict == "identical"
    (moved / "LICENSE").write_text("other files of the base may come and go")
    found = again(out, None, base=str(moved))
    assert found.verdict == "different" and "the weights are bit-identical" in found.why
    tensors = load_file(moved / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, moved / "model.safetensors", metadata={"format": "pt"})
    with raises("manifest-mismatch") as refused:
        again(out, base=str(moved))
    assert "model.safetensors" in refused.value.what and "--base" in str(refused.value.fix)
    assert refused.value.where == str(moved) and not Path("again").exists()
    found = again(out, None, base=str(moved), force=True)
    assert found.verdict == "different" and any("model.safetensors" in c for c in found.changed)
    (moved / "config.json").write_text((moved / "config.json").read_text().replace('"rms_norm_eps"', '"other"'))
    with raises("manifest-mismatch") as refused:
        again(out, base=str(moved))
    assert "config.json" in refused.value.what


def test_a_base_that_is_gone(out: Path) -> None:
    change(out / "manifest.json", lambda m: m["model"].update(name="/nowhere/model"))
    with raises("no-model-folder") as refused:
        again(out)
    assert "/nowhere/model" in str(refused.value) and "--base" in str(refused.value.fix)


def test_directions_are_checked(out: Path) -> None:
    file = out / "heretic/directions.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError) as changed:
        again(out)
    file.unlink()
    with pytest.raises(UserError) as missing:
        again(out)
    assert changed.value.where == missing.value.where == str(file)


def test_a_base_in_pickle_files_is_read_only_if_asked_for(config: Path, llama: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(llama, tmp_path / "pickled"))
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    out = export(config, base, "search.start=kernels", "allow_pickle=true")
    with raises("pickled-weights") as refused:
        again(out)
    assert "--allow-pickle" in str(refused.value.fix)
    assert again(out, allow_pickle=True).verdict == "identical"


def test_places_that_are_not_free(out: Path) -> None:
    with raises("destination-is-export"):
        again(out, "out")
    shutil.copytree(out, "copy")
    with raises("destination-is-export"):
        again(out, "copy")
    again(out)
    assert again(out).verdict == "identical", "an earlier reproduction gives way"


def test_from_a_gguf_file(config: Path, tmp_path: Path) -> None:
    out = export(config, save_tiny_gguf(tmp_path / "tiny.gguf"))
    (tmp_path / "tiny.gguf").rename(tmp_path / "renamed.gguf")
    assert again(out, base=str(tmp_path / "renamed.gguf")).verdict == "identical"


@pytest.mark.parametrize("save", [save_fp8, save_mxfp4])
def test_from_a_quantized_checkpoint(config: Path, tmp_path: Path, save: Callable[[Path], Path]) -> None:
    assert again(export(config, save(tmp_path / "packed"))).verdict == "identical"


@pytest.mark.parametrize("geometry", ["plain", "norm_preserving"])
def test_an_adapter_is_made_again_too(config: Path, llama: Path, geometry: str) -> None:
    out = export(config, llama, "export_format=lora", "lora_rank=5", f"ablation.geometry={geometry}")
    assert again(out).verdict == "identical"
    assert "LoRA adapter" in Path("again/README.md").read_text()


def nested(manifest: dict[str, Any]) -> None:
    manifest["model"]["sha256"] = {"../../etc/passwd": "0" * 64}


HOSTILE: dict[str, Callable[[dict[str, Any]], None]] = {
    "path": nested,
    "no file name": lambda m: m["written"].update(sha256={"..": "0" * 64}),
    "no hash": lambda m: m["written"].update(sha256={"model.safetensors": "x"}),
    "text for numbers": lambda m: m["ablation"]["strengths"].update(attention=["1"] * 4),
    "not finite": lambda m: m["ablation"]["strengths"].update(attention=[float("nan")] * 4),
    "too many layers": lambda m: m["ablation"]["strengths"].update(attention=[1.0] * 5000),
    "wrong width": lambda m: m["ablation"].update(vector=[1.0] * 7),
    "no vector": lambda m: m["ablation"].update(vector=[]),
    "two vectors where the settings say one": lambda m: m["ablation"].update(vector=[1.0] * 64),
    "one vector where the settings say two": lambda m: (
        m["settings"]["directions"].update(count=2),
        m["ablation"].update(vector=[1.0] * 32),
        m.pop("directions"),
    ),
    "more directions than the file has": lambda m: m["settings"]["directions"].update(iterative_rounds=1),
    "no number of directions": lambda m: m["settings"]["directions"].update(count=0),
    "too few in a mixture": lambda m: m["ablation"].update(mixture=[1.0]),
    "a component that the model has not": lambda m: m["ablation"]["strengths"].update(other=[1.0] * 4),
    "not finite in a vector": lambda m: m["ablation"].update(vector=[float("inf")] * 32),
    "beyond all measure": lambda m: m["ablation"]["strengths"].update(attention=[1e300] * 4),
    "a rank of nothing": lambda m: m["written"].update(rank=0),
    "text for a trial": lambda m: m.update(trial="3"),
    "a table for a text": lambda m: m["model"].update(name={}),
    "geometry": lambda m: m["settings"]["ablation"].update(geometry="exec"),
    "list for a table": lambda m: m.update(model=[]),
    "nothing": lambda m: m.clear(),
    "another tool": lambda m: m.update(made_with="other"),
    "no format": lambda m: m["written"].update(format="../x"),
    "type of numbers": lambda m: m.update(dtype="float8"),
}


NEEDED = [
    ("made_with",), ("run",), ("fingerprint",), ("trial",), ("model",), ("model", "name"), ("model", "sha256"), ("written",),
    ("written", "sha256"), ("settings",), ("settings", "ablation"), ("dtype",), ("ablation",), ("ablation", "strengths"),
    ("versions",),
]  # fmt: skip
FITTING = [(("run",), "text"), (("fingerprint",), "text"), (("model", "name"), "text"), (("trial",), 7)]
FOR_THE_CARD = [
    ("scores",), ("scores", "original"), ("scores", "original", "refusals"), ("scores", "written"),
    ("scores", "written", "divergence"),
]  # fmt: skip


def without(key: tuple[str, ...], instead: Any = None) -> Callable[[dict[str, Any]], None]:
    """An edit that takes a key out, or puts something else there."""

    def edit(manifest: dict[str, Any]) -> None:
        *tables, last = key
        for table in tables:
            manifest = manifest[table]
        if instead is None:
            del manifest[last]
        else:
            manifest[last] = instead

    return edit


@pytest.mark.parametrize("instead", [None, 7, "text", [], {"a": 1}, float("nan")], ids=repr)
def test_every_key_that_is_needed_gone_or_of_another_type(out: Path, instead: Any) -> None:
    kept = (out / "manifest.json").read_text()
    for key in NEEDED:
        if (key, instead) in FITTING:
            continue
        (out / "manifest.json").write_text(kept)
        change(out / "manifest.json", without(key, instead))
        with pytest.raises(UserError) as refused:
            again(out)
        assert "manifest" in str(refused.value), key
        assert str(refused.value).count("\n") <= 2 and len(str(refused.value)) < 800, key
        assert not Path("again").exists()


@pytest.mark.parametrize("instead", [None, "text", float("inf")], ids=repr)
def test_what_only_the_card_is_made_of(out: Path, instead: Any) -> None:
    kept = (out / "manifest.json").read_text()
    for key in FOR_THE_CARD:
        (out / "manifest.json").write_text(kept)
        change(out / "manifest.json", without(key, instead))
        with raises("manifest-without-card"):
            again(out)
        assert not Path("again").exists()


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_manifests(out: Path, name: str) -> None:
    change(out / "manifest.json", HOSTILE[name])
    with pytest.raises(UserError) as refused:
        again(out)
    assert "manifest" in str(refused.value)
    assert str(refused.value).count("\n") <= 2 and len(str(refused.value)) < 800
    assert not Path("again").exists() and not list(Path().glob(".again*"))


def test_hostile_bytes(tmp_path: Path) -> None:
    file = tmp_path / "manifest.json"
    with pytest.raises(UserError) as refused:
        again(file)
    assert refused.value.where == str(file)
    for content in (b"\xff\xfe", b"[" * 100_000, b'{"a": ' * 50_000, b"null", b'{"trial": 1' + b"0" * 5000 + b"}", b""):
        file.write_bytes(content)
        with pytest.raises(UserError) as refused:
            again(file)
        assert refused.value.where == str(file)
    with file.open("wb") as sparse:
        sparse.truncate(1 << 34)
    with pytest.raises(UserError) as refused:
        again(file)
    assert refused.value.where == str(file) and "16 MiB" in refused.value.what


def test_a_device_map_that_is_none(
    out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = heretic(capsys, monkeypatch, "reproduce", "out", "--device-map", "moon")
    assert said.status == 1 and said.code == "device-not-there" and "moon" in said.err


def test_remote_code_is_not_trusted_because_a_manifest_says_so(out: Path, llama: Path, tmp_path: Path) -> None:
    base = tmp_path / "own code"
    shutil.copytree(llama, base)
    change(base / "config.json", lambda c: c.update(model_type="own", auto_map={"AutoConfig": "own.Own"}))
    (base / "own.py").write_text("raise SystemExit('it ran')")
    change(out / "manifest.json", lambda m: m["settings"].update(trust_remote_code=[str(base)]))
    change(out / "manifest.json", lambda m: m["model"].update(name=str(base)))
    with raises("needs-remote-code"):
        again(out)


def test_scores_of_a_manifest_are_not_called_measured(out: Path) -> None:
    change(out / "manifest.json", lambda m: m["scores"]["written"].update(refusals=0))
    change(out / "manifest.json", lambda m: m["versions"].update(heretic="9 [x](https://evil.example)"))
    assert again(out).verdict == "identical"
    first, rebuilt = ((Path(folder) / "README.md").read_text() for folder in ("out", "again"))
    measured = [text.partition("## What was measured\n")[2].lstrip().partition(" ")[0] for text in (first, rebuilt)]
    assert measured[0] != "**None" and measured[1] == "**None" and "](https://evil" not in rebuilt


def test_link_in_the_place_of_directions_that_are_not_needed_is_not_copied(out: Path) -> None:
    Path("secret").write_text("key")
    (out / "heretic/directions.safetensors").unlink()
    (out / "heretic/directions.safetensors").symlink_to(Path("secret").resolve())
    change(out / "manifest.json", lambda m: m["ablation"].update(vector=[1.0] + [0.0] * 31))
    change(out / "manifest.json", lambda m: m.update(directions=None))
    again(out)
    assert Path("again/README.md").is_file() and not Path("again/heretic").exists()


def test_added_file_survives_a_second_reproduction(out: Path) -> None:
    again(out)
    Path("again/notes.txt").write_text("mine")
    again(out)
    assert Path("again/notes.txt").read_text() == "mine"
    Path("again/tokenizer.json").write_text("edited")
    with pytest.raises(UserError) as error:
        again(out)
    assert error.value.code == "destination-edited" and Path("again/tokenizer.json").read_text() == "edited"


@pytest.mark.parametrize("form", ["full", "lora"])
def test_template_of_the_settings_is_in_the_export_and_in_the_rebuilt_one(config: Path, llama: Path, form: str) -> None:
    Path("t.jinja").write_text("{# of the study #}" + TEMPLATE)
    export(
        config,
        llama,
        "chat_template=t.jinja",
        "search.start=kernels",
        "ablation.geometry=plain",
        f"export_format={form}",
    )
    assert again(Path("out")).verdict == "identical"
    for folder in ("out", "again"):
        assert (Path(folder) / "chat_template.jinja").read_text() == Path("t.jinja").read_text()
        assert "`chat_template.jinja`" in (Path(folder) / "README.md").read_text()
    Path("out/chat_template.jinja").write_text("{# another #}")
    with pytest.raises(UserError) as error:
        again(Path("out"))
    assert error.value.code == "template-not-of-the-manifest"
