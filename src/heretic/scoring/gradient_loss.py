"""Differentiable loss of an ablation: KL on harmless prompts, and the probability of the reference refusals.

The operators are differentiable in the strengths and the direction; the weights get no gradients. Both terms need one
teacher-forced pass each. The LM head runs on chunks of tokens, and activations can be recomputed to save memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from heretic.ablation.ablation import Ablation
from heretic.ablation.apply import apply_operators
from heretic.ablation.operator_factory import OperatorFactory
from heretic.model.batching import Batch, Batcher, EditSpec, SharedPrefix
from heretic.model.forward import log_probs_of, run_decoder
from heretic.model.loading import LanguageModel
from heretic.model.patching import replaced_forward
from heretic.model.transfer import to_device, to_host
from heretic.scoring.teacher_forcing import TeacherForcedTexts, last_hidden, row_of_token

# A certain refusal has an infinite loss -log(1 - p); with (1 - LABEL_SMOOTHING) p the gradient is at most 1 / LABEL_SMOOTHING.
LABEL_SMOOTHING = 0.01
TOKENS_PER_CHUNK = 32  # tokens whose logits over the vocabulary exist at a time, with their gradients


@dataclass(frozen=True)
class LossTerms:
    """Terms of the loss, and the gradients of kl + weight * refusing if they were requested."""

    kl: float  # mean KL(original || ablated) per predicted token of the harmless prompts
    probability: float  # mean probability p of the reference refusals
    refusing: float  # mean -log(1 - p)
    gradients: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Objective:
    """Evaluates the loss of an ablation, and its gradients."""

    language_model: LanguageModel
    operator_factory: OperatorFactory
    batcher: Batcher
    harmless: TeacherForcedTexts
    harmful: TeacherForcedTexts
    original: Sequence[Tensor]  # log-probabilities of the original by harmless prompt [predicted tokens, vocabulary]
    recompute_activations: bool = False  # gradient checkpointing: less memory, more compute

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
        """Evaluate the ablation on a subset of the prompts.

        Args:
            first_layer: the first layer that the ablation edits.
            harmless, harmful: indices of the prompts.
            weight: factor of the refusal term.
            wanted: tensors of the ablation whose gradients are returned.

        Raises:
            RuntimeError: if an operation of the model has no backward pass.
        """
        total = [torch.zeros_like(t) for t in wanted]
        tokens = sum(len(self.harmless.texts[i]) for i in harmless)
        # Sums by batch. They are read once, after all passes.
        kl_sums: list[Tensor] = []  # KL [1]
        refusal_sums: list[Tensor] = []  # p and -log(1 - p) [2]

        def kl_gradient(batch: Batch, values: Tensor) -> tuple[Tensor, Tensor]:
            return values.sum()[None], torch.full_like(values, 1 / tokens)

        def refusing_gradient(batch: Batch, values: Tensor) -> tuple[Tensor, Tensor]:
            row = to_device(row_of_token([len(self.harmful.texts[i]) for i in batch.rows]), values.device)
            log_p = torch.zeros(len(batch.rows), dtype=values.dtype, device=values.device).index_add(0, row, values)
            smoothed = (1 - LABEL_SMOOTHING) * log_p.exp()
            sums = torch.stack([log_p.exp().sum(), -torch.log1p(-smoothed).sum()])
            return sums, (weight / len(harmful)) * (smoothed / (1 - smoothed))[row]

        edited = EditSpec(1, first_layer)
        for name, targets, rows, value, value_gradient, sums in (
            ("Harmless prompts", self.harmless, harmless, self._kl, kl_gradient, kl_sums),
            ("Refusals", self.harmful, harmful, self._log_p, refusing_gradient, refusal_sums),
        ):

            def step(
                batch: Batch,
                targets: TeacherForcedTexts = targets,
                value: Callable[[Batch], Callable[[slice, Tensor], Tensor]] = value,
                value_gradient: Callable[[Batch, Tensor], tuple[Tensor, Tensor]] = value_gradient,
                sums: list[Tensor] = sums,
            ) -> list[None]:
                found, gradients = self._pass(
                    ablation, first_layer, batch, targets, value(batch), partial(value_gradient, batch), wanted
                )
                sums.append(found)
                for accumulated, gradient in zip(total, gradients, strict=False):
                    accumulated.add_(gradient)
                return [None] * len(batch.rows)

            self.batcher.run_items(name, targets.sequences, step, edited=edited, entries=targets.entries, items=rows)
        read = [found.tolist() for found in to_host([*kl_sums, *refusal_sums])]
        kl = sum(found[0] for found in read[: len(kl_sums)]) / max(1, tokens)
        probability, refusing = (sum(f[i] for f in read[len(kl_sums) :]) / max(1, len(harmful)) for i in (0, 1))
        return LossTerms(kl, probability, refusing, tuple(total))

    def _pass(
        self,
        ablation: Ablation,
        first_layer: int,
        batch: Batch,
        targets: TeacherForcedTexts,
        value: Callable[[slice, Tensor], Tensor],
        value_gradient: Callable[[Tensor], tuple[Tensor, Tensor]],
        wanted: Sequence[Tensor],
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """Return one batch's sums, and the gradients of its part of the loss."""
        if batch.shared_prefix:  # its keys and values need gradients too, so every batch recomputes them
            own = None if self.recompute_activations else SharedPrefix(batch.shared_prefix.tokens)
            batch = replace(batch, shared_prefix=own) if own else self._without_shared_prefix(batch, targets)
        model, blocks = self.language_model.model, self.language_model.structure.blocks
        with torch.set_grad_enabled(bool(wanted)):
            operators = self.operator_factory.operators(ablation, zeros_from=first_layer)
            with (
                apply_operators(self.operator_factory.writers, operators),
                _recomputed_activations(blocks if self.recompute_activations and wanted else []),
            ):
                hidden, _ = run_decoder(model, batch, use_cache=False)
                hidden_at_tokens = last_hidden(hidden, [len(targets.texts[i]) for i in batch.rows])
                values, gradient = self._head(hidden_at_tokens.detach(), value, gradients=bool(wanted))
                sums, weights = value_gradient(values)
                if not wanted:
                    return sums, ()
                gradient *= weights[:, None].to(gradient)
                return sums, torch.autograd.grad(hidden_at_tokens, list(wanted), gradient)

    def _without_shared_prefix(self, batch: Batch, targets: TeacherForcedTexts) -> Batch:
        whole = self.batcher.batch(batch.rows, targets.sequences)
        return replace(whole, edited=batch.edited)

    def _head(
        self, hidden_at_tokens: Tensor, value: Callable[[slice, Tensor], Tensor], *, gradients: bool
    ) -> tuple[Tensor, Tensor]:
        """Return the value of every token [tokens], and its gradient in the hidden states [tokens, width]."""
        values, all_gradients = [], torch.zeros_like(hidden_at_tokens)
        for start in range(0, len(hidden_at_tokens), TOKENS_PER_CHUNK):
            positions = slice(start, start + TOKENS_PER_CHUNK)
            chunk = hidden_at_tokens[positions].requires_grad_(gradients)
            chunk_values = torch.cat(
                [value(positions, log_probs) for _, log_probs in log_probs_of(self.language_model.model, chunk)]
            )
            if gradients:
                all_gradients[positions] = torch.autograd.grad(chunk_values.sum(), chunk)[0]
            values.append(chunk_values.detach())
        return torch.cat(values), all_gradients

    def _kl(self, batch: Batch) -> Callable[[slice, Tensor], Tensor]:
        original = torch.cat([self.original[i] for i in batch.rows])

        def value(positions: slice, ablated: Tensor) -> Tensor:
            reference = to_device(original[positions], ablated.device).to(ablated.dtype)
            return torch.where(
                reference > -torch.inf, reference.exp() * (reference - ablated), torch.zeros_like(ablated)
            ).sum(-1)

        return value

    def _log_p(self, batch: Batch) -> Callable[[slice, Tensor], Tensor]:
        tokens = torch.tensor([token for i in batch.rows for token in self.harmful.texts[i]])

        def value(positions: slice, ablated: Tensor) -> Tensor:
            return ablated.gather(1, to_device(tokens[positions, None], ablated.device))[:, 0]

        return value


@contextmanager
def _recomputed_activations(blocks: Sequence[nn.Module] | nn.ModuleList) -> Iterator[None]:
    """Enable gradient checkpointing for these blocks within the context.

    The backward pass must also run inside the context, since the recomputation needs the same hooks.
    """
    with ExitStack() as stack:
        for block in blocks:
            # Nothing is random here; reading the generator's state would wait for the GPU.
            recomputed = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
            stack.enter_context(replaced_forward(block, recomputed))
        yield
