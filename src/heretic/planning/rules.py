"""What can go wrong before it does: each rule looks at the facts and says what it finds, with the line to put in the config.

A rule is a function of `Facts` and one line in `RULES`. It reads nothing else, so every rule can be tried on made-up facts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from heretic.hardware.host import format_bytes
from heretic.model.checkpoint import Checkpoint
from heretic.model.quantization import QUANTIZATIONS
from heretic.planning.memory_model import FLOAT32, GIB, MIB, SHARE_FOR_RESIDUALS
from heretic.planning.memory_plan import MemoryPlan
from heretic.planning.model_rules import download, missing_package, model, other_weights, rewritten_while_quantized
from heretic.planning.placement import MODES
from heretic.planning.preflight_facts import Finding, Level, PreflightFacts
from heretic.settings import Settings

BUSY = 500 * MIB  # GPU memory that another process may hold without being worth a word
UNSEEN_USE = 2 * GIB  # used memory that belongs to no visible process; the driver keeps up to about 1 GiB for itself
LARGE = 3_000_000_000  # parameters, for a CPU
WHY_NO_GPU = "if there are GPUs, heretic doctor says why they are not seen; on a CPU a model of this size takes days"
RUN_FOLDER = GIB
SPARE_DISK = 1.05
GGUF_BITS = {"f32": 32, "f16": 16, "bf16": 16, "q8_0": 8.5, "q6_k": 6.6, "q5_k_m": 5.7, "q4_k_m": 4.9}  # a number


Rule = Callable[[PreflightFacts], Iterator[Finding]]


def unseen_gpus(facts: PreflightFacts) -> Iterator[Finding]:
    """What NVML cannot tell."""
    unseen = facts.report.problem
    if not facts.usable and not facts.report.gpus:
        why = f" ({unseen})" if unseen else ""
        large = facts.checkpoint is not None and facts.checkpoint.parameters > LARGE
        text = f"No GPU is used{why}; everything runs on the CPU, slowly."
        yield Finding("warning" if large else "ok", "GPUs", text, WHY_NO_GPU if large else None)
    elif unseen:
        yield Finding("ok", "GPUs", f"Not looked into: {unseen}.")


def unusable_gpus(facts: PreflightFacts) -> Iterator[Finding]:
    """GPUs that PyTorch cannot use."""
    if facts.report.gpus and not facts.usable:
        text = f"{facts.report.gpus[0].name} is there, but the installed PyTorch cannot use it; everything runs on the CPU."
        yield Finding(
            "warning", "GPUs", text, "install PyTorch with CUDA for your driver: https://pytorch.org/get-started"
        )


def idle_gpus(facts: PreflightFacts) -> Iterator[Finding]:
    """A GPU that the settings leave unused."""
    if facts.usable and facts.plan and not facts.plan.on_gpu:
        text = f"The model is put on the CPU although {facts.usable[0].name} could be used."
        yield Finding("warning", "device_map", text, 'device_map = "planned"')


def weights_do_not_fit(facts: PreflightFacts) -> Iterator[Finding]:
    """Not even one prompt at a time fits."""
    plan = facts.plan
    if plan is None or plan.largest_batch_size or facts.covered_by_other_rule:
        return
    if plan.offloaded:
        text = f"{format_bytes(plan.offloaded)} of {format_bytes(plan.weights)} of weights in {plan.dtype} fit on no device."
    else:
        text = _shortage(plan)
    fix = "a smaller model, or a machine with more memory"
    if plan.on_gpu and facts.settings.device_map == "planned" and facts.settings.quantization == "none":
        fix = 'device_map = "auto" keeps the rest in RAM (every pass becomes many times slower); or a smaller model'
    yield Finding("failure", "memory", text, _smaller_weights(facts) or _fewer_bits(facts) or fix)


def everything_on_one_gpu(facts: PreflightFacts) -> Iterator[Finding]:
    """GPU 0 full, the others empty."""
    plan = facts.plan
    if plan and facts.all_on_one_of_several:
        short = "It barely fits." if plan.fits else _shortage(plan)
        text = f"device_map puts everything on one of {len(facts.usable)} GPUs. {short}"
        level: Level = "warning" if plan.largest_batch_size else "failure"
        yield Finding(level, "device_map", text, 'device_map = "balanced"')


def cached_weights(facts: PreflightFacts) -> Iterator[Finding]:
    """Copies of the edited weights do not fit beside the model; each lies on its original's device, sharded or not."""
    if facts.plan and facts.fits_without_copies:
        copies = sum(load.copies for load in facts.plan.loads)
        text = f"The copies of the edited weights ({format_bytes(copies)}) do not fit beside a batch of {facts.plan.batch_size}."
        level: Level = "warning" if facts.plan.largest_batch_size else "failure"
        fix = 'cache_weights = false; or apply = "operators", which needs no copies'
        yield Finding(level, "cache_weights", text, fix)


def iterative_rounds(facts: PreflightFacts) -> Iterator[Finding]:
    """Rounds of finding directions that run out of memory.

    They follow each other, each with the memory of one pass. What they leave behind are directions, which every operator of a trial
    then holds; what is kept of every prompt stays for as long as a round lasts.
    """
    rounds, plan = facts.settings.directions.iterative_rounds, facts.plan
    if plan is None:
        return
    if facts.fits_without_rounds:
        added = sum(load.rounds for load in plan.loads)
        text = f"What {rounds} iterative rounds add to the operators ({format_bytes(added)}) does not fit. {_shortage(plan)}"
        fix = "directions.iterative_rounds = 0, or trials_per_batch = 1"
        yield Finding("warning" if plan.largest_batch_size else "failure", "iterative rounds", text, fix)
    if plan.residuals > SHARE_FOR_RESIDUALS * facts.ram:
        text = (
            f"The residuals of every prompt take {format_bytes(plan.residuals)} in each of {1 + rounds} rounds; of RAM, "
            f"{format_bytes(facts.ram)} are free, and half of that may be used."
        )
        fix = 'directions.method = "mean_difference", or fewer prompts to train on'
        yield Finding("failure", "directions", text, fix)
    elif rounds and plan.fits:
        yield Finding(
            "ok", "iterative rounds", f"{rounds} more, one after the other: each needs the memory of one pass."
        )


def weights_in_ram(facts: PreflightFacts) -> Iterator[Finding]:
    """Weights that are moved to a GPU in every pass."""
    plan = facts.plan
    if plan and plan.in_ram:
        text = f"{format_bytes(plan.in_ram)} of weights wait in RAM; moving them to a GPU makes every pass many times slower."
        yield Finding(
            "warning", "memory", text, _smaller_weights(facts) or _fewer_bits(facts) or "a smaller model, or more GPUs"
        )


def batch_too_large(facts: PreflightFacts) -> Iterator[Finding]:
    """The batch asked for does not fit, a smaller one does."""
    plan = facts.plan
    if plan and facts.settings.batch_size and not plan.fits and plan.largest_batch_size:
        if facts.covered_by_other_rule:
            return
        text = f"A batch of {plan.batch_size} does not fit. {_shortage(plan)}"
        yield Finding("warning", "batch size", text, f"batch_size = {plan.largest_batch_size}")


def batch_too_small(facts: PreflightFacts) -> Iterator[Finding]:
    """One prompt at a time, where a GPU would do many in the same time."""
    plan = facts.plan
    if plan and facts.settings.batch_size == 1 and plan.on_gpu and plan.largest_batch_size > 1:
        text = f"One prompt at a time leaves the GPU idle; {plan.largest_batch_size} fit."
        yield Finding("warning", "batch size", text, f"batch_size = {plan.largest_batch_size}")


def memory(facts: PreflightFacts) -> Iterator[Finding]:
    """It fits; whether there is anything to spare."""
    plan = facts.plan
    if plan is None or not plan.fits:
        return
    places = ", ".join(load.device.name for load in plan.loads)
    text = f"{format_bytes(plan.weights)} of weights in {plan.dtype} on {places}, batches of {plan.batch_size}"
    if not plan.tight:
        yield Finding("ok", "memory", f"{text}.")
    elif not facts.all_on_one_of_several:
        yield Finding("warning", "memory", f"{text}: it fits, with less than 5 % to spare.", _more_room(facts, plan))


def ignored_limits(facts: PreflightFacts) -> Iterator[Finding]:
    """`max_memory` beside a placement that leaves nothing to choose."""
    device_map = facts.settings.device_map
    if facts.settings.max_memory and (not isinstance(device_map, str) or device_map not in MODES):
        text = "max_memory has no effect, because device_map names the devices itself."
        yield Finding("warning", "max_memory", text, 'device_map = "planned"')


def opened_in_ram(facts: PreflightFacts) -> Iterator[Finding]:
    """GGUF files are dequantized in RAM, in float32, before anything is placed; what was opened is written from RAM in bfloat16."""
    checkpoint, settings = facts.checkpoint, facts.settings
    if checkpoint is None or not checkpoint.is_dequantized:
        return
    if checkpoint.gguf_file and (needed := checkpoint.parameters * FLOAT32) > facts.ram:
        text = f"Reading the GGUF file takes {format_bytes(needed)} of RAM; {format_bytes(facts.ram)} are free."
        yield Finding("warning", "model", text, 'model = "…": the safetensors version, which is read piece by piece')
    elif settings.save_to and settings.export_format == "full" and (needed := 2 * checkpoint.parameters) > facts.ram:
        text = f"Writing the opened model takes at least {format_bytes(needed)} of RAM; {format_bytes(facts.ram)} are free."
        yield Finding("warning", "export", text, 'export_format = "lora", or the model in full precision')


def one_huge_file(facts: PreflightFacts) -> Iterator[Finding]:
    """Weights in a file that the kernel does not let safetensors map."""
    if facts.mappable is not None and facts.largest_file > facts.mappable:
        text = (
            f"One file of the weights has {format_bytes(facts.largest_file)}; this machine maps at most "
            f"{format_bytes(facts.mappable)} (RAM and swap) at once."
        )
        fix = 'sudo sysctl vm.overcommit_memory=1, or save the model in shards (save_pretrained(..., max_shard_size="4GB"))'
        yield Finding("failure", "memory", text, fix)


def busy_gpus(facts: PreflightFacts) -> Iterator[Finding]:
    """Other processes on the GPUs that are to be used."""
    for gpu in facts.used_gpus:
        known = sum(process.used or 0 for process in gpu.processes)
        for process in gpu.processes:
            if process.used is not None and process.used > BUSY:
                text = f"Process {process.pid} ({process.name}) holds {format_bytes(process.used)} of cuda:{gpu.index}."
                fix = f"wait for it, end it (kill {process.pid}), or leave this GPU out with CUDA_VISIBLE_DEVICES"
                yield Finding("warning", "GPUs", text, fix)
        # In a container the driver names no processes; where it names them without their memory, nothing can be told.
        unseen = gpu.total - gpu.free - known
        if unseen > UNSEEN_USE and all(process.used is not None for process in gpu.processes):
            text = f"{format_bytes(unseen)} of cuda:{gpu.index} are taken by processes that cannot be seen from here."
            yield Finding("warning", "GPUs", text, "look with nvidia-smi on the host, or set CUDA_VISIBLE_DEVICES")


def held_locks(facts: PreflightFacts) -> Iterator[Finding]:
    """Another run of ours on the same device."""
    for name, holder in facts.holders:
        yield Finding("warning", "lock", f"{name} is in use by {holder}", "heretic … --wait queues for it")


def run_folder(facts: PreflightFacts) -> Iterator[Finding]:
    """Where the study is kept."""
    folder = facts.run_folder
    if not folder.writable:
        yield Finding("failure", "run folder", f"{folder.path} cannot be written.", 'runs_dir = "…": a folder of yours')
    elif folder.free < RUN_FOLDER:
        text = f"Only {format_bytes(folder.free)} are free for {folder.path}."
        yield Finding("warning", "run folder", text, 'runs_dir = "…": a folder on a disk with 1 GiB free')


def export_folder(facts: PreflightFacts) -> Iterator[Finding]:
    """Where the result is to be saved, hours later."""
    folder = facts.export_folder
    if folder is None:
        return
    if folder.occupied:
        text = f"{folder.path} holds files that heretic did not write; it will not be overwritten."
        yield Finding("failure", "export", text, f'save_to = "{folder.path}-2"')
        return
    if not folder.writable:
        yield Finding("failure", "export", f"{folder.path} cannot be written.", 'save_to = "…": a folder of yours')
    elif facts.checkpoint:
        needed = int(SPARE_DISK * _export_size(facts.checkpoint, facts.settings))
        if folder.free < needed:
            text = f"The export takes {format_bytes(needed)}, but only {format_bytes(folder.free)} are free for {folder.path}."
            yield Finding("failure", "export", text, 'save_to = "…": a folder on a larger disk')
        else:
            yield Finding(
                "ok", "export", f"{format_bytes(needed)} of {format_bytes(folder.free)} free for {folder.path}."
            )


def _export_size(checkpoint: Checkpoint, settings: Settings) -> float:
    """Bytes of what is to be written; of an adapter, which is some megabytes, a gigabyte. A GGUF file is converted from a folder
    that lies beside it, and quantized from a file as large as that."""
    if settings.export_format == "lora":
        return GIB
    folder = 2 * checkpoint.parameters if checkpoint.is_dequantized else checkpoint.nbytes
    if settings.export_format != "gguf":
        return folder
    if settings.gguf_type.endswith(("_m", "_k")):
        folder *= 2
    return folder + GGUF_BITS[settings.gguf_type] / 8 * checkpoint.parameters


def prompts(facts: PreflightFacts) -> Iterator[Finding]:
    """What is doubtful about the prompt sets."""
    for warning in facts.prompt_warnings:
        yield Finding("warning", "prompts", warning, "[prompts]: choose splits that share no prompts")


RULES: tuple[Rule, ...] = (
    model,
    other_weights,
    rewritten_while_quantized,
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
    held_locks,
    prompts,
    run_folder,
    export_folder,
)


def _smaller_weights(facts: PreflightFacts) -> str | None:
    """The setting that takes more memory than it must, or leaves less than there is."""
    plan, settings = facts.plan, facts.settings
    if plan and plan.dtype == "float32":
        return 'dtypes = ["bfloat16"]'
    if settings.max_memory:
        return "max_memory = {}"
    return 'apply = "operators"' if plan and any(load.copies for load in plan.loads) else None


def _fewer_bits(facts: PreflightFacts) -> str | None:
    """The quantization with the most bits with which the model would fit, as it was planned too."""
    name = facts.fitting_quantization
    return f'quantization = "{name}": {QUANTIZATIONS[name].words}' if name else None


def _more_room(facts: PreflightFacts, plan: MemoryPlan) -> str:
    """What leaves more to spare; `largest_batch_size` does, if any batch does."""
    if plan.largest_batch_size < plan.batch_size:
        return f"batch_size = {plan.largest_batch_size}"
    halved = f"batch_size = {plan.batch_size // 2}" if plan.batch_size > 1 else None
    return _smaller_weights(facts) or halved or "end other programs, or take a smaller model"


def _shortage(plan: MemoryPlan) -> str:
    """The device that lacks most, in words."""
    worst = max(plan.loads, key=lambda load: load.total - load.device.free)
    device = worst.device
    return f"{device.name} would need {format_bytes(worst.total)}, but {format_bytes(device.free)} are free."
