"""The model card: what was changed, how much, and plainly that safety training was reduced."""

from __future__ import annotations

import re
from pathlib import Path

from heretic import __version__
from heretic.ablation.ablation import Ablation
from heretic.scoring.ladder import Scores


def card(
    *,
    base_model: str,
    source_card: str,
    ablation: Ablation,
    geometry: str,
    before: int,
    scores: Scores,
    run: str,
    trial: int,
) -> str:
    """Markdown with a YAML head; licence and languages are taken over from the base model's own card."""
    total = scores.total
    head = ["---", f"base_model: {base_model}" if _is_hub_id(base_model) else "", *_kept(source_card)]
    head += ["library_name: transformers", "tags: [abliterated, directional-ablation, heretic]", "---"]
    kernels = "\n".join(
        f"| {component} | {k.max_weight:.3f} | {k.max_weight_position:.2f} | {k.min_weight:.3f} | {k.min_weight_distance:.2f} |"
        for component, k in ablation.kernels.items()
    )
    scope = (
        "each layer's own"
        if ablation.scope == "per_layer"
        else f"that of layer {ablation.direction_index:.2f} everywhere"
    )
    d = scores.divergence
    return (
        "\n".join(line for line in head if line)
        + f"""

# {Path(base_model).name}, refusals ablated

**The safety training of this model was reduced on purpose.** The direction in its residual stream that carries refusal was
projected out of weights that write to the stream. It answers requests that the original declines, and what it answers
can be wrong, offensive or harmful. Nothing was added to it: it knows what the original knows.

## What was measured

On this model as written, reloaded from its files; answers are judged by refusal phrases in their first tokens.

| | original | this model |
|---|---|---|
| requests declined | {before} of {total} | {scores.refusals} of {total} |
| KL divergence on harmless requests, mean | 0 | {d.mean:.4f} |
| median / 95th percentile / largest | 0 | {d.median:.4f} / {d.p95:.4f} / {d.max:.4f} |

## What was changed

Geometry `{geometry}`; direction: {scope}. Strengths over the layers, one kernel a component:

| component | largest | at layer | smallest | at distance |
|---|---|---|---|---|
{kernels}

`manifest.json` holds the base model's and this model's hashes, all settings, the prompt sets' hashes, and the versions used.
Made with heretic {__version__}, run `{run}`, trial {trial}.

## Responsible use

Meant for research into refusal and over-refusal, and for people who are answerable for what they do with it. Do not put it in
front of others without safeguards of your own. The licence and the acceptable-use terms of the base model still apply.

Method: Arditi et al., *Refusal in Language Models Is Mediated by a Single Direction* (2024), arXiv 2406.11717.
"""
    )


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
