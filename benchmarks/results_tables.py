"""Tables and captions of the documents, made from benchmarks/results/*.json; `results_page.py` puts them in."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from heretic.scoring.interval import wilson

RESULTS = Path(__file__).parent / "results"
QWEN, DEMO = "Qwen2.5-Coder-0.5B-Instruct", "Demo model (SmolLM2-135M-Instruct, guarded)"
GEMMA = "Gemma 3 270M (pretrained, guarded)"
LARGER = "Qwen2.5-Coder-1.5B-Instruct"
MODELS = {
    "qwen2.5-coder-0.5b-instruct": QWEN,
    "qwen2.5-coder-1.5b-instruct": LARGER,
    "guarded-model": DEMO,
    "gemma-3-270m-guarded": GEMMA,
}
SYSTEM_PROMPT = " --set 'system_prompt=You are a helpful assistant.'"
# What all searches of quality.py, peer.py and versus_heretic.py change of the defaults.
SHORT = "float32, 32 tokens (default 100), 10 startup trials (theirs 60), their system prompt"
SAME = "as above"  # RESULTS.md gives `SHORT` in its first table of a search
Report = Mapping[str, Any]
Point = Mapping[str, Any]


# 1. Tables


@cache
def read(name: str) -> Report:
    """Return a result by its file's name without the ending."""
    found: Report = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def table(rows: Iterable[Sequence[Any]]) -> str:
    """Return a table in Markdown; the first row is its head."""
    head, *rest = ([str(cell) for cell in row] for row in rows)
    return "\n".join(f"|{'|'.join(cells)}|" for cells in (head, ["---"] * len(head), *rest))


def captioned(
    rows: Iterable[Sequence[Any]], *files: str, settings: str, model: str = "", hardware: str = "", command: str = ""
) -> str:
    """Return a table and its caption: model, hardware, dates, commands, settings; from the files where not given."""
    reports = [read(name) for name in files]
    model = model or " and ".join(unique(MODELS[report["model"]] for report in reports))
    hardware = hardware or " and ".join(unique(f"{r['machine']['cores']} cores of an {cpu(r)}" for r in reports))
    commands = command or ", ".join(f"`{each}`" for each in unique(map(command_of, reports)))
    days = sorted(report[key][:10] for report in reports for key in ("began", "date") if key in report)
    dates = " to ".join(unique((days[0], days[-1])))
    names = ", ".join(f"`{name}.json`" for name in shortened(files))
    text = f"{model}. {hardware}, {dates}. {commands}. Settings: {settings}. Data: {names}."
    return f"{table(rows)}\n\n{wrapped(text)}"


def wrapped(text: str) -> str:
    """Return a caption in lines of 120 characters."""
    return textwrap.fill(f"*{text}*", 120, break_long_words=False, break_on_hyphens=False)


def shortened(files: Sequence[str]) -> list[str]:
    """Return at most two names; for more the beginnings that they share."""
    return list(files) if len(files) < 3 else unique(f"{name.partition('_')[0]}*" for name in files)


def unique(values: Iterable[str]) -> list[str]:
    """Return the values without repetitions, in their order."""
    return list(dict.fromkeys(values))


def cpu(report: Report) -> str:
    """Return the processor's name."""
    name: str = report["machine"]["cpu"]
    return name.replace("(R)", "").replace(" Processor", "")


def command_of(report: Report) -> str:
    """Return the command without the place of its result, and with FOLDERS for a list of models."""
    text = re.sub(r" --out \S+", "", report["command"]).replace(SYSTEM_PROMPT, "")
    return re.sub(r"(--models)(?: \S+/trial-\d+)+", r"\1 FOLDERS", text).strip()


# 2. Fronts


def front(points: Sequence[Point]) -> str:
    """Return the points that no other dominates, the fewest refusals first."""
    best = [p for p in points if not any(dominates(q, p) for q in points)]
    return ", ".join(f"{p['refusals']} at {p['kl']:.3f}" for p in sorted(best, key=lambda p: -p["kl"]))


def dominates(one: Point, other: Point) -> bool:
    """Return whether a point is as good in both values and better in one."""
    a, b = (one["refusals"], one["kl"]), (other["refusals"], other["kl"])
    return a != b and a[0] <= b[0] and a[1] <= b[1]


def counted(count: int | None, total: int) -> str:
    """Return a count with the 95 % interval (Wilson) of its share."""
    if count is None:
        return ""
    low, high = wilson(count, total)
    return f"{count} [{100 * low:.0f}-{100 * high:.0f}%]"


def searched(file: str, seed: int, mark: str, label: str = "heretic") -> tuple[str, ...]:
    """Return the row of a search of `free`, the default."""
    report = read(file)
    found = search(report, "free", seed)["fronts"][mark]
    return (
        str(seed),
        f"{label}, {found['trials']}",
        f"{found['seconds']:.0f} s",
        *cells(report, found["points"], found),
    )


def folders(file: str, group: str, seed: int, trials: int, timed: str = "") -> tuple[str, ...]:
    """Return the row of models that heretic-llm wrote; `timed` is the result of peer.py that holds its seconds."""
    report = read(file)
    points = [model for model in report["models"] if model["group"] == group]
    seconds = [study["seconds_study"] for study in read(timed)["studies"] if study["seed"] == seed] if timed else []
    took = f"{seconds[0]:.0f} s" if seconds else ""
    return (str(seed), f"heretic-llm, {trials}", took, *cells(report, points, report["groups"][group]))


def cells(report: Report, points: Sequence[Point], found: Report) -> list[str]:
    """Return a front as three cells."""
    return [front(points), counted(found["refusals_at_0.1"], report["of"]), f"{found['hypervolume']:.4f}"]


def search(report: Report, method: str, seed: int) -> Report:
    """Return the search of a method with a seed."""
    found: Report = next(s for s in report["searches"] if (s["method"], s["seed"]) == (method, seed))
    return found


FRONT_HEAD = ("seed", "tool, trials", "search", "refusals at KL", "at KL ≤ 0.1", "hypervolume")


def held_out() -> str:
    """Return the fronts of Qwen on held-out prompts, beside heretic-llm."""
    rows = [
        FRONT_HEAD,
        searched("quality_trials", 0, "10"),
        searched("quality_trials", 0, "30"),
        folders("quality_peer", "heretic-llm, 30 trials", 0, 30),
        folders("quality_peer", "heretic-llm, 100 trials", 0, 100),
        searched("quality_trials_10", 1, "10"),
        folders("quality_folders", "heretic-llm, 30 trials, seed 1", 1, 30, "peer_30"),
        searched("quality_trials_10", 2, "10"),
        folders("quality_folders", "heretic-llm, 30 trials, seed 2", 2, 30, "peer_30"),
    ]
    files = ("quality_trials", "quality_trials_10", "quality_peer", "quality_folders", "peer_30", "peer")
    return captioned(
        rows, *files, hardware="A core of an AMD EPYC a search, two for heretic-llm's seed 0",
        command="`python benchmarks/quality.py ASSETS --methods free --count 10 30`, "
        "`python benchmarks/peer.py ASSETS --trials 30`",
        settings=f"{SHORT}; 50 + 50 held-out prompts, of which the original refuses 21",
    )  # fmt: skip


# Setting, and for each model: file and method, then those of the default if they are others.
METHODS: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ('search.start = "kernels"', ("quality_mixture_kernels", "kernels", "quality_free"),
     ("quality_demo_kernels", "kernels", "quality_demo_trials")),
    ('search.gradient.direction = "per_layer"', ("quality_free_per_layer", "per_layer"), ()),
    ("search.gradient.mine_refusals = false", (), ("quality_demo_methods", "deaf")),
    ('directions.method = "geometric_median"', ("quality_directions", "geometric_median"),
     ("quality_demo_directions", "geometric_median")),
    ('directions.method = "self_organizing_map"', ("quality_directions", "map_3"), ()),
    ("directions.iterative_rounds = 1", ("quality_directions", "rounds_1"), ()),
    ("directions.iterative_rounds = 2", (), ("quality_demo_methods", "rounds_2")),
    ("directions.project_harmless = false", (), ("quality_demo_methods", "unprojected")),
    ('ablation.geometry = "plain"', (), ("quality_demo_methods", "plain")),
    ("kl_tokens = 4", (), ("quality_demo_more", "kl_tokens_4")),
)  # fmt: skip


def methods() -> str:
    """Return the hypervolumes of other settings and how far they are from the default's, seed by seed."""
    rows: list[tuple[str, ...]] = [("setting", "Qwen2.5-Coder-0.5B", "demo model")]
    files: list[str] = []
    for setting, *sources in METHODS:
        rows.append((f"`{setting}`", *(beside(*source) if source else "" for source in sources)))
        files += [name for source in sources for name in " ".join((*source[:1], *source[2:3])).split()]
    return captioned(
        rows, *unique(files), hardware="One or two cores of an AMD EPYC or Intel Xeon",
        command="`python benchmarks/quality.py ASSETS --methods free METHOD`",
        settings=f"{SAME}; two points, `search.gradient.weights=[0.25,1.5]`; the first two rows on Qwen 347 s; kernels on "
        "the demo model 30 trials",
    )  # fmt: skip


def beside(files: str, method: str, reference: str = "", default: str = "free") -> str:
    """Return hypervolumes by seed, each with its difference from the default's with the same seed."""
    told = []
    for file in files.split():
        for found in read(file)["searches"]:
            if found["method"] == method:
                other = volume(search(read(reference or file), default, found["seed"]))
                told.append(f"{volume(found):.4f} ({volume(found) - other:+.4f})")
    return ", ".join(told)


def volume(found: Report) -> float:
    """Return the hypervolume at the end of a search."""
    value: float = list(found["fronts"].values())[-1]["hypervolume"]
    return value


# 3. Times and memory


def versus() -> str:
    """Return the two tools taking turns on one machine."""
    report = read("versus_heretic")
    tools = ("ours", "theirs")
    before = report["again"]["original"]

    def of(key: str, form: str = "{:.1f} s") -> list[str]:
        return [form.format(report[tool][key]) for tool in tools]

    def points(markers: str) -> list[str]:
        return [front([point[markers] for point in report["again"][tool]]) for tool in tools]

    measured = [report["ours"]["seconds_trial_measured_median"], report["theirs"]["seconds_trial_median"]]
    volumes = [report["comparison"][by]["hypervolume"] for by in ("our_markers", "their_markers")]
    peaks = [f"{report[tool]['peak_gb_study']:.2f} / {report[tool]['peak_gb']:.2f} GB" for tool in tools]
    rows = [
        ("", "heretic", "heretic-llm 1.4.0"),
        ("a fully measured trial, median", *(f"{each:.1f} s" for each in measured)),
        ("to a front that dominates heretic-llm's last one", _dominates_after(report), ""),
        ("to the end of the study", *of("seconds_study")),
        ("peak memory, study / with export", *peaks),
        (f"refusals at KL, our phrases ({before['our_markers']['refusals']} before)", *points("our_markers")),
        (f"refusals at KL, their phrases ({before['their_markers']['refusals']} before)", *points("their_markers")),
        ("hypervolume, our / their phrases", *(" / ".join(f"{v[tool]:.3f}" for v in volumes) for tool in tools)),
        *_second_seed(read("versus_heretic_1")),
    ]
    chosen, theirs = report["settings"], report["settings"].get("their_dtype", "float32")
    formats = "float32" if chosen["dtype"] == theirs else f"bfloat16 (default), heretic-llm {theirs}"
    settings = f"30 trials (default 200), {SHORT.replace('float32', formats)}; scored on its prompts in float32"
    return captioned(
        rows,
        "versus_heretic",
        "versus_heretic_1",
        model=QWEN,
        settings=settings,
        command=f"`{command_of(report)}`, also `--seed 1`",
    )


def _second_seed(report: Report) -> list[tuple[str, ...]]:
    """Return the rows of seed 1, which was scored by our phrases only."""
    tools = ("ours", "theirs")
    volumes = report["comparison"]["our_markers"]["hypervolume"]
    points = (front([point["our_markers"] for point in report["again"][tool]]) for tool in tools)
    end, volume = (
        [f"{value:{form}}" for value in values]
        for form, values in (
            (".0f", [report[tool]["seconds_study"] for tool in tools]),
            (".3f", [volumes[tool] for tool in tools]),
        )
    )
    return [
        ("seed 1: seconds, to dominate", f"{end[0]}, {_dominates_after(report)}", end[1]),
        ("refusals at KL; hypervolume", *(f"{p}; {v}" for p, v in zip(points, volume, strict=True))),
    ]


def _dominates_after(report: Report) -> str:
    """Return after which seconds our trials were as good as heretic-llm's final points, by our phrases; else what was missing."""
    theirs = [(p["our_markers"]["refusals"], p["our_markers"]["kl"]) for p in report["again"]["theirs"]]
    ours: list[tuple[int, float]] = []
    missing, since = theirs, ""
    for line in report["ours"]["lines"]:
        if found := re.match(r"([\d.]+) Trial \d+ \(.*?\): (\d+) of \d+ refused, KL ([\d.]+)", line):
            ours.append((int(found[2]), float(found[3])))
            left = [(refusals, kl) for refusals, kl in theirs if not any(r <= refusals and k <= kl for r, k in ours)]
            if len(left) < len(missing):
                missing, since = left, f"{float(found[1]):.0f} s"
    return since + "".join(f", but for {refusals} at {kl:.3f}" for refusals, kl in missing)


def convergence() -> str:
    """Return what ending studies at convergence costs and saves, by patience and smallest gain."""
    report = read("convergence")
    grid, studies = report["grid"], report["studies"]
    gains = [0.001, 0.01, 0.03]
    cells = {(g["patience"], g["min_gain"]): f"{100 * g['lost']:.2f} %, {g['ran']}" for g in grid}
    rows = [("patience", *(f"min_gain {gain:g}" for gain in gains))]
    rows += [(str(p), *(cells[p, gain] for gain in gains)) for p in (5, 10, 20)]
    models = " and ".join(unique(MODELS[s["model"]] for s in studies))
    sizes = sorted(s["trials"] for s in studies)
    settings = (
        f"largest loss of final hypervolume in one of {len(studies)} studies of {sizes[0]} to {sizes[-1]} trials, trials run of "
        f"{grid[0]['of']}"
    )
    command = "`python benchmarks/convergence.py STUDIES`"
    return captioned(rows, "convergence", model=models, settings=settings, command=command)


def geometries() -> str:
    """Return the points of every method's gradient search on held-out requests of two sources."""
    report = read("geometries")
    rows = [("model, seed", "method", "held-out requests", "HarmBench", "KL over its own answers")]
    for row in sorted(report["rows"], key=lambda row: (row["model"] != report["rows"][0]["model"], row["seed"])):
        points = row["points"]
        left = []
        for source, total in row["of"].items():
            counts = (f"{p['refusals.' + source]:g}/{p['unanswered.' + source]:g}" for p in points)
            left.append(f"{', '.join(counts)} of {total}")
        divergences = ", ".join(f"{p['own_answer_kl.mean']:.4f}" for p in points)
        name = MODELS[row["model"]].split(" (")[0].removesuffix("-Instruct")
        rows.append((f"{name}, {row['seed']}", f"`{row['method']}`", left[0], left[1] if left[1:] else "", divergences))
    settings = (
        "points of the gradient search, from strict to gentle: refused (phrases) / not answered (trained judge) in 48 tokens; the "
        "original refuses all of these requests; KL over 8 tokens; float32; Qwen: weights 0.06, 0.25, 1, 5 steps, one search"
    )
    models = " and ".join(unique(MODELS[row["model"]] for row in report["rows"]))
    return captioned(
        rows, "geometries", model=models, settings=settings, command="`python benchmarks/geometries.py ASSETS`"
    )


# The ways of trial.json in words.
SAVINGS = {
    "one trial in a pass": "one",
    "two trials in a pass": "two",
    "four trials in a pass": "four",
    "one, none of it": "one, without any saving",
    "one, every pass from the first block": "one, without cached activations",
    "one, no text tried": "one, without drafts",
    "one, beginnings for every prompt": "one, without prefix caching and cached activations",
}


def savings() -> str:
    """Return what each saving in a trial brings."""
    ways = read("trial")["ways"]
    rows = [
        (SAVINGS.get(name, name), *(f"{way[k]:.2f}" for k in ("seconds_per_trial", "divergence", "refusals")))
        for name, way in ways.items()
    ]
    apart = max(way["kl_apart"] for way in ways.values())
    verdicts = " or ".join(unique(way["same_verdicts"] for way in ways.values()))
    settings = (
        f"random kernels, float32, 32 tokens; KL at most {apart:.1e} apart (relative), {verdicts} trials with the same "
        "verdicts"
    )
    return captioned([("trials in a pass", "seconds a trial", "KL", "refusals"), *rows], "trial", settings=settings)


def plan_peaks() -> str:
    """Return the memory plan against the peaks of studies on pretend GPUs."""
    report = read("plan_peaks")
    phases = list(next(iter(report["cases"].values()))["phases"])
    names = unique(name.partition(",")[0] for name in report["cases"])
    rows: list[Sequence[Any]] = [("phase", *names)]
    for phase in phases:
        of = [[found["phases"][phase] for case, found in report["cases"].items() if case.startswith(n)] for n in names]
        rows.append((phase.replace("_", " "), *map(_over, of)))
    settings = (
        "plan above the measured peak beside the weights in percent, least to most of 1 and 4 GPUs, 0 or 64 shared tokens; "
        "bfloat16, 8 blocks, width 512, 32 rows of up to 27 further tokens, answers of 24"
    )
    return captioned(rows, "plan_peaks", settings=settings, model="Random models on pretend GPUs")


def _over(cases: Sequence[Mapping[str, Sequence[int]]]) -> str:
    """Return by how many percent the plan is above the measured peaks of a phase, least and most."""
    over = sorted(100 * (p / m - 1) for case in cases for p, m in zip(case["planned"], case["measured"], strict=True))
    return " to ".join(unique((f"{over[0]:+.0f}", f"{over[-1]:+.0f}")))


def llama_cpp() -> str:
    """Return exported GGUF files in llama.cpp."""
    files = ("llama_cpp", "llama_cpp_smollm2")
    found = [read(file)["compared"] for file in files]
    same = (
        "prompts with the same token ids",
        "answers that are the same, token for token",
        "chats with the same answer",
    )
    worst = "largest difference of a log-probability"
    rows = [
        ("", "Qwen2.5-Coder-0.5B", "SmolLM2-135M"),
        ("same token ids, answers, chats", *(f"{told(each, same)} of {each['prompts']}" for each in found)),
        (worst, *(f"{each[worst]:.4f}" for each in found)),
    ]
    settings = f"`gguf_type=f32`, greedy answers of 32 tokens, xllamacpp {read(files[0])['xllamacpp']}"
    command = "`python benchmarks/llama_cpp.py FILE.gguf PROMPTS.txt --llama LLAMA/bin/python`"
    return captioned(rows, *files, model="Exports of two ablated models", command=command, settings=settings)


def told(values: Report, keys: Sequence[str]) -> str:
    """Return some values of a result."""
    return ", ".join(str(values[key]) for key in keys)
