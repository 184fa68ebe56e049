"""Train the head of the judge `trained`, and measure it and the phrases on answers that it was not trained on.

    python benchmarks/train_judge.py ENCODER [--trials compare.json] [--head src/heretic/data/judge_head.json]

ENCODER is sentence-transformers/all-MiniLM-L6-v2 or a folder with it. benchmarks/judge/train.jsonl holds the training set:
answers of models, cut to 200 characters, and answers that were written for it. Block and regularization are chosen by
cross-validation over groups of prompts. benchmarks/judge/blind.jsonl holds 100 answers to other prompts; their labels were
committed before any judge saw them. `--trials` is the output of `heretic compare --json`: the ranks that both judges give to
its trials are compared. Needs scikit-learn (a part of heretic[lm_eval]).
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, head, write
from scipy.stats import spearmanr
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold

from heretic.files import read_text, sha256, split_lines
from heretic.scoring.judges.agreement import Agreement, LabeledAnswer, agreement, labeled_answers
from heretic.scoring.judges.registry import make_judge
from heretic.scoring.judges.trained import HEAD, SentenceEncoder, features, mean_state
from heretic.scoring.judges.verdict import ANSWER, BEGINNING, ORDER, REFUSAL, Exchange, Judge, Verdict
from heretic.settings import Settings

DATA = Path(__file__).parent / "judge"
SHIPPED = Path(__file__).parents[1] / "src" / "heretic" / "data" / HEAD
EXAMPLE = "I'm sorry, but I can't help with that. Is there something else?"
FOLDS, BLOCKS, STRENGTHS = 10, (2, 3, 4, 5, 6), (3.0, 10.0, 30.0)
CHOSEN_BLOCK, CHOSEN_STRENGTH = 4, 10.0


@dataclass(frozen=True)
class Rows:
    """Labeled answers of a file."""

    data: list[dict[str, Any]]

    @classmethod
    def read(cls, name: str) -> Rows:
        """Read a file of benchmarks/judge."""
        return cls([json.loads(line) for line in split_lines(read_text(DATA / name))])

    @property
    def labels(self) -> np.ndarray:
        """Labels, [rows]."""
        return np.array([row["label"] for row in self.data])

    @property
    def groups(self) -> list[str]:
        """The prompt of each row; rows of one prompt are on one side of a split."""
        return [row["prompt"] for row in self.data]

    def labeled(self) -> list[LabeledAnswer]:
        """The rows for `agreement`."""
        return [LabeledAnswer(Exchange(row["prompt"], row["answer"]), row["label"]) for row in self.data]


def main() -> None:
    """Choose, train, write the head, measure, write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", metavar="ENCODER")
    parser.add_argument("--trials", type=Path)
    parser.add_argument("--head", type=Path, default=SHIPPED)
    parser.add_argument("--cache", type=Path, help="file that keeps the features of the training set")
    parser.add_argument("--out", type=Path, default=RESULTS / "judge.json")
    arguments = parser.parse_args()
    train = Rows.read("train.jsonl")
    longest = max(len(row["answer"]) for row in train.data)
    if longest > BEGINNING:
        raise SystemExit(f"An answer of the training set has {longest} characters, {BEGINNING} are allowed.")
    report: dict[str, Any] = head(arguments) | {"training": counts(train)}
    encoder = SentenceEncoder(arguments.model, "cpu", CHOSEN_BLOCK)
    described = described_by_block(train, arguments.model, arguments.cache)
    report["cross_validation"] = {str(block): cross_validated(train, described[block], block) for block in BLOCKS}
    fitted = fit(described[CHOSEN_BLOCK], train.labels, CHOSEN_STRENGTH)
    write_head(arguments.head, fitted, encoder, sha256(DATA / "train.jsonl"))
    judges = {"markers": Settings(), "trained": trained_settings(arguments.model)}
    made = {name: make_judge(settings) for name, settings in judges.items()}
    sets = {"labeled_60": labeled_answers(), "blind_100": Rows.read("blind.jsonl").labeled()}
    report["agreement"] = {
        name: {judge: agreement(made[judge], answers).as_dict() for judge in made} for name, answers in sets.items()
    }
    report["cpu_seconds_per_100_answers"] = {name: cpu_seconds(judge, train) for name, judge in made.items()}
    if arguments.trials:
        report["trials"] = ranks(made, json.loads(read_text(arguments.trials)))
    write(report, arguments.out)
    print(json.dumps({k: report[k] for k in ("training", "cross_validation", "cpu_seconds_per_100_answers")}, indent=1))


def trained_settings(encoder: str) -> Settings:
    """Settings that select the trained judge with this encoder."""
    return Settings.model_validate({"judge": {"kind": "trained", "trained": {"encoder": encoder}}})


def counts(rows: Rows) -> dict[str, Any]:
    """How many answers by label, source and language."""
    by = {key: dict(Counter(row[key] for row in rows.data)) for key in ("label", "source", "language")}
    return {"answers": len(rows.data), "prompts": len(set(rows.groups)), **by}


def fit(described: np.ndarray, labels: np.ndarray, strength: float) -> LogisticRegression:
    """Fit the logistic regression, all labels weighted equally; `strength` is scikit-learn's C."""
    return LogisticRegression(C=strength, max_iter=5000, class_weight="balanced").fit(described, labels)


class AllBlocks(SentenceEncoder):
    """Concatenates the vectors of all `BLOCKS`, so that one pass describes a text by each of them."""

    def _embed_batch(self, texts: Sequence[str]) -> torch.Tensor:
        states, mask = self._states(texts)
        return torch.cat([mean_state(states[block], mask) for block in BLOCKS], dim=1)


def described_by_block(rows: Rows, encoder: str, cache: Path | None) -> dict[int, np.ndarray]:
    """Features of the answers by block, [rows, features] each."""
    if cache and cache.is_file():
        every = np.load(cache)["X"]
    else:
        every = features(AllBlocks(encoder, "cpu", BLOCKS[-1]), [row["answer"] for row in rows.data]).numpy()
        if cache:
            np.savez(cache, X=every)
    texts, length = np.split(every[:, :-1], 3, axis=1), every[:, -1:]
    by_block = [np.split(text, len(BLOCKS), axis=1) for text in texts]
    return {block: np.hstack([*(text[i] for text in by_block), length]) for i, block in enumerate(BLOCKS)}


def cross_validated(rows: Rows, described: np.ndarray, block: int) -> dict[str, dict[str, Any]]:
    """Return accuracy, precision and recall of refusals by C, each answer judged by a head that saw none of its prompt."""
    found = {}
    for strength in STRENGTHS if block == CHOSEN_BLOCK else (CHOSEN_STRENGTH,):
        judged = np.empty(len(rows.data), dtype=object)
        folds = GroupKFold(FOLDS, shuffle=True, random_state=0)
        for train, test in folds.split(described, rows.labels, rows.groups):
            judged[test] = fit(described[train], rows.labels[train], strength).predict(described[test])
        figures = shares(rows.labels, judged)
        if (block, strength) == (CHOSEN_BLOCK, CHOSEN_STRENGTH):
            for key in ("language", "source"):
                values = np.array([row[key] for row in rows.data])
                figures[key] = {
                    str(v): shares(rows.labels[values == v], judged[values == v]) for v in sorted(set(values))
                }
        found[str(strength)] = figures
    return found


def shares(labels: Sequence[Verdict] | np.ndarray, judged: Sequence[Verdict] | np.ndarray) -> dict[str, Any]:
    """Return agreement, precision and recall of refusals with their intervals."""
    pairs = Counter(zip(labels, judged, strict=True))
    return {
        name: part
        for name, part in Agreement("trained", dict(pairs)).as_dict().items()
        if name in ("agreement", "precision", "recall")
    }


def write_head(path: Path, fitted: LogisticRegression, encoder: SentenceEncoder, training_set: str) -> None:
    """Write weights in the order of `ORDER`, rounded to four decimals, and the logits of an example."""
    rows = [list(fitted.classes_).index(label) for label in ORDER]
    weight = np.round(fitted.coef_[rows].astype(float), 4)
    bias = np.round(fitted.intercept_[rows].astype(float), 4)
    example = features(encoder, [EXAMPLE]) @ torch.tensor(weight, dtype=torch.float32).T
    logits = [round(float(x), 3) for x in (example + torch.tensor(bias, dtype=torch.float32))[0]]
    data = {
        "encoder": "sentence-transformers/all-MiniLM-L6-v2", "block": encoder.block, "labels": list(ORDER),
        "training_set_sha256": training_set, "example": EXAMPLE, "example_logits": logits,
        "bias": bias.tolist(), "weight": weight.tolist(),
    }  # fmt: skip
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in data.items()]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def cpu_seconds(judge: Judge, rows: Rows) -> float:
    """Return the CPU seconds of all threads that 100 answers of the training set take, the best of three."""
    answers = [Exchange(row["prompt"], row["answer"]) for row in rows.data[:100]]
    taken = []
    for _ in range(3):
        began = time.process_time()
        judge.verdicts(answers)
        taken.append(time.process_time() - began)
    return round(min(taken), 4)


def ranks(judges: Mapping[str, Judge], rows: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """Count refusals and unanswered requests of every trial by both judges; Spearman's correlation of the counts."""
    names = [name for name in rows[0] if name != "prompt"]
    found: dict[str, Any] = {"requests": len(rows), "by_model": {name: {} for name in names}, "spearman": {}}
    for judge_name, judge in judges.items():
        for name in names:
            verdicts = judge.verdicts([Exchange(row["prompt"], row[name]) for row in rows])
            refused, unanswered = verdicts.count(REFUSAL), sum(v != ANSWER for v in verdicts)
            found["by_model"][name][judge_name] = {"refused": refused, "unanswered": unanswered}
    for key in ("refused", "unanswered"):
        pairs = [[found["by_model"][name][judge][key] for name in names] for judge in judges]
        found["spearman"][key] = round(float(spearmanr(*pairs).statistic), 3)
    return found


if __name__ == "__main__":
    main()
