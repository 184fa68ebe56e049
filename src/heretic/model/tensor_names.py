"""Which parameter of a model each tensor of a checkpoint is loaded into."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key


def loaded_names(model: Any, names: Iterable[str]) -> dict[str, str]:
    """Map each checkpoint tensor to the model parameter that it is loaded into, alone or with others."""
    conversions = getattr(model, "_weight_conversions", None) or []
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    own = model.state_dict()
    return {name: rename_source_key(name, renamings, converters, model.base_model_prefix, own)[0] for name in names}
