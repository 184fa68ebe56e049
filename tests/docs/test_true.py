"""What the documents name exists: files, links, anchors, tests, settings, identifiers."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from heretic.machine.rules import RULES
from heretic.settings.layers import all_keys
from tests.docs.pages import HISTORY, NOW, OF_ANOTHER_TOOL, PAGES, ROOT, named, quoted

every_page = pytest.mark.parametrize("page", PAGES, ids=named)
every_page_of_today = pytest.mark.parametrize("page", NOW, ids=named)
CODE = ("src", "tests", "benchmarks", "scripts")
# Of other programs, and of the text that this project grew from.
FOREIGN = {"state_dict", "torch_dtype", "convert_hf_to_gguf.py"}
FILE = re.compile(r"\.(?:py|md|toml|jsonl?|txt|safetensors|db|log|html)$")


def anchors(page: Path) -> set[str]:
    """As GitHub makes them from headings."""
    found = set()
    for line in page.read_text(encoding="utf-8").splitlines():
        if match := re.match(r"#+ (.+)", line):
            text = re.sub(r"[^\w\- ]", "", match[1].lower().replace("`", ""))
            found.add(text.strip().replace(" ", "-"))
    return found


@pytest.fixture(scope="module")
def words() -> set[str]:
    """Every word of the code, of the settings files, and of what is beside them."""
    files = [p for folder in CODE for p in (ROOT / folder).rglob("*.py") if p.name != "test_true.py"]
    files += [*ROOT.glob("*.toml"), ROOT / "Makefile", *(ROOT / "src").rglob("*.toml")]
    texts = [file.read_text(encoding="utf-8") for file in files]
    return {word for text in texts for pattern in (r"[\w.-]*\w", r"\w+") for word in re.findall(pattern, text)}


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", text)):
        if re.match(r"\w+:", target):
            continue
        name, _, anchor = target.partition("#")
        other = page if not name else (page.parent / name)
        assert other.exists(), f"{target} does not exist"
        if anchor:
            assert anchor in anchors(other), f"{other.name} has no heading for #{anchor}"


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached, open_ends = set(), [ROOT / "README.md"]
    while open_ends:
        page = open_ends.pop()
        reached.add(page)
        targets = re.findall(r"\]\(([^)#\s]+\.md)", page.read_text(encoding="utf-8"))
        linked = {(page.parent / t).resolve() for t in targets if not re.match(r"\w+:", t)}
        open_ends += sorted((linked & set(PAGES)) - reached)
    assert reached >= {p for p in PAGES if p.name not in HISTORY}


@every_page_of_today
def test_files_that_are_named_exist(page: Path, words: set[str]) -> None:
    """Here, or as what a run makes: then the code names it."""
    roots = (ROOT, ROOT / "src/heretic", page.parent, ROOT / "benchmarks", ROOT / "tests", ROOT / "docs")
    anywhere = {p.name for folder in CODE for p in (ROOT / folder).rglob("*.*")}
    for name in quoted(page):
        if re.fullmatch(r"[\w./-]+", name) and FILE.search(name):
            bare = "/" not in name and name in anywhere
            last = name.split("/")[-1]
            made = not name.endswith((".py", ".md")) and {last, last.strip(".").partition(".")[0]} & (words | FOREIGN)
            numbered = re.fullmatch(r"(?:trial-N|worker-0|worker-1)\.\w+", name)
            known = bare or made or numbered or name in FOREIGN or any((root / name).exists() for root in roots)
            assert known, f"{name} does not exist"


@every_page_of_today
def test_tests_that_are_named_exist(page: Path, words: set[str]) -> None:
    for name in quoted(page):
        if re.fullmatch(r"test_\w+", name):
            assert name in words, f"there is no test {name}"


@every_page_of_today
def test_settings_and_identifiers_that_are_named_exist(page: Path, words: set[str]) -> None:
    """A setting by its full name; anything else that looks like a name of the code is somewhere in the code."""
    if page.name in (*OF_ANOTHER_TOOL, "architectures.md"):  # the second names modules of other people's models
        return
    known = set(all_keys())
    tables = {key.split(".")[0] for key in known if "." in key}
    for name in quoted(page):
        first = name.split(".")[0]
        if re.fullmatch(r"[a-z_]+(?:\.[a-z_]+)+", name) and first in tables and not FILE.search(name):
            assert any(k == name or k.startswith(name + ".") for k in known), f"there is no setting {name}"
        elif re.fullmatch(r"[A-Za-z]+(?:_[A-Za-z0-9]{2,})+", name):
            assert name in words | FOREIGN or f"{name}." in " ".join(known), f"nothing is called {name}"


@every_page_of_today
def test_variables_of_the_environment_are_settings(page: Path) -> None:
    for name in re.findall(r"\bHERETIC_([A-Z_]+)\b", page.read_text(encoding="utf-8")):
        assert name.lower().replace("__", ".") in all_keys(), f"HERETIC_{name} sets nothing"


def test_results_that_are_named_are_there() -> None:
    text = "".join((ROOT / "benchmarks" / page).read_text(encoding="utf-8") for page in ("README.md", "quality.md"))
    known = set(re.findall(r"`results/([\w.]+\.json)`", text))
    there = {p.name for p in (ROOT / "benchmarks/results").glob("*.json")}
    assert known == there
    for name in there:
        report = json.loads((ROOT / "benchmarks/results" / name).read_text())
        if name != "families.json":  # a table of families
            assert {"date", "versions"} <= set(report), name


def test_the_map_names_every_module() -> None:
    """CLAUDE.md says of every file of the package what it is."""
    text = (ROOT / "CLAUDE.md").read_text(encoding="utf-8")
    package = ROOT / "src/heretic"
    missing = []
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).as_posix()
        folder = name.partition("/")[0] + "/"
        if path.name in ("__init__.py", "__main__.py") or folder in ("commands/", "settings/", "demo/"):
            continue  # named as a whole
        if f"`{name}`" not in text:
            missing.append(name)
    assert not missing, f"CLAUDE.md does not name: {', '.join(missing)}"


def test_the_plan_says_how_many_rules_there_are_and_names_a_test_for_every_task() -> None:
    text = (ROOT / "IMPLEMENTATION_PLAN.md").read_text(encoding="utf-8")
    assert f"{len(RULES)} preflight rules" in text
    tasks = text.split("## The tasks that the project began with")[1].split("\n## ")[0]
    rows = [row for row in tasks.splitlines() if row.startswith("| ")][1:]
    assert len(rows) == 8
    for row in rows:
        task, where, test = (cell.strip() for cell in row.strip("|").split(" | "))
        if not where.startswith("not yet"):
            assert re.search(r"`[\w/]+\.py`", where) and re.search(r"`tests/[\w/]+\.py`", test), task


def test_messages_that_are_explained_are_messages() -> None:
    """The beginnings of errors in CLAUDE.md stand in the code, whatever is put into them."""
    table = (ROOT / "CLAUDE.md").read_text(encoding="utf-8").split("### Common errors")[1].split("\n### ")[0]
    code = " ".join(p.read_text(encoding="utf-8") for p in (ROOT / "src").rglob("*.py"))
    said = re.findall(r'"([^"]+)"', " ".join(r.split(" | ")[0] for r in table.splitlines() if r.startswith("| ")))
    assert len(said) > 10
    assert not [message for message in said if message not in code]


def test_the_session_that_is_shown_says_what_a_run_says() -> None:
    session = (ROOT / "README.md").read_text(encoding="utf-8").split("## A session")[1].split("\n## ")[0]
    code = " ".join(p.read_text(encoding="utf-8") for p in (ROOT / "src").rglob("*.py"))
    for said in (
        "The original model declines", "probability of refusing", "on prompts held back; ", "Strengths by gradient",
        " refused, KL ", "beaten, with at least", "Chosen: trial ", "fewest refusals among the trials with a KL of at most",
        "written to", "verified",
        "reloaded from disk; KL from the measured model",
    ):  # fmt: skip
        assert said in session and said in code, said
