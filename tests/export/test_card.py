"""Cards: their head, what is taken of the base model's, and that nobody's text becomes more than text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import metadata_load

from heretic.errors import UserError
from heretic.export.base_card import BaseCard, read_base_card
from heretic.export.card import TAGS, card, share
from heretic.export.manifest import comparisons_of
from heretic.export.markdown import code, escape, is_url
from heretic.export.request import WriteResult

HOSTILE = "# Head\n---\nbase_model: evil/x\n</td><script>alert(1)</script> [click](https://evil.example) | a | `b` *c* ![](http://e)"


def manifest(**changes: Any) -> dict[str, Any]:
    """As much of a manifest as a card is made of."""
    divergence = {"mean": 0.1, "median": 0.1, "p95": 0.2, "max": 0.3}
    written = {
        "divergence": divergence,
        "refusals": 1,
        "total": 8,
        "evasive": 0,
        "judge": "markers",
    }
    return {
        "model": {"name": "owner/tiny", "revision": "c" * 40},
        "ablation": {"strengths": {"mlp": [0.0, 1.0]}},
        "scores": {"original": {"refusals": 7}, "written": written},
        "settings": {"ablation": {"geometry": "plain"}, "max_response_length": 100},
        "versions": {"heretic": "1", "torch": "2", "transformers": "5"},
        "run": "mine", "trial": 3, **changes,
    }  # fmt: skip


def head(text: str, folder: Path) -> dict[str, Any]:
    (folder / "card.md").write_text(text, encoding="utf-8")
    return metadata_load(folder / "card.md") or {}


def base(folder: Path, text: str) -> BaseCard:
    (folder / "README.md").write_text(text, encoding="utf-8")
    return read_base_card(folder)


@pytest.mark.parametrize(
    ("written", "relation"),
    [
        (WriteResult({}), "finetune"),
        (WriteResult({}, relation="adapter"), "adapter"),
        (WriteResult({}, relation="quantized"), "quantized"),
    ],
)
def test_head_says_base_relation_and_task(tmp_path: Path, written: WriteResult, relation: str) -> None:
    told = head(
        card(manifest(), base(tmp_path, "---\npipeline_tag: image-text-to-text\n---\n"), written, "So."), tmp_path
    )
    assert (told["base_model"], told["base_model_relation"]) == ("owner/tiny", relation)
    assert told["pipeline_tag"] == "image-text-to-text" and told["tags"] == TAGS and "heretic" not in told["tags"]


def test_local_base_is_not_named_in_the_head(tmp_path: Path) -> None:
    for name in (str(tmp_path), "models/tiny"):  # which looks like a name on the hub
        text = card(manifest(model={"name": name, "revision": None}), BaseCard(), WriteResult({}), "So.")
        assert "base_model" not in head(text, tmp_path) and name not in text and "huggingface.co/" not in text


def test_the_conditions_of_the_scores_are_told() -> None:
    assert "conditions" not in card(manifest(), BaseCard(), WriteResult({}), "So.")
    given = manifest(response_prefix="<think>\n</think>", template_variables={"enable_thinking": False})
    given["settings"]["system_prompt"] = "be `good`"
    text = card(given, BaseCard(), WriteResult({}), "So.")
    for told in ("`be 'good'`", r"`<think>\n</think>`", '`"enable_thinking": false`'):
        assert told in text


def test_a_total_that_is_no_number_of_cases_is_not_a_share() -> None:
    row = {"name": "mine", "unit": "points", "better": "lower", "original": 5.0, "ablated": 0.7, "total": 3.0}
    text = card(manifest(measures=[row]), BaseCard(), WriteResult({}), "So.")
    assert "| `mine` | points | lower | 5 | 0.7 |" in text


def test_a_missing_card_is_not_one_without_a_license(tmp_path: Path) -> None:
    missing, silent = read_base_card(tmp_path), base(tmp_path, "# A model\n")
    assert missing.terms != silent.terms and not missing.entries


def test_counts_of_earlier_versions_and_of_scorers_are_the_same_rows() -> None:
    before, now = ({"over_refusals": n, "degenerate": 0, "total": 8} for n in (1, 3))
    old = manifest()
    for model, counts in (("original", before), ("written", now)):
        old["scores"][model]["harmless_metrics"] = counts
    rows = [comparison.as_dict() for comparison in comparisons_of(old)]
    assert [(row["name"], row["original"], row["ablated"], row["total"]) for row in rows] == [
        ("over_refusals", 1, 3, 8), ("degenerate", 0, 0, 8),
    ]  # fmt: skip
    new = card(manifest(measures=rows), BaseCard(), WriteResult({}), "So.")
    assert new == card(old, BaseCard(), WriteResult({}), "So.")
    assert f"| `over_refusals` | unanswered harmless prompts | lower | {share(1, 8)} | {share(3, 8)} | +2 |" in new


def test_limitations_are_a_section() -> None:
    text = card(manifest(), BaseCard(), WriteResult({}), "So.")
    section = text.partition("\n## Limitations\n")[2].partition("\n## ")[0]
    assert section.count("\n- ") == 7 and "100 tokens" in section and "8 requests" in section


FORGED = """---
license: other
license_name: "x\\nbase_model: evil/x"
license_link: "javascript:alert(1)"
language: ["en", "no", false, "<b>", {a: b}, [en]]
pipeline_tag: "evil\\ntags: [heretic]"
base_model: evil/x
tags: [heretic]
---
# Forged
"""


def test_only_checked_entries_of_the_base_card_are_taken_over(tmp_path: Path) -> None:
    found = base(tmp_path, FORGED)
    told = head(card(manifest(), found, WriteResult({}), "So."), tmp_path)
    assert found.entries == {"license": "other", "language": ["en", "no", "no"], "pipeline_tag": "text-generation"}
    assert told["base_model"] == "owner/tiny" and told["license"] == "other" and told["tags"] == TAGS


@pytest.mark.parametrize(
    "text",
    ["", "# no head", "---\n- a\n- b\n---\n", "---\nlicense: [\n---\n", "---\nlicense: !!python/object:os.system x\n---\n",
     f"---\nlicense: {'[' * 5000}\n---\n", "---\nlicense: mit", "---\n: : :\n---\n"],
)  # fmt: skip
def test_broken_head_of_the_base_card_gives_none(tmp_path: Path, text: str) -> None:
    assert not {"license", "language"} & base(tmp_path, text).entries.keys()


def test_aliases_in_the_base_card_do_not_multiply(tmp_path: Path) -> None:
    lines = ["a0: &a0 [en, en]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 20)}]" for n in range(1, 12)]
    assert "language" not in base(tmp_path, "\n".join(["---", *lines, "language: *a11", "---", ""])).entries


def test_base_card_that_is_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("---\nlicense: mit\n---\n")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/README.md").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError) as error:
        read_base_card(tmp_path / "model")
    assert error.value.code == "link-outside-folder"


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"name": HOSTILE, "revision": HOSTILE}},
        {"run": HOSTILE},
        {"versions": dict.fromkeys(("heretic", "torch", "transformers"), HOSTILE)},
        {"settings": {"ablation": {"geometry": HOSTILE}}},
        {"ablation": {"strengths": {HOSTILE: [0.0, 1.0]}}},
        {"behavior": HOSTILE},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_text_of_others_stays_text(tmp_path: Path, changes: dict[str, Any]) -> None:
    text = card(manifest(**changes), BaseCard(), WriteResult({}), "So.")
    plain = card(manifest(), BaseCard(), WriteResult({}), "So.")
    for mark in ("\n# ", "\n## ", "\n---\n", "<script>", "](https://evil", "![", "\n|"):
        outside = "".join(text.split("`")[::2])  # nothing within a code span is read as Markdown or HTML
        assert outside.count(mark) == plain.count(mark), mark
    assert "evil/x" not in str(head(text, tmp_path))


@pytest.mark.parametrize("key", ["trial", "kl_tokens"])
def test_text_for_a_number_is_refused(key: str) -> None:
    told = manifest(trial="<b>") if key == "trial" else manifest()
    told["settings"] |= {"kl_tokens": "<b>"} if key == "kl_tokens" else {}
    with pytest.raises((TypeError, ValueError)):
        card(told, BaseCard(), WriteResult({}), "So.")


def test_markdown_is_escaped() -> None:
    assert escape("<b>[x](y)</b>\n# z") == r"\<b\>\[x\]\(y\)\</b\> \# z"
    assert code("a`b|c\nd") == "`a'b/c d`"
    assert is_url("https://example.org/a?b=c") and not is_url("https://a.b/)[x](y") and not is_url("javascript:x")
