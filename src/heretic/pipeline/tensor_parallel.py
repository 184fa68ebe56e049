"""Tensor parallelism: processes started by torchrun, each with a shard of every weight.

Rank 0 leads: it alone has the screen, the locks, the study and the files, and broadcasts what all ranks compute next.
Decisions that could differ between ranks, such as those by the clock, are rank 0's (`broadcast_from_rank0`).
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import optuna

from heretic.errors import Interrupted, UserError
from heretic.hardware.devices import bind_rank
from heretic.interrupt import StopSignal
from heretic.model.distributed import broadcast_from_rank0, rank, size
from heretic.progress import NULL_REPORTER

if TYPE_CHECKING:
    from heretic.model.checkpoint import Checkpoint
    from heretic.pipeline.trials import Trials
    from heretic.planning.memory_plan import LoadPlan
    from heretic.session.session import Session
    from heretic.settings import Settings


@contextmanager
def leader_scope() -> Iterator[None]:
    """Connect the ranks; at the end of the context release the followers if they wait for a task."""
    init_process_group()
    try:
        yield
    except (Interrupted, UserError):
        if _followers_waiting:
            release_followers()
        raise
    release_followers()


_followers_waiting = True  # whether the followers wait for a task from rank 0


@contextmanager
def opening_scope() -> Iterator[None]:
    """Mark the context in which all ranks open the session and the followers wait for no task."""
    global _followers_waiting
    _followers_waiting = False
    yield
    _followers_waiting = True


def init_process_group() -> None:
    """Connect to the other ranks. Raises UserError if there is no accelerator for this one."""
    import torch.distributed as dist

    if size() > 1 and not dist.is_initialized():
        dist.init_process_group(bind_rank(int(os.environ["LOCAL_RANK"])))


def check(checkpoint: Checkpoint, settings: Settings) -> None:
    """Raise UserError if the model cannot be sharded among the ranks, before anything is loaded."""
    from heretic.ablation.geometries import GEOMETRIES

    processes = size()
    if processes == 1:
        return
    where = f"torchrun --nproc-per-node {processes}"
    if settings.apply == "weights" or checkpoint.gguf_file:
        raise UserError(
            "Tensor parallelism needs ablation by operators and a model in safetensors format.",
            code="tensor-parallel-unsupported",
            where=where,
            fix='apply = "operators", and no GGUF file; or run without torchrun',
        )
    if settings.quantization != "none" or settings.judge.kind != "markers":
        raise UserError(
            "Tensor parallelism needs unquantized weights and the markers judge.",
            code="tensor-parallel-unsupported",
            where=where,
            fix='quantization = "none" and judge.kind = "markers", or run without torchrun',
        )
    if GEOMETRIES[settings.ablation.geometry].reads_inputs:
        raise UserError(
            "A process with a shard of the weights does not see the whole input of a writer.",
            code="tensor-parallel-unsupported",
            where=f'ablation.geometry = "{settings.ablation.geometry}"',
            fix='ablation.geometry = "plain", or run without torchrun',
        )
    config: Any = checkpoint.config.get_text_config(decoder=True)
    if not getattr(config, "base_model_tp_plan", None):
        raise UserError(
            f"transformers has no tensor-parallel plan for {config.model_type}.",
            code="tensor-parallel-unsupported",
            where=where,
            fix='run without torchrun: device_map = "balanced" uses all GPUs',
        )
    parts = {
        "attention heads": getattr(config, "num_attention_heads", None),
        "key-value heads": getattr(config, "num_key_value_heads", None),
        "intermediate features": getattr(config, "intermediate_size", None),
    }
    indivisible = [
        f"{number} {what}" for what, number in parts.items() if isinstance(number, int) and number % processes
    ]
    if indivisible:
        fitting = [n for n in range(2, 65) if all(not isinstance(v, int) or v % n == 0 for v in parts.values())]
        raise UserError(
            f"{' and '.join(indivisible)} of {checkpoint.model} cannot be divided evenly among {processes} processes.",
            code="tensor-parallel-unsupported",
            where=where,
            fix=f"--nproc-per-node {' or '.join(map(str, fitting))}" if fitting else 'device_map = "balanced" instead',
        )


def sharded_plan(plan: LoadPlan) -> LoadPlan:
    """Return the plan with which each rank loads its shards."""
    if size() == 1:
        return plan
    from transformers.distributed.configuration_utils import DistributedConfig

    return replace(plan, arguments={"distributed_config": DistributedConfig(tp_size=size(), tp_plan="auto")})


class SynchronizedStop(StopSignal):
    """A stop at the same batch in all ranks: a rank that stops alone would leave the others waiting forever."""

    def __init__(self, local: StopSignal) -> None:
        super().__init__()
        self.local = local

    def check(self) -> None:
        """Raise Interrupted in all ranks if rank 0 has a stop request."""
        if broadcast_from_rank0(lambda: self.local.requested):
            raise Interrupted


@dataclass
class RankZeroTrials:
    """Trials of rank 0, which broadcasts them so that all ranks measure them together."""

    trials: Trials

    def trials_per_batch(self, before: int | None) -> int:
        """Return the setting, else an earlier session's value, else 1: timing would differ between ranks."""
        return self.trials.session.context.settings.trials_per_batch or before or 1

    def sample(self, trial: optuna.Trial) -> object:
        """Return a trial's ablation."""
        return self.trials.sample(trial)

    def initial_params(self) -> list[dict[str, Any]]:
        """Return the parameters of the first trials."""
        return self.trials.initial_params()

    def measure(self, trials: Sequence[optuna.Trial], is_dominated: Callable[[float, float], bool]) -> list[Any]:
        """See Trials."""
        for trial in trials:
            self.trials.sample(trial)
        broadcast_from_rank0(lambda: ("measure", [dict(trial.params) for trial in trials], is_dominated))
        outcomes = self.trials.measure(trials, is_dominated)
        broadcast_from_rank0(lambda: [_signature(outcome) for outcome in outcomes])
        return outcomes


def lead_export(params: dict[str, Any]) -> None:
    """Let the followers compute along while an export is planned."""
    if size() > 1:
        broadcast_from_rank0(lambda: ("export", [params], None))


def release_followers() -> None:
    """End the followers; from here on rank 0 loads models without tensor parallelism."""
    import torch.distributed as dist

    if size() > 1:
        if dist.is_initialized():
            broadcast_from_rank0(lambda: None)
            dist.destroy_process_group()
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            os.environ.pop(name, None)


def follower_loop(settings: Settings) -> None:
    """Run a follower: load its shards and compute along until rank 0 releases it. Shows and stores nothing."""
    with suppress(Interrupted, UserError):  # rank 0 reports it
        _follow(settings)


def _follow(settings: Settings) -> None:
    from pathlib import Path

    from heretic.model.checkpoint import open_model
    from heretic.pipeline.trials import Trials
    from heretic.prompts.sets import load_all
    from heretic.runs.folder import RunFolder
    from heretic.session.session import open_session

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # rank 0 handles signals and broadcasts the stop
    init_process_group()
    plan = broadcast_from_rank0(lambda: None)
    if plan is None:
        return
    checkpoint = open_model(settings)
    stop, null_folder = SynchronizedStop(StopSignal()), RunFolder(Path(os.devnull))
    session = open_session(
        settings, checkpoint, load_all(settings.prompts), sharded_plan(plan), null_folder, NULL_REPORTER, stop
    )
    trials = Trials(session, session.space(broadcast_from_rank0(lambda: None)))
    while (task := broadcast_from_rank0(lambda: None)) is not None:
        _compute_along(session, trials, *task)


def _compute_along(
    session: Session, trials: Trials, what: str, params: list[dict[str, Any]], is_dominated: Any
) -> None:
    fixed: Any = [optuna.trial.FixedTrial(p) for p in params]
    try:
        if what == "export":
            ablation = trials.sample(fixed[0])
            session.operator_factory.operators(ablation)
            session.log_probs(ablation)
            session.compare(ablation)
            return
        own = [_signature(outcome) for outcome in trials.measure(fixed, is_dominated)]
    except Interrupted:
        return
    expected = broadcast_from_rank0(lambda: own)
    if own != expected:
        raise RuntimeError(f"rank {rank()} measured {own}, rank 0 {expected}: the ranks are out of sync")


def _signature(outcome: Any) -> tuple[Any, ...]:
    """Return the parts of an outcome that must be the same in all ranks."""
    if isinstance(outcome, UserError):
        return (outcome.what,)
    return type(outcome).__name__, outcome.divergence.mean, getattr(outcome, "refusals", None)
