"""What the documents say of large models, for machines that are not here: the checklist, working configurations, sizes."""

from __future__ import annotations

import json
import re
import runpy
import struct
from pathlib import Path

import pytest

from heretic.machine.memory_plan import plan_for
from heretic.machine.preflight import USUAL_PROMPT
from heretic.machine.workload import Workload
from heretic.settings.layers import resolve
from tests.command import heretic
from tests.docs.pages import ROOT
from tests.machine.shapes import checkpoint_of, gpus, qwen_32b

LESSONS = ROOT / "LESSONS_LEARNED.md"
SHARD = 5_000_000_000
BUNDLED = {"harmful_train": "cooking_train", "harmless_train": "other_train", "harmful_eval": "cooking_eval",
           "harmless_eval": "other_eval"}  # fmt: skip


def save_shape(folder: Path) -> None:
    """A folder as of the 32B model in 14 files, which have headers, the right length, and nothing in them: they take no disk."""
    folder.mkdir()
    config = qwen_32b()
    config.architectures, config.dtype = ["Qwen2ForCausalLM"], "bfloat16"
    config.save_pretrained(folder)
    shards: list[list[tuple[str, str, tuple[int, ...], int]]] = [[]]
    for tensor in checkpoint_of(qwen_32b()).tensors.values():
        if sum(size for *_, size in shards[-1]) + tensor.nbytes > SHARD:
            shards.append([])
        shards[-1].append((tensor.name, tensor.dtype, tensor.shape, tensor.nbytes))
    where = {}
    for number, shard in enumerate(shards, 1):
        name, header, at = f"model-{number:05}-of-{len(shards):05}.safetensors", {}, 0
        for tensor_name, dtype, shape, size in shard:
            header[tensor_name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
            where[tensor_name] = name
            at += size
        text = json.dumps(header).encode()
        with (folder / name).open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + at)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def test_the_checklist_is_what_preflight_prints(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    save_shape(Path("Qwen2.5-Coder-32B-Instruct"))
    changes = [f"prompts.{role}.source=bundled:{name}" for role, name in BUNDLED.items()]
    arguments = [word for change in ("model=Qwen2.5-Coder-32B-Instruct", *changes) for word in ("--set", change)]
    config = str(ROOT / "config.32b.toml")
    printed = heretic(capsys, monkeypatch, "preflight", "--config", config, "--devices", "4x24GiB", *arguments).out
    written = LESSONS.read_text(encoding="utf-8").split("## The checklist")[1].split("\nHow to read it")[0]
    block = written[written.index("    Memory in GiB") :]
    table, findings = block.split("└", 1)
    assert " ".join(table.split()) in printed
    for level, subject in (("ok", "model"), ("ok", "memory")):  # the disk is that of the day
        line = re.search(rf"^    {level} +{subject} .*\n(?:      .*\n)*", findings, re.M)
        assert line and " ".join(line[0].split()) in printed


def configurations() -> list[tuple[str, str, str, str]]:
    text = LESSONS.read_text(encoding="utf-8").split("## Working configurations")[1].split("\n## ")[0]
    return re.findall(r"^### (\d+B) on (\d) x (\d+) GiB\n.*?^```toml\n(.*?)^```", text, re.M | re.S)


@pytest.mark.parametrize("size, number, gib, block", configurations(), ids=lambda v: v if len(v) < 4 else "")
def test_a_working_configuration_fits(
    size: str, number: str, gib: str, block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    sizes = runpy.run_path(str(ROOT / "benchmarks/sizes.py"))
    file = tmp_path / "block.toml"
    file.write_text(block)
    settings = resolve(file, environment={}).settings
    checkpoint, devices = sizes["checkpoint_of"](sizes["SHAPES"][size]), gpus(int(number), int(gib) - 0.5)
    work = Workload.of(settings, USUAL_PROMPT)
    plan = plan_for(settings, checkpoint, work, devices)
    assert plan.fits and plan.batch_size >= 8
    without = plan_for(settings.model_copy(update={"quantization": "none"}), checkpoint, work, devices)
    assert without.fits == (settings.quantization == "none"), "quantised where it need not be"


def test_there_is_a_configuration_for_every_size() -> None:
    assert {"7B", "14B", "32B", "70B"} == {size for size, *_ in configurations()}


def table_of_sizes(heading: str) -> dict[str, dict[str, str]]:
    """The cells of a table in benchmarks/sizes.md, by size and machine."""
    text = (ROOT / "benchmarks/sizes.md").read_text(encoding="utf-8").split(heading)[1].split("\n## ")[0]
    head, _, *rows = ([c.strip() for c in r.strip("|").split("|")] for r in text.splitlines() if r.startswith("|"))
    return {row[0].split()[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}


@pytest.mark.parametrize("name", ["README.md", "CLAUDE.md"])
def test_sizes_are_told_as_they_were_calculated(name: str) -> None:
    """Rows that begin with a size: weights, where it fits in 16 bits, where in fewer, how long. All as in benchmarks/sizes.md."""
    fit, hours = table_of_sizes("## Will it fit"), table_of_sizes("## How long")
    rows = [
        [cell.strip() for cell in row.strip("|").split("|")]
        for row in (ROOT / name).read_text(encoding="utf-8").splitlines()
        if re.match(r"\| \d+B \|", row)
    ]
    assert [row[0] for row in rows] == ["7B", "14B", "32B", "70B"]
    for size, weights, whole, quantised, times, *_ in rows:
        assert weights == fit[size]["weights"]
        for machine in re.findall(r"\d x \d\d GiB", whole):
            assert fit[size][machine].startswith("batches"), f"{size} on {machine}"
        for machines, bits in re.findall(r"([^()]+)\((\d bits)\)", quantised):
            for machine in re.findall(r"\d x \d\d GiB", machines):
                assert fit[size][machine].startswith(bits), f"{size} on {machine}"
        told = re.findall(r"[\d.]+ to [\d.]+ h", times)
        assert told and set(told) <= set(hours[size].values()), size
    assert hours["32B"]["4 x 24 GiB"] in (ROOT / "config.32b.toml").read_text(encoding="utf-8")
