"""What a trial is worth as a function with a gradient: change of harmless answers, and how probable refusals still are.

The operators are differentiable in every strength and in the direction; the weights stay as they are and get no gradients.
Nothing is decoded: both sides are read from one pass each over prompts with the first tokens of the original's answer behind
them. The head runs on a few tokens at a time, and what a block computes can be computed again instead of kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from heretic.ablation.ablation import Ablation, OperatorFactory
from heretic.ablation.apply import apply_operators
from heretic.model.batching import Batch, Batcher, EditSpec, SharedPrefix
from heretic.model.forward import log_probs_of, run_decoder
from heretic.model.loading import LanguageModel
from heretic.model.patching import replaced_forward
from heretic.scoring.teacher_forcing import TeacherForcedTexts, last_hidden, row_of_place

# A certain refusal has an infinite loss -log(1 - p); with (1 - DOUBT) p in its place the slope is at most 1 / DOUBT.
LABEL_SMOOTHING = 0.01
PLACES_AT_ONCE = 32  # tokens whose logits over the vocabulary exist at a time, with their gradients


@dataclass(frozen=True)
class LossTerms:
    """Mean KL(original || ablated) per predicted token of the harmless prompts; mean probability of the refusals' texts, and
    mean -log(1 - p) of them; the gradients of KL + weight * refusing loss, if they were wanted."""

    kl: float
    probability: float
    refusing: float
    gradients: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Objective:
    """Reads an ablation off the model. `original[i]` are the original's log-probabilities [texts, vocabulary] for harmless
    prompt i; with `checkpoints` a block's inner activations are computed twice instead of kept."""

    language_model: LanguageModel
    operator_factory: OperatorFactory
    batcher: Batcher
    harmless: TeacherForcedTexts
    harmful: TeacherForcedTexts
    original: Sequence[Tensor]
    checkpoints: bool = False

    def evaluate(
        self,
        ablation: Ablation,
        first_layer: int,
        harmless: Sequence[int],
        harmful: Sequence[int],
        *,
        weight: float = 1.0,
        wanted: Sequence[Tensor] = (),
    ) -> LossTerms:
        """The ablation on these of the prompts. `wanted` are tensors in it whose gradients are asked for.

        Nothing below `first_layer` is edited. Raises RuntimeError where a kernel of the model has no backward.
        """
        total = [torch.zeros_like(t) for t in wanted]
        sums = {"kl": 0.0, "probability": 0.0, "refusing": 0.0}
        places = sum(len(self.harmless.texts[i]) for i in harmless)

        def kl_slope(batch: Batch, values: Tensor) -> Tensor:
            sums["kl"] += float(values.sum()) / places
            return torch.full_like(values, 1 / places)

        def refusing_slope(batch: Batch, values: Tensor) -> Tensor:
            row = row_of_place([len(self.harmful.texts[i]) for i in batch.rows]).to(values.device)
            log_p = torch.zeros(len(batch.rows), dtype=values.dtype, device=values.device).index_add(0, row, values)
            doubted = (1 - LABEL_SMOOTHING) * log_p.exp()
            sums["probability"] += float(log_p.exp().sum()) / len(harmful)
            sums["refusing"] += float(-torch.log1p(-doubted).sum()) / len(harmful)
            return (weight / len(harmful)) * (doubted / (1 - doubted))[row]

        edited = EditSpec(1, first_layer)
        for name, taught, rows, value, slope in (
            ("Harmless prompts", self.harmless, harmless, self._kl, kl_slope),
            ("Refusals", self.harmful, harmful, self._log_p, refusing_slope),
        ):

            def step(
                batch: Batch,
                taught: TeacherForcedTexts = taught,
                value: Callable[[Batch], Callable[[slice, Tensor], Tensor]] = value,
                slope: Callable[[Batch, Tensor], Tensor] = slope,
            ) -> list[None]:
                before = dict(sums)
                try:
                    found = self._pass(
                        ablation, first_layer, batch, taught, value(batch), partial(slope, batch), wanted
                    )
                except BaseException:
                    sums.update(before)  # out of memory: half of the batch is tried next
                    raise
                for mine, more in zip(total, found, strict=False):
                    mine.add_(more)
                return [None] * len(batch.rows)

            self.batcher.run_items(name, taught.sequences, step, edited=edited, entries=taught.entries, items=rows)
        return LossTerms(sums["kl"], sums["probability"], sums["refusing"], tuple(total))

    def _pass(
        self,
        ablation: Ablation,
        first_layer: int,
        batch: Batch,
        taught: TeacherForcedTexts,
        value: Callable[[slice, Tensor], Tensor],
        slope: Callable[[Tensor], Tensor],
        wanted: Sequence[Tensor],
    ) -> Sequence[Tensor]:
        """The gradients of one batch's part of the loss."""
        if batch.shared_prefix:  # its keys and values have gradients too, so every batch computes it for itself
            own = None if self.checkpoints else SharedPrefix(batch.shared_prefix.tokens)
            batch = replace(batch, shared_prefix=own) if own else self._whole(batch, taught)
        model, blocks = self.language_model.model, self.language_model.structure.blocks
        with torch.set_grad_enabled(bool(wanted)):
            operators = self.operator_factory.operators(ablation, zeros_from=first_layer)
            with (
                apply_operators(self.operator_factory.writers, operators),
                _checkpointed(blocks if self.checkpoints and wanted else []),
            ):
                hidden, _ = run_decoder(model, batch, use_cache=False)
                picked = last_hidden(hidden, [len(taught.texts[i]) for i in batch.rows])
                values, gradient = self._head(picked.detach(), value, gradients=bool(wanted))
                slopes = slope(values)
                if not wanted:
                    return ()
                gradient *= slopes[:, None].to(gradient)
                return torch.autograd.grad(picked, list(wanted), gradient)

    def _whole(self, batch: Batch, taught: TeacherForcedTexts) -> Batch:
        whole = self.batcher.batch(batch.rows, taught.sequences)
        return replace(whole, edited=batch.edited)

    def _head(
        self, picked: Tensor, value: Callable[[slice, Tensor], Tensor], *, gradients: bool
    ) -> tuple[Tensor, Tensor]:
        """Values of all places [places], and their slopes in the hidden states [places, width]."""
        values, slopes = [], torch.zeros_like(picked)
        for start in range(0, len(picked), PLACES_AT_ONCE):
            places = slice(start, start + PLACES_AT_ONCE)
            some = picked[places].requires_grad_(gradients)
            found = torch.cat(
                [value(places, log_probs) for _, log_probs in log_probs_of(self.language_model.model, some)]
            )
            if gradients:
                slopes[places] = torch.autograd.grad(found.sum(), some)[0]
            values.append(found.detach())
        return torch.cat(values), slopes

    def _kl(self, batch: Batch) -> Callable[[slice, Tensor], Tensor]:
        original = torch.cat([self.original[i] for i in batch.rows])

        def value(places: slice, now: Tensor) -> Tensor:
            before = original[places].to(now)
            return torch.where(before > -torch.inf, before.exp() * (before - now), torch.zeros_like(now)).sum(-1)

        return value

    def _log_p(self, batch: Batch) -> Callable[[slice, Tensor], Tensor]:
        tokens = torch.tensor([token for i in batch.rows for token in self.harmful.texts[i]])

        def value(places: slice, now: Tensor) -> Tensor:
            return now.gather(1, tokens[places, None].to(now.device))[:, 0]

        return value


@contextmanager
def _checkpointed(blocks: Sequence[nn.Module] | nn.ModuleList) -> Iterator[None]:
    """Within the context a block keeps only what goes into it, and computes the rest again when its gradient is asked for.

    The gradient has to be asked for inside: the second computation needs the same hooks.
    """
    with ExitStack() as stack:
        for block in blocks:
            again = partial(checkpoint, block.forward, use_reentrant=False)
            stack.enter_context(replaced_forward(block, again))
        yield
