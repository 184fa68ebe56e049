"""The contents of a run's tensor files: what heretic wrote comes back, anything else is refused and made again."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from heretic.ablation.directions import Directions
from heretic.ablation.geometries.conditional import InputMap
from heretic.ablation.operator import Operator
from heretic.ablation.residual_geometry import ResidualGeometry
from heretic.errors import UserError
from heretic.files import read_tensors, write_tensors
from heretic.model.response_prefix import AnswerStart
from heretic.runs.folder import RunFolder
from heretic.runs.stored_tensors import (
    Baseline,
    directions_from_tensors,
    effects_from_tensors,
    geometry_from_tensors,
    input_map_tensors,
    input_maps_from_tensors,
    operator_tensors,
    operators_from_tensors,
    optimizer_state_from_tensors,
    optimizer_state_tensors,
)
from heretic.scoring.direction_effects import DirectionEffects
from heretic.scoring.judges.verdict import ANSWER, EVASIVE, REFUSAL
from heretic.search.gradient_path import PathPoint
from heretic.search.path_optimizer import OptimizerState
from tests.helpers.reporters import RecordingReporter

BASELINE = Baseline(
    torch.randn(5, 7).log_softmax(-1), (REFUSAL, ANSWER, EVASIVE), ([1, 2], [], []),
    AnswerStart("Sure", {"thinking": False}, "2024-02-03", 7), ([3, 4], [5, 6, 0]), ([3, 4, 9], []),
)  # fmt: skip
DIRECTIONS = {"directions": torch.randn(3, 4), "extra": torch.randn(3, 1, 4)}
GEOMETRY = ResidualGeometry(
    torch.eye(3), torch.rand(3, 3), torch.rand(3), torch.tensor([1.0, float("nan"), 2.0]), torch.rand(3, 5, 2), torch.rand(3, 2),
    torch.tensor([1, 1, 0, 0, 1], dtype=torch.uint8),
)  # fmt: skip
STATE = OptimizerState(
    torch.rand(2, 3), torch.rand(4), 4, 1, [PathPoint(0.5, {"mlp": (0.0, 0.1, 0.2)}, 0.1, 0.2, (0.1, 0.2, 0.3, 0.4))], [(0, [3])],
    moments={"strengths.step": torch.tensor(4.0), "strengths.exp_avg": torch.rand(2, 3)},
)  # fmt: skip
INPUT_MAPS = {
    "block.0.down": InputMap(torch.rand(5, 3), torch.rand(5, 4)),
    "block.1.down": InputMap(*torch.rand(2, 5, 3)),
}
OPERATORS = {"block.0.down": Operator(torch.rand(2, 3), torch.rand(2, 3), torch.rand(3), torch.rand(2, 4))}
EFFECTS = DirectionEffects(torch.rand(3), torch.rand(3), torch.rand(3), torch.rand(2))
READERS: dict[str, tuple[Callable[[dict[str, Tensor]], object], dict[str, Tensor]]] = {
    "directions": (directions_from_tensors, DIRECTIONS),
    "baseline": (Baseline.from_tensors, BASELINE.tensors()),
    "geometry": (geometry_from_tensors, GEOMETRY.tensors()),
    "gradient_path": (optimizer_state_from_tensors, optimizer_state_tensors(STATE)),
    "input_maps": (input_maps_from_tensors, input_map_tensors(INPUT_MAPS)),
    "operators": (operators_from_tensors, operator_tensors(OPERATORS)),
    "effects": (effects_from_tensors, EFFECTS.tensors()),
}
MAY_LACK = {
    "extra",
    "harmless_answers",
    "template_date",
    "end_of_turn",
    "refusal_texts",
    "answered",
    "vector",
    "strengths.step",
    "strengths.exp_avg",
    "block.0.down.w",
    "block.0.down.n",
    "block.0.down.a",
}
SPOILED: dict[str, Callable[[Tensor], Tensor]] = {
    "another type": lambda t: t.long() if t.is_floating_point() else t.float(),
    "another number of dimensions": lambda t: t.unsqueeze(0),
    "not finite": lambda t: torch.full_like(t, float("nan")) if t.is_floating_point() else t.float() * float("nan"),
    "complex": lambda t: t.to(torch.complex64),
}


def test_what_was_written_is_read() -> None:
    found = Baseline.from_tensors(BASELINE.tensors())
    assert (
        found is not None
        and found.verdicts == BASELINE.verdicts
        and found.harmless_answers == BASELINE.harmless_answers
    )
    assert found.refusal_texts == BASELINE.refusal_texts and found.start == BASELINE.start
    old = {k: t for k, t in BASELINE.tensors().items() if k != "harmless_answers"}
    earlier = Baseline.from_tensors({**old, "harmless_metrics": torch.tensor([1, 0, 3])})
    assert earlier is not None and earlier.harmless_answers == ()
    state = optimizer_state_from_tensors(optimizer_state_tensors(STATE))
    assert (
        state.points == STATE.points
        and state.extra_refusals == STATE.extra_refusals
        and state.moments.keys() == STATE.moments.keys()
    )
    assert geometry_from_tensors(GEOMETRY.tensors()).num_layers == 3 and directions_from_tensors(DIRECTIONS).count == 2
    maps = input_maps_from_tensors(input_map_tensors(INPUT_MAPS))
    assert all(torch.equal(maps[name].outputs, own.outputs) for name, own in INPUT_MAPS.items())
    assert torch.equal(effects_from_tensors(EFFECTS.tensors()).kl, EFFECTS.kl)


def test_a_state_of_an_earlier_version_is_read() -> None:
    mixture = {"mixture": torch.rand(3), "mixture.step": torch.tensor(4.0), "mixture.exp_avg": torch.rand(3)}
    state = optimizer_state_from_tensors({**optimizer_state_tensors(STATE), **mixture})
    assert state.points == STATE.points and state.moments.keys() == STATE.moments.keys()


def test_the_tensors_of_a_run_are_those_of_the_document() -> None:
    table = (Path(__file__).parents[2] / "docs/run_folder.md").read_text(encoding="utf-8")
    undocumented = [n for n in (*DIRECTIONS, *BASELINE.tensors(), "strengths", "vector") if f"`{n}`" not in table]
    assert not undocumented


def test_a_date_that_is_none_is_refused() -> None:
    date = torch.tensor(list(b"2024-13-01"), dtype=torch.uint8)
    with pytest.raises(ValueError):
        Baseline.from_tensors({**BASELINE.tensors(), "template_date": date})


@pytest.mark.parametrize("name", READERS)
def test_a_missing_or_spoiled_tensor_is_refused(name: str) -> None:
    reader, whole = READERS[name]
    for key, tensor in whole.items():
        if key not in MAY_LACK:
            with pytest.raises(ValueError):
                reader({k: t for k, t in whole.items() if k != key})
        for how, spoil in SPOILED.items():
            if key == "separation" and how == "not finite":
                continue
            with pytest.raises(ValueError):
                reader({**whole, key: spoil(tensor)})
                pytest.fail(f"{key}: {how}")


@pytest.mark.parametrize("told", [b"", b"[]", b"{", b"[" * 100_000, b'{"steps": -1}', b"\xff"])
def test_a_spoiled_state_is_refused(told: bytes) -> None:
    with pytest.raises(ValueError):
        optimizer_state_from_tensors(
            {**optimizer_state_tensors(STATE), "state": torch.tensor(list(told), dtype=torch.uint8)}
        )


def test_a_run_folder_moves_such_a_file_aside(tmp_path: Path) -> None:
    folder, reporter = RunFolder(tmp_path, "stamp"), RecordingReporter()
    for name, read in (
        ("directions", folder.load_directions),
        ("baseline", folder.load_baseline),
        ("gradient_path", folder.load_path_state),
        ("input_maps", folder.load_input_maps),
    ):
        file = tmp_path / f"{name}.safetensors"
        write_tensors(file, {"of_another_program": torch.ones(2)}, {"fingerprint": "stamp"})
        if name == "baseline":  # without answers it would be of an earlier version
            write_tensors(file, {**BASELINE.tensors(), "refused": torch.ones(2)}, {"fingerprint": "stamp"})
        assert read(reporter) is None and not file.exists() and file.with_suffix(".damaged").is_file()
    assert len(reporter.warnings) == 4
    write_tensors(tmp_path / "geometry.safetensors", {"cosines": torch.ones(2)}, {"fingerprint": "stamp"})
    assert folder.load_geometry() is None and folder.path_steps() == 0


def test_directions_of_another_model_are_not_used(tmp_path: Path) -> None:
    RunFolder(tmp_path, "another").save_directions(Directions(torch.eye(3)))
    assert RunFolder(tmp_path, "stamp").load_directions(RecordingReporter()) is None


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "directions.safetensors")
    with pytest.raises(UserError) as refused:
        read_tensors(tmp_path / "directions.safetensors")
    assert refused.value.code == "damaged-file"


def test_operators_beyond_any_edit_are_refused() -> None:
    far = {name: torch.full_like(tensor, 1e30) for name, tensor in operator_tensors(OPERATORS).items()}
    with pytest.raises(ValueError, match="above"):
        operators_from_tensors(far)
