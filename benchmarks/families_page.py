"""The document that `families.py` writes."""

from __future__ import annotations

from datetime import date
from typing import Any

import transformers
from tiny_families import LAYERS

COLUMNS = ("attached = baked", "removed", "trials in a pass", "padding", "residuals", "decoding", "export")
STREAMS = "several streams"
# Families of which this project has run a whole study on real weights, and on which model.
REAL = {"llama": "SmolLM2-135M-Instruct", "qwen2": "Qwen2.5-Coder-0.5B-Instruct"}


def page(found: dict[str, dict[str, Any]]) -> str:
    """The document."""
    whole = [f for f, r in found.items() if all(r.get(c) == "yes" for c in COLUMNS)]
    exact = [f for f, r in found.items() if r.get("attached = baked") == r.get("export") == "yes"]
    introduction = INTRODUCTION.format(
        version=transformers.__version__,
        day=date.today(),
        tried=len(found),
        whole=len(whole),
        exact=len(exact),
        layers=LAYERS,
    )
    return "\n".join([introduction, *table(found)]) + "\n"


def table(found: dict[str, dict[str, Any]]) -> list[str]:
    """A row a family; what is not "yes" is spelled out in the last column."""
    rows = [
        f"| family | real weights | writers | {' | '.join(COLUMNS)} | what to know |",
        f"|---|---|---|{'---|' * len(COLUMNS)}---|",
    ]
    for family, results in found.items():
        marks = [_mark(results.get(c, "")) for c in COLUMNS]
        said = [f"{c}: {results[c]}" for c in COLUMNS if results.get(c, "yes") not in ("yes", STREAMS)]
        said += [f"{k}: {results[k]}" for k in ("not built", "refused", "failed") if k in results]
        said += [results["notes"]] if results.get("notes") else []
        text = "; ".join(said).replace("|", "\\|").replace("\n", " ")
        rows.append(
            f"| {family} | {REAL.get(family, 'no')} | {results.get('writers', '')} | {' | '.join(marks)} | {text} |"
        )
    return rows


def _mark(result: str) -> str:
    return {"yes": "yes", "": "", STREAMS: "-"}.get(result, "no")


INTRODUCTION = """# Architectures

Made by `python benchmarks/families.py` on {day} with transformers {version}: every decoder family of that version, with
{layers} layers, a width of 32 and random weights in float32 on the CPU. {tried} were tried; {whole} pass everything,
and of {exact} an edit can be attached, written and loaded again exactly. It says nothing of how well a family's real
models take to ablation. A model that is not in the table is dissected like the others; what is found is said at the start.

The columns:

- real weights: the model with which a whole study was run, from the directions to the verified export; "no" where only tiny random
  models were tried.
- writers: modules found whose output is added to the residual stream, over all layers. `experts: NAME` is a mixture with all its
  experts.
- attached = baked: logits with hooks and with rewritten weights differ, in every geometry, by less than 0.2 % of what the edit
  moves. The weights come back bit for bit, from copies and from the files.
- removed: with `plain` at strength 1 no block adds anything along the direction, norms behind the writers included (`-`: several
  streams side by side).
- trials in a pass: two trials that share a pass give what each gives alone.
- padding: a prompt beside longer ones gives what it gives alone. Where not, only prompts of one length share a batch: slower.
- residuals: one finite vector a prompt and block.
- decoding: the tokens of `generate(do_sample=False)`, also when rows end early.
- export: the written folder is loaded and gives the attached model's logits.

## What is done where a family is unlike Llama

**Mixtures of experts.** What a mixture writes for a token is a weighted sum of what its experts write, so an operator on its
output is the same operator on every expert: exact in every geometry, fused tensors included. It also means that the experts share
one operator. `row_normalized` and `norm_preserving` therefore take the experts' matrices side by side as one wide matrix: its
rows' norms are those that count and are kept, not those of each expert alone. An operator for each expert would need a hook
between the expert and the sum, where fused kernels have none, and several trials could no longer share a pass. Shared experts
are writers of their own, except in Llama 4, where only the sum of all experts comes out as one vector a token. Routers and gates
are never edited. Where a mixture hands on something that its weights did not make (LongCat's experts that return their input), it
is left alone, with a warning that names it.

**Norms behind a writer** (Gemma 2 to 4, OLMo 2 and 3, GLM 4, EXAONE 4): all RMS norms between a writer and the stream are found by
silencing the writers of a block, and `norm_aware` accounts for their product.

**Several streams side by side** (Gemma 3n, DeepSeek V4, HY 4, Qwen 4 preview): every writer is edited as usual; directions come
from the mean over the streams, which is about what the head reads.

**Other ways of writing** are told at the start by running every block with its writers silenced: it must hand on its input, up to
a factor. Scaled residuals (Granite) and parallel blocks (Cohere, GPT-NeoX) pass; residuals scaled by component (Doge, ZAYA),
normalized residuals (MiniMax, GPT-1) and unknown writers are warned of. A convolution between a writer and the stream (Inkling)
is not noticed there; the column "removed" shows what it leaves.

**Weights used by several blocks** get one edit, with the strength of the first block that uses them. Zamba's shared attention and
MLP feed the Mamba layers and do not write to the stream themselves, so they are left alone.

**Recurrent and convolution states** cannot be cut by rows: rows that have ended stay in the batch, and texts that were tried
are not decoded on from. Where the cache is not handed out at all, transformers' `generate` decodes, which is said at the start.

An architecture without blocks or writers that are recognized is refused with a message that says what was looked for.

## Table
"""
