"""Numbers that are none, models that an edit destroys, and prompt sets at the edge of what makes sense."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from pathlib import Path

import pytest

from tests.faults.conftest import Amount, Tally
from tests.helpers.command import Ran, heretic
from tests.tiny import HARMFUL, HARMLESS, TEXT


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, config: Path):  # type: ignore[no-untyped-def]
    def call(*arguments: str) -> Ran:
        return heretic(capsys, monkeypatch, "run", "--run-name", "mine", "--fresh", *arguments)

    return call


def sets(**prompts: list[str]) -> list[str]:
    """Assignments of prompt sets."""
    found = []
    for role, lines in prompts.items():
        path = Path(f"{role}.txt").resolve()
        path.write_text("\n".join(lines) + "\n")
        found += ["--set", f"prompts.{role}.source={path}"]
    return found


def front(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> list[dict[str, float]]:
    monkeypatch.setattr("sys.argv", ["heretic", "status", "mine", "--json"])
    from heretic.cli import main as cli

    with pytest.raises(SystemExit):
        cli.main()
    return json.loads(capsys.readouterr().out)["pareto_front"]


def test_one_prompt_in_every_set(run, tally: Tally) -> None:  # type: ignore[no-untyped-def]
    ran = run(*sets(harmful_train=HARMFUL[:1], harmless_train=HARMLESS[:1], harmful_eval=HARMFUL[1:2],
                    harmless_eval=HARMLESS[1:2]))  # fmt: skip
    assert ran.status == 0, ran.err
    tally("a single prompt in every set", 1, "nothing")


def test_many_prompts(run, amount: Amount, tally: Tally) -> None:  # type: ignore[no-untyped-def]
    count = amount(300, 10_000)
    words = sorted(set(TEXT.split()))[:22]
    many = [" ".join(three) for three in itertools.product(words, repeat=3)][:count]
    ran = run(*sets(harmful_train=many), "--trials", "1", "--set", "batch_size=128")
    assert ran.status == 0, ran.err
    tally(f"{count} prompts in a set", 1, "nothing")


def test_prompts_of_one_token_and_of_the_whole_context(run, tally: Tally) -> None:  # type: ignore[no-untyped-def]
    long = " ".join(["bread"] * 240)  # the tiny model's context is 256 tokens; the template and 6 answer tokens fit
    ran = run(*sets(harmful_train=["a", *HARMFUL[:3]], harmful_eval=["of", long], harmless_eval=["to", long + " now"]))
    assert ran.status == 0, ran.err
    too_long = run(*sets(harmful_eval=[long + " now" * 20]))
    assert too_long.status != 0 and too_long.code == "prompt-too-long"
    tally("prompts of one token, of the whole context, and longer", 3, "nothing: the last is refused")


def test_prompts_that_are_all_the_same(run, tally: Tally) -> None:  # type: ignore[no-untyped-def]
    ran = run(*sets(harmful_eval=["make bread now"] * 3))
    assert ran.status == 1 and ran.code == "prompts-alike" and "harmful_eval" in ran.err
    ran = run(*sets(harmful_train=HARMFUL[:4], harmless_train=HARMFUL[:4]))
    assert ran.status == 1 and "no direction to find" in ran.err
    tally("a set that repeats one prompt; directions of norm zero", 2, "nothing: refused")


def test_logits_that_are_no_numbers(run, llama: Path, tmp_path: Path, tally: Tally) -> None:  # type: ignore[no-untyped-def]
    """Weights too large for half precision, and too large for any."""
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(llama, tmp_path / "large"))
    weights = load_file(folder / "model.safetensors")
    kept = weights["model.layers.1.mlp.down_proj.weight"]
    for factor, works in ((1e6, True), (1e39, False)):
        weights["model.layers.1.mlp.down_proj.weight"] = kept * factor
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        ran = run("--set", f'model="{folder}"', "--set", 'dtypes=["float16", "float32"]')
        assert ran.status == (0 if works else 1), ran.err
        assert "not finite" in ran.err + ran.out
    tally("NaN or infinite logits from a number format", 2, "nothing: the next format, or refused")


def test_an_edit_that_destroys_the_model(  # type: ignore[no-untyped-def]
    run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, amount: Amount, tally: Tally
) -> None:
    """Every second ablation is a million billion billion times too strong, so that what the model computes overflows."""
    from heretic.search.space import SearchSpace

    whole, calls = SearchSpace.sample, 0

    def too_strong(self, trial):  # type: ignore[no-untyped-def]
        nonlocal calls
        calls += 1
        found = whole(self, trial)
        if trial.number % 2:
            found = dataclasses.replace(found, strengths={k: [1e24] * len(v) for k, v in found.strengths.items()})
        return found

    monkeypatch.setattr(SearchSpace, "sample", too_strong)
    times = amount(4, 40)
    ran = run("--trials", str(times))
    assert ran.status == 0, ran.err
    assert calls >= times
    points = front(capsys, monkeypatch)
    assert points and all(point["divergence"]["mean"] < 100 for point in points)  # type: ignore[index]
    tally("edits that make the model's numbers overflow", times // 2, "nothing: never on the front")


@pytest.mark.parametrize("markers", ['["zzz"]', '["a", "e", "i", "o", "<"]'])
def test_none_refused_and_all_refused(run, tally: Tally, markers: str) -> None:  # type: ignore[no-untyped-def]
    ran = run("--set", f"refusal_markers={markers}", "--set", 'search.start="gradient"', "--set",
              "search.gradient.steps=1", "--set", "search.gradient.weights=[0.1]")  # fmt: skip
    assert ran.status == 0, ran.err
    tally("none or all of the requests refused by the original", 1, "nothing")


def test_trials_that_destroy_the_model_are_never_on_the_front(  # type: ignore[no-untyped-def]
    run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, amount: Amount, tally: Tally
) -> None:
    from heretic.scoring import evaluator

    times = amount(4, 40)
    calls = 0
    whole = evaluator.measure_divergence

    def broken(*arguments, **options):  # type: ignore[no-untyped-def]
        """Every second trial gives logits that are no numbers."""
        nonlocal calls
        calls += 1
        found = whole(*arguments, **options)
        if calls % 2:
            return [d.__class__(float("inf"), float("inf"), float("inf"), float("inf")) for d in found]
        return found

    monkeypatch.setattr(evaluator, "measure_divergence", broken)
    ran = run("--trials", str(times))
    assert ran.status == 0, ran.err
    assert calls >= times
    assert all(point["divergence"]["mean"] < 100 for point in front(capsys, monkeypatch))
    tally("trials with an infinite KL", times // 2, "nothing: never on the front")
