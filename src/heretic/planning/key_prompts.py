"""Which training prompts give the keys of input maps: never those that the gradient search takes its losses from.

On those prompts the edit is silent by construction, so a KL measured there would mean nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from heretic.ablation.geometries import GEOMETRIES
from heretic.errors import UserError
from heretic.prompts.sets import PromptSets
from heretic.settings import Settings

FEWEST = 8  # prompts of each kind

T = TypeVar("T")


def key_prompts(settings: Settings, role: str, prompts: Sequence[T]) -> Sequence[T]:
    """Return those of the training prompts of a role that give keys. Raises UserError if they are too few."""
    searched = 0 if settings.search.start == "kernels" else settings.search.gradient.prompts
    left = prompts[searched:]
    if len(left) >= FEWEST:
        return left
    beyond = f", beyond the {searched} of the gradient search" if searched else ""
    raise UserError(
        f"`{settings.ablation.geometry}` needs at least {FEWEST} prompts of {role}{beyond}; there are {len(left)}.",
        code="too-few-key-prompts",
        where=f"prompts.{role}",
        fix="use a larger split" + (", or lower search.gradient.prompts" if searched else ""),
    )


def check_key_prompts(settings: Settings, prompts: PromptSets) -> None:
    """Raise UserError if the geometry needs keys and the training sets have too few prompts for them."""
    if GEOMETRIES[settings.ablation.geometry].reads_inputs:
        for prompt_set in (prompts.harmful_train, prompts.harmless_train):
            key_prompts(settings, prompt_set.role, prompt_set.prompts)
