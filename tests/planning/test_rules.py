"""Every rule on made-up facts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from heretic.hardware.devices import Device
from heretic.hardware.gpus import Gpu, GpuProcess, GpuReport
from heretic.hardware.locks import LockOwner
from heretic.hardware.obstacles import Obstacle
from heretic.model.checkpoint import Checkpoint
from heretic.model.tensor_info import TensorInfo
from heretic.planning import rules
from heretic.planning.memory_model import DeviceMemory
from heretic.planning.memory_plan import MemoryPlan
from heretic.planning.preflight_facts import Finding, Folder, PreflightFacts
from heretic.planning.rules import RULES
from heretic.settings import Settings
from tests.helpers.shapes import GIB, small

TENSORS = {"w": TensorInfo("w", (GIB,), "BF16", Path("a.safetensors"))}
ROOMY = Folder("/disk", 1000 * GIB)


def gpu(index: int = 0, free: float = 24, *processes: GpuProcess) -> Gpu:
    return Gpu(index, f"GPU-{index}", "RTX 4090", 24 * GIB, int(free * GIB), processes)


def load(
    name: str = "cuda:0", weights: float = 10, free: float = 24, copies: float = 0, rounds: float = 0
) -> DeviceMemory:
    device = Device(name, int(free * GIB), int(free * GIB))
    return DeviceMemory(
        device, "blocks 0-9", weights=int(weights * GIB), copies=int(copies * GIB), rounds=int(rounds * GIB)
    )


def plan(
    *loads: DeviceMemory, batch: int = 8, largest: int = 8, offloaded: float = 0, dtype: str = "bfloat16"
) -> MemoryPlan:
    return MemoryPlan({"": 0}, None, dtype, batch, largest, 100, 100, 1, loads or (load(),), int(offloaded * GIB))


def facts(*gpus: Gpu, **changes: Any) -> PreflightFacts:
    """A machine on which nothing is wrong, but for the changes."""
    settings = changes.pop("settings", {})
    there = gpus or (gpu(),)
    usual: dict[str, Any] = {
        "settings": Settings(model="owner/model", **settings),
        "report": GpuReport(there),
        "usable": there,
        "ram": 64 * GIB,
        "checkpoint": Checkpoint("owner/model", Path("/nowhere"), small(), TENSORS),
        "plan": plan(),
        "prompt_warnings": (),
        "holders": (),
        "run_folder": ROOMY,
        "export_folder": None,
        "hub_cache": ROOMY,
    }
    return PreflightFacts(**(usual | changes))


def run(given: PreflightFacts) -> list[Finding]:
    """All findings that are not fine."""
    return [finding for rule in RULES for finding in rule(given) if finding.level != "ok"]


def only(given: PreflightFacts) -> Finding:
    found = run(given)
    assert len(found) == 1, found
    return found[0]


def test_nothing_is_found_where_nothing_is_wrong() -> None:
    assert run(facts()) == []
    assert run(facts(export_folder=ROOMY)) == []


def test_every_rule_is_in_the_table_once() -> None:
    names = [rule.__name__ for rule in RULES]
    written = [
        n
        for n, f in vars(rules).items()
        if callable(f) and getattr(f, "__annotations__", {}).get("facts") == "PreflightFacts"
    ]
    assert sorted(names) == sorted(n for n in written if not n.startswith("_"))


def test_every_rule_bears_that_nothing_is_known() -> None:
    unknown = facts(checkpoint=None, plan=None, report=GpuReport((), "no NVIDIA driver"), usable=())
    assert run(unknown) == []


def test_quantized_checkpoint() -> None:
    config = small()
    config.quantization_config = {"quant_method": "fp8"}
    fp8 = Checkpoint("owner/fp8", Path("."), config, TENSORS)
    assert run(facts(checkpoint=fp8)) == []
    for form in ("lora", "full", "gguf"):
        assert run(facts(checkpoint=fp8, settings={"save_to": "out", "export_format": form})) == []
    again = run(facts(checkpoint=fp8, settings={"quantization": "bnb_4bit"}))
    assert again[0].fix == 'quantization = "none"'
    packed = small()
    packed.quantization_config = {"quant_method": "hqq"}
    kept = Checkpoint("owner/hqq", Path("."), packed, TENSORS)
    found, _ = run(facts(checkpoint=kept, settings={"save_to": "out"}))  # the other one is about the package
    assert found.level == "failure" and found.fix == 'export_format = "lora"'
    gguf = Checkpoint("a.gguf", Path("."), config, TENSORS, gguf_file="a.gguf")
    assert run(facts(checkpoint=gguf, settings={"save_to": "out"})) == []


def test_a_package_that_a_quantized_checkpoint_needs() -> None:
    config = small()
    config.quantization_config = {"quant_method": "awq"}
    found = only(facts(checkpoint=Checkpoint("owner/awq", Path("."), config, TENSORS)))
    assert found.level == "failure" and "gptqmodel" in found.text and "full precision" in str(found.fix)


def test_weights_opened_from_a_quantized_checkpoint_are_put_back_from_copies_only() -> None:
    config = small()
    config.quantization_config = {"quant_method": "fp8"}
    fp8 = Checkpoint("owner/fp8", Path("."), config, TENSORS)
    assert run(facts(checkpoint=fp8, settings={"apply": "weights"})) == []
    found = only(facts(checkpoint=fp8, settings={"apply": "weights", "cache_weights": False}))
    assert found.fix == 'apply = "operators"'


def test_quantized_weights_are_not_rewritten() -> None:
    found = only(facts(settings={"quantization": "bnb_8bit", "apply": "weights"}))
    assert found.level == "failure" and found.fix == 'apply = "operators"'


def test_bitsandbytes_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(facts(settings={"quantization": "bnb_4bit"})) == []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = only(facts(settings={"quantization": "bnb_4bit"}))
    assert found.level == "failure" and found.fix == "pip install bitsandbytes"


def test_fewer_bits_are_proposed_where_the_model_fits_in_them() -> None:
    short = plan(load(), offloaded=20, largest=0)
    found = only(facts(plan=short, fitting_quantization="bnb_8bit"))
    assert found.level == "failure" and str(found.fix).startswith('quantization = "bnb_8bit"')
    assert "bnb" not in str(only(facts(plan=short)).fix)


def test_gpus_that_are_left_out_fail_a_run_that_has_no_other_and_does_not_ask_for_the_cpu() -> None:
    obstacle = Obstacle("too old", "another build")
    old, cpu = replace(gpu(), obstacle=obstacle), plan(load("cpu", free=64))
    found = only(facts(report=GpuReport((gpu(1), old)), usable=(gpu(1),)))
    assert (found.level, found.fix) == ("warning", "another build")
    found = only(facts(report=GpuReport((old, replace(old, index=1))), usable=(), plan=cpu))  # one finding for both
    assert found.level == "failure" and "cuda:0" in found.text and "cuda:1" in found.text
    assert str(found.fix).endswith('device_map = "cpu"')
    found = only(facts(report=GpuReport((old,)), usable=(), plan=cpu, settings={"device_map": "cpu"}))
    assert found.level == "warning"
    unstarted = replace(old, obstacle=replace(obstacle, fails=False))
    found = only(facts(report=GpuReport((unstarted,)), usable=(), plan=cpu))
    assert (found.level, found.fix) == ("warning", "another build")


def test_what_uses_the_ram_is_no_finding_of_a_gpu_whose_memory_it_is() -> None:
    shared = gpu(0, 10, GpuProcess(7, "python", 3 * GIB))
    assert len(run(facts(shared))) == 2
    assert run(facts(replace(shared, integrated=True))) == []


def test_an_exclusive_gpu_on_which_another_process_computes() -> None:
    drawing, computing = GpuProcess(6, "Xorg", 1, computes=False), GpuProcess(7, "python", 1)
    assert run(facts(gpu(0, 24, drawing, computing))) == []
    assert run(facts(replace(gpu(0, 24, drawing), exclusive=True))) == []
    found = only(facts(replace(gpu(0, 24, drawing, computing), exclusive=True)))
    assert found.level == "failure" and "7" in found.text and "python" in found.text
    other = facts(gpu(0), replace(gpu(1, 24, computing), exclusive=True))
    assert run(other) == [], "the plan does not use it"


def test_bfloat16_on_a_gpu_that_emulates_it() -> None:
    old = replace(gpu(), emulates_bfloat16=True)
    found = only(facts(old))
    assert (found.level, found.fix) == ("warning", 'dtypes = ["float16", "bfloat16"]')
    assert run(facts(old, plan=plan(dtype="float16"))) == []
    assert run(facts(gpu(), replace(old, index=1))) == [], "the plan does not use it"


def test_idle_gpu() -> None:
    assert only(facts(plan=plan(load("cpu", free=64)))).fix == 'device_map = "planned"'


@pytest.mark.parametrize(
    ("changes", "fix"),
    [
        ({"plan": plan(load(), offloaded=20, largest=0)}, 'device_map = "auto"'),
        ({"plan": plan(load(weights=30), largest=0, dtype="float32")}, 'dtypes = ["bfloat16"]'),
        ({"plan": plan(load(), offloaded=1, largest=0), "settings": {"max_memory": {"0": "1GiB"}}}, "max_memory = {}"),
        (
            {"plan": plan(load(weights=30, copies=5), largest=0), "settings": {"apply": "weights"}},
            'apply = "operators"',
        ),
        ({"plan": plan(load(weights=30), largest=0), "settings": {"device_map": "auto"}}, "use a smaller model"),
    ],
)
def test_weights_that_do_not_fit(changes: dict[str, Any], fix: str) -> None:
    found = only(facts(**changes))
    assert found.level == "failure" and found.subject == "memory" and str(found.fix).startswith(fix)
    assert ("--by-block" in str(found.fix)) == fix.startswith("use a smaller model"), "only where no setting helps"


def test_advice_to_edit_by_block_works_with_the_settings() -> None:
    settings = {
        "device_map": "auto",
        "ablation": {"geometry": "conditional"},
        "export_format": "lora",
    }
    fix = str(only(facts(plan=plan(load(weights=30), largest=0), settings=settings)).fix)
    assert "ablation.geometry=norm_preserving" in fix and "export_format=full" in fix


@pytest.mark.parametrize("changes", [{"apply": "weights"}, {"search": {"start": "kernels"}}])
def test_readers_need_operators_and_the_gradient_search(changes: dict[str, Any]) -> None:
    found = only(facts(settings={"ablation": {"readers": True}, **changes}))
    assert found.level == "failure" and found.subject == "ablation.readers"


def test_everything_on_one_of_several_gpus() -> None:
    crowd = [gpu(i) for i in range(4)]
    full = facts(*crowd, plan=plan(load(weights=61), largest=0), settings={"device_map": "sequential"})
    assert only(full).fix == 'device_map = "planned"' and only(full).level == "failure"
    tight = replace(full, plan=plan(load(weights=23.5)))
    assert only(tight).fix == 'device_map = "planned"' and only(tight).level == "warning"
    assert run(replace(full, plan=plan(load(weights=10)))) == []


def test_cached_weights_that_do_not_fit_on_sharded_model() -> None:
    sharded = plan(load("cuda:0", 17, copies=8), load("cuda:1", 17, copies=8), largest=0)
    found = only(facts(gpu(0), gpu(1), plan=sharded, settings={"apply": "weights"}))
    assert (
        found.subject == "cache_weights"
        and str(found.fix).startswith("cache_weights = false")
        and "16.0 GiB" in found.text
    )
    smaller = replace(sharded, largest_batch_size=2)
    assert only(facts(gpu(0), gpu(1), plan=smaller, settings={"apply": "weights", "batch_size": 8})).level == "warning"
    fitting = plan(load("cuda:0", 10, copies=8), load("cuda:1", 10, copies=8))
    assert run(facts(gpu(0), gpu(1), plan=fitting, settings={"apply": "weights"})) == []


def test_iterative_rounds() -> None:
    rounds = {"directions": {"iterative_rounds": 2}}
    assert run(facts(settings=rounds)) == []
    levels = [f.level for rule in RULES for f in rule(facts(settings=rounds)) if f.subject == "iterative rounds"]
    assert levels == ["ok"]
    short = facts(plan=plan(load(weights=22, rounds=3), largest=4), settings=rounds)
    found = only(short)
    assert found.level == "warning" and str(found.fix).startswith("directions.iterative_rounds = 0")
    assert "3.0 GiB" in found.text and "cuda:0 needs 25.0 GiB" in found.text
    assert only(replace(short, plan=plan(load(weights=22, rounds=3), largest=0))).level == "failure"
    assert only(replace(short, plan=plan(load(weights=26, rounds=3), largest=0))).subject == "memory", "not their fault"


def test_residuals_of_every_prompt_that_do_not_fit() -> None:
    settings = {"directions": {"iterative_rounds": 1, "method": "geometric_median"}}
    given = facts(plan=replace(plan(), residuals=33 * GIB), settings=settings)
    found = only(given)
    assert (
        found.level == "failure"
        and "33.0 GiB in each of 2 rounds" in found.text
        and "mean_difference" in str(found.fix)
    )
    assert run(replace(given, plan=replace(plan(), residuals=31 * GIB))) == []


def test_weights_in_ram() -> None:
    found = only(facts(plan=plan(load(), load("cpu", free=64)), settings={"device_map": "auto"}))
    assert found.level == "warning" and "slower" in found.text


def test_batch_too_large() -> None:
    found = only(facts(plan=plan(load(weights=30), batch=64, largest=8), settings={"batch_size": 64}))
    assert (found.level, found.fix) == ("warning", "batch_size = 8")


def test_batch_too_small() -> None:
    found = only(facts(plan=plan(batch=1, largest=32), settings={"batch_size": 1}))
    assert (found.level, found.fix) == ("warning", "batch_size = 32")
    assert run(facts(plan=plan(batch=1, largest=1), settings={"batch_size": 1})) == []


def test_tight() -> None:
    assert only(facts(plan=plan(load(weights=23.5)))).fix == "batch_size = 4"
    assert (
        only(facts(plan=plan(load(weights=23.5), batch=8, largest=2), settings={"batch_size": 8})).fix
        == "batch_size = 2"
    )
    weights = facts(plan=plan(load(weights=13.5, copies=10), batch=1, largest=1), settings={"apply": "weights"})
    assert only(weights).fix == 'apply = "operators"'
    assert "smaller model" in str(only(facts(plan=plan(load(weights=23.5), batch=1, largest=1))).fix)


def test_max_memory_without_effect() -> None:
    found = only(facts(settings={"device_map": "cuda:0", "max_memory": {"0": "1GiB"}}))
    assert found.subject == "max_memory" and found.fix == 'device_map = "planned"'
    assert only(facts(settings={"device_map": {"": 0}, "max_memory": {"0": "1GiB"}})).subject == "max_memory"


def test_gguf_takes_ram() -> None:
    gguf = Checkpoint("a.gguf", Path("."), small(), TENSORS, gguf_file="a.gguf")
    assert "4.0 GiB of RAM" in only(facts(checkpoint=gguf, ram=3 * GIB)).text
    assert run(facts(checkpoint=gguf)) == []


def test_two_processes_on_one_gpu() -> None:
    small_one, large_one = GpuProcess(7, "Xorg", 100 * 2**20), GpuProcess(8, "python", 5 * GIB)
    found = only(facts(gpu(0, 18, small_one, large_one)))
    assert found.level == "warning" and "8 (python)" in found.text and "kill 8" in str(found.fix)
    assert run(facts(gpu(0), gpu(1, 18, large_one))) == []  # not on the GPU that is used


def test_use_by_invisible_processes() -> None:
    finding = only(facts(gpu(0, 18)))
    assert (finding.level, finding.subject) == ("warning", "GPUs") and "6.0 GiB of cuda:0" in finding.text
    assert run(facts(gpu(0, 18, GpuProcess(8, "python", None)))) == []


def test_unseen_use_is_reported_in_the_words_of_the_devices_kind() -> None:
    found = only(facts(replace(gpu(0, 18), kind="xpu"), plan=plan(load("xpu:0"))))
    assert "xpu:0" in found.text and "ZE_AFFINITY_MASK" in str(found.fix)
    assert run(facts(replace(gpu(0, 18), kind="mps"), plan=plan(load("mps")))) == []  # the system uses the same memory


def test_held_lock() -> None:
    other = LockOwner(123, "host", "heretic x", "owner/x", "2026-01-30T12:00:00+01:00")
    found = only(facts(holders=(("cuda:0", other),)))
    assert "123" in found.text and "owner/x" in found.text and "--wait" in str(found.fix)


@pytest.mark.parametrize(
    ("changes", "level", "words"),
    [
        ({"run_folder": Folder("/r", GIB, writable=False)}, "failure", "runs_dir"),
        ({"run_folder": Folder("/r", GIB // 2)}, "warning", "runs_dir"),
        ({"export_folder": Folder("/e", 1000 * GIB, occupied=True)}, "failure", 'save_to = "/e-2"'),
        ({"export_folder": Folder("/e", 1000 * GIB, writable=False)}, "failure", "save_to"),
        ({"export_folder": Folder("/e", 1000 * GIB, mounted=True)}, "failure", 'save_to = "/e/model"'),
        ({"export_folder": Folder("/e", GIB // 2), "export_bytes": GIB}, "failure", "larger disk"),
        ({"prompt_warnings": ("shared",)}, "warning", "prompts"),
    ],
)
def test_folders_and_prompts(changes: dict[str, Any], level: str, words: str) -> None:
    found = only(facts(**changes))
    assert found.level == level and words in str(found.fix)


def test_download() -> None:
    remote = {"w": TensorInfo("w", (GIB,), "BF16", None)}
    checkpoint = Checkpoint("owner/model", Path("."), small(), remote, commit="abc")
    assert run(facts(checkpoint=checkpoint)) == []
    found = only(facts(checkpoint=checkpoint, hub_cache=Folder("/cache", GIB)))
    assert found.level == "failure" and "HF_HUB_CACHE" in str(found.fix)
    assert run(facts(checkpoint=checkpoint, hub_cache=Folder("/cache", GIB), downloaded_bytes=int(1.5 * GIB))) == []
    assert run(facts(checkpoint=replace(checkpoint, tensors=TENSORS), hub_cache=Folder("/cache", GIB))) == []
    cache, folder = Folder("/cache", 3 * GIB, disk=7), Folder("/out", 3 * GIB, disk=7)
    both = {"checkpoint": checkpoint, "hub_cache": cache, "export_bytes": 2 * GIB}
    assert "download" in only(facts(**both, export_folder=folder)).text
    assert run(facts(**both, export_folder=replace(folder, disk=8))) == []


def test_one_file_that_is_too_large_to_be_mapped() -> None:
    found = only(facts(largest_file=61 * GIB, mappable=22 * GIB))
    assert found.level == "failure" and "61.0 GiB" in found.text and "overcommit_memory=1" in str(found.fix)
    assert run(facts(largest_file=61 * GIB)) == run(facts(largest_file=5 * GIB, mappable=22 * GIB)) == []
