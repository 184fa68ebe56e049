"""The model card: what was changed, how much, and that safety training was reduced."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from heretic.ablation.ablation import Ablation
from heretic.export.base_card import BaseCard
from heretic.export.manifest import DIRECTIONS, Edit, comparisons_of
from heretic.export.markdown import code, escape
from heretic.export.request import WriteResult
from heretic.scoring.comparison import Comparison, number_text
from heretic.scoring.interval import wilson
from heretic.scoring.judges.registry import JUDGES
from heretic.scoring.scores import Scores

BARS = "·▁▂▃▄▅▆▇█"
OF_REFUSAL = """\
**The safety training of this model was reduced on purpose.** The refusal direction in its residual stream was projected out of
weights that write to the stream. The model answers requests that the original refuses, and its answers can be wrong, offensive
or harmful. Nothing was added to it: it knows what the original knows."""
OF_ANOTHER_BEHAVIOR = """\
**A behavior of this model was reduced on purpose: {behavior}.** The direction in its residual stream that carries it was
projected out of weights that write to the stream. Its safety training may be reduced with it: whether it still refuses what the
original refuses was not measured here. Nothing was added to it: it knows what the original knows."""
TEMPLATE_OF_THE_STUDY = """\
The chat template is the one that the study used, not the base model's own; it is in this folder as `chat_template.jinja`."""
MEASURES = """\
### Other measures

Of the same model; those that run it together with the original are of the ablated model before it was written. The difference has
its standard error where the value is a mean over prompts or tasks.

| measure | unit | better | original | ablated | difference |
|---|---|---|---|---|---|"""
LIMITATIONS = """\
Not measured for this card:

- languages other than that of the prompts;
- conversations of more than one turn, and system prompts other than the study's;
- long answers: {ends};
- sampled answers: every answer was decoded greedily;
- capability benchmarks, such as knowledge, reasoning and code (`heretic benchmark` runs them);
- areas of safety that the {total} requests do not cover, and attacks on the model;
- programs and number formats other than those used here."""
REBUILDING = f"""\
## How to rebuild it

    heretic reproduce manifest.json -o FOLDER

This needs the base model, `manifest.json` and the folder `{DIRECTIONS.parent}`, but no search. It checks every hash and
every version, and reports whether the model is identical bit for bit. The manifest holds the hashes of the base model, of this
model and of the prompt sets, all settings, the edit and the versions. {{made}}"""
RESPONSIBLE_USE = """\
## Responsible use

This model is meant for research on refusal and over-refusal, by people who are accountable for its use. Do not deploy it for
others without your own safeguards. The license and the acceptable-use terms of the base model still apply.

Method: Arditi et al., *Refusal in Language Models Is Mediated by a Single Direction* (2024), arXiv 2406.11717."""
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
# Not `heretic`: the hub lists models of another tool (p-e-w/heretic) under it. The last tag names what only our exports hold.
TAGS = ["abliterated", "directional-ablation", "directional-ablation-manifest"]


def card(manifest: Mapping[str, Any], base: BaseCard, written: WriteResult, measured: str) -> str:
    """Return the model card: Markdown with a YAML head.

    Args:
        manifest: Content of the export's manifest. It is untrusted, so everything in it is escaped.
        base: Entries of the base model's card.
        written: The result of the format's writer.
        measured: A sentence on which model the scores are of; without scores, what was verified instead.

    Raises:
        LookupError, TypeError, ValueError, AttributeError, ArithmeticError: The manifest lacks something.
    """
    ablation = Edit.model_validate(manifest["ablation"]).ablation
    has_scores = manifest["scores"] is not None  # none of a model that was edited block by block
    scores = Scores.from_dict({**manifest["scores"]["written"], "seconds": {}}) if has_scores else None
    behavior = str(manifest.get("behavior", ""))
    name = manifest["model"]["name"]
    revision = manifest["model"]["revision"]
    template = TEMPLATE_OF_THE_STUDY if manifest.get("chat_template") else ""
    rebuilt = manifest.get("reproduced")
    used = _versions((rebuilt or manifest)["versions"])
    made = f"Rebuilt with {used} from the manifest of" if rebuilt else f"Made with {used};"
    sections = [
        f"# {escape(Path(name).name)}, {escape(behavior) or 'refusals'} ablated",
        OF_ANOTHER_BEHAVIOR.format(behavior=escape(behavior)) if behavior else OF_REFUSAL,
        f"Base model: {_of_hub(name, revision) if revision else code(Path(name).name)}. {base.terms}",
        written.about,
        template,
        f"## What was measured\n\n{_measured(manifest, scores, measured) if scores else measured}",
        _measures(comparisons_of(manifest)),
        f"## Limitations\n\n{_limitations(manifest, scores)}" if scores else "",
        f"## What was changed\n\n{_changed(manifest, ablation)}",
        REBUILDING.format(made=f"{made} run {code(manifest['run'])}, trial {int(manifest['trial'])}.")
        + ("" if scores else " Rebuilding needs memory for the whole model."),
        RESPONSIBLE_USE,
    ]
    return _head(name if revision else "", base, written) + "\n".join(
        f"{section.strip()}\n" for section in sections if section
    )


def _head(name: str, base: BaseCard, written: WriteResult) -> str:
    """The card's head; `name` is the base model's on the hub, empty for a local one."""
    of_the_hub = {"base_model": name, "base_model_relation": written.relation} if HUB_ID.fullmatch(name) else {}
    entries = {**of_the_hub, **base.entries, "library_name": written.library, "tags": TAGS}
    return f"---\n{ModelCardData(**entries).to_yaml()}\n---\n\n"


def _measured(manifest: Mapping[str, Any], scores: Scores, measured: str) -> str:
    d, total, original = scores.divergence, scores.total, manifest["scores"]["original"]
    shown = "answers that show it" if manifest.get("behavior") else "requests refused"
    tokens = _kl_position(int(manifest["settings"].get("kl_tokens", 1)))
    return f"""\
{measured} {_conditions(manifest)}Answers are judged by {JUDGES[scores.judge].words}. Brackets hold the 95 % Wilson interval
for the number of requests.

| | original | this model |
|---|---|---|
| {shown} | {share(original["refusals"], total)} | {share(scores.refusals, total)} |
| neither refused nor answered | {share(original.get("evasive", 0), total)} | {share(scores.evasive, total)} |
| KL divergence on harmless requests, {tokens}, mean | 0 | {d.mean:.4f} |
| median / 95th percentile / largest | 0 | {d.median:.4f} / {d.p95:.4f} / {d.max:.4f} |"""


def _conditions(manifest: Mapping[str, Any]) -> str:
    """A sentence on what the model was given beside the prompts; empty for none."""
    given = {
        "system prompt": manifest["settings"].get("system_prompt"),
        "answers begin with": json.dumps(manifest.get("response_prefix") or "", ensure_ascii=False).strip('"'),
        "template variables": json.dumps(manifest.get("template_variables") or {}, ensure_ascii=False).strip("{}"),
    }
    told = "; ".join(f"{name} {code(text)}" for name, text in given.items() if text)
    return f"The scores hold under these conditions: {told}. " if told else ""


def _measures(comparisons: Sequence[Comparison]) -> str:
    """A table of other scorers."""
    if not comparisons:
        return ""
    lines = [
        f"| {code(c.name)} | {escape(c.unit)} | {c.better} | {_value(c.original, c)} | {_value(c.ablated, c)} | "
        f"{c.difference_text} |"
        for c in comparisons
    ]
    return "\n".join([MEASURES, *lines])


def _value(number: float, of: Comparison) -> str:
    whole = of.total is not None and number == int(number) and 0 <= number <= of.total
    return share(int(number), int(of.total)) if whole and of.total else number_text(number)


def _limitations(manifest: Mapping[str, Any], scores: Scores) -> str:
    longest = manifest["settings"].get("max_response_length")
    ends = f"every answer ends after {int(longest)} tokens" if longest else "every answer ends after a few tokens"
    return LIMITATIONS.format(total=int(scores.total), ends=ends)


def _changed(manifest: Mapping[str, Any], ablation: Ablation) -> str:
    wanted = manifest["settings"].get("directions", {})
    directions = int(wanted.get("count", 1)) * (1 + int(wanted.get("iterative_rounds", 0)))
    strengths = "\n".join(_profile(component, list(map(float, s))) for component, s in ablation.strengths.items())
    return f"""\
Geometry {code(manifest["settings"]["ablation"]["geometry"])}; direction: {_direction(ablation, directions)}.
Strengths (1 removes the direction entirely):

| component | edited | largest | at layer | mean | layer by layer |
|---|---|---|---|---|---|
{strengths}"""


def _versions(versions: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {escape(versions.get(name, '?'))}" for name in ("heretic", "torch", "transformers"))


def _kl_position(tokens: int) -> str:
    return "first token" if tokens == 1 else f"first {tokens} tokens of the original's answer"


def share(count: int, total: int) -> str:
    """Format a share with its Wilson interval: '7 of 50 (14 %; 7 % to 26 %)'."""
    if not total:
        return "0 of 0"
    low, high = wilson(count, total)
    return f"{count} of {total} ({count / total:.0%}; {low:.0%} to {high:.0%})".replace("%", " %")


def _profile(component: str, strengths: list[float]) -> str:
    """A row of the table: edited layers, strengths, and a bar chart."""
    edited = [layer for layer, s in enumerate(strengths) if s > 0]
    component = escape(component)
    if not edited:
        return f"| {component} | nowhere | | | | |"
    largest = max(strengths)
    bars = "".join(BARS[round(s / largest * (len(BARS) - 1))] for s in strengths)
    reach, mean = f"layers {edited[0]} to {edited[-1]}", sum(strengths) / len(edited)
    return f"| {component} | {reach} | {largest:.3f} | {strengths.index(largest)} | {mean:.3f} | `{bars}` |"


def _direction(ablation: Ablation, directions: int) -> str:
    if directions > 1:
        return f"{directions} orthogonal ones, each {_direction(ablation, 1)}"
    if ablation.vector is not None:
        return "one for all layers, from the gradient search (in the manifest)"
    if ablation.mixture is None:
        return "each layer's own"
    parts = [abs(float(c)) for c in ablation.mixture]
    most = sorted(range(len(parts)), key=lambda layer: -parts[layer])[:3]
    named = [f"{layer} ({parts[layer] / sum(parts):.0%})" for layer in most if parts[layer] > 0]
    return f"one for all layers, a mixture mostly of those of layers {', '.join(named)}"


def _of_hub(name: str, commit: str) -> str:
    link = f"[{name}](https://huggingface.co/{name})" if HUB_ID.fullmatch(name) else code(name)
    return f"{link}, commit {code(commit)}"
