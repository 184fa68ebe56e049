"""What a study launches, by launch log: heretic's own passes over a model that exists only as shapes, on pretend GPUs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import torch
from accelerate import dispatch_model, init_empty_weights
from launch_log import NO_BLOCK, Launch, LaunchLog, Section, on_cards
from sizes import PROMPT, SHARED, Shape, checkpoint_of
from torch import nn
from transformers import AutoModelForCausalLM

from heretic.ablation.ablation import Ablation
from heretic.ablation.apply import apply_operators
from heretic.ablation.directions import Directions
from heretic.ablation.operator_factory import OperatorFactory
from heretic.model.architecture import ModelStructure
from heretic.model.batching import Batcher, EditSpec
from heretic.model.capture import mean_residuals
from heretic.model.decoding import DEFAULT_SYNC_INTERVAL, DecodingState, continue_decoding
from heretic.model.lazy_tensor import LazyTensor
from heretic.model.loading import LanguageModel
from heretic.model.stages import share_inputs
from heretic.model.turns import Turns
from heretic.model.writer import ResidualWriter
from heretic.scoring.divergence import first_tokens, measure_divergence
from heretic.scoring.gradient_loss import Objective
from heretic.scoring.judges.verdict import ANSWER
from heretic.scoring.refusal_count import EncodedRequests, PrunedRefusalCounter
from heretic.scoring.teacher_forcing import TeacherForcedTexts

DRAFT, TOKENS = 8, 100  # of a refusal's draft, of an answer
STEPS_LOGGED = 2 * DEFAULT_SYNC_INTERVAL  # of decoding: with two reads by the host
# Assumption: of so many answers one is a refusal, which the draft or its first token decides; the others go to the last token.
DECIDED = 4
ENDED = object()


@dataclass(frozen=True)
class Placed:
    """A model on pretend GPUs, and its log."""

    log: LaunchLog
    language_model: LanguageModel
    factory: OperatorFactory
    groups: int  # micro-batches in turn, at most

    @property
    def layers(self) -> int:
        """Number of blocks."""
        return self.language_model.structure.num_layers

    def batcher(self, rows: int) -> Batcher:
        """A batcher that takes so many rows at once, with prefix caching."""
        return Batcher(rows, self.language_model.device, groups=self.groups, prefix_caching=True)


@contextmanager
def placed(
    shape: Shape, blocks: Sequence[int], *, quantization: str = "none", most: int = 2, groups: int = 0
) -> Iterator[Placed]:
    """Place a model's shape on pretend GPUs, so many blocks on each; the embedding on the first, the head on the last.

    At most `most` blocks of each GPU exist, and the log repeats the last. `groups` are micro-batches in turn; 0: as
    heretic does it.
    """
    fewer = [min(most, count) for count in blocks]
    cards = [card for card, count in enumerate(fewer) for _ in range(count)]
    part = replace(
        shape,
        blocks=len(cards),
        head_width=shape.head,
    )
    checkpoint = checkpoint_of(part)
    with init_empty_weights(include_buffers=True):
        model = AutoModelForCausalLM.from_config(checkpoint.config, dtype=shape.dtype).eval().requires_grad_(False)
    table: dict[str, int | str] = {"model.embed_tokens": 0, "model.rotary_emb": 0}
    table |= {f"model.layers.{layer}": card for layer, card in enumerate(cards)}
    table |= {"model.norm": cards[-1], "lm_head": cards[-1]}
    with LaunchLog(len(blocks), 1 << 50) as log:
        on_cards(model, lambda name: next(int(c) for module, c in table.items() if f"{name}.".startswith(f"{module}.")))
        if len(blocks) > 1:
            dispatch_model(model, table)
        log.mark_blocks(model.model.layers)
        share_inputs(model.model.layers)
        last = {card: layer for layer, card in enumerate(cards)}
        log.repeats = {layer: 1 + blocks[card] - fewer[card] for card, layer in last.items()}
        writers = tuple(writers_of(model))
        if quantization != "none":
            for module in model.model.modules():
                if isinstance(module, nn.Linear):
                    cast(Any, module).forward = partial(_quantized, log, quantization, module, module.forward)
        structure = ModelStructure(model.model.layers, shape.hidden, writers, ())
        tokenizer: Any = SimpleNamespace(eos_token_id=None, pad_token_id=0)
        loaded = LanguageModel(model, tokenizer, checkpoint, structure, str(shape.dtype).removeprefix("torch."))
        directions = Directions(nn.functional.normalize(torch.randn(len(cards), shape.hidden), dim=1))

        def read(writer: ResidualWriter) -> Sequence[LazyTensor]:
            log.block = writer.layer
            return writer.weights()

        factory = OperatorFactory.prepare(directions, writers, "norm_preserving", read)
        yield Placed(log, loaded, factory, groups or loaded.groups)


def writers_of(model: Any) -> Iterator[ResidualWriter]:
    """The writers of a Llama-like model; probing needs values."""
    for layer, block in enumerate(model.model.layers):
        name = f"model.layers.{layer}"
        yield ResidualWriter(f"{name}.self_attn.o_proj", layer, "attention", block.self_attn.o_proj)
        yield ResidualWriter(f"{name}.mlp.down_proj", layer, "mlp", block.mlp.down_proj)


def _quantized(log: LaunchLog, quantization: str, module: nn.Linear, linear: Any, x: torch.Tensor) -> torch.Tensor:
    """A linear map of bitsandbytes: NF4 unpacks the weight first; LLM.int8 quantizes x, multiplies int8 and scales the result."""
    weights, card = module.weight.numel(), x.device.index
    if quantization == "bnb_4bit":
        log.add(Launch(card, 0.0, weights * (0.5 + 2), matmul=False))
        return linear(x)
    log.add(Launch(card, 0.0, 3.0 * x.numel(), matmul=False))
    log.paused, before = True, log.paused
    made: torch.Tensor = linear(x)
    log.paused = before
    log.add(
        Launch(card, 2.0 * weights * x.numel() / x.shape[-1], weights + x.numel() + 4.0 * made.numel(), matmul=True)
    )
    log.add(Launch(card, 0.0, 6.0 * made.numel(), matmul=False))
    return made


def sequences(count: int, tokens: int) -> list[list[int]]:
    """Prompts of one length that share their beginning."""
    return [[1] * SHARED + [2 + i] * (tokens - SHARED) for i in range(count)]


class _Judge:
    """Decides every fourth answer when the drafts are verified for the first time, and none later."""

    name, ends_early = "markers", True

    def __init__(self, rows: int) -> None:
        self.rows, self.asked = rows, itertools.count(1)

    def is_final_refusal(self, answer: str) -> bool:
        number = next(self.asked)
        return number <= self.rows and number % DECIDED == 0

    def verdicts(self, exchanges: Any) -> list[str]:
        return [ANSWER] * len(exchanges)


def trial_log(model: Placed, rows: int, trials: int, batch: int) -> dict[str, Section]:
    """The launches of trials with every layer edited: operators, KL, drafts, and steps of decoding at mean length."""
    log, requests = model.log, max(1, rows // trials)
    counter_class: Any = PrunedRefusalCounter  # with a chat and a judge that need no text
    ones = dict.fromkeys(("attention", "mlp"), (1.0,) * model.layers)
    edited, judge, chat = EditSpec(trials), _Judge(rows), SimpleNamespace(text=lambda _: "")
    vocabulary = model.language_model.model.lm_head.out_features
    targets = first_tokens(sequences(requests, PROMPT))

    def mid_answer(loaded: Any, answers: DecodingState, limits: Any) -> Turns[None]:
        lengthen(log, answers, (TOKENS - STEPS_LOGGED) // 2)
        turns = continue_decoding(loaded, answers, limits)
        while True:
            with log.phase("decoding"):  # others take their turns outside
                if next(turns, ENDED) is ENDED:
                    return
            yield

    log.take()
    with log.phase("operators"):
        operators = model.factory.operators(Ablation(ones, vector=torch.ones(model.language_model.structure.width)))
    log.block = NO_BLOCK
    with apply_operators(model.factory.writers, *[operators] * trials):
        with log.phase("KL"):
            measure_divergence(
                model.language_model, targets, torch.zeros(requests, vocabulary), model.batcher(batch), edited
            )
        counted = EncodedRequests(sequences(requests, PROMPT), [[3] * DRAFT] * requests)
        with log.phase("drafts"), mock.patch("heretic.scoring.refusal_count.continue_decoding", mid_answer):
            counter = counter_class(
                model.language_model, chat, judge, model.batcher(batch), 1 + STEPS_LOGGED, counted, edited,
                lambda _trial, _at_least: False,
            )  # fmt: skip
            counter.run()
    return {section.name: section for section in log.take()}


def lengthen(log: LaunchLog, answers: DecodingState, tokens: int) -> None:
    """Give every row so many more tokens in the cache, without logging it."""
    log.paused = True
    answers.mask = torch.cat([answers.mask, answers.mask.new_ones(len(answers.mask), tokens)], dim=1)
    for layer in answers.cache.layers:
        for name in ("keys", "values"):
            old = getattr(layer, name)
            new = old.new_zeros(old.shape[0], old.shape[1], tokens, old.shape[3])
            setattr(layer, name, torch.cat([old, new], dim=2))
    log.paused = False


def residuals_log(model: Placed, rows: int) -> Section:
    """The launches of capturing the residuals of one batch."""
    model.log.take()
    with model.log.phase("residuals"):
        mean_residuals(model.language_model, "", sequences(rows, PROMPT), model.batcher(rows))
    (section,) = model.log.take()
    return section


def gradient_log(model: Placed, prompts: int, rows: int, *, recompute: bool) -> Section:
    """The launches of one step of the gradient search, with so many prompts of each kind in passes of so many rows.

    Only of the blocks that exist: none is repeated.
    """
    harmless, harmful = (
        TeacherForcedTexts.of(sequences(prompts, PROMPT), [[3] * tokens] * prompts) for tokens in (1, 4)
    )  # kl_tokens, refusal_tokens
    vocabulary = model.language_model.model.lm_head.out_features
    original = [torch.zeros(1, vocabulary)] * prompts
    objective = Objective(
        model.language_model, model.factory, model.batcher(rows), harmless, harmful, original, recompute
    )
    strengths = torch.ones(2, model.layers, requires_grad=True)
    vector = torch.ones(model.language_model.structure.width, requires_grad=True)
    ablation = Ablation(dict(zip(("attention", "mlp"), strengths, strict=True)), vector=vector)
    model.log.take()
    repeats, model.log.repeats = model.log.repeats, {}  # backward passes have no marks
    with model.log.phase("gradient step"):
        objective.evaluate(ablation, 0, range(prompts), range(prompts), wanted=[strengths, vector])
    (section,) = model.log.take()
    model.log.repeats, model.log.block = repeats, NO_BLOCK
    return section
