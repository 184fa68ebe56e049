"""Input maps of a model's writers, from the training prompts that the gradient search does not use."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from heretic.ablation.geometries import GEOMETRIES
from heretic.ablation.geometries.conditional import BENIGN_KEYS, HARMFUL_KEYS, InputMap, input_map
from heretic.hardware.host import memory
from heretic.model.architecture import ResidualWriter
from heretic.model.batching import free_memory, parts_within
from heretic.model.input_capture import input_width, writer_inputs
from heretic.model.lazy_tensor import LazyTensor, materialize
from heretic.planning.key_prompts import key_prompts
from heretic.planning.memory_model import MOST_CAPTURED, SHARE_FOR_RESIDUALS
from heretic.runs.folder import INPUT_MAPS, RunFolder
from heretic.scoring.teacher_forcing import answer_prefixes
from heretic.storage.compute_once import ComputeOnce

if TYPE_CHECKING:
    from heretic.session.model_context import ModelContext

ANSWER_TOKENS = 4  # first tokens of the original's answers that give keys
MOST_TEMPLATE_TOKENS = 16  # last tokens of a prompt that give keys, at most

Keys = tuple[list[list[int]], list[list[int]]]  # sequences, and the tokens of each that give keys, counted from its end

# Returns a writer's matrices [width, inputs], also of offloaded layers.
Read = Callable[[ResidualWriter], Sequence[LazyTensor]]


def open_input_maps(
    model_context: ModelContext, folder: RunFolder, compute_once: ComputeOnce, read: Read
) -> dict[str, InputMap]:
    """Load the input maps from the run's folder or compute them, if the geometry needs them. Raises UserError."""
    if not GEOMETRIES[model_context.settings.ablation.geometry].reads_inputs:
        return {}
    with compute_once.shared_file(INPUT_MAPS):
        input_maps = folder.load_input_maps(model_context.batcher.reporter)
        if input_maps is None:
            input_maps = find_input_maps(model_context, read)
            folder.save_input_maps(input_maps)
    return input_maps


def find_input_maps(model_context: ModelContext, read: Read) -> dict[str, InputMap]:
    """Compute the map of every writer with a plain input, a few layers at a time.

    Raises UserError if too few prompts are left beside those of the gradient search.
    """
    language_model = model_context.language_model
    batcher, structure = model_context.batcher, language_model.structure
    harmful, benign = keys_of_model(model_context)
    sequences, offsets = [*harmful[0], *benign[0]], [*harmful[1], *benign[1]]
    count, total = sum(map(len, harmful[1])), sum(map(len, offsets))
    all_writers = [writer for writer in structure.writers if not writer.reads_stream]
    writers = [writer for writer in all_writers if not writer.mixture]
    batcher = replace(batcher, prefix_caching=False)  # one for all groups, so that a smaller batch stays
    found: dict[str, InputMap] = {}
    for group in groups(writers, total, structure.width):
        layers = f"{group[0].layer} to {group[-1].layer}"
        keys = writer_inputs(language_model, group, f"Inputs of layers {layers}", sequences, offsets, batcher)
        with batcher.reporter.stage(f"Input maps of layers {layers}", len(group)) as stage:
            for writer in group:
                batcher.stop.check()
                own = keys.pop(writer.name, None)
                if own is not None and bool(own.isfinite().all()) and bool(own[:count].any()):
                    (weight,) = read(writer)
                    found[writer.name] = input_map(materialize(weight), own[:count], own[count:])
                stage.advance()
    if left := len(all_writers) - len(found):
        batcher.reporter.info(
            f"{left} of {len(all_writers)} writers have no plain input, or read nothing; their edit is plain."
        )
    free_memory()  # of the keys and their pinned copies
    return found


def keys_of_model(model_context: ModelContext) -> tuple[Keys, Keys]:
    """Choose the tokens that give keys, of harmful and of harmless prompts with the beginnings of the original's answers.

    They are the template tokens that follow every prompt and the first tokens of the answer. Raises UserError.
    """
    settings, encoded = model_context.settings, model_context.encoded
    roles = ("harmful_train", "harmless_train")
    ending = min(MOST_TEMPLATE_TOKENS, common_ending([tokens for role in roles for tokens in encoded[role]]))
    found = []
    for role, most in zip(roles, (HARMFUL_KEYS, BENIGN_KEYS), strict=True):
        prompts = list(key_prompts(settings, role, encoded[role]))[:most]
        answers = answer_prefixes(model_context.language_model, prompts, model_context.batcher, ANSWER_TOKENS + 1)
        sequences = [[*prompt, *answer[:-1]] for prompt, answer in zip(prompts, answers, strict=True)]
        found.append((sequences, key_offsets([len(answer) - 1 for answer in answers], ending, most)))
    return found[0], found[1]


def key_offsets(answers: Sequence[int], ending: int, most: int) -> list[list[int]]:
    """Choose at most `most` tokens, counted from the end of each sequence: the prompt's last one, and some of the others.

    Args:
        answers: Number of answer tokens of each sequence.
        ending: Template tokens at the end of a prompt.
        most: At least the number of sequences.
    """
    chosen = [[answer + 1] for answer in answers]
    others = [
        (i, offset) for i, a in enumerate(answers) for offset in range(1, a + max(1, ending) + 1) if offset != a + 1
    ]
    random.Random(0).shuffle(others)
    for i, offset in others[: most - len(chosen)]:
        chosen[i].append(offset)
    return [sorted(offsets, reverse=True) for offsets in chosen]


def common_ending(sequences: Sequence[list[int]]) -> int:
    """Return how many last tokens all sequences share."""
    first, last = min(s[::-1] for s in sequences), max(s[::-1] for s in sequences)
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))


def groups(writers: Sequence[ResidualWriter], keys: int, width: int) -> Iterator[list[ResidualWriter]]:
    """Return the writers in groups whose keys and outputs fit into the RAM for them together; at least one writer each."""
    budget = min(MOST_CAPTURED, int(SHARE_FOR_RESIDUALS * memory()[1]))
    needed = [4 * keys * (input_width(writer) + width) for writer in writers]
    return ([writers[i] for i in part] for part in parts_within(needed, budget))
