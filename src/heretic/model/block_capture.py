"""Capture residuals block by block: all prompts pass through one block before the next is read from disk."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from heretic.errors import UserError
from heretic.hardware.host import format_bytes, memory
from heretic.model.architecture import first_tensor
from heretic.model.batching import Batch, Batcher, out_of_memory
from heretic.model.capture import ResidualMeans, ResidualSums, last_token_residuals, one_stream
from heretic.model.forward import hidden_states
from heretic.model.loading import LanguageModel
from heretic.model.patching import forward_hooks, replaced_forward
from heretic.model.turns import finish

SHARE_FOR_STREAMS = 0.5  # of the free RAM, for the hidden states of all prompts
SAME = 1e-3  # largest relative difference from a pass through all blocks in turn; on one device both compute the same


@dataclass
class _Stream:
    """One batch between two blocks."""

    batch: Batch
    sums: ResidualSums
    returned: Any = None  # by the block before: hidden states in RAM, in a tuple if blocks return tuples


def mean_residuals_by_block(
    language_model: LanguageModel,
    sets: Sequence[Sequence[list[int]]],
    batcher: Batcher,
    winsorize: float = 1.0,
    *,
    keep_each: bool = False,
) -> list[ResidualMeans]:
    """Compute the mean residuals as `model.capture.mean_residuals`, of several prompt sets in one read of the blocks.

    Small batches cost no further read, so those of a batcher with `equal_lengths` avoid padding at no cost. Between blocks the
    hidden states of all prompts are in RAM. The shortest prompt also passes through all blocks in turn, which is another read, and
    must have the same residuals.

    Raises UserError if hidden states do not fit into RAM, or the blocks depend on more than the hidden states.
    """
    structure = language_model.structure
    shortest = min((tokens for sequences in sets for tokens in sequences), key=len)
    alone = batcher.batch([0], [shortest])
    _check_memory(language_model, [*(tokens for sequences in sets for tokens in sequences), shortest])
    expected = finish(last_token_residuals(language_model, alone))
    found: list[ResidualSums] | None = None
    while found is None:  # again with smaller batches, if memory ran out
        checked, *sums = (
            ResidualSums(count, structure.num_layers, structure.width, clip, keep_each)
            for count, clip in ((1, 1.0), *((len(sequences), winsorize) for sequences in sets))
        )
        streams = [_Stream(alone, checked)]
        for sequences, own in zip(sets, sums, strict=True):
            streams += [_Stream(batch, own) for batch in batcher.batches(sequences)]
        found = sums if _run(language_model, streams, batcher) else None
    _check_same(language_model, expected, checked.means.mean)
    return [own.means for own in found]


@torch.inference_mode()
def _run(language_model: LanguageModel, streams: Sequence[_Stream], batcher: Batcher) -> bool:
    """Run all blocks on all batches; False if memory ran out, after reducing the batch size."""
    with batcher.reporter.stage("Residuals, block by block", language_model.structure.num_layers) as stage:
        for layer in range(language_model.structure.num_layers):
            for stream in streams:
                batcher.stop.check()
                try:
                    _run_block(language_model, layer, stream)
                    failed = False
                except (RuntimeError, MemoryError) as error:
                    if not out_of_memory(error):
                        raise
                    failed = True  # outside `except`: the error holds the failed pass's tensors
                except (
                    LookupError,
                    AttributeError,
                    TypeError,
                    ValueError,
                ) as error:  # state that a skipped block keeps
                    raise _not_by_block(language_model) from error
                if failed:
                    batcher.reduce_batch(len(stream.batch.rows))
                    return False
            stage.advance()
    return True


def _run_block(language_model: LanguageModel, layer: int, stream: _Stream) -> None:
    """Run one block on a batch, in a pass of the model that skips all other blocks, and add the residuals."""
    blocks, batch = language_model.structure.blocks, stream.batch
    device = batch.input_ids.device
    returned = _moved(stream.returned, device)

    def keep(_module: object, _inputs: object, output: Any) -> None:
        nonlocal returned
        returned = output

    # The model itself makes the masks and positions of this block.
    with ExitStack() as stack:
        for block in blocks:
            if block is not blocks[layer]:
                stack.enter_context(replaced_forward(block, lambda *_, **__: returned))
        stack.enter_context(forward_hooks([(blocks[layer], keep)]))
        hidden_states(language_model.model, batch, use_cache=False)
    shape = (*batch.input_ids.shape, language_model.structure.width)
    last = one_stream(first_tensor(returned), *shape)[:, -1, :]
    stream.sums.add(batch.rows, last.float().cpu()[:, None], layer)
    stream.returned = _moved(returned, torch.device("cpu"))


def _moved(returned: Any, device: torch.device) -> Any:
    """What a block returned, with its hidden states on the device and nothing else."""
    if isinstance(returned, tuple):
        return (returned[0].to(device), *[None] * (len(returned) - 1))
    return returned if returned is None else returned.to(device)


def _check_memory(language_model: LanguageModel, sequences: Sequence[list[int]]) -> None:
    tokens = sum(map(len, sequences))
    needed = tokens * language_model.structure.width * language_model.model.dtype.itemsize
    free = memory()[1]
    if needed > SHARE_FOR_STREAMS * free:
        raise UserError(
            f"The hidden states of all {tokens} tokens need {format_bytes(needed)} of RAM. {format_bytes(free)} are free, and "
            "heretic uses at most half of that.",
            code="insufficient-ram",
            where="prompts.harmful_train, prompts.harmless_train",
            fix="use fewer or shorter prompts",
        )


def _check_same(language_model: LanguageModel, expected: Tensor, found: Tensor) -> None:
    """Raise UserError unless residuals [1, layers, width] and [layers, width] are the same, or not finite."""
    difference = (expected[0].double() - found).norm(dim=-1) / expected[0].double().norm(dim=-1).clamp_min(1e-30)
    if bool(expected.isfinite().all()) and not bool((difference <= SAME).all()):
        raise _not_by_block(language_model)


def _not_by_block(language_model: LanguageModel) -> UserError:
    return UserError(
        "The blocks of this model depend on more than the hidden states, so they cannot run one by one.",
        code="not-by-block",
        where=str(language_model.checkpoint.folder),
        fix="use a machine that holds the model",
    )
