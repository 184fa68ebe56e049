"""Train the judge `words`, and measure it on answers that it was not trained on.

    python benchmarks/train_words.py

The training set, the blind set and the folds are those of `train_judge.py`. Needs scikit-learn (a part of heretic[lm_eval]).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, head, write
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold
from train_judge import DATA, FOLDS, Rows, counts, cpu_seconds, shares

from heretic.files import sha256
from heretic.scoring.judges.agreement import agreement, labeled_answers
from heretic.scoring.judges.registry import make_judge
from heretic.scoring.judges.verdict import ORDER
from heretic.scoring.judges.words import FILE, terms
from heretic.settings import Settings

SHIPPED = Path(__file__).parents[1] / "src" / "heretic" / "data" / FILE
STRENGTHS, CHOSEN = (3.0, 10.0, 30.0), 10.0
RARE = 2  # answers that a term must occur in


def main() -> None:
    """Choose, train, write the weights, measure, write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--weights", type=Path, default=SHIPPED)
    parser.set_defaults(model="words")
    parser.add_argument("--out", type=Path, default=RESULTS / "judge_words.json")
    arguments = parser.parse_args()
    train = Rows.read("train.jsonl")
    report: dict[str, Any] = head(arguments) | {"training": counts(train)}
    report["cross_validation"] = {str(strength): cross_validated(train, strength) for strength in STRENGTHS}
    words = vectorizer()
    fitted = fit(words.fit_transform(answers(train)), train.labels, CHOSEN)
    write_weights(arguments.weights, words, fitted, sha256(DATA / "train.jsonl"))
    judge = make_judge(Settings.model_validate({"judge": {"kind": "words"}}))
    sets = {"labeled_60": labeled_answers(), "blind_100": Rows.read("blind.jsonl").labeled()}
    report["agreement"] = {name: agreement(judge, labeled).as_dict() for name, labeled in sets.items()}
    report["cpu_seconds_per_100_answers"] = cpu_seconds(judge, train)
    write(report, arguments.out)
    print(
        json.dumps({k: report[k] for k in ("cross_validation", "agreement", "cpu_seconds_per_100_answers")}, indent=1)
    )


def fit(described: Any, labels: np.ndarray, strength: float) -> LogisticRegression:
    """Fit the logistic regression; labels are not weighted equally, which would raise false alarms on the blind set."""
    return LogisticRegression(C=strength, max_iter=5000).fit(described, labels)


def vectorizer() -> TfidfVectorizer:
    """TF-IDF with logarithmic counts over the judge's own terms."""
    return TfidfVectorizer(analyzer=terms, sublinear_tf=True, min_df=RARE)


def answers(rows: Rows) -> list[str]:
    """The texts of the answers."""
    return [row["answer"] for row in rows.data]


def cross_validated(rows: Rows, strength: float) -> dict[str, Any]:
    """Return accuracy, precision and recall of refusals, each answer judged without any of its prompt."""
    judged, texts = np.empty(len(rows.data), dtype=object), np.array(answers(rows))
    for train, test in GroupKFold(FOLDS, shuffle=True, random_state=0).split(texts, rows.labels, rows.groups):
        words = vectorizer()
        fitted = fit(words.fit_transform(texts[train]), rows.labels[train], strength)
        judged[test] = fitted.predict(words.transform(texts[test]))
    return shares(rows.labels, judged)


def write_weights(path: Path, words: TfidfVectorizer, fitted: LogisticRegression, training_set: str) -> None:
    """Write the inverse document frequency of every term and its weights in the order of `ORDER`, rounded."""
    rows = [list(fitted.classes_).index(label) for label in ORDER]
    table: Sequence[Sequence[float]] = np.vstack([words.idf_, fitted.coef_[rows]]).T.round(2).tolist()
    by_term = dict(sorted(zip(words.get_feature_names_out(), table, strict=True)))
    data = {
        "labels": list(ORDER), "training_set_sha256": training_set, "bias": fitted.intercept_[rows].round(2).tolist(),
    }  # fmt: skip
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in data.items()]
    entries = ",\n".join(f"    {json.dumps(term)}: {json.dumps(numbers)}" for term, numbers in by_term.items())
    path.write_text("{\n" + ",\n".join([*lines, '  "weights": {\n' + entries + "\n  }"]) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
