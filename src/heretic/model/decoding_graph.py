"""Decode by replaying a graph of a GPU's launches (CUDA graphs): one launch a token instead of one a kernel.

A replay repeats the same kernels on the same memory. So the cache has all its slots from the beginning, and what changes from token
to token lies on the GPU: the next slot, the mask, the positions, the tokens. Tested on pretend GPUs only.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from heretic.errors import first_line
from heretic.hardware.devices import captures_graphs, is_accelerator
from heretic.model.batching import out_of_memory
from heretic.model.device_errors import is_device_error
from heretic.model.forward import MODEL_ERRORS, fast_argmax, forward_supported, kl_tolerance, max_kl, rows_of_trials
from heretic.model.kv_cache import FixedLayer, first_row, keeps_plain_keys
from heretic.model.masks import known_padding
from heretic.model.patching import outputs_stay
from heretic.model.transfer import Index, to_device
from heretic.model.turns import Turns

if TYPE_CHECKING:
    from heretic.model.decoding import DecodingState

SPARE = 1024  # free slots of the trial: more than the local attention of models that count from the end of the keys
log = logging.getLogger(__name__)


@dataclass
class DecodingGraphs:
    """Whether a model decodes by graphs; false from the first launch on that cannot be captured."""

    enabled: bool = False
    _tried: bool = field(default=False, repr=False)
    # One for all: the libraries keep a workspace for each stream for ever.
    _stream: Any = field(default=None, repr=False)

    def suit(self, model: Any, answers: DecodingState, tokens: Tensor) -> bool:
        """Return whether these answers can be decoded by graphs: a whole model on one GPU, with plain keys and values."""
        device = answers.mask.device
        if not self.enabled or not is_accelerator(device) or not captures_graphs():
            return False
        if not keeps_plain_keys(answers.cache) or {p.device for p in model.parameters()} != {device}:
            return False
        if not self._tried:
            try:
                self._try(model, _first(answers), tokens[:1])
            except MODEL_ERRORS as error:
                if is_device_error(error):
                    raise
                self.turn_off(repr(error))
            self._tried = True
        return self.enabled

    def stream(self, device: torch.device) -> Any:
        """Return the stream of captures and of the passes before them."""
        if self._stream is None:
            self._stream = torch.Stream(device)
        return self._stream

    def turn_off(self, reason: str) -> None:
        """Decode without graphs from now on."""
        self.enabled = False
        log.warning("This model cannot be decoded by graphs: %s", reason)

    def _try(self, model: Any, answers: DecodingState, tokens: Tensor) -> None:
        """Turn graphs off if one row has other probabilities in fixed slots, or cannot be captured."""
        mask = torch.nn.functional.pad(answers.mask, (0, 1), value=1)
        plain = _next_logits(model, replace(_first(answers), mask=mask), tokens, answers.positions)
        graph = DecodingGraph(self, model, answers, tokens, remaining=SPARE, interval=2)
        log_probs = [torch.log_softmax(logits.float(), -1) for logits in (plain, graph.run())]
        if not (kl := max_kl(*log_probs)) <= kl_tolerance(model):
            self.turn_off(f"free slots in its cache change the answers by KL {kl:.1e}")
        else:
            graph.capture()


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
        self.graphs, self.model, self.answers, self.remaining = graphs, model, answers, remaining
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
        """Launch `count` tokens, at most `interval`, one a turn; returns them [cache rows, tokens]."""
        self.step.zero_()
        for _ in range(count):
            self._launch()
            yield
        self.answers.positions = self.positions
        return self.chosen[:, :count].clone()

    def _launch(self) -> None:
        self.remaining -= 1
        if self.graph is not None:
            self.graph.replay()
            return
        self.run()
        if self.graphs.enabled and self.remaining >= self.chosen.shape[1]:  # for fewer tokens a capture does not pay
            self.capture()

    def run(self) -> Tensor:
        """Launch a token on the stream of captures; returns its logits [cache rows, vocabulary]."""
        current, stream = torch.accelerator.current_stream(self.slot.device), self.graphs.stream(self.slot.device)
        stream.wait_stream(current)
        with stream:
            logits = self._pass()
        current.wait_stream(stream)
        return logits

    def capture(self) -> None:
        """Capture the launches of a token, without effect; turn graphs off if they cannot be captured."""
        graph = torch.accelerator.Graph()
        try:
            with self.graphs.stream(self.slot.device), graph:
                self._pass()
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            self.graphs.turn_off(first_line(error))
            return
        self.graph = graph

    def _pass(self) -> Tensor:
        answers = self.answers
        answers.mask.index_fill_(1, self.slot, 1)
        with known_padding(True):
            logits = _next_logits(self.model, answers, self.tokens, self.positions)
        self.tokens.copy_(fast_argmax(logits)[:, None])
        self.chosen.index_copy_(1, self.step, self.tokens)
        for counter in (self.slot, self.positions, self.step):
            counter.add_(1)
        return logits


def _next_logits(model: Any, answers: DecodingState, tokens: Tensor, positions: Tensor) -> Tensor:
    """Run the model on the newest tokens [cache rows, 1]; returns the logits after them [cache rows, vocabulary]."""
    with rows_of_trials(answers.trials), outputs_stay(model):
        output = forward_supported(
            model,
            tokens,
            attention_mask=answers.mask,
            position_ids=positions,
            past_key_values=answers.cache,
            use_cache=True,
            logits_to_keep=1,
        )
    logits: Tensor = output.logits[:, -1]
    return logits


def _first(answers: DecodingState) -> DecodingState:
    """Return a copy of the first cache row."""
    cache = DynamicCache()
    cache.layers = [first_row(layer) for layer in answers.cache.layers]
    trials = None if answers.trials is None else Index(answers.trials.values[:1])
    return replace(
        answers, cache=cache, mask=answers.mask[:1], positions=answers.positions[:1], cache_rows=[0], trials=trials
    )
