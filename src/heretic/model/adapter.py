"""A LoRA adapter's folder: the model that it was made for, and a model with it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import cast

from safetensors import safe_open
from transformers import PreTrainedModel

from heretic.errors import UserError, first_line
from heretic.files import expand_user
from heretic.model.device_errors import is_device_error
from heretic.model.weight_files import ADAPTER, read_json, require_regular

WEIGHTS = "adapter_model.safetensors"


def adapter_folder(model: str) -> Path | None:
    """Return the folder if it holds an adapter without a model, else None."""
    folder = expand_user(model)
    return folder if (folder / ADAPTER).is_file() and not (folder / "config.json").exists() else None


def base_of(adapter: Path, candidate: str | None) -> tuple[str, str]:
    """Return name and revision of the model that the adapter was made for, where that is a folder or a name on the hub.

    Else it is `candidate`, if that has the same last part: adapters name the place of a model on another machine. Raises
    UserError for anything but LoRA in a safetensors file, or if the model cannot be told.
    """
    config = read_json(adapter / ADAPTER, "invalid-config")
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UserError(
            f"The adapter's kind is {kind!r}; heretic reads only LoRA.",
            code="adapter-not-loadable",
            where=str(adapter / ADAPTER),
            fix="merge the adapter into its model (peft: merge_and_unload)",
        )
    require_regular(adapter / WEIGHTS)
    named, revision = str(config.get("base_model_name_or_path") or ""), str(config.get("revision") or "")
    if named and (expand_user(named).is_dir() or (named.count("/") == 1 and not named.startswith((".", "/", "~")))):
        return named, revision
    if candidate and Path(candidate).name == Path(named or candidate).name:
        return candidate, ""
    raise UserError(
        f"The adapter was made for the model {named!r}, which was not found.",
        code="adapter-only",
        where=str(adapter / ADAPTER),
        fix="name it: heretic evaluate ADAPTER --against MODEL",
    )


def with_adapter(model: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    """Return the model with a LoRA adapter that peft attaches to its modules, not merged. Raises UserError."""
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # of tensors that do not fit, which is checked below, and of its own imports
            attached = PeftModel.from_pretrained(model, adapter)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        if is_device_error(error):
            raise
        raise _not_loadable(adapter, f": {first_line(error)}") from error
    # peft only warns of tensors that it does not find, and leaves others as they were created.
    with safe_open(adapter / WEIGHTS, "pt") as file:
        stored = set(file.keys())
    expected = {name.replace(".default", "") for name in attached.state_dict() if ".lora_" in name}
    if missing := expected - stored:
        raise _not_loadable(adapter, f": it has no tensor {min(missing)}")
    return cast(PreTrainedModel, attached.get_base_model())


def _not_loadable(adapter: Path, problem: str) -> UserError:
    return UserError(
        f"The adapter cannot be attached to the model{problem}",
        code="adapter-not-loadable",
        where=str(adapter),
        fix="name the model that the adapter was made for",
    )
