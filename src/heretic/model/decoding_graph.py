"""Decode by replaying a graph of a GPU's launches (CUDA graphs): one launch a token instead of one a kernel.

A replay repeats the same kernels on the same memory. So the cache has all its slots from the beginning, and what changes from token
to token lies on the GPU: the next slot, the mask, the positions, the tokens. Tested on pretend GPUs only.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from heretic.errors import first_line
from heretic.hardware.devices import captures_graphs, is_accelerator
from heretic.model.batching import out_of_memory
from heretic.model.forward import forward_supported, rows_of_trials
from heretic.model.kv_cache import FixedLayer, keeps_plain_keys
from heretic.model.masks import known_padding
from heretic.model.patching import outputs_stay
from heretic.model.transfer import to_device
from heretic.model.turns import Turns

if TYPE_CHECKING:
    from heretic.model.decoding import DecodingState

log = logging.getLogger(__name__)


@dataclass
class DecodingGraphs:
    """Whether a model decodes by graphs; false from the first launch on that cannot be captured."""

    enabled: bool = False

    def suit(self, model: Any, answers: DecodingState) -> bool:
        """Return whether these answers can be decoded by graphs: a whole model on one GPU, with plain keys and values."""
        if not self.enabled or not is_accelerator(answers.mask.device) or not captures_graphs():
            return False
        return keeps_plain_keys(answers.cache) and {p.device for p in model.parameters()} == {answers.mask.device}


class DecodingGraph:
    """The passes of a batch, a token each; the first runs without a graph, so that libraries and copies are ready."""

    def __init__(
        self, graphs: DecodingGraphs, model: Any, answers: DecodingState, tokens: Tensor, remaining: int, interval: int
    ) -> None:
        """Give the cache of the answers fixed slots.

        Args:
            graphs: Turned off if a launch cannot be captured.
            model: The model, on one GPU.
            answers: The answers; their mask gets a column for each slot.
            tokens: The newest tokens [cache rows, 1].
            remaining: Tokens that may follow.
            interval: Tokens between two reads.
        """
        self.graphs, self.model, self.answers = graphs, model, answers
        layers = answers.cache.layers
        if type(layers[0]) is not FixedLayer:
            used = answers.mask.shape[1]
            slot = to_device([used], answers.mask.device)
            for i in range(len(layers)):  # one at a time: two whole caches may not fit
                layers[i] = FixedLayer(layers[i], used + remaining, slot)
            answers.mask = torch.nn.functional.pad(answers.mask, (0, remaining))
        self.slot = layers[0].slot
        self.positions, self.tokens = answers.positions.clone(), tokens.clone()
        self.step = torch.zeros_like(self.slot)  # since the last read
        self.chosen = tokens.new_zeros(len(tokens), interval)
        self.graph: Any = None

    def decode(self, count: int) -> Turns[Tensor]:
        """Launch so many tokens, at most `interval`, one a turn; returns them [cache rows, tokens]."""
        self.step.zero_()
        for _ in range(count):
            self._launch()
            yield
        self.answers.positions = self.positions
        return self.chosen[:, :count].clone()

    def _launch(self) -> None:
        if self.graph is not None:
            self.graph.replay()
            return
        self._pass()
        if self.graphs.enabled:
            self._capture()

    def _pass(self) -> None:
        answers = self.answers
        answers.mask.index_fill_(1, self.slot, 1)
        with rows_of_trials(answers.trials), known_padding(True), outputs_stay(self.model):
            output = forward_supported(
                self.model,
                self.tokens,
                attention_mask=answers.mask,
                position_ids=self.positions,
                past_key_values=answers.cache,
                use_cache=True,
                logits_to_keep=1,
            )
        self.tokens.copy_(output.logits[:, -1].argmax(dim=-1, keepdim=True))
        self.chosen.index_copy_(1, self.step, self.tokens)
        for counter in (self.slot, self.positions, self.step):
            counter.add_(1)

    def _capture(self) -> None:
        graph = torch.accelerator.Graph()
        try:
            with torch.Stream(self.tokens.device), graph:
                self._pass()
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            self.graphs.enabled = False
            log.warning("This model cannot be decoded by CUDA graphs: %s", first_line(error))
            return
        self.graph = graph
