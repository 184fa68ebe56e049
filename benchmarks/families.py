"""Every decoder family of the installed transformers, tiny and random, through the parts of heretic that depend on it.

    python benchmarks/families.py [--only qwen3_next jamba] [--out docs/architectures.md] [--json FILE] [--parts 1/3]

Writes the table of architectures. With `--only` or `--parts` it adds to what the JSON file holds, so that the whole can be done in
several goes; about two seconds a family on one core.
"""

from __future__ import annotations

import before_torch  # isort: skip  # noqa: F401

import argparse
import json
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from families_page import RUN, STREAMS, page
from tiny_families import LAYERS, families, tiny_model, tiny_tokenizer
from transformers import GenerationConfig, PreTrainedModel

from heretic.ablation.ablation import Ablation
from heretic.ablation.apply import apply_operators
from heretic.ablation.bake import copy_weights, read_from_checkpoint, rewritten_weights
from heretic.ablation.directions import Directions
from heretic.ablation.geometries import GEOMETRIES
from heretic.ablation.operator import Operator
from heretic.ablation.operator_factory import OperatorFactory
from heretic.errors import UserError, first_line
from heretic.export.save import plan_edits, write_weights
from heretic.interrupt import StopSignal
from heretic.model.architecture import ModelStructure, first_tensor
from heretic.model.batching import Batcher, EditSpec
from heretic.model.capture import last_token_residuals
from heretic.model.checkpoint import open_checkpoint
from heretic.model.decoding import decode, decoded_by_generate
from heretic.model.forward import next_token_log_probs
from heretic.model.loading import LanguageModel, load
from heretic.model.turns import finish
from heretic.progress import NULL_REPORTER

PROMPTS = [[5, 9, 17], [7, 8, 11, 60, 3, 22, 41, 33, 9, 10, 12, 13], [40, 41], [21, 22, 23, 24, 25]]
SAME = 2e-3  # of what the edit itself moves
NEW_TOKENS = 12


def main() -> None:
    """Try the families, write the JSON and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--parts", default="1/1", help="I/N: the I-th of N equal parts")
    parser.add_argument("--out", type=Path, default=Path("docs/architectures.md"))
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/families.json"))
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    part, parts = map(int, chosen.parts.split("/"))
    wanted = chosen.only or families()[part - 1 :: parts]
    found = json.loads(chosen.json.read_text()) if chosen.json.is_file() else {}
    found[RUN] = {"date": str(date.today()), "layers": LAYERS, "transformers": transformers.__version__}
    for family in wanted:
        began = time.perf_counter()
        found[family] = examine(family)
        print(f"{family:24} {time.perf_counter() - began:5.1f} s  {found[family]}", flush=True)
        chosen.json.parent.mkdir(parents=True, exist_ok=True)
        chosen.json.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(page(found))


def examine(family: str) -> dict[str, Any]:
    """All checks of one family, by column: "yes" or what went wrong."""
    transformers.utils.logging.set_verbosity_error()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            model = tiny_model(family)
            model.save_pretrained(folder)
            tiny_tokenizer().save_pretrained(folder)
        except Exception as error:  # the families' own code; whatever it is belongs into the table
            return {"not built": told(error)}
        found["class"] = type(model).__name__
        try:
            language_model = load(open_checkpoint(folder), ["float32"], {})
        except UserError as error:
            return {**found, "refused": first_line(error)}
        except Exception as error:
            return {**found, "failed": told(error)}
        found["writers"] = writers_in_words(language_model.structure)
        found["notes"] = notes(language_model)
        subject = Subject(language_model, Path(folder))
        checks: dict[str, Callable[[], str]] = {
            "attached = baked": subject.attached_is_baked,
            "removed": subject.nothing_is_left,
            "trials in a pass": subject.trials_share_a_pass,
            "padding": subject.padding_changes_nothing,
            "residuals": subject.residuals,
            "decoding": subject.decoding,
            "export": subject.export,
        }
        for name, check in checks.items():
            try:
                found[name] = check()
            except Exception as error:
                found[name] = f"fails: {told(error)}"
    return found


def told(error: Exception) -> str:
    """An error in a few words, with the place for whoever goes after it."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {first_line(error)[:140]} ({Path(place.filename).name}:{place.lineno})"


def writers_in_words(structure: ModelStructure) -> str:
    """How many writers of each kind, over all layers: `4 o_proj, 1 down_proj, 3 experts`."""
    counts = Counter(
        (w.component, ("experts: " if w.mixture else "") + w.name.rpartition(".")[2]) for w in structure.writers
    )
    return "; ".join(
        f"{component} " + ", ".join(f"{n} {name}" for (c, name), n in sorted(counts.items()) if c == component)
        for component in structure.components
    )


def notes(language_model: LanguageModel) -> str:
    """What the anatomy could not make out, and how decoding is done."""
    structure, said = language_model.structure, []
    if structure.unrecognized:
        last = sorted({".".join(n.split(".")[-2:]) for n in structure.unrecognized})
        said.append(f"not edited: {', '.join(last)}")
    if structure.incomplete:
        said.append(
            f"{len(structure.incomplete)} of {structure.num_layers} blocks do more than add their writers to one stream"
        )
    if decoded_by_generate(language_model.model, "cpu"):
        said.append("decoded by generate")
    return "; ".join(said)


class Subject:
    """One tiny model under examination."""

    def __init__(self, language_model: LanguageModel, folder: Path) -> None:
        self.language_model = language_model
        self.model: Any = language_model.model
        self.structure = language_model.structure
        self.folder = folder
        torch.manual_seed(1)
        vectors = torch.nn.functional.normalize(torch.randn(self.structure.num_layers, self.structure.width), dim=-1)
        self.directions = Directions(vectors)
        self.batch = Batcher(8).batch([0, 1, 2, 3], PROMPTS)
        self.even = Batcher(8).batch([0, 1], [PROMPTS[1], PROMPTS[1][::-1]])

    def operators(self, geometry: str = "norm_preserving", shift: float = 0.3) -> dict[str, Operator]:
        """Of an edit of all writers."""
        strengths = {c: [0.9 + 0.1 * i for i in range(self.structure.num_layers)] for c in self.structure.components}
        operator_factory = OperatorFactory.prepare(self.directions, self.structure.writers, geometry)
        return operator_factory.operators(Ablation(strengths, None, shift=shift))

    @torch.no_grad()
    def logits(self, model: Any = None) -> torch.Tensor:
        """For two sequences without padding."""
        found: torch.Tensor = (model or self.model)(input_ids=self.even.input_ids, use_cache=False).logits
        return found.float()

    def attached_is_baked(self) -> str:
        """In every geometry, with weights restored from copies and from the files."""
        writers, original = self.structure.writers, self.logits()
        sources = (copy_weights(writers), read_from_checkpoint(self.language_model.checkpoint, writers, self.model))
        worst = 0.0
        for geometry in GEOMETRIES:
            operators = self.operators(geometry)
            with apply_operators(writers, operators):
                attached = self.logits()
            effect = float((attached - original).abs().max())
            if not effect > 1e-3:
                return f"the {geometry} edit has no effect"
            for source in sources:
                with rewritten_weights(writers, operators, source):
                    worst = max(worst, float((self.logits() - attached).abs().max()) / effect)
                if not torch.equal(self.logits(), original):
                    return "something of the edit stays behind"
        return "yes" if worst < SAME else f"apart by {worst:.1e} of the edit's effect"

    @torch.no_grad()
    def nothing_is_left(self) -> str:
        """At strength 1 no block adds anything along the direction, whatever norms the writers' outputs pass."""
        layers, v = self.structure.num_layers, self.directions.vectors[1]
        operator_factory = OperatorFactory.prepare(self.directions, self.structure.writers, "plain")
        only = [float(i == 1) for i in range(layers)]
        operators = operator_factory.operators(Ablation({c: [1.0] * layers for c in self.structure.components}, only))
        seen: list[tuple[torch.Tensor, torch.Tensor]] = []

        def keep(_module: Any, args: Any, kwargs: Any, output: Any) -> None:
            given = args[0] if args else kwargs["hidden_states"]
            seen.append((given.clone(), first_tensor(output).clone()))

        handles = [b.register_forward_hook(keep, with_kwargs=True) for b in self.structure.blocks]
        try:
            with apply_operators(self.structure.writers, operators):
                self.logits()
        finally:
            for handle in handles:
                handle.remove()
        if any(after.ndim != 3 or after.shape[-1] != len(v) for _, after in seen):
            return STREAMS
        worst = 0.0
        for before, after in seen:
            was, now = before @ v, after @ v
            factor = (was * now).sum() / (was * was).sum()  # some scale the stream as a whole
            worst = max(worst, float((now - factor * was).abs().max() / (after - factor * before).norm(dim=-1).max()))
        return "yes" if worst < SAME else f"up to {worst:.1e} of what a block adds"

    def trials_share_a_pass(self) -> str:
        """Two trials in one pass give what each gives alone."""
        writers = self.structure.writers
        both = [self.operators("plain"), self.operators("norm_preserving", -0.4)]
        alone = []
        for operators in both:
            with apply_operators(writers, operators):
                alone.append(next_token_log_probs(self.model, self.even))
        rows = Batcher(8).batch([0, 0, 1, 1], [PROMPTS[1], PROMPTS[1][::-1]])
        batch = type(rows)(rows.rows, rows.input_ids, rows.attention_mask, None, [0, 1, 0, 1], EditSpec(2))
        with apply_operators(writers, *both):
            together = next_token_log_probs(self.model, batch)
        expected = torch.stack([alone[0][0], alone[1][0], alone[0][1], alone[1][1]])
        apart = float((together - expected).abs().max())
        return "yes" if apart < 1e-3 else f"apart by {apart:.1e}"

    def padding_changes_nothing(self) -> str:
        """A prompt beside longer ones gives what it gives alone."""
        together = next_token_log_probs(self.model, self.batch)
        alone = [next_token_log_probs(self.model, Batcher(1).batch([0], [p]))[0] for p in PROMPTS]
        apart = float((together - torch.stack(alone)).abs().max())
        return "yes" if apart < 1e-3 else f"is not nothing (log-probabilities move by {apart:.1e})"

    def residuals(self) -> str:
        """One vector a row and block, and the blocks differ."""
        found = finish(last_token_residuals(self.language_model, self.even))
        if found.shape != (2, self.structure.num_layers, self.structure.width):
            return f"shape {tuple(found.shape)}"
        moving = (found[:, 1:] - found[:, :-1]).norm(dim=-1).max() > 0
        return "yes" if torch.isfinite(found).all() and moving else "not finite or constant"

    def decoding(self) -> str:
        """The tokens of `generate(do_sample=False)`, and rows that end early do not disturb the others."""
        model, batch = self.model, self.even if self.padding_changes_nothing() != "yes" else self.batch
        try:
            full = self.generated(model, batch)
        except Exception as error:
            return f"generate itself fails: {told(error)}"
        if finish(decode(model, batch, NEW_TOKENS, set())) != full:
            return "other tokens than generate"
        ends = {full[0][2], full[1][5]}
        expected = [row[: next((i for i, t in enumerate(row) if t in ends), NEW_TOKENS)] for row in full]
        return "yes" if finish(decode(model, batch, NEW_TOKENS, ends)) == expected else "rows that end disturb others"

    @staticmethod
    def generated(model: PreTrainedModel, batch: Any) -> list[list[int]]:
        """What transformers decodes."""
        if model.generation_config is not None:
            model.generation_config.eos_token_id = None
        config = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
        arguments: Any = dict(input_ids=batch.input_ids, attention_mask=batch.attention_mask, generation_config=config)
        with torch.no_grad():
            tokens: torch.Tensor = model.generate(**arguments)  # type: ignore[operator]
        return tokens[:, batch.input_ids.shape[1] :].tolist()

    def export(self) -> str:
        """The written folder is loaded and gives the attached model's logits."""
        writers, checkpoint = self.structure.writers, self.language_model.checkpoint
        original, operators = self.logits(), self.operators()
        with apply_operators(writers, operators):
            attached = self.logits()
        with tempfile.TemporaryDirectory() as out:
            edits = plan_edits(checkpoint, writers, operators, self.model)
            write_weights(checkpoint, edits, Path(out), NULL_REPORTER, StopSignal())
            written = load(open_checkpoint(out), ["float32"], {})
            apart = float((self.logits(written.model) - attached).abs().max() / (attached - original).abs().max())
        return "yes" if apart < SAME else f"apart by {apart:.1e} of the edit's effect"


if __name__ == "__main__":
    main()
