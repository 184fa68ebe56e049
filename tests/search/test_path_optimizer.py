"""The descent: true gradients, exact zeros, resumable, and better than where it began."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from heretic.ablation.ablation import Ablation
from heretic.ablation.apply import apply_operators
from heretic.ablation.directions import Directions, normalized, orthonormal
from heretic.ablation.geometries import GEOMETRIES
from heretic.ablation.operator_factory import OperatorFactory
from heretic.ablation.weight_stats import stats_for_directions
from heretic.errors import Interrupted
from heretic.interrupt import StopSignal
from heretic.model.activation_cache import allocate_cache
from heretic.model.batching import Batcher
from heretic.model.chat_format import ChatFormat
from heretic.model.checkpoint import open_checkpoint
from heretic.model.loading import load
from heretic.progress import NULL_REPORTER
from heretic.runs.folder import RunFolder
from heretic.scoring.gradient_loss import Objective
from heretic.scoring.teacher_forcing import TeacherForcedTexts, log_probs_at
from heretic.search import path_optimizer
from heretic.search.path_optimizer import MinedRefusals, OptimizerState, PathOptimizer
from heretic.settings import GradientSettings
from tests.helpers.facts import facts_for, in_float64
from tests.tiny import FAMILIES, HARMFUL, HARMLESS, save_tiny

SETTINGS = GradientSettings(weights=[0.5, 2.0], steps=4, batch=4, prompts=8, sparsity=0.0, refusal_tokens=2)


def objective(folder: Path, geometry: str = "norm_preserving", *, more: bool = False, kl_tokens: int = 2) -> Objective:
    """The first 8 prompts of each kind; the model's own most probable words stand for its refusals."""
    model = load(open_checkpoint(str(folder)), ["float32"], {})
    chat = ChatFormat(model.tokenizer)
    torch.manual_seed(3)
    directions = Directions(torch.nn.functional.normalize(torch.randn(4, 32), dim=-1))
    operator_factory = OperatorFactory.prepare(directions, model.structure.writers, geometry)
    batcher = Batcher(3)
    asked = chat.encode(HARMFUL[:8])
    words = [[int(t[0].argmax())] for t in log_probs_at(model, TeacherForcedTexts.of(asked, [[0]] * 8), batcher)]
    harmful = TeacherForcedTexts.of(asked, [[*word, *([9] if more else [])] for word in words])
    harmless = TeacherForcedTexts.of(chat.encode(HARMLESS[:8]), [[11] * kl_tokens] * 8)
    return Objective(model, operator_factory, batcher, harmless, harmful, log_probs_at(model, harmless, batcher))


def begin(of: Objective, kind: str = "free") -> OptimizerState:
    return OptimizerState.initial(2, of.operator_factory.directions, kind)


def optimizer(of: Objective, settings: GradientSettings = SETTINGS, **more: object) -> PathOptimizer:
    components = of.language_model.structure.components
    return PathOptimizer(of, components, settings, 0, NULL_REPORTER, StopSignal(), **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_gradients_of_every_geometry_are_true_in_float64(geometry: str) -> None:
    torch.manual_seed(0)
    weight, vectors = torch.randn(12, 7), torch.nn.functional.normalize(torch.randn(3, 12), dim=-1)
    facts = in_float64(facts_for(geometry, weight, vectors))
    directions, x = Directions(vectors.double()), torch.randn(5, 7, dtype=torch.float64)
    y = x @ weight.double().mT

    def edited(strength: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
        mix = coefficients / (coefficients @ directions.vectors).norm()
        vector = torch.nn.functional.normalize(mix @ directions.vectors, dim=0)
        return GEOMETRIES[geometry](vector, strength, facts, mix)(y, x)

    for strength in (0.0, 0.6, 1.4):
        inputs = (
            torch.tensor(strength, dtype=torch.float64, requires_grad=True),
            torch.tensor([0.3, 1.0, -0.2], dtype=torch.float64, requires_grad=True),
        )
        assert torch.autograd.gradcheck(edited, inputs)


def facts_of_vectors(geometry: str, weight: torch.Tensor) -> Callable[[torch.Tensor], Any]:
    """The facts of a weight for directions with gradients."""
    if GEOMETRIES[geometry].needs == "weight_stats":
        return lambda vectors: stats_for_directions(vectors, weight, weight.norm(dim=1))
    fixed = in_float64(facts_for(geometry, weight, torch.empty(0)))
    return lambda _vectors: fixed


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_several_directions_have_true_gradients(geometry: str) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(12, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    facts = facts_of_vectors(geometry, weight)

    def edited(strength: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
        rows, _ = orthonormal(vectors.unflatten(0, (3, 12)))
        return GEOMETRIES[geometry](rows, strength, facts(rows), torch.eye(3).double())(x @ weight.mT, x)

    vectors = torch.randn(36, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(edited, (torch.tensor(0.7, dtype=torch.float64, requires_grad=True), vectors))


@pytest.mark.parametrize("kind", ["per_layer", "free"])
def test_a_search_with_several_directions_lowers_its_loss_and_resumes(llama: Path, kind: str, tmp_path: Path) -> None:
    of = objective(llama)
    torch.manual_seed(3)
    writers = of.language_model.structure.writers
    of = replace(
        of, operator_factory=OperatorFactory.prepare(normalized(torch.randn(4, 2, 32)), writers, "norm_preserving")
    )
    whole = optimizer(of).run(begin(of, kind))
    train = range(6), range(6)
    before, after = (of.evaluate(a, 0, *train) for a in (Ablation({}), whole[-1].ablation))
    assert after.kl + 2.0 * after.refusing < before.kl + 2.0 * before.refusing
    if kind == "free":
        assert whole[-1].vector is not None and len(whole[-1].vector) == 2 * 32
        pair = torch.tensor(whole[-1].vector).view(2, 32)
        assert float(torch.nn.functional.normalize(pair, dim=1).prod(dim=0).sum().abs()) < 0.9
    folder = RunFolder(tmp_path, "stamp")

    def cut(state: OptimizerState) -> None:
        folder.save_path_state(state)
        if state.steps == 5:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        optimizer(of, save_state=cut).run(begin(of, kind))
    state = folder.load_path_state(NULL_REPORTER)
    assert state is not None and optimizer(of).run(state) == whole


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_direction_of_its_own_has_true_gradients_too(geometry: str) -> None:
    torch.manual_seed(0)
    weight, strength = torch.randn(12, 7, dtype=torch.float64), torch.tensor(0.8, dtype=torch.float64)
    x, facts = torch.randn(5, 7, dtype=torch.float64), facts_of_vectors(geometry, weight)

    def edited(vector: torch.Tensor) -> torch.Tensor:
        unit = torch.nn.functional.normalize(vector, dim=0)
        return GEOMETRIES[geometry](unit, strength, facts(unit), unit.new_ones(1))(x @ weight.mT, x)

    vector = torch.randn(12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(edited, (vector,))


def test_a_vector_inside_the_span_is_the_same_as_its_mixture(llama: Path) -> None:
    of = objective(llama)
    strengths, mixture = {"attention": (0.0, 0.5, 1.2, 0.3), "mlp": (0.9, 0.0, 0.4, 0.0)}, (0.2, 1.0, 0.5, -0.3)
    vector = torch.tensor(mixture) @ of.operator_factory.directions.vectors
    with torch.no_grad():
        one = of.operator_factory.operators(Ablation(strengths, mixture))
        other = of.operator_factory.operators(Ablation(strengths, vector=3 * vector))
    assert one.keys() == other.keys()
    for name, operator in one.items():
        y = torch.randn(3, 32)
        assert torch.allclose(operator(y), other[name](y), atol=1e-4)


def test_a_free_direction_leaves_the_span_less_the_more_it_costs(llama: Path) -> None:
    of = objective(llama)
    span = torch.linalg.qr(of.operator_factory.directions.vectors.T).Q

    def outside(leaving: float) -> float:
        settings = SETTINGS.model_copy(update={"direction": "free", "off_span_penalty": leaving})
        *_, last = optimizer(of, settings).run(begin(of, "free"))
        unit = torch.nn.functional.normalize(torch.tensor(last.vector), dim=0)
        return float((unit - span @ (span.T @ unit)).norm())

    assert outside(0.0) > 0.05 and outside(10.0) < 0.7 * outside(0.0)


def test_a_direction_waits_for_the_first_strength(llama: Path) -> None:
    """At strengths of 0 it has no gradient, and the penalty's is rounding, which differs from machine to machine."""
    of = objective(llama)
    state = begin(of, "free")
    assert state.vector is not None
    before, search = state.vector.clone(), optimizer(of)
    search.step(state)
    assert bool(state.strengths.any()) and torch.equal(state.vector, before)
    search.step(state)
    assert not torch.equal(state.vector, before)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_losss_gradient_is_its_slope(family: str, tmp_path: Path) -> None:
    of = objective(save_tiny(tmp_path, family), more=True)
    strengths = torch.full((2, 4), 0.4)
    vector = torch.tensor([0.2, 1.0, 0.5, -0.3]) @ of.operator_factory.directions.vectors
    rows = list(range(8))

    def loss(s: torch.Tensor, v: torch.Tensor, **wanted: object) -> object:
        ablation = Ablation({"attention": s[0], "mlp": s[1]}, vector=v)
        return of.evaluate(ablation, 0, rows, rows, weight=2.0, **wanted)  # type: ignore[arg-type]

    leaves = [strengths.clone().requires_grad_(), vector.clone().requires_grad_()]
    gradients = loss(*leaves, wanted=leaves).gradients  # type: ignore[attr-defined]
    for which, tensor in enumerate((strengths, vector)):
        torch.manual_seed(which)
        towards = torch.randn_like(tensor)
        step = 3e-3
        values = []
        for sign in (1, -1):
            moved = [strengths, vector]
            moved[which] = tensor + sign * step * towards
            reading = loss(*moved)
            values.append(reading.kl + 2.0 * reading.refusing)  # type: ignore[attr-defined]
        slope = (values[0] - values[1]) / (2 * step)
        assert float((gradients[which] * towards).sum()) == pytest.approx(slope, rel=0.02, abs=2e-4)


@pytest.mark.parametrize("way", ["shared beginning", "computed twice", "later", "small batches"])
def test_every_way_of_saving_gives_the_same_gradient(way: str, llama: Path) -> None:
    plain = objective(llama)
    strengths = torch.zeros(2, 4)
    strengths[:, 2:] = 0.5
    of = plain
    if way == "shared beginning":
        of = replace(plain, batcher=replace(plain.batcher, prefix_caching=True))
    if way == "computed twice":
        of = replace(plain, recompute_activations=True, batcher=replace(plain.batcher, prefix_caching=True))
    if way == "small batches":
        of = replace(plain, batcher=replace(plain.batcher, size=1))
    if way == "later":
        blocks = plain.language_model.structure.blocks

        def kept(taught: TeacherForcedTexts) -> TeacherForcedTexts:
            room = allocate_cache(
                blocks, taught.sequences, [], with_cache=False, bytes_per_token=(128, 128), budget=10**7
            )
            return replace(taught, entries=room)

        of = replace(plain, harmless=kept(plain.harmless), harmful=kept(plain.harmful))

    def gradients(o: Objective) -> tuple[torch.Tensor, ...]:
        leaf = strengths.clone().requires_grad_()
        ablation = Ablation({"attention": leaf[0], "mlp": leaf[1]})
        return o.evaluate(ablation, 2, range(8), range(8), wanted=[leaf]).gradients

    (expected,) = gradients(plain)
    assert expected[:, 2:].abs().min() > 0
    for _ in range(2):  # the second time, what the first has kept is used
        (found,) = gradients(of)
        assert torch.allclose(found, expected, rtol=1e-3, atol=1e-6)


def test_the_search_goes_from_gentle_to_strict_and_lowers_its_loss(llama: Path) -> None:
    of = objective(llama)
    down = optimizer(of)
    before = down.validate(begin(of))
    gentle, strict = down.run(begin(of))
    assert before.kl == pytest.approx(0, abs=1e-6)
    assert strict.probability < before.probability and gentle.kl <= strict.kl
    assert strict.kl + 2.0 * strict.probability < before.kl + 2.0 * before.probability
    assert gentle.vector is not None and gentle.vector != strict.vector


def test_a_penalty_keeps_what_is_not_worth_it_at_exactly_zero(llama: Path) -> None:
    of = objective(llama)
    (free,) = optimizer(of, SETTINGS.model_copy(update={"weights": [1.0]})).run(begin(of, "per_layer"))
    held = optimizer(of, SETTINGS.model_copy(update={"weights": [1.0], "sparsity": 0.03}))
    (sparse,) = held.run(begin(of, "per_layer"))

    def zeros(point: object) -> int:
        return sum(s == 0.0 for profile in point.strengths.values() for s in profile)  # type: ignore[attr-defined]

    assert zeros(sparse) > zeros(free)
    (none,) = optimizer(of, SETTINGS.model_copy(update={"weights": [1.0], "sparsity": 50.0})).run(begin(of))
    assert zeros(none) == 8


def test_interrupted_anywhere_it_reaches_the_same_path(llama: Path, tmp_path: Path) -> None:
    of, folder = objective(llama), RunFolder(tmp_path, "stamp")
    whole = optimizer(of).run(begin(of))

    class After(Exception):
        pass

    def cut(state: OptimizerState) -> None:
        folder.save_path_state(state)
        if state.steps in (3, 4, 6):
            raise After

    for _ in range(3):
        with pytest.raises(After):
            optimizer(of, save_state=cut).run(folder.load_path_state(NULL_REPORTER) or begin(of))
    state = folder.load_path_state(NULL_REPORTER)
    assert state is not None and state.steps == 6 and len(state.points) == 1
    assert optimizer(of, save_state=cut).run(state) == whole
    assert RunFolder(tmp_path, "another").load_path_state(NULL_REPORTER) is None


def listening(
    of: Objective, settings: GradientSettings = SETTINGS, **more: object
) -> tuple[PathOptimizer, MinedRefusals]:
    """An optimizer that mines one refusal in other words than the original's: the second most probable one."""
    sequences = of.harmful.sequences
    (log_probs, *_) = log_probs_at(of.language_model, TeacherForcedTexts.of(sequences[:1], [[0]]), of.batcher)
    other = (0, [int(log_probs[0].topk(2).indices[1])])

    def teach(heard: Sequence[MinedRefusals]) -> Objective:
        prompts = [*sequences, *(sequences[row] for row, _ in heard)]
        return replace(of, harmful=TeacherForcedTexts.of(prompts, [*of.harmful.texts, *(text for _, text in heard)]))

    return optimizer(of, settings, mine=lambda _: ([other], 1), add_targets=teach, **more), other


def test_words_that_are_heard_on_the_way_become_improbable_too(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(path_optimizer, "MINE_BELOW", 1.0)
    of, settings = objective(llama), SETTINGS.model_copy(update={"weights": [0.5, 10.0], "steps": 10})
    listens, (row, text) = listening(of, settings)

    def probability(down: PathOptimizer, state: OptimizerState) -> float:
        down.run(state)
        ablation = state.points[-1].ablation
        with apply_operators(of.operator_factory.writers, of.operator_factory.operators(ablation)):
            (found,) = log_probs_at(
                of.language_model, TeacherForcedTexts.of([of.harmful.sequences[row]], [text]), of.batcher
            )
        return float(found[0, text[0]].exp())

    state = begin(of)
    deaf = probability(optimizer(of, settings), begin(of))
    assert probability(listens, state) < 0.9 * deaf
    assert state.extra_refusals == [(row, text)], "once is enough"
    assert not state.has_new_refusals or len(state.points) == 2


def test_new_refusals_are_mined_only_once_the_known_ones_are_improbable(llama: Path) -> None:
    of = objective(llama)
    listens, _ = listening(of)
    state = begin(of)
    assert listens.run(state)[0].probability > path_optimizer.MINE_BELOW / 10 or state.extra_refusals
    assert bool(state.extra_refusals) == (state.points[0].probability <= path_optimizer.MINE_BELOW)


def test_mined_refusals_are_stored_with_the_path(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(path_optimizer, "MINE_BELOW", 1.0)
    of, folder = objective(llama), RunFolder(tmp_path, "stamp")
    whole = listening(of)[0].run(begin(of))

    def cut(state: OptimizerState) -> None:
        folder.save_path_state(state)
        if state.steps in (4, 6):
            raise Interrupted

    for _ in range(2):
        with pytest.raises(Interrupted):
            listening(of, save_state=cut)[0].run(folder.load_path_state(NULL_REPORTER) or begin(of))
    state = folder.load_path_state(NULL_REPORTER)
    assert state is not None and state.extra_refusals and state.has_new_refusals
    assert listening(of)[0].run(state) == whole


def test_mined_refusals_stay_with_their_prompts(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, state = RunFolder(tmp_path, "stamp"), begin(objective(llama))
    state.remap_extra_refusals([2, 5, 7])
    state.extra_refusals = [(0, [3]), (2, [4]), (1, [9])]
    folder.save_path_state(state)
    again = folder.load_path_state(NULL_REPORTER)
    assert again is not None
    again.remap_extra_refusals([1, 2, 7])  # 5 is answered now, and 1 is refused
    assert again.extra_refusals == [(1, [3]), (2, [4])] and again.prompt_indices == [1, 2, 7]


def test_weights_too_gentle_to_change_anything_are_skipped_after_one_pass(llama: Path, tmp_path: Path) -> None:
    of = objective(llama)
    update = {"weights": [1e-9, 1e-8, 0.5, 2.0], "steps": 5, "sparsity": 1e-5}
    settings, state, seen = SETTINGS.model_copy(update=update), begin(of), []
    points = optimizer(of, settings, save_state=lambda now: seen.append(now.steps)).run(state)
    assert [p.weight for p in points] == [0.5, 2.0]
    assert seen == list(range(11, 21)), "no step at the two gentle weights"

    few = settings.model_copy(update={"weights": [1e-9, 1e-8]})
    assert [p.weight for p in optimizer(of, few).run(begin(of))] == [1e-8], "the last weight gives a point in any case"


def test_the_first_step_is_that_of_its_own_weight(llama: Path) -> None:
    """At strengths of 0 the gradient is the weight times that of the refusals, so one pass serves every weight."""
    of = objective(llama)
    settings = SETTINGS.model_copy(update={"weights": [0.5], "sparsity": 1e-5})
    state = begin(of)
    down = optimizer(of, settings)
    _, at_half = down._gradients(state, 0.5)
    _, at_one = down._gradients(state, 1.0)
    assert at_half["strengths"].abs().max() > 0
    assert torch.allclose(at_half["strengths"], 0.5 * at_one["strengths"], rtol=1e-4, atol=1e-7)


def test_it_goes_on_to_stricter_weights_while_prompts_are_refused(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(path_optimizer, "MINE_BELOW", 1.0)
    of = objective(llama)
    many: list[list[MinedRefusals]] = [
        [],
        [(0, [5])] * 3,
        [(1, [6])],
    ]  # of 8 prompts: none at the first point, three at the second
    left = list(many)

    def told(found: list[MinedRefusals]) -> tuple[list[MinedRefusals], int]:
        return found, len(found)

    down = optimizer(of, mine=lambda _: told(left.pop(0) if left else []))
    assert [p.weight for p in down.run(begin(of))] == [0.5, 2.0, 3.0, 4.5], "one of 8 is more than a tenth"

    always = optimizer(of, mine=lambda _: ([], 1))  # in the original's words
    assert len(always.run(begin(of))) == 2 + path_optimizer.MAX_EXTRA_WEIGHTS, "not for ever"

    folder, said = RunFolder(tmp_path, "stamp"), list(many)

    def cut(state: OptimizerState) -> None:
        folder.save_path_state(state)
        if state.steps == 9:
            raise Interrupted

    def first(_: object) -> tuple[list[MinedRefusals], int]:
        return told(said.pop(0) if said else [])

    with pytest.raises(Interrupted):
        optimizer(of, mine=first, save_state=cut).run(begin(of))
    state = folder.load_path_state(NULL_REPORTER)
    assert state is not None and state.extra_weights == 1
    assert [p.weight for p in optimizer(of, mine=first).run(state)] == [0.5, 2.0, 3.0, 4.5]


def test_points_that_leave_all_refusals_are_left_out_but_for_the_first_and_the_last(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(path_optimizer, "MINE_BELOW", 1.0)
    of = objective(llama)
    refused = [8, 8, 8, 4, 0]  # of 8 prompts, in other words at every point
    found = optimizer(of, mine=lambda _: ([], refused.pop(0))).run(begin(of))
    assert [p.weight for p in found] == [0.5, 4.5, 6.75] and not refused
    found = optimizer(of, mine=lambda _: ([], 8)).run(begin(of))
    assert [p.weight for p in found] == [0.5, 2.0 * 1.5**path_optimizer.MAX_EXTRA_WEIGHTS]
    assert found[0].probability == 1.0, "it refuses everything, in whatever words"


def test_a_point_that_is_left_out_does_not_end_the_search(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An earlier point may have a low probability of the words that were known then."""
    monkeypatch.setattr(path_optimizer, "CONVERGED_REFUSALS", 1.0)
    monkeypatch.setattr(path_optimizer, "MINE_BELOW", 1.0)
    settings = SETTINGS.model_copy(update={"weights": [0.5, 1.0, 2.0]})
    answers: list[tuple[list[MinedRefusals], int]] = [([(0, [5])], 4), ([], 8), ([], 0)]
    found = optimizer(objective(llama), settings, mine=lambda _: answers.pop(0)).run(begin(objective(llama)))
    assert [p.weight for p in found] == [0.5, 2.0]


def test_a_stop_ends_it_between_steps(llama: Path) -> None:
    of = objective(llama)
    down = optimizer(of)
    down.stop.requested = True
    with pytest.raises(Interrupted):
        down.run(begin(of))


def test_a_destroyed_model_does_not_poison_the_strengths(llama: Path) -> None:
    of = objective(llama)
    down, state = optimizer(of), begin(of)
    down.step(state)
    head = of.language_model.model.lm_head.weight
    kept = head.clone()
    head.fill_(float("nan"))
    down.step(state)
    head.copy_(kept)
    assert torch.isfinite(state.strengths).all() and state.vector is not None and torch.isfinite(state.vector).all()
    assert math.isfinite(down.step(state).kl)
