"""From Python: the examples of docs/python.md run as they stand, and what they do is what the command does."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from heretic import StrengthKernel, load
from heretic.errors import BusyError
from heretic.export.export import Export
from heretic.hardware.locks import runtime_folder
from heretic.model.checkpoint import open_checkpoint
from heretic.pipeline.api import AblationSession
from heretic.scoring.judges.verdict import REFUSAL
from heretic.scoring.refusals import RefusalCount
from tests.helpers.errors import raises
from tests.tiny import save_tiny

PAGE = Path(__file__).parents[2] / "docs" / "python.md"


@pytest.fixture
def given(prompt_files: dict[str, Path]) -> dict[str, Any]:
    prompts = {role: {"source": str(path)} for role, path in prompt_files.items()}
    return {"prompts": prompts, "max_response_length": 6, "refusal_markers": ["sorry", "bread"], "n_trials": 4}


@pytest.fixture
def session(config: Path) -> Iterator[AblationSession]:
    with load(config=config) as opened:
        yield opened


def test_the_examples_run_as_they_stand(llama: Path, given: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    assert len(blocks) == 2
    for block in blocks:
        exec(block, {"MODEL": str(llama), "PROMPTS": given["prompts"]})
    printed = capsys.readouterr().out
    assert "4 ('attention', 'mlp') torch.Size([4, 32])" in printed and "torch.Size([1, 4, 96])" in printed
    assert (Path("ablated") / "model.safetensors").is_file() and "report.html" in printed
    before, after = open_checkpoint(str(llama)), open_checkpoint("ablated")
    assert any(not torch.equal(before.read(n), after.read(n)) for n in before.tensors)


def test_a_lab_does_what_it_says(llama: Path, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = RefusalCount((REFUSAL,) * 16, ((7, 8),) * 16)
    monkeypatch.setattr("heretic.pipeline.geometry.find_refusals", lambda _context, _requests: asked)
    with load(str(llama), **given) as lab:
        ids = torch.tensor([[5, 6, 7]])
        with torch.no_grad():
            original = lab.model(ids).logits
            edit = lab.ablation(2.0, attention=1.0, mlp=[0, 0, 0.5, 1])
            with lab.attach(edit) as model:
                moved = model(ids).logits
            assert (moved - original).abs().max() > 1e-2, "nothing was ablated"
            assert torch.equal(lab.model(ids).logits, original), "the hooks are still there"
        assert edit.strengths == {"attention": (1.0,) * 4, "mlp": (0, 0, 0.5, 1)} and edit.mixture == (0, 0, 1, 0)
        assert lab.score().divergence.mean == pytest.approx(0, abs=1e-9)
        assert lab.score(edit).divergence.mean > 1e-4
        assert len(lab.answers(["tell me", "why"], edit, tokens=3)) == 2
        assert len(lab.answers("tell me", edit, tokens=3)) == 1 and lab.answers([]) == []
        assert lab.geometry().num_layers == lab.num_layers == 4
        assert len(lab.direction_effects().sufficiency) == 4


def test_directions_of_ones_own_count_in_the_model_and_in_the_export(llama: Path, given: dict[str, Any]) -> None:
    torch.manual_seed(3)
    with load(str(llama), **given) as lab:
        edit = lab.ablation(attention=StrengthKernel(1.0, 2.0, 0.5, 3.0))
        before = lab.score(edit).divergence.mean
        lab.directions = torch.randn(4, 32)
        assert lab.directions.vectors.norm(dim=-1).tolist() == pytest.approx([1.0] * 4)
        after = lab.score(edit).divergence.mean
        assert after != pytest.approx(before, rel=1e-3)
        written: Export = lab.export(edit, "own")
        assert written.verification.scores.divergence.mean == pytest.approx(after, rel=1e-3)
        assert lab.score(edit).divergence.mean == pytest.approx(after, rel=1e-4), "forgotten with the model"


def test_what_a_user_can_do_wrong(llama: Path, given: dict[str, Any]) -> None:
    with raises("unknown-setting"):
        load(str(llama), trials=3)
    with load(str(llama), **given) as lab:
        with raises("unknown-component"):
            lab.ablation(router=1.0)
        with raises("shape-mismatch"):
            lab.ablation(mlp=[1, 1, 1])
        with raises("shape-mismatch"):
            lab.directions = torch.randn(4, 31)
        for index, strength in (
            (99, 1.0),
            (-1, 1.0),
            (float("nan"), 1.0),
            (2, float("nan")),
            (2, [1, 1, 1, float("inf")]),
        ):
            with raises("invalid-option"):
                lab.ablation(index, mlp=strength)
        for wrong in ("1", None, ["1"] * 4, torch.ones(4, 2)):
            with raises("invalid-option"):
                lab.ablation(mlp=wrong)  # type: ignore[arg-type]
        for right in (1, torch.tensor(1.0), torch.ones(4), range(4)):
            assert isinstance(lab.ablation(mlp=right).strengths["mlp"][0], float)  # type: ignore[arg-type]
        with raises("not-a-prompt"):
            lab.answers(["tell me", 5])  # type: ignore[list-item]
        with raises("trial-not-found"):
            lab.trial(7)
        with raises("busy", BusyError) as error:
            load(str(llama), **given)
        assert "session.close()" in str(error.value), "not the number of the user's own process to kill"
    with load(str(llama), **given):
        pass  # everything was let go of


def test_importing_is_quick() -> None:
    code = "import heretic, sys; assert not {'torch', 'transformers', 'optuna'} & set(sys.modules); heretic.nothing"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "has no attribute 'nothing'" in ran.stderr and "AssertionError" not in ran.stderr


def test_what_would_have_an_attached_ablation_too_is_refused(session: AblationSession) -> None:
    strong, weak = session.ablation(attention=1.0, mlp=1.0), session.ablation(attention=0.5)
    before = session.score(weak).divergence
    with session.attach(strong):
        for call in (
            session.score,
            lambda: session.score(weak),
            lambda: session.answers("make soup", weak),
            lambda: session.compare(weak),
            lambda: session.export(weak, "never"),
            lambda: session.attach(weak).__enter__(),
        ):
            with raises("ablation-attached"):
                call()
    assert session.score(weak).divergence == before and not Path("never").exists()


@pytest.mark.parametrize("directions", ["no tensor", [[math.nan] * 2], "nan", "zero"])
def test_what_is_no_direction_is_refused(session: AblationSession, directions: Any) -> None:
    vectors = session.directions.vectors.clone()
    if directions in ("nan", "zero"):
        vectors[1] = math.nan if directions == "nan" else 0
        directions = vectors
    with raises("no-direction" if directions is vectors else "shape-mismatch"):
        session.directions = directions
    for given in (session.directions.vectors.numpy(), 1e25 * session.directions.vectors, session.directions):
        before = session.directions.vectors
        session.directions = given
        assert torch.allclose(session.directions.vectors, before, atol=1e-6)


@pytest.mark.parametrize("tokens", [0, -1, 1.5])
def test_answers_of_no_length_are_refused(session: AblationSession, tokens: Any) -> None:
    with raises("invalid-option"):
        session.answers("make soup", tokens=tokens)
    assert len(session.answers("make soup", tokens=np.int64(3))) == 1  # type: ignore[arg-type]


def test_a_closed_session_loads_nothing(config: Path) -> None:
    session = load(config=config)
    assert len(repr(session)) < 200
    session.close()
    for use in (lambda: session.tokenizer, session.score, session.trial, session.geometry):
        with raises("session-closed"):
            use()
    assert session.run_context.loaded is None


def test_paths_and_numbers_of_numpy_are_settings(config: Path, llama: Path) -> None:
    with load(
        llama, config=config, runs_dir=Path("elsewhere"), seed=np.int64(3), refusal_markers=np.array(["bread"])
    ) as session:
        assert session.settings.seed == 3 and session.run_context.folder.path.parent == Path("elsewhere")


def test_a_run_is_opened_by_its_folder(config: Path, llama: Path) -> None:
    with load(llama, config=config, seed=3, run_name="mine") as session:
        folder = session.run_context.folder.path
    config.unlink()
    for name in (folder, "mine"):
        with load(name) as session:
            assert session.settings.seed == 3 and session.run_context.folder.path == folder


def test_two_models_side_by_side(config: Path, tmp_path: Path) -> None:
    other = save_tiny(tmp_path / "other")
    with load(config=config) as first, load(other, config=config) as second:
        assert first.score().refusals >= 0 and second.score().refusals >= 0
        with raises("busy", BusyError):
            load(config=config)
        first.close()
        assert second.score().refusals >= 0
    with load(config=config):
        pass


def test_warnings_are_shown_and_logged(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (
        pytest.warns(UserWarning, match="refuses almost nothing"),
        load(config=config, refusal_markers=["zz"]) as session,
    ):
        assert "refuses almost nothing" in (session.run_context.folder.path / "run.log").read_text()


def test_a_failed_load_leaves_no_weights(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def stopped(context: Any) -> None:
        seen.append(context.language_model.model)
        raise KeyboardInterrupt

    monkeypatch.setattr("heretic.session.session.measure_baseline", stopped)
    with pytest.raises(KeyboardInterrupt):
        load(config=config)
    assert all(parameter.is_meta for parameter in seen[0].parameters())


def test_a_program_need_not_close_its_session(config: Path) -> None:
    code = f"import heretic; session = heretic.load(config={str(config)!r})"
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert not list(runtime_folder().glob("cpu.lock.json"))
