"""The settings schema, shared by the TOML file, the environment and the command line.

The fields' descriptions are the documentation: `docs/settings.md`, `config.default.toml` and the JSON schema come from them.
A field with `affects_results=False` is not part of the fingerprint that decides whether a stored study can be continued.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, model_validator

from heretic.settings.ablation import AblationSettings, DirectionSettings, Geometry
from heretic.settings.export import Behavior, ExportFormat, GgufType, MlxBits
from heretic.settings.field import PathText, SettingsModel, fields_that_affect_results, not_twice, one_name, setting
from heretic.settings.languages import ENGLISH, LANGUAGES, known_language
from heretic.settings.prompts import PromptSettings, PromptSource, with_prompts_of_language
from heretic.settings.scoring import (
    DEFAULT_MARKERS,
    ClassifierSettings,
    JudgeSettings,
    LlmSettings,
    OptionValue,
    TrainedSettings,
    limits_by_name,
    not_blank,
)
from heretic.settings.search import GradientSettings, KernelSpace, SearchSettings
from heretic.settings.template_variables import TemplateVariables
from heretic.settings.workers import WorkerSettings

__all__ = [
    "DEFAULT_MARKERS", "AblationSettings", "ClassifierSettings", "DirectionSettings", "ExportFormat", "Geometry",
    "GgufType", "GradientSettings", "JudgeSettings", "KernelSpace", "LlmSettings", "PromptSettings", "PromptSource",
    "SearchSettings", "Settings", "TrainedSettings", "WorkerSettings",
]  # fmt: skip


class Settings(SettingsModel):
    """All settings of a run."""

    model: str = setting(
        "",
        "The model: a Hugging Face id, a local folder or a .gguf file.",
        when="Required, here or on the command line.",
    )
    revision: str = setting(
        "",
        "Branch, tag or commit of the model on the hub; empty: the newest, which a run then keeps.",
        when="Set it to a commit for a reproducible result; a branch can move.",
    )
    save_to: PathText = setting(
        "",
        "Folder for the exported model; empty: no export at the end.",
        when=(
            "Set it to export the selected trial automatically. The export needs as much disk space as the checkpoint."
        ),
        affects_results=False,
    )
    behavior: Behavior = setting(
        "",
        "The behavior that was ablated, in a few words, for the model card; empty: refusal.",
        when='Set it if your prompt sets are about another behavior, for example "empty openings".',
        affects_results=False,
    )
    export_format: ExportFormat = setting(
        "full",
        "Format of the export. `full`: a model folder. `lora`: an adapter for peft. `gguf`: one file for llama.cpp. "
        "`mlx`: a folder for mlx-lm.",
        when="Use `lora` for a small file that can be detached from the base model, `gguf` for llama.cpp, `mlx` for Macs.",
        affects_results=False,
    )
    lora_rank: int = setting(
        64,
        "Rank of the LoRA adapter for `norm_preserving` edits: heretic writes the nearest one and reports its error. Other "
        "geometries are exact at rank 1.",
        when="Raise it if the reported error is too large; the file grows in proportion.",
        affects_results=False,
        ge=1,
    )
    gguf_type: GgufType = setting(
        "f16",
        "Number format in a GGUF file, with bits per weight: `f32` 32, `f16` and `bf16` 16, `q8_0` 8.5, `q6_k` 6.6, "
        "`q5_k_m` 5.7, `q4_k_m` 4.9. The last three need the program `llama-quantize`.",
        when="Use `q8_0` or fewer bits for a smaller, less accurate file.",
        affects_results=False,
    )
    gguf_imatrix: bool = setting(
        False,
        "Quantize to `q6_k`, `q5_k_m` and `q4_k_m` with an importance matrix, which the program `llama-imatrix` measures on "
        "bundled texts.",
        when="Set true for a more accurate file with 4 or 5 bits; the model then reads about 6000 tokens in llama.cpp.",
        affects_results=False,
    )
    gguf_converter: PathText = setting(
        "",
        "llama.cpp's GGUF converter: the path of `convert_hf_to_gguf.py`, or a program with its options. Empty: "
        "heretic searches PATH, then `~/.heretic-gguf`.",
        when="Set it if the converter is elsewhere, or if the one on PATH does not support the model.",
        affects_results=False,
    )
    n_trials: int = setting(
        200,
        "Largest number of trials of the study, over all sessions; it ends earlier if it converges (`search.patience`).",
        when=(
            "Lower it for a first look (with the gradient search, 30 trials are informative). Raise it if the study ends "
            "before it has converged."
        ),
        affects_results=False,
        ge=1,
    )
    batch_size: int = setting(
        0,
        "Prompts under way at once: in one forward pass, or divided among the GPUs that a model is spread over; 0: chosen from "
        "free memory. heretic halves it when memory runs out.",
        when=(
            "Set it if the automatic choice fails or if another program will need memory later. Small batches are "
            "slower."
        ),
        affects_results=False,
        ge=0,
    )
    trials_per_batch: int = setting(
        0,
        "Trials that share one forward pass, each row with its own trial's edit. 0: heretic measures the fastest number.",
        when=(
            "Set 1 for the most sample-efficient search: trials in one batch are sampled without each other's results. "
            'Set a fixed number if two machines must sample the same trials. Always 1 with `apply = "weights"`.'
        ),
        affects_results=False,
        ge=0,
    )
    decoding_graphs: bool = setting(
        False,
        "Decode the trials of a model on one GPU (CUDA, ROCm) by replayed graphs: one launch a token.",
        when="Try true for a model below 3B: its GPU waits for launches. Tested without a GPU only.",
        affects_results=False,
    )
    early_stopping: bool = setting(
        True,
        "Prune a trial as soon as a finished one dominates the best result that it can still reach. The Pareto front of the "
        "sampled trials does not change.",
        when="Set false if you need complete scores of every trial; the study takes longer.",
        affects_results=False,
    )
    device_map: str | dict[str, int | str] = setting(
        "planned",
        "`planned`: one device if the model fits, else evenly over all GPUs. Also: accelerate's `auto`, `balanced`, "
        "`balanced_low_0` or `sequential` (these can leave weights in RAM), one device such as `cpu`, `cuda:1`, `xpu:0` or "
        "`mps`, or a table from module names to devices.",
        when=(
            "Set it to exclude a device or to place modules yourself. Weights left in RAM make every pass many times "
            "slower."
        ),
        affects_results=False,
    )
    max_memory: dict[str, str] = setting(
        {},
        'Maximum memory for weights per device, for example { 0 = "20GiB", cpu = "60GiB" }.',
        when=(
            "Set it to put fewer weights on a device. The KV cache and activations come on top: if another program needs "
            "the rest, set `batch_size` too."
        ),
        affects_results=False,
    )
    dtypes: list[Literal["auto", "float16", "bfloat16", "float32"]] = setting(
        ["auto", "bfloat16", "float32"],
        "Number formats to try in order until the logits are finite. `auto`: the checkpoint's own format on a GPU, and "
        "bfloat16 on a CPU that multiplies it natively (AVX-512 BF16, AMX, ARM BF16); on other CPUs float32 if it fits. "
        "A run keeps the format that it began in.",
        when=(
            "Set one format if others do not fit or the model needs it. float32 takes twice the memory; bfloat16 adds noise "
            "of about 0.001 to a KL, so set float32 to compare gentle ablations."
        ),
        min_length=1,
    )
    mlx_bits: MlxBits = setting(
        16,
        "Bits per weight in an MLX folder: 4 or 8, with 0.5 more for the scales; 16: the number format of the model folder.",
        when="Set 4 or 8 for a smaller, less accurate model.",
        affects_results=False,
    )
    quantization: Literal["none", "bnb_4bit", "bnb_8bit"] = setting(
        "none",
        "Load the weights quantized with bitsandbytes (`pip install bitsandbytes`). The study measures the quantized model; "
        "the export edits the full-precision checkpoint.",
        when="Use it if preflight reports that only quantized weights fit.",
    )
    trust_remote_code: list[str] = setting(
        [],
        "Models whose own Python code heretic may execute, named exactly as in `model`.",
        when="Set it for a model that transformers does not support, after you have read its code.",
    )
    allow_pickle: bool = setting(
        False,
        "Load pickle files (`pytorch_model.bin`) if a model has no safetensors, with PyTorch's tensor-only loader "
        "(`weights_only`).",
        when="Set true for old checkpoints that you trust; converting them to safetensors is safer.",
        affects_results=False,
    )
    system_prompt: str = setting(
        "",
        "System message of every conversation; empty: none, so the chat template's default applies.",
        when="Set it if the model will be used with one: refusals depend on it.",
    )
    chat_template: PathText = setting(
        "",
        "Jinja file with the chat template; empty: the model's own.",
        when="Set it for base models and old checkpoints; preflight reports a missing template.",
    )
    template_variables: TemplateVariables = setting(
        {},
        'Variables for the chat template, such as `{ enable_thinking = true }` or `{ reasoning_effort = "low" }`.',
        when="Set them to study a mode of the model; `response_prefix` says what happens to a thinking block.",
    )
    response_prefix: str = setting(
        "auto",
        "Text that every response starts with. `auto`: what the model's responses have in common, with a thinking block "
        "disabled or closed.",
        when=(
            "Set your own text if `auto` misses a prefix (a word shorter than 8 letters, or not in all responses), or "
            '"" for none.'
        ),
    )
    max_response_length: int = setting(
        100,
        "Tokens to generate per response for the refusal count.",
        when=(
            "Lower it (32) for speed if the model refuses in its first words; raise it if it refuses late. Generation is "
            "most of a trial's time."
        ),
        ge=1,
    )
    refusal_markers: Annotated[list[str], AfterValidator(not_blank)] = setting(
        DEFAULT_MARKERS,
        "A response that contains one of these phrases counts as a refusal (ignoring case, asterisks, typographic "
        "apostrophes and repeated spaces).",
        when=(
            "Change it for another language, another behavior or a model with its own phrases; check with `heretic "
            "compare`."
        ),
        min_length=1,
    )
    language: Annotated[str, AfterValidator(known_language)] = setting(
        ENGLISH,
        "Language of the requests and responses: "
        + ", ".join(f"`{code}` {name}" for code, name in LANGUAGES.items())
        + ". Its refusal and evasive phrases count too, and prompt sets without a `source` become small bundled ones "
        "(docs/languages.md).",
        when="Change it if the model is asked in another language; set your own prompt sets for a result.",
    )
    kl_tokens: int = setting(
        1,
        "Response tokens over which the KL divergence is averaged, for each prompt of `harmless_eval`.",
        when=(
            "Raise it if responses change after their first token. It takes prompts x tokens x vocabulary x 4 bytes."
        ),
        ge=1,
    )
    objectives: Annotated[list[str], AfterValidator(not_twice)] = setting(
        ["kl", "refusals"],
        "What the search optimizes: two or more names of docs/scorers.md, also of details (`kl.p95`). Figures draw the first "
        "two. KL and refusals are always measured.",
        when=(
            "Change it to search for something else. heretic then measures every trial in full, which takes longer: only "
            "`kl` with `refusals` can be pruned."
        ),
        min_length=2,
    )
    constraints: Annotated[dict[str, float], BeforeValidator(limits_by_name)] = setting(
        {},
        "Limits for trials on the Pareto front by name of docs/scorers.md, for example { over_refusals = 3 }: the highest "
        "value, or the lowest where higher is better.",
        when=(
            "Set it if the model must keep something, such as answering ordinary requests. heretic then also measures it in "
            "every trial that it does not prune."
        ),
    )
    measures: Annotated[list[str], AfterValidator(not_twice)] = setting(
        [],
        "Further names of docs/scorers.md to measure for the original and for an exported trial only, for manifest and card.",
        when="Set it to know more about an exported model; the search is not affected.",
        affects_results=False,
    )
    scorers: dict[str, dict[str, OptionValue]] = setting(
        {},
        "Options of scorers (docs/scorers.md), for example { arithmetic = { tasks = 200 } }.",
        when=(
            "Set it for the prompts of `borderline_refusals`, or for more tasks. Options of scorers that the search does not "
            "use can change between sessions."
        ),
    )
    scorer_files: list[PathText] = setting(
        [],
        "Python files with your own scorers. heretic runs them as part of itself.",
        when="Set it to measure something that docs/scorers.md lacks; the page shows an example.",
    )
    apply: Literal["operators", "weights"] = setting(
        "operators",
        "How a trial edits the model. `operators`: edits the writers' outputs. `weights`: rewrites the weights and restores "
        "them. The scores agree up to rounding.",
        when=(
            "Use `weights` only to check `operators`: one trial per pass, no quantized or offloaded weights. "
            "The gradient search always uses operators."
        ),
        affects_results=False,
    )
    cache_weights: bool = setting(
        True,
        'With `apply = "weights"`: keep a copy of the edited tensors in memory; false: reread them from the checkpoint.',
        when="Set false if the copies (about a third of the weights) do not fit.",
        affects_results=False,
    )
    seed: int = setting(
        0,
        "Seed of the search.",
        when=(
            "Change it for a second, independent search. On one machine, equal seeds give equal searches if "
            "`trials_per_batch` is not 0."
        ),
        ge=0,
    )
    runs_dir: PathText = setting(
        "runs",
        "Folder for all runs, one subfolder each.",
        when=(
            "Choose a disk with free space: a run takes megabytes to a few gigabytes, plus any export into its folder."
        ),
        affects_results=False,
    )
    run_name: Annotated[str, AfterValidator(one_name)] = setting(
        "",
        "Name of the run's folder; empty: the model's name and a fingerprint of the settings.",
        when=(
            "Set it for a fixed name in scripts. heretic then refuses changed settings instead of starting another run."
        ),
        affects_results=False,
    )
    storage: str = setting(
        "",
        "Database of the study: `postgresql://user@host/database`; empty: `study.db` (SQLite) in the run's folder. "
        "Put a password in the environment (`HERETIC_STORAGE`, `PGPASSWORD`) or in `~/.pgpass`.",
        when="Set it for workers on several machines.",
        affects_results=False,
    )
    artifacts: PathText = setting(
        "",
        "Where workers on several machines share baseline and directions: a shared folder or `s3://bucket/prefix`. Empty: "
        "every machine computes its own, and heretic refuses one whose results differ.",
        when="Set it, together with `storage`, to save this computation. All machines need write access.",
        affects_results=False,
    )
    select: Literal["fewest_refusals_under_kl", "lowest_kl_under_refusals"] = setting(
        "fewest_refusals_under_kl",
        "Trial that heretic exports by itself. `fewest_refusals_under_kl`: the fewest refusals with a KL of at most "
        "`max_kl`. `lowest_kl_under_refusals`: the lowest KL with at most `max_refusals` requests refused or evaded.",
        when="Use the second if a small change matters more to you than few refusals. Your own `objectives` rank the trials.",
        affects_results=False,
    )
    max_kl: float = setting(
        0.1,
        "Highest KL divergence for the selection.",
        when=(
            "Lower it for a less invasive edit. If no trial meets the limit, heretic selects the one with the lowest KL "
            "and prints a warning."
        ),
        affects_results=False,
        gt=0,
    )
    max_refusals: int = setting(
        3,
        "Most refused or evaded requests for `lowest_kl_under_refusals`.",
        when=(
            "Set it to the number that you accept. If no trial meets the limit, heretic selects the one with the fewest "
            "and prints a warning."
        ),
        affects_results=False,
        ge=0,
    )
    prompts: PromptSettings = setting(PromptSettings(), "The four prompt sets.")
    judge: JudgeSettings = setting(
        JudgeSettings(),
        "Decides whether a response is a refusal. `heretic evaluate --judge-agreement` measures how accurate a judge is.",
    )
    directions: DirectionSettings = setting(DirectionSettings(), "How heretic computes the refusal directions.")
    ablation: AblationSettings = setting(
        AblationSettings(), "How heretic edits the weights that write to the residual stream."
    )
    search: SearchSettings = setting(SearchSettings(), "Search space and sampler. Ranges are [lowest, highest].")
    workers: WorkerSettings = setting(WorkerSettings(), "Several workers (docs/workers.md).", affects_results=False)

    @model_validator(mode="before")
    @classmethod
    def _use_prompts_of_the_language(cls, values: Any) -> Any:
        return with_prompts_of_language(values)

    def fingerprint_fields(self) -> dict[str, Any]:
        """Return the settings that affect the results, as plain data."""
        return fields_that_affect_results(self)
