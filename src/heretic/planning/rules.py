"""Preflight rules: each yields findings from the facts, with a line for the config as the fix.

A rule is a function of `PreflightFacts` with an entry in `RULES`. It reads nothing else, so tests can use made-up facts.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator

from heretic.hardware.devices import CPU, KINDS
from heretic.hardware.host import format_bytes
from heretic.hardware.obstacles import Obstacle
from heretic.model.quantization import QUANTIZATIONS
from heretic.planning.block_plan import supported_by_block
from heretic.planning.memory_model import FLOAT32, GIB, MIB, SHARE_FOR_RESIDUALS
from heretic.planning.memory_plan import MemoryPlan
from heretic.planning.model_rules import (
    download,
    missing_package,
    model,
    other_weights,
    readers,
    rewritten_while_quantized,
)
from heretic.planning.placement import MODES
from heretic.planning.preflight_facts import Finding, Level, PreflightFacts
from heretic.settings import Settings
from heretic.settings.toml import toml_value

BUSY = 500 * MIB  # GPU memory of another process from which a warning is printed
UNSEEN_USE = 2 * GIB  # used memory without a visible process; the driver itself uses up to about 1 GiB
LARGE = 3_000_000_000  # parameters, for a CPU
WHY_NO_GPU = "if the machine has GPUs, run heretic doctor; on a CPU a model of this size takes days"
RUN_FOLDER = GIB
SPARE_DISK = 1.05


Rule = Callable[[PreflightFacts], Iterator[Finding]]


def unseen_gpus(facts: PreflightFacts) -> Iterator[Finding]:
    """Report what NVML cannot see."""
    unseen = facts.report.problem
    if not facts.usable and not facts.report.gpus:
        why = f" ({unseen})" if unseen else ""
        large = facts.checkpoint is not None and facts.checkpoint.parameters > LARGE
        text = f"heretic uses no GPU{why}. Everything runs on the CPU, which is slow."
        yield Finding("warning" if large else "ok", "GPUs", text, WHY_NO_GPU if large else None)
    elif unseen:
        yield Finding("ok", "GPUs", f"Not inspected: {unseen}.")


def unusable_gpus(facts: PreflightFacts) -> Iterator[Finding]:
    """Report GPUs that cannot be used, by reason; a failure if no other is left and the settings do not name the CPU."""
    names: dict[Obstacle, list[str]] = {}
    for gpu in facts.report.gpus:
        if gpu.obstacle is not None:
            names.setdefault(gpu.obstacle, []).append(f"{gpu.name} ({gpu.device.name})")
    fails = not facts.usable and facts.settings.device_map in MODES
    for obstacle, gpus in names.items():
        level: Level = "failure" if fails and obstacle.fails else "warning"
        instead = f', or use the CPU: device_map = "{CPU}"' if level == "failure" else ""
        text = f"Not used: {', '.join(gpus)}; {obstacle.text}."
        if level == "warning" and not facts.usable:
            text += " Everything runs on the CPU."
        yield Finding(level, "GPUs", text, obstacle.fix + instead)


def idle_gpus(facts: PreflightFacts) -> Iterator[Finding]:
    """Report a GPU that the settings leave unused."""
    if facts.usable and facts.plan and facts.plan.loads and not facts.plan.on_gpu:
        text = f"The settings put the model on the CPU, but {facts.usable[0].name} is available."
        yield Finding("warning", "device_map", text, 'device_map = "planned"')


def weights_do_not_fit(facts: PreflightFacts) -> Iterator[Finding]:
    """Report that not even one prompt at a time fits."""
    plan = facts.plan
    if plan is None or plan.largest_batch_size or facts.covered_by_other_rule:
        return
    if plan.offloaded:
        text = f"{format_bytes(plan.offloaded)} of the {format_bytes(plan.weights)} of weights in {plan.dtype} fit on no device."
    else:
        text = _shortage(plan)
    fix = "use a smaller model or a machine with more memory"
    if facts.checkpoint and not facts.checkpoint.obstacle and facts.settings.quantization == "none":
        fix += f"; or without scores: {_by_block(facts.settings)}"
    if plan.on_gpu and facts.settings.device_map == "planned" and facts.settings.quantization == "none":
        fix = (
            'device_map = "auto" (leaves the rest in RAM; every pass becomes many times slower), or use a smaller model'
        )
    yield Finding("failure", "memory", text, _smaller_weights(facts) or _fewer_bits(facts) or fix)


def _by_block(settings: Settings) -> str:
    """Return the command that needs one block in memory, without what it does not support."""
    words = ["heretic", "ablate", settings.model, "--strength", "1", "--by-block", "-o", "FOLDER"]
    changed = supported_by_block(settings.ablation)
    if settings.export_format != "full":
        changed["export_format"] = "full"
    for name, value in changed.items():
        words += ["--set", f"{name}={value if isinstance(value, str) else toml_value(value)}"]
    return shlex.join(words)


def everything_on_one_gpu(facts: PreflightFacts) -> Iterator[Finding]:
    """Report one overfull GPU beside empty ones."""
    plan = facts.plan
    if plan and facts.all_on_one_of_several:
        short = "It barely fits." if plan.fits else _shortage(plan)
        text = f"device_map puts everything on one of {len(facts.usable)} GPUs. {short}"
        level: Level = "warning" if plan.largest_batch_size else "failure"
        yield Finding(level, "device_map", text, 'device_map = "planned"')


def cached_weights(facts: PreflightFacts) -> Iterator[Finding]:
    """Report copies of the edited weights that do not fit; each copy is on its original's device."""
    if facts.plan and facts.fits_without_copies:
        copies = sum(load.copies for load in facts.plan.loads)
        text = f"The copies of the edited weights ({format_bytes(copies)}) do not fit beside a batch of {facts.plan.batch_size}."
        level: Level = "warning" if facts.plan.largest_batch_size else "failure"
        fix = 'cache_weights = false, or apply = "operators", which needs no copies'
        yield Finding(level, "cache_weights", text, fix)


def iterative_rounds(facts: PreflightFacts) -> Iterator[Finding]:
    """Report iterative rounds that do not fit.

    Each round needs the memory of one pass and of all prompts' residuals. Its directions add to every operator of a trial.
    """
    rounds, plan = facts.settings.directions.iterative_rounds, facts.plan
    if plan is None:
        return
    if facts.fits_without_rounds:
        added = sum(load.rounds for load in plan.loads)
        text = f"The operators of {rounds} iterative rounds ({format_bytes(added)}) do not fit. {_shortage(plan)}"
        fix = "directions.iterative_rounds = 0, or trials_per_batch = 1"
        yield Finding("warning" if plan.largest_batch_size else "failure", "iterative rounds", text, fix)
    if plan.residuals > SHARE_FOR_RESIDUALS * facts.ram:
        text = (
            f"The residuals of all prompts need {format_bytes(plan.residuals)} in each of {1 + rounds} rounds. heretic uses at "
            f"most half of the free RAM ({format_bytes(facts.ram)})."
        )
        fix = 'directions.method = "mean_difference", or fewer training prompts'
        yield Finding("failure", "directions", text, fix)
    elif rounds and plan.fits:
        yield Finding("ok", "iterative rounds", f"{rounds} further rounds, each with the memory of one pass.")


def weights_in_ram(facts: PreflightFacts) -> Iterator[Finding]:
    """Report weights that every pass moves to a GPU."""
    plan = facts.plan
    if plan and plan.in_ram:
        text = f"{format_bytes(plan.in_ram)} of weights stay in RAM. Moving them to a GPU makes every pass many times slower."
        fix = _smaller_weights(facts) or _fewer_bits(facts) or "use a smaller model or more GPUs"
        yield Finding("warning", "memory", text, fix)


def batch_too_large(facts: PreflightFacts) -> Iterator[Finding]:
    """Report a batch size that does not fit although a smaller one does."""
    plan = facts.plan
    if plan and facts.settings.batch_size and not plan.fits and plan.largest_batch_size:
        if facts.covered_by_other_rule:
            return
        text = f"A batch of {plan.batch_size} does not fit. {_shortage(plan)}"
        yield Finding("warning", "batch size", text, f"batch_size = {plan.largest_batch_size}")


def batch_too_small(facts: PreflightFacts) -> Iterator[Finding]:
    """Report a batch size of 1 on a GPU that fits more."""
    plan = facts.plan
    if plan and facts.settings.batch_size == 1 and plan.on_gpu and plan.largest_batch_size > 1:
        text = f"A batch size of 1 leaves the GPU mostly idle; {plan.largest_batch_size} fit."
        yield Finding("warning", "batch size", text, f"batch_size = {plan.largest_batch_size}")


def memory(facts: PreflightFacts) -> Iterator[Finding]:
    """Report a plan that fits, and whether it is tight."""
    plan = facts.plan
    if plan is None or not plan.fits:
        return
    places = ", ".join(load.device.name for load in plan.loads)
    text = f"{format_bytes(plan.weights)} of weights in {plan.dtype} on {places}, batches of {plan.batch_size}"
    if not plan.tight:
        yield Finding("ok", "memory", f"{text}.")
    elif not facts.all_on_one_of_several:
        yield Finding("warning", "memory", f"{text}. It fits with less than 5 % to spare.", _more_room(facts, plan))


def ignored_limits(facts: PreflightFacts) -> Iterator[Finding]:
    """Report a `max_memory` without effect."""
    device_map = facts.settings.device_map
    if facts.settings.max_memory and facts.plan and facts.plan.loads and not facts.plan.on_gpu:
        text = "max_memory has no effect, because the whole model is on the CPU."
        yield Finding("warning", "max_memory", text, "max_memory = {}")
    elif facts.settings.max_memory and (not isinstance(device_map, str) or device_map not in MODES):
        text = "max_memory has no effect, because device_map gives the devices."
        yield Finding("warning", "max_memory", text, 'device_map = "planned"')


def opened_in_ram(facts: PreflightFacts) -> Iterator[Finding]:
    """Check the RAM for a dequantized model: GGUF files are loaded in float32, exports are written in bfloat16."""
    checkpoint, settings = facts.checkpoint, facts.settings
    if checkpoint is None or not checkpoint.is_dequantized:
        return
    if checkpoint.gguf_file and (needed := checkpoint.parameters * FLOAT32) > facts.ram:
        text = f"Reading the GGUF file needs {format_bytes(needed)} of RAM; {format_bytes(facts.ram)} are free."
        yield Finding("warning", "model", text, 'model = "…": the safetensors version, which needs less RAM')
    elif settings.save_to and settings.export_format != "lora" and (needed := 2 * checkpoint.parameters) > facts.ram:
        text = f"Writing the dequantized model needs at least {format_bytes(needed)} of RAM; {format_bytes(facts.ram)} are free."
        yield Finding("warning", "export", text, 'export_format = "lora", or the model in full precision')


def one_huge_file(facts: PreflightFacts) -> Iterator[Finding]:
    """Report a weights file that the kernel cannot map."""
    if facts.mappable is not None and facts.largest_file > facts.mappable:
        text = (
            f"One weights file has {format_bytes(facts.largest_file)}, but this machine can map at most "
            f"{format_bytes(facts.mappable)} (RAM and swap)."
        )
        fix = 'sudo sysctl vm.overcommit_memory=1, or save the model in shards (save_pretrained(..., max_shard_size="4GB"))'
        yield Finding("failure", "memory", text, fix)


def busy_gpus(facts: PreflightFacts) -> Iterator[Finding]:
    """Report other processes on the GPUs of the plan."""
    for gpu in facts.used_gpus:
        kind = KINDS[gpu.kind]
        if gpu.device.uses_ram:  # what uses the RAM is reported with the RAM
            continue
        known = sum(process.used or 0 for process in gpu.processes)
        for process in gpu.processes:
            if process.used is not None and process.used > BUSY:
                text = f"Process {process.pid} ({process.name}) uses {format_bytes(process.used)} of {gpu.device.name}."
                fix = f"wait for it, end it (kill {process.pid}), or exclude this GPU with {kind.visibility[0]}"
                yield Finding("warning", "GPUs", text, fix)
        # In a container the driver lists no processes; if it lists them without their memory, the rest is unknown.
        unseen = gpu.total - gpu.free - known
        if unseen > UNSEEN_USE and all(process.used is not None for process in gpu.processes):
            text = f"Processes that are not visible here use {format_bytes(unseen)} of {gpu.device.name}."
            yield Finding("warning", "GPUs", text, f"run {kind.monitor} on the host, or set {kind.visibility[0]}")


def exclusive_gpus(facts: PreflightFacts) -> Iterator[Finding]:
    """Report a GPU of the plan that another process has for itself."""
    for gpu in facts.used_gpus:
        owner = next((process for process in gpu.processes if process.computes), None)
        if gpu.exclusive and owner:
            kind = KINDS[gpu.kind]
            text = (
                f"Process {owner.pid} ({owner.name}) has {gpu.device.name} for itself: its compute mode is exclusive."
            )
            fix = f"wait for it, exclude this GPU with {kind.visibility[0]}, or sudo {kind.monitor} -i {gpu.uuid} -c DEFAULT"
            yield Finding("failure", "GPUs", text, fix)


def emulated_bfloat16(facts: PreflightFacts) -> Iterator[Finding]:
    """Report GPUs of the plan that emulate its number format."""
    names = [f"{gpu.name} ({gpu.device.name})" for gpu in facts.used_gpus if gpu.emulates_bfloat16]
    if names and facts.plan and facts.plan.dtype == "bfloat16":
        text = f"Without bfloat16 of its own, which is therefore emulated and slow: {', '.join(names)}."
        yield Finding("warning", "dtypes", text, 'dtypes = ["float16", "bfloat16"]')


def held_locks(facts: PreflightFacts) -> Iterator[Finding]:
    """Report another heretic run on the same device."""
    for name, owner in facts.holders:
        yield Finding("warning", "lock", f"{name} is in use by {owner}", "add --wait to wait until it is free")


def run_folder(facts: PreflightFacts) -> Iterator[Finding]:
    """Check the folder of the runs."""
    folder = facts.run_folder
    if not folder.writable:
        yield Finding("failure", "run folder", f"{folder.path} cannot be written.", 'runs_dir = "…": a writable folder')
    elif folder.free < RUN_FOLDER:
        text = f"{folder.path} has only {format_bytes(folder.free)} free."
        yield Finding("warning", "run folder", text, 'runs_dir = "…": a folder on a disk with 1 GiB free')


def export_folder(facts: PreflightFacts) -> Iterator[Finding]:
    """Check the folder of the export."""
    folder = facts.export_folder
    if folder is None:
        return
    if folder.mounted:
        text = f"{folder.path} is a mount point, which heretic cannot replace by the finished export."
        yield Finding("failure", "export", text, f'save_to = "{folder.path}/model"')
        return
    if folder.occupied:
        text = f"{folder.path} contains files that heretic did not write and will not overwrite."
        yield Finding("failure", "export", text, f'save_to = "{folder.path}-2"')
        return
    if not folder.writable:
        text = f"{folder.path} cannot be written, or the folder that contains it."
        yield Finding("failure", "export", text, 'save_to = "…": a folder in a writable one')
    elif facts.checkpoint:
        needed = int(SPARE_DISK * facts.export_bytes)
        shared = facts.to_download if folder.disk and folder.disk == facts.hub_cache.disk else 0
        if folder.free < needed + shared:
            what = "The download and the export need" if shared else "The export needs"
            text = (
                f"{what} {format_bytes(needed + shared)}, but {folder.path} has only {format_bytes(folder.free)} free."
            )
            yield Finding("failure", "export", text, 'save_to = "…": a folder on a larger disk')
        else:
            text = f"The export needs {format_bytes(needed)}; {folder.path} has {format_bytes(folder.free)} free."
            yield Finding("ok", "export", text)


def prompts(facts: PreflightFacts) -> Iterator[Finding]:
    """Report warnings about the prompt sets."""
    for warning in facts.prompt_warnings:
        yield Finding("warning", "prompts", warning, "[prompts]: choose splits that share no prompts")


RULES: tuple[Rule, ...] = (
    model,
    other_weights,
    rewritten_while_quantized,
    readers,
    missing_package,
    download,
    opened_in_ram,
    one_huge_file,
    unseen_gpus,
    unusable_gpus,
    idle_gpus,
    memory,
    weights_do_not_fit,
    everything_on_one_gpu,
    cached_weights,
    iterative_rounds,
    weights_in_ram,
    ignored_limits,
    batch_too_large,
    batch_too_small,
    busy_gpus,
    exclusive_gpus,
    emulated_bfloat16,
    held_locks,
    prompts,
    run_folder,
    export_folder,
)


def _smaller_weights(facts: PreflightFacts) -> str | None:
    """Return the setting that reduces the memory of the weights or lifts a limit; None if there is none."""
    plan, settings = facts.plan, facts.settings
    if settings.max_memory and plan and plan.offloaded:
        return "max_memory = {}, or a higher limit"
    if plan and plan.dtype == "float32":
        return 'dtypes = ["bfloat16"]'
    if settings.max_memory:
        return "max_memory = {}"
    return 'apply = "operators"' if plan and any(load.copies for load in plan.loads) else None


def _fewer_bits(facts: PreflightFacts) -> str | None:
    """Return the quantization with the most bits that makes the model fit; None if there is none."""
    name = facts.fitting_quantization
    return f'quantization = "{name}": {QUANTIZATIONS[name].words}' if name else None


def _more_room(facts: PreflightFacts, plan: MemoryPlan) -> str:
    """Return the fix for a tight plan."""
    if plan.largest_batch_size < plan.batch_size:
        return f"batch_size = {plan.largest_batch_size}"
    halved = f"batch_size = {plan.batch_size // 2}" if plan.batch_size > 1 else None
    return _smaller_weights(facts) or halved or "end other programs, or use a smaller model"


def _shortage(plan: MemoryPlan) -> str:
    """Describe the device that lacks the most memory."""
    worst = max(plan.loads, key=lambda load: load.total - load.device.free)
    device = worst.device
    return f"{device.name} needs {format_bytes(worst.total)}, but has {format_bytes(device.free)} free."
