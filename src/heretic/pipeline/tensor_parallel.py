"""Tensor parallelism: processes that torchrun starts, each with a share of every weight, which go through the same steps.

The first one leads. It alone has the screen, the locks, the study and the files. It tells the others what to run next: all then
do the same computation, so that each of its sums over the shares finds everybody there. Decisions that could fall out
differently, such as those taken by the clock, are the leader's (`agree`).
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
    """Within the context the leader does its work; at its end the other processes are let go where they listen."""
    init_process_group()
    try:
        yield
    except (Interrupted, UserError):
        if _listening:
            release_followers()
        raise
    release_followers()


_listening = True  # whether the other processes wait for what the leader tells them


@contextmanager
def opening_scope() -> Iterator[None]:
    """Within the context all processes open the session, and the others do not listen."""
    global _listening
    _listening = False
    yield
    _listening = True


def init_process_group() -> None:
    """Meet the other processes."""
    import torch
    import torch.distributed as dist

    if size() > 1 and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def check(checkpoint: Checkpoint, settings: Settings) -> None:
    """Raise UserError where this model cannot be shared among so many processes, before anything is loaded."""
    processes = size()
    if processes == 1:
        return
    where = f"torchrun --nproc-per-node {processes}"
    if settings.apply == "weights" or checkpoint.gguf_file:
        raise UserError(
            "Tensor parallelism needs ablation by operators and a model in safetensors.",
            code="tensor-parallel-unsupported",
            where=where,
            fix='apply = "operators", and no GGUF file; or run without torchrun',
        )
    if settings.quantization != "none" or settings.judge.kind != "markers":
        raise UserError(
            "Tensor parallelism needs unquantized weights and the judge by markers.",
            code="tensor-parallel-unsupported",
            where=where,
            fix='quantization = "none" and judge.kind = "markers", or run without torchrun',
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
    odd = [f"{number} {what}" for what, number in parts.items() if isinstance(number, int) and number % processes]
    if odd:
        fitting = [n for n in range(2, 65) if all(not isinstance(v, int) or v % n == 0 for v in parts.values())]
        raise UserError(
            f"{' and '.join(odd)} of {checkpoint.model} cannot be divided evenly among {processes} processes.",
            code="tensor-parallel-unsupported",
            where=where,
            fix=f"--nproc-per-node {' or '.join(map(str, fitting))}" if fitting else 'device_map = "balanced" instead',
        )


def sharded_plan(plan: LoadPlan) -> LoadPlan:
    """The same plan, each process loading its share."""
    if size() == 1:
        return plan
    from transformers.distributed.configuration_utils import DistributedConfig

    return replace(plan, arguments={"distributed_config": DistributedConfig(tp_size=size(), tp_plan="auto")})


class SynchronizedStop(StopSignal):
    """A stop that all processes heed at the same batch, since one that stops alone leaves the others waiting for ever."""

    def __init__(self, own: StopSignal) -> None:
        super().__init__()
        self.own = own

    def check(self) -> None:
        """Raise Interrupted in all processes if the leader was asked to stop."""
        if broadcast_from_rank0(lambda: self.own.requested):
            raise Interrupted


@dataclass
class RankZeroTrials:
    """Trials of the leader: the other processes are told what is measured, and measure it too."""

    trials: Trials

    def trials_per_batch(self, before: int | None) -> int:
        """As the settings say, else one: what would pay is not measured, as clocks differ."""
        return self.trials.session.context.settings.trials_per_batch or before or 1

    def sample(self, trial: optuna.Trial) -> object:
        """A trial's ablation."""
        return self.trials.sample(trial)

    def initial_params(self) -> list[dict[str, Any]]:
        """Parameters of the trials to begin with."""
        return self.trials.initial_params()

    def measure(self, trials: Sequence[optuna.Trial], beaten: Callable[[float, float], bool]) -> list[Any]:
        """See Trials."""
        for trial in trials:
            self.trials.sample(trial)
        broadcast_from_rank0(lambda: ("measure", [dict(trial.params) for trial in trials], beaten))
        found = self.trials.measure(trials, beaten)
        broadcast_from_rank0(lambda: [_signature(one) for one in found])
        return found


def lead_export(params: dict[str, Any]) -> None:
    """Have the other processes compute along while an export is planned."""
    if size() > 1:
        broadcast_from_rank0(lambda: ("export", [params], None))


def release_followers() -> None:
    """The leader goes on alone: the other processes end, and the model is loaded as without them from here on."""
    import torch.distributed as dist

    if size() > 1:
        if dist.is_initialized():
            broadcast_from_rank0(lambda: None)
            dist.destroy_process_group()
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            os.environ.pop(name, None)


def follower_loop(settings: Settings) -> None:
    """What every process but the leader does: load its share, compute along, end when it is told. Shows and stores nothing."""
    with suppress(Interrupted, UserError):  # the leader says it
        _follow(settings)


def _follow(settings: Settings) -> None:
    from pathlib import Path

    from heretic.model.checkpoint import open_model
    from heretic.pipeline.trials import Trials
    from heretic.prompts import load_all
    from heretic.runs.folder import RunFolder
    from heretic.session.session import open_session

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the leader is asked to stop, and says when
    init_process_group()
    plan = broadcast_from_rank0(lambda: None)
    if plan is None:
        return
    checkpoint = open_model(settings)
    stop, nowhere = SynchronizedStop(StopSignal()), RunFolder(Path(os.devnull))
    session = open_session(
        settings, checkpoint, load_all(settings.prompts), sharded_plan(plan), nowhere, NULL_REPORTER, stop
    )
    trials = Trials(session, session.space(broadcast_from_rank0(lambda: None)))
    while (task := broadcast_from_rank0(lambda: None)) is not None:
        _compute_along(session, trials, *task)


def _compute_along(session: Session, trials: Trials, what: str, params: list[dict[str, Any]], beaten: Any) -> None:
    fixed: Any = [optuna.trial.FixedTrial(p) for p in params]
    try:
        if what == "export":
            ablation = trials.sample(fixed[0])
            session.operator_factory.operators(ablation)
            session.log_probs(ablation)
            return
        mine = [_signature(one) for one in trials.measure(fixed, beaten)]
    except Interrupted:
        return
    leaders = broadcast_from_rank0(lambda: mine)
    if mine != leaders:
        raise RuntimeError(f"process {rank()} measured {mine}, the leader {leaders}: their shares do not fit together")


def _signature(found: Any) -> tuple[Any, ...]:
    """What must be the same in all processes."""
    if isinstance(found, UserError):
        return (found.what,)
    return type(found).__name__, found.divergence.mean, getattr(found, "refusals", None)
