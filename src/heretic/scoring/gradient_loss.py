"""Differentiable loss of an ablation: KL on harmless prompts, and the probability of the reference refusals.

The operators are differentiable in the strengths and the direction; the weights get no gradients. Both terms need one
teacher-forced pass each. The LM head runs on chunks of tokens, and activations can be recomputed to save memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from heretic.ablation.ablation import Ablation
from heretic.ablation.apply import apply_operators
from heretic.ablation.operator import Operator
from heretic.ablation.operator_factory import OperatorFactory
from heretic.model.batching import Batch, Batcher, EditSpec, SharedPrefix
from heretic.model.forward import bring_to_head, log_probs_of, run_decoder
from heretic.model.loading import LanguageModel
from heretic.model.patching import replaced_forward
from heretic.model.transfer import send_through_ram, to_device, to_host
from heretic.model.turns import Turns
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
        # 1. Compute the operators once. The passes differentiate the loss in copies of them.
        with torch.set_grad_enabled(bool(wanted)):
            operators = self.operator_factory.operators(ablation, zeros_from=first_layer)
        applied = {name: operator.as_leaf() for name, operator in operators.items()} if wanted else operators
        passes = _Passes(self, applied, first_layer)

        # 2. Run both terms. Their sums are read once, after all passes.
        tokens = sum(len(self.harmless.texts[i]) for i in harmless)

        def kl_gradient(batch: Batch, values: Tensor) -> tuple[Tensor, Tensor]:
            return values.sum()[None], torch.full_like(values, 1 / tokens)

        def refusing_gradient(batch: Batch, values: Tensor) -> tuple[Tensor, Tensor]:
            row = to_device(row_of_token([len(self.harmful.texts[i]) for i in batch.rows]), values.device)
            log_p = torch.zeros(len(batch.rows), dtype=values.dtype, device=values.device).index_add(0, row, values)
            smoothed = (1 - LABEL_SMOOTHING) * log_p.exp()
            sums = torch.stack([log_p.exp().sum(), -torch.log1p(-smoothed).sum()])
            return sums, (weight / len(harmful)) * (smoothed / (1 - smoothed))[row]

        # KL [1] by batch, then p and -log(1 - p) [2]
        kl_sums = passes.run("Harmless prompts", self.harmless, harmless, self._kl, kl_gradient)
        refusal_sums = passes.run("Refusals", self.harmful, harmful, self._log_p, refusing_gradient)

        # 3. Differentiate the operators.
        gradients = passes.gradients_in(operators, wanted)
        read = [found.tolist() for found in to_host([*kl_sums, *refusal_sums])]
        kl = sum(found[0] for found in read[: len(kl_sums)]) / max(1, tokens)
        probability, refusing = (sum(f[i] for f in read[len(kl_sums) :]) / max(1, len(harmful)) for i in (0, 1))
        return LossTerms(kl, probability, refusing, gradients)

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


# (batch, values of its tokens) -> (sums for the report, gradient of the loss in the values)
ValueGradient = Callable[[Batch, Tensor], tuple[Tensor, Tensor]]
# batch -> (tokens, their log-probabilities over the vocabulary) -> the term's value of each token
TokenValues = Callable[[Batch], Callable[[slice, Tensor], Tensor]]


class _Passes:
    """Passes of one evaluation with the same operators, and the loss's gradients in these, summed over the batches.

    Args:
        operators: by writer; those that are leaves with gradients are differentiated.
    """

    def __init__(self, objective: Objective, operators: Mapping[str, Operator], first_layer: int) -> None:
        self.objective, self.operators, self.edited = objective, operators, EditSpec(1, first_layer)
        self._leaves = [t for operator in operators.values() for t in operator.tensors if t.requires_grad]
        self._totals: list[Tensor | None] = [None] * len(self._leaves)

    def run(
        self, name: str, targets: TeacherForcedTexts, rows: Sequence[int], values: TokenValues, gradient: ValueGradient
    ) -> list[Tensor]:
        """Run the texts with these indices; returns the sums of every batch."""
        sums: list[Tensor] = []

        def step(batch: Batch) -> Turns[list[None]]:
            found, gradients = yield from self._pass(batch, targets, values(batch), partial(gradient, batch))
            sums.append(found)
            for i, added in enumerate(gradients):
                if added is not None:
                    total = self._totals[i]
                    self._totals[i] = added if total is None else total.add_(added)
            return [None] * len(batch.rows)

        self.objective.batcher.run_items(
            name, targets.sequences, step, edited=self.edited, entries=targets.entries, items=rows
        )
        return sums

    def gradients_in(self, operators: Mapping[str, Operator], wanted: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the loss's gradients in the tensors that the operators were computed from."""
        if not wanted:
            return ()
        computed = [t for operator in operators.values() for t in operator.tensors if t.requires_grad]
        used = [(t, total) for t, total in zip(computed, self._totals, strict=True) if total is not None]
        found = torch.autograd.grad([t for t, _ in used], list(wanted), [g for _, g in used], allow_unused=True)
        return tuple(torch.zeros_like(t) if g is None else g for t, g in zip(wanted, found, strict=True))

    def _pass(
        self,
        batch: Batch,
        targets: TeacherForcedTexts,
        value: Callable[[slice, Tensor], Tensor],
        value_gradient: Callable[[Tensor], tuple[Tensor, Tensor]],
    ) -> Turns[tuple[Tensor, Sequence[Tensor | None]]]:
        """Return one batch's sums, and the gradients of its part of the loss in the operators; a turn lies between the passes."""
        objective, differentiate = self.objective, bool(self._leaves)
        if batch.shared_prefix:  # its keys and values need gradients too, so every batch recomputes them
            own = None if objective.recompute_activations else SharedPrefix(batch.shared_prefix.tokens)
            batch = replace(batch, shared_prefix=own) if own else self._without_shared_prefix(batch, targets)
        with self._applied(gradients=differentiate):
            hidden, _ = run_decoder(objective.language_model.model, batch, use_cache=False)
            hidden_at_tokens = last_hidden(hidden, [len(targets.texts[i]) for i in batch.rows])
        del hidden, _
        at_head = yield from bring_to_head(objective.language_model.model, hidden_at_tokens.detach())
        with torch.set_grad_enabled(differentiate):
            values, gradient = self._head(at_head, value, gradients=differentiate)
            sums, weights = value_gradient(values)
            # A direct copy would wait for the other batches' backward passes on the head's GPU.
            arrive = send_through_ram(gradient * weights[:, None].to(gradient), hidden_at_tokens.device)
        yield
        if not differentiate:
            return sums, ()
        with self._applied(gradients=True):
            # A module that a pass does not reach, such as an expert without tokens, has no gradient.
            return sums, torch.autograd.grad(hidden_at_tokens, self._leaves, arrive(), allow_unused=True)

    @contextmanager
    def _applied(self, *, gradients: bool) -> Iterator[None]:
        """Apply the operators; gradient checkpointing needs them in the backward pass too."""
        objective = self.objective
        blocks = objective.language_model.structure.blocks
        with (
            torch.set_grad_enabled(gradients),
            apply_operators(objective.operator_factory.writers, self.operators),
            _recomputed_activations(blocks if objective.recompute_activations and gradients else []),
        ):
            yield

    def _without_shared_prefix(self, batch: Batch, targets: TeacherForcedTexts) -> Batch:
        whole = self.objective.batcher.batch(batch.rows, targets.sequences)
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
                [
                    value(positions, log_probs)
                    for _, log_probs in log_probs_of(self.objective.language_model.model, chunk)
                ]
            )
            if gradients:
                all_gradients[positions] = torch.autograd.grad(chunk_values.sum(), chunk)[0]
            values.append(chunk_values.detach())
        return torch.cat(values), all_gradients


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
