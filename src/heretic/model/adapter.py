"""A LoRA adapter's folder: the model that it was made for, and a model with it."""

from __future__ import annotations

import warnings
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any, cast

from safetensors import safe_open
from transformers import PreTrainedModel

from heretic.errors import UserError, first_line, plain_line
from heretic.files import expand_user, open_regular
from heretic.model.device_errors import is_device_error
from heretic.model.weight_files import ADAPTER, read_json

if TYPE_CHECKING:
    from peft import PeftModel

WEIGHTS = "adapter_model.safetensors"


def adapter_folder(model: str) -> Path | None:
    """Return the folder if it holds an adapter without a model, else None."""
    folder = expand_user(model)
    return folder if (folder / ADAPTER).is_file() and not (folder / "config.json").exists() else None


def base_of(adapter: Path, candidate: str | None) -> tuple[str, str]:
    """Return name and revision of the model that the adapter was made for.

    It is the folder that the adapter names; else `candidate`, if that has the same last part, since adapters name the place
    of a model on another machine; else the name on the hub. Raises UserError for anything but LoRA in a safetensors file, for
    damaged files, or if the model cannot be told.
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
    _check_files(adapter)
    named, revision = str(config.get("base_model_name_or_path") or ""), str(config.get("revision") or "")
    if named and expand_user(named).is_dir():
        return named, revision
    if candidate and _last_part(candidate) == _last_part(named or candidate):
        return candidate, revision if candidate == named else ""
    if named.count("/") == 1 and not named.startswith((".", "/", "~")):
        return named, revision
    raise UserError(
        f"The adapter was made for the model {named!r}, which was not found.",
        code="adapter-only",
        where=str(adapter / ADAPTER),
        fix="name it: heretic evaluate ADAPTER --against MODEL",
    )


def _last_part(model: str) -> str:
    return PureWindowsPath(model).name  # of paths of any system


def _check_files(adapter: Path) -> None:
    """Read the weights' header and the config. Raises UserError."""
    from peft import LoraConfig

    open_regular(adapter / WEIGHTS, "The adapter's file").close()
    try:
        with safe_open(adapter / WEIGHTS, "pt"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            LoraConfig.from_pretrained(str(adapter))
    except Exception as error:  # peft trusts the file's content, so any error may follow
        if is_device_error(error):
            raise
        raise UserError(
            f"The adapter's files are damaged: {first_line(error)[:200]}",
            code="adapter-not-loadable",
            where=str(adapter),
            fix="download or save the adapter again",
        ) from None


def with_adapter(model: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    """Return the model with a LoRA adapter that peft attaches to its modules, not merged. Raises UserError."""
    try:
        with warnings.catch_warnings():
            # Of tensors that do not fit, which is checked below, and of its own imports
            warnings.simplefilter("ignore")
            attached, missing, unexpected = _attached(model, adapter)
    except Exception as error:  # as above
        if is_device_error(error):
            raise
        raise _not_loadable(adapter, first_line(error)[:300]) from error
    if missing:
        raise _not_loadable(adapter, f"it has no tensor {min(missing).replace('.default', '')}")
    if unexpected:
        raise _not_loadable(adapter, f"the model has no place for its tensor {min(unexpected).replace('.default', '')}")
    return cast(PreTrainedModel, attached.get_base_model())


def _attached(model: PreTrainedModel, adapter: Path) -> tuple[PeftModel, list[str], list[str]]:
    """Attach the adapter with peft; also return the tensors that the file lacks, and those that the model lacks.

    peft converts names, so that they cannot be compared with the file's; it only warns of the former.
    """
    from peft import LoraConfig, PeftModel

    results = []

    class Recording(PeftModel):
        def load_adapter(self, *args: Any, **kwargs: Any) -> Any:
            results.append(super().load_adapter(*args, **kwargs))
            return results[-1]

    config = LoraConfig.from_pretrained(str(adapter))
    config.task_type = None  # else peft would choose another class, which differs in generation only
    attached = Recording.from_pretrained(model, adapter, config=config)
    return attached, results[0].missing_keys, results[0].unexpected_keys


def _not_loadable(adapter: Path, problem: str) -> UserError:
    return UserError(
        f"The adapter cannot be attached to the model: {plain_line(problem)}",
        code="adapter-not-loadable",
        where=str(adapter),
        fix="name the model that the adapter was made for",
    )
