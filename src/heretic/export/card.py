"""The model card: what was changed, how much, and plainly that safety training was reduced."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from heretic.ablation.ablation import Ablation
from heretic.export.job import Written
from heretic.export.manifest import DIRECTIONS, Edit
from heretic.scoring.harmless import Conduct
from heretic.scoring.interval import wilson
from heretic.scoring.ladder import Scores
from heretic.scoring.verdict import JUDGED

BARS = "·▁▂▃▄▅▆▇█"
OF_REFUSAL = """\
**The safety training of this model was reduced on purpose.** The direction in its residual stream that carries refusal was
projected out of weights that write to the stream. It answers requests that the original declines, and what it answers
can be wrong, offensive or harmful. Nothing was added to it: it knows what the original knows."""
OF_ANOTHER_BEHAVIOUR = """\
**A behaviour of this model was reduced on purpose: {behaviour}.** The direction in its residual stream that carries it was
projected out of weights that write to the stream. Its safety training may be reduced with it: whether it still declines what the
original declines was not measured here. Nothing was added to it: it knows what the original knows."""
KEPT = ("license", "license_name", "license_link", "language")


def card(manifest: Mapping[str, Any], source_card: str, written: Written, measured: str) -> str:
    """Markdown with a YAML head, from what the manifest holds; licence and languages are taken over from the base model's card.

    `written` has what the format says of itself, `measured` says of which model the scores are.
    """
    base_model = manifest["model"]["name"]
    kept = _kept(source_card)
    head = ["---", f"base_model: {base_model}" if _is_hub_id(base_model) else "", *kept]
    head += [f"library_name: {written.library}", "tags: [abliterated, directional-ablation, heretic]", "---"]
    ablation = Edit.model_validate(manifest["ablation"]).ablation
    strengths = "\n".join(_profile(component, list(map(float, s))) for component, s in ablation.strengths.items())
    scores = Scores.from_dict({**manifest["scores"]["written"], "seconds": {}})
    d, total = scores.divergence, scores.total
    original = manifest["scores"]["original"]
    before = original["refusals"]
    behaviour = str(manifest.get("behaviour", ""))
    tokens = manifest["settings"].get("kl_tokens", 1)
    revision = manifest["model"]["revision"]
    geometry = manifest["settings"]["ablation"]["geometry"]
    wanted = manifest["settings"].get("directions", {})
    directions = wanted.get("count", 1) * (1 + wanted.get("iterative_rounds", 0))
    used = ", ".join(f"{name} {manifest['versions'].get(name, '?')}" for name in ("heretic", "torch", "transformers"))
    return (
        "\n".join(line for line in head if line)
        + f"""

# {Path(base_model).name}, {behaviour or "refusals"} ablated

{OF_ANOTHER_BEHAVIOUR.format(behaviour=behaviour) if behaviour else OF_REFUSAL}

Base model: {_link(base_model)}{f", commit `{revision}`" if revision else ""}. {_licence(kept)}
{f"{chr(10)}{written.about}{chr(10)}" if written.about else ""}
## What was measured

{measured} Answers are judged by {JUDGED[scores.judge]}. In brackets the 95 % interval (Wilson) that the number of
requests allows.

| | original | this model |
|---|---|---|
| {"answers that show it" if behaviour else "requests declined"} | {share(before, total)} | {share(scores.refusals, total)} |
| neither declined nor answered | {share(original.get("evasive", 0), total)} | {share(scores.evasive, total)} |
{_conduct(original.get("conduct"), scores.conduct)}| KL divergence on harmless requests, {_at(tokens)}, mean | 0 | {d.mean:.4f} |
| median / 95th percentile / largest | 0 | {d.median:.4f} / {d.p95:.4f} / {d.max:.4f} |

## What was changed

Geometry `{geometry}`; direction: {_direction(ablation, directions)}. Strengths (1 removes the direction whole):

| component | edited | largest | at layer | mean | layer by layer |
|---|---|---|---|---|---|
{strengths}

## How to make it again

    heretic reproduce manifest.json -o FOLDER

That needs the base model, `manifest.json` and `{DIRECTIONS.as_posix()}`, but no search. It checks every hash and
every version, and says whether the model is the same bit for bit. The manifest holds the base model's and this model's hashes, all
settings, the prompt sets' hashes, the edit and the versions. Made with {used}; run `{manifest["run"]}`, trial {manifest["trial"]}.

## Responsible use

Meant for research into refusal and over-refusal, and for people who are answerable for what they do with it. Do not put it in
front of others without safeguards of your own. The licence and the acceptable-use terms of the base model still apply.

Method: Arditi et al., *Refusal in Language Models Is Mediated by a Single Direction* (2024), arXiv 2406.11717.
"""
    )


def _conduct(before: Mapping[str, int] | None, now: Conduct | None) -> str:
    """Rows on the answers to harmless prompts, where they were looked at."""
    if before is None or now is None:
        return ""
    named = {"declined or evaded": "over_refusals", "answered with nothing or a loop": "degenerate"}
    return "".join(
        f"| harmless requests {what} | {share(before[key], now.total)} | {share(getattr(now, key), now.total)} |\n"
        for what, key in named.items()
    )


def _at(tokens: int) -> str:
    return "first token" if tokens == 1 else f"first {tokens} tokens of the original's answer"


def share(count: int, total: int) -> str:
    """'7 of 50 (14 %; 7 % to 26 %)'."""
    if not total:
        return "0 of 0"
    low, high = wilson(count, total)
    return f"{count} of {total} ({count / total:.0%}; {low:.0%} to {high:.0%})".replace("%", " %")


def _profile(component: str, strengths: list[float]) -> str:
    """A row of the table: where it is edited, how much, and a drawing."""
    edited = [layer for layer, s in enumerate(strengths) if s > 0]
    if not edited:
        return f"| {component} | nowhere | | | | |"
    largest = max(strengths)
    bars = "".join(BARS[round(s / largest * (len(BARS) - 1))] for s in strengths)
    reach, mean = f"layers {edited[0]} to {edited[-1]}", sum(strengths) / len(edited)
    return f"| {component} | {reach} | {largest:.3f} | {strengths.index(largest)} | {mean:.3f} | `{bars}` |"


def _direction(ablation: Ablation, directions: int) -> str:
    if directions > 1:
        return f"{directions} at right angles, of each {_direction(ablation, 1)}"
    if ablation.vector is not None:
        return "one for all layers, found by gradient (in the manifest)"
    if ablation.mixture is None:
        return "each layer's own"
    parts = [abs(float(c)) for c in ablation.mixture]
    most = sorted(range(len(parts)), key=lambda layer: -parts[layer])[:3]
    named = [f"{layer} ({parts[layer] / sum(parts):.0%})" for layer in most if parts[layer] > 0]
    return f"one for all layers, mixed mostly from those of layers {', '.join(named)}"


def _is_hub_id(name: str) -> bool:
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name)) and not Path(name).exists()


def _link(name: str) -> str:
    return f"[{name}](https://huggingface.co/{name})" if _is_hub_id(name) else f"`{Path(name).name}`"


def _licence(kept: list[str]) -> str:
    """What is known of the base model's licence."""
    found = {key: value.strip().strip("\"'") for key, _, value in (line.partition(":") for line in kept)}
    name = found.get("license_name") or found.get("license")
    if not name:
        return "Its own card names no licence; its terms, whatever they are, hold for this model too."
    link = found.get("license_link")
    return f"Its licence, {f'[{name}]({link})' if link else name}, holds for this model too."


def _kept(source_card: str) -> list[str]:
    """Lines of the base model's YAML head that stay true: licence and language."""
    parts = source_card.split("---", 2)
    if len(parts) < 3 or parts[0].strip():
        return []
    kept: list[str] = []
    keeping = False
    for line in parts[1].strip().splitlines():
        if line[:1] not in (" ", "-"):
            keeping = line.split(":")[0] in KEPT
        if keeping:
            kept.append(line)
    return kept
