"""The model card: what was changed, how much, and plainly that safety training was reduced."""

from __future__ import annotations

import re
from pathlib import Path

from heretic import __version__
from heretic.ablation.ablation import Ablation
from heretic.run_folder import Baseline
from heretic.scoring.harmless import Conduct
from heretic.scoring.ladder import Scores

BARS = "·▁▂▃▄▅▆▇█"
JUDGED = {
    "markers": "refusal phrases in their first tokens",
    "classifier": "a classifier of their first tokens",
    "llm": "a language model that read their first tokens",
}


def card(
    *,
    base_model: str,
    source_card: str,
    ablation: Ablation,
    geometry: str,
    before: Baseline,
    scores: Scores,
    run: str,
    trial: int,
) -> str:
    """Markdown with a YAML head; licence and languages are taken over from the base model's own card."""
    total = scores.total
    head = ["---", f"base_model: {base_model}" if _is_hub_id(base_model) else "", *_kept(source_card)]
    head += ["library_name: transformers", "tags: [abliterated, directional-ablation, heretic]", "---"]
    strengths = "\n".join(_profile(component, list(map(float, s))) for component, s in ablation.strengths.items())
    d = scores.divergence
    tokens = max(map(len, before.answered))
    return (
        "\n".join(line for line in head if line)
        + f"""

# {Path(base_model).name}, refusals ablated

**The safety training of this model was reduced on purpose.** The direction in its residual stream that carries refusal was
projected out of weights that write to the stream. It answers requests that the original declines, and what it answers
can be wrong, offensive or harmful. Nothing was added to it: it knows what the original knows.

## What was measured

On this model as written, reloaded from its files; answers are judged by {JUDGED[scores.judge]}.

| | original | this model |
|---|---|---|
| requests declined | {before.refusals} of {total} | {scores.refusals} of {total} |
| neither declined nor answered | {before.evasive} of {total} | {scores.evasive} of {total} |
{_conduct(before.conduct, scores.conduct)}| KL divergence on harmless requests, {_at(tokens)}, mean | 0 | {d.mean:.4f} |
| median / 95th percentile / largest | 0 | {d.median:.4f} / {d.p95:.4f} / {d.max:.4f} |

## What was changed

Geometry `{geometry}`; direction: {_direction(ablation)}. Strengths (1 removes the direction whole):

| component | edited | largest | at layer | mean | layer by layer |
|---|---|---|---|---|---|
{strengths}

`manifest.json` holds the base model's and this model's hashes, all settings, the prompt sets' hashes, and the versions used.
Made with heretic {__version__}, run `{run}`, trial {trial}.

## Responsible use

Meant for research into refusal and over-refusal, and for people who are answerable for what they do with it. Do not put it in
front of others without safeguards of your own. The licence and the acceptable-use terms of the base model still apply.

Method: Arditi et al., *Refusal in Language Models Is Mediated by a Single Direction* (2024), arXiv 2406.11717.
"""
    )


def _conduct(before: Conduct | None, now: Conduct | None) -> str:
    """Rows on the answers to harmless prompts, where they were looked at."""
    if before is None or now is None:
        return ""
    return (
        f"| harmless requests declined or evaded | {before.over_refusals} of {now.total} | {now.over_refusals} of {now.total} |\n"
        f"| harmless requests answered with nothing or a loop | {before.degenerate} of {now.total} "
        f"| {now.degenerate} of {now.total} |\n"
    )


def _at(tokens: int) -> str:
    return "first token" if tokens == 1 else f"first {tokens} tokens of the original's answer"


def _profile(component: str, strengths: list[float]) -> str:
    """A row of the table: where it is edited, how much, and a drawing."""
    edited = [layer for layer, s in enumerate(strengths) if s > 0]
    if not edited:
        return f"| {component} | nowhere | | | | |"
    largest = max(strengths)
    bars = "".join(BARS[round(s / largest * (len(BARS) - 1))] for s in strengths)
    reach, mean = f"layers {edited[0]} to {edited[-1]}", sum(strengths) / len(edited)
    return f"| {component} | {reach} | {largest:.3f} | {strengths.index(largest)} | {mean:.3f} | `{bars}` |"


def _direction(ablation: Ablation) -> str:
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


def _kept(source_card: str) -> list[str]:
    """Lines of the base model's YAML head that stay true: licence and language."""
    parts = source_card.split("---", 2)
    if len(parts) < 3 or parts[0].strip():
        return []
    kept: list[str] = []
    keeping = False
    for line in parts[1].strip().splitlines():
        if line[:1] not in (" ", "-"):
            keeping = line.split(":")[0] in ("license", "license_name", "license_link", "language")
        if keeping:
            kept.append(line)
    return kept
