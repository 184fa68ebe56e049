"""The page of architectures, made from the results of `families.py`.

python benchmarks/families_page.py
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RUN = "run"  # the key of the JSON file that holds date, version and layers
COLUMNS = ("attached = baked", "removed", "trials in a pass", "padding", "residuals", "decoding", "export")
STREAMS = "several streams"
UNTESTED = {STREAMS: "not checked (several streams)"}
# Results in fewer words; the page explains them once.
SHORTER = {
    r"(\d+) of (\d+) blocks do more than add their writers to one stream": r"mixed: \1/\2 blocks",
    r"removed: up to (\S+) of what a block adds": r"removed: \1",
    r"padding: is not nothing \(log-probabilities move by (\S+)\)": r"padding: \1",
    r"No module of this model \((\w+)\) was recognized as writing to the residual stream": "no writers found",
    r"generate itself fails: (\w+): .*?(; |$)": r"generate itself fails (\1)\2",
    r" but it was not found in your environment": "",
    r" \(images\)": "†",
    r"The blocks of this model \((\w+)\) were not found": "no blocks found",
}
# Families of which this project has run a whole study on real weights, and on which model.
REAL = {"llama": "SmolLM2-135M-Instruct", "qwen2": "Qwen2.5-Coder-0.5B-Instruct"}


def main() -> None:
    """Write docs/architectures.md."""
    results = json.loads((ROOT / "benchmarks/results/families.json").read_text(encoding="utf-8"))
    (ROOT / "docs/architectures.md").write_text(page(results), encoding="utf-8")


def page(results: dict[str, dict[str, Any]]) -> str:
    """Return the page, families with equal results in one row."""
    families = {family: result for family, result in sorted(results.items()) if family != RUN}
    good = {f: r for f, r in families.items() if all(r.get(c) == "yes" for c in COLUMNS)}
    exact = [f for f, r in families.items() if r.get("attached = baked") == r.get("export") == "yes"]
    introduction = INTRODUCTION.format(
        **results[RUN],
        tried=len(families),
        good=len(good),
        exact=len(exact),
        real=" and ".join(f"`{family}` ({model})" for family, model in REAL.items()),
    )
    rest = {f: r for f, r in families.items() if f not in good}
    return "\n".join([introduction, *passing(good), "", EXCEPTIONS, *exceptions(rest)]) + "\n"


def passing(families: dict[str, dict[str, Any]]) -> list[str]:
    """Return the table of families that pass every check, by their writers."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for family, result in families.items():
        groups[_writers(result), result.get("notes", "")].append(family)
    rows = sorted(groups.items(), key=lambda group: (-len(group[1]), group[1]))
    lines = [f"|{_cell(kinds)}|{_cell(', '.join(names))}|{_cell(notes)}|" for (kinds, notes), names in rows]
    return ["|writers|families|notes|", "|---|---|---|", *lines]


def exceptions(families: dict[str, dict[str, Any]]) -> list[str]:
    """Return the table of the other families, with what differs."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for family, result in families.items():
        failed = [f"{c}: {UNTESTED.get(result[c], result[c])}" for c in COLUMNS if result.get(c, "yes") != "yes"]
        failed += [f"{k}: {_reason(result[k])}" for k in ("not built", "refused", "failed") if k in result]
        failed += [result["notes"]] if result.get("notes") else []
        groups[_writers(result), "; ".join(failed)].append(family)
    lines = [f"|{_cell(', '.join(names))}|{_cell(kinds)}|{_cell(text)}|" for (kinds, text), names in groups.items()]
    return ["|families|writers|what differs|", "|---|---|---|", *lines]


def _writers(result: dict[str, Any]) -> str:
    """Return the kinds of writers without their numbers."""
    return re.sub(r"\b\d+ (experts: )?", r"\1", result.get("writers", ""))


def _reason(error: str) -> str:
    """Return an error without what follows its first clause and the place that raised it."""
    return re.split(r"; |\. |: (?=mat1)| <class| \(\w+\.py:\d+\)", error)[0].rstrip(".")


def _cell(text: str) -> str:
    for pattern, short in SHORTER.items():
        text = re.sub(pattern, short, text)
    return text.replace("|", "\\|").replace("\n", " ")


INTRODUCTION = """# Architectures

heretic finds a model's writers by running its blocks, so it also opens architectures that are not listed. It refuses
one without recognized blocks or writers (`architecture-not-supported`).

We tried all {tried} decoder families of transformers {transformers} with {layers} layers, a width of 32 and random float32 weights
on a CPU (`python benchmarks/families.py`, {date}). {good} pass every check, {exact} can be edited, written and reloaded exactly.

|check|passes if|
|---|---|
|attached = baked|in every geometry, operators and rewritten weights give logits that differ by less than 0.2 % of the edit's \
effect; the weights can be restored bit for bit|
|removed|with `plain` at strength 1, no block adds anything along the direction, norms behind writers included|
|trials in a pass|two trials in one pass give what each gives alone|
|padding|a prompt gives the same beside longer ones. If not, only prompts of equal length share a batch|
|residuals|there is one finite vector per prompt and block|
|decoding|the tokens are those of `generate(do_sample=False)`, also when rows end early|
|export|the written folder gives the attached model's logits|

## Families that differ from Llama

**Mixtures of experts.** A mixture writes a weighted sum of its experts' outputs, so an operator on the sum is the same operator
on every expert, fused or not. `row_normalized` and `norm_preserving` keep the row norms of all experts side by side, not of
each expert. Shared experts are writers of their own, except in Llama 4. Routers and gates are never edited. heretic warns about a
mixture with other outputs (LongCat's identity experts) and does not edit it.

**Norms behind a writer** (Gemma 2 to 4, OLMo 2 and 3, GLM 4, EXAONE 4). heretic finds them by a test pass;
`norm_aware` [accounts for them](how.md#the-operator).

**Several streams side by side** (Gemma 3n, DeepSeek V4, HY 4, Qwen 4 preview). Directions come from the mean over the streams.

**Other residual connections.** heretic zero-ablates the writers of every block and checks that the block returns its input, up
to a factor. Scaled residuals (Granite) and parallel blocks (Cohere, GPT-NeoX) pass. It warns about residuals scaled by
component (Doge, ZAYA), normalized residuals (MiniMax, GPT-1) and unknown writers.

**Weights shared by blocks** get one edit, with the strength of the first block that uses them. Zamba's shared attention and MLP
feed the Mamba layers, so heretic does not edit them.

**Recurrent and convolution states** cannot be cut by rows: finished rows stay in the batch, without drafts. If the model returns no
cache, transformers' `generate` decodes.

## Limitations

- Random weights do not show how well real models respond to ablation. Whole studies on real weights ran for {real}.
- The check at the start misses a convolution between a writer and the stream (Inkling); "removed" shows what it leaves.

## Families that pass every check

`experts: NAME` is a mixture with all its experts. † marks models that also take images. "mixed: 1/4 blocks": one of four does more
than add its writers to one stream.
"""

EXCEPTIONS = """## The other families

"removed": the largest share of what a block adds that stays along the direction. "padding": how much it moves log-probabilities.
"""

if __name__ == "__main__":
    main()
