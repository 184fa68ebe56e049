"""The main job on one GPU and spread over four, pretend ones: the CPU's results, and no bytes left behind."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import pytest
import torch

from heretic.ablation.ablation import Ablation
from heretic.ablation.apply import apply_operators
from heretic.ablation.directions import Directions, normalized
from heretic.ablation.geometries.conditional import input_map
from heretic.ablation.operator_factory import OperatorFactory
from heretic.errors import UserError
from heretic.interrupt import StopSignal
from heretic.model import decoding
from heretic.model.batching import Batch, Batcher, EditSpec
from heretic.model.capture import last_token_residuals
from heretic.model.checkpoint import open_checkpoint
from heretic.model.decoding import StopCriteria, decode, verify_draft
from heretic.model.forward import next_token_log_probs, supports_prefix_caching
from heretic.model.input_capture import writer_inputs
from heretic.model.loading import LanguageModel, load
from heretic.model.turns import finish
from heretic.pipeline.actions import export_from_run, start_chat
from heretic.pipeline.run import Outcome, run
from heretic.pipeline.run_context import RunContext
from heretic.planning import memory_plan
from heretic.planning.memory_plan import MemoryPlan
from heretic.progress import NullReporter
from heretic.scoring.divergence import measure_divergence
from heretic.scoring.gradient_loss import Objective
from heretic.scoring.teacher_forcing import TeacherForcedTexts, all_log_probs
from heretic.search import path_optimizer
from heretic.settings.sources import resolve
from tests.helpers.pretend_gpus import PretendGpus
from tests.helpers.spread import TIED, spread
from tests.helpers.turns import at_once
from tests.tiny import FAMILIES, MIXED, save_prompts, save_tiny

pytestmark = pytest.mark.usefixtures("cuda")

Start = Literal["kernels", "gradient"]
TRIED = ("llama", "gemma3", "mixtral", "gpt2")
SEEDS = {("gradient", "gemma3"): 1, ("gradient", "mixtral"): 1}  # with these enough prompts are "refused"
SYSTEM = "please tell me about the stars and rivers and music and history now"
SETTINGS = (
    "n_trials=2", "max_response_length=6", "batch_size=64", 'dtypes=["float32"]', "max_kl=50.0", 'run_name="run"',
    "trials_per_batch=2", 'response_prefix=""', f'system_prompt="{SYSTEM}"', "search.n_startup_trials=2",
)  # fmt: skip
STARTS: dict[Start, tuple[str, ...]] = {
    "kernels": ('search.start="kernels"', 'refusal_markers=["bread","soup","music","help","sorry","request"]'),
    "gradient": (
        'search.start="gradient"', "search.gradient.sparsity=0", "search.gradient.weights=[5]", "search.gradient.steps=2",
        "search.gradient.batch=4", "search.gradient.refusal_tokens=2", "search.gradient.second_search=false",
        'refusal_markers=["a","e","i","o","u","r","s","t","n"]',
    ),
}  # fmt: skip
CHAT = [{"role": "user", "content": "write about bread"}]


def device_map(family: str, count: int) -> str:
    """The setting for no GPU, one, or four."""
    rows = ", ".join(f'"{name}"={gpu}' for name, gpu in spread(family).items())
    return {0: 'device_map="cpu"', 1: 'device_map="cuda:0"', 4: f"device_map={{{rows}}}"}[count]


@dataclass
class Study:
    """What a study came to: (refusals, KL) by trial, the KL of the export, an answer of the chat, what each objective of the
    gradient search was, the plan; and the bytes on every GPU by moment."""

    outcome: Outcome | None = None
    answer: str = ""
    proof: float = -1.0
    readings: list[tuple[float, list[float]]] = field(default_factory=list)
    plan: MemoryPlan | None = None
    bytes: dict[str, list[int]] = field(default_factory=dict)

    @property
    def refusals(self) -> list[int]:
        assert self.outcome is not None
        return [result.scores.refusals for result in self.outcome.results]

    @property
    def divergences(self) -> list[float]:
        assert self.outcome is not None
        return [result.scores.divergence.mean for result in self.outcome.results]


def make(
    family: str, start: Start, placed: str, gpus: PretendGpus | None, *more: str, folder: Path, whole: bool = True
) -> Study:
    """Run a study in `folder`; a `whole` one chats and exports after it."""
    found, plan, step = Study(), memory_plan.make_plan, path_optimizer.PathOptimizer.step

    def note(moment: str) -> None:
        found.bytes[moment] = list(gpus.used) if gpus else []

    def then(run_context: RunContext) -> None:
        note("studied")
        if whole:
            _, say = start_chat(run_context, None, 3)
            found.answer = say(CHAT, True, lambda _: None)
            found.proof = export_from_run(run_context, None, folder / "exported").export.verification.divergence
            note("exported")

    def planned(*args: object, **kwargs: object) -> MemoryPlan:
        found.plan = plan(*args, **kwargs)  # type: ignore[arg-type]
        return found.plan

    def stepped(*args: object) -> object:
        reading = step(*args)  # type: ignore[arg-type]
        found.readings.append((reading.kl, [float(g.norm()) for g in reading.gradients]))
        return reading

    model = folder / f"tiny-{family}"
    if not model.exists():
        save_tiny(model, family, SEEDS.get((start, family), 0))
    prompts = save_prompts(folder / "prompts")
    lines = [f'model = "{model}"', *(f'[prompts.{role}]\nsource = "{path}"' for role, path in prompts.items())]
    (folder / "config.toml").write_text("\n".join(lines))
    runs = f'runs_dir="{folder / "runs"}"'
    torch.manual_seed(0)
    with (
        mock.patch.object(memory_plan, "make_plan", planned),
        mock.patch.object(path_optimizer.PathOptimizer, "step", stepped),
        mock.patch.object(path_optimizer, "MAX_EXTRA_WEIGHTS", 0),
    ):
        resolved = resolve(folder / "config.toml", assignments=[*SETTINGS, *STARTS[start], placed, runs, *more])
        found.outcome = run(resolved, reporter=NullReporter(), stop=StopSignal(), on_finished=then)
    note("left")
    return found


@pytest.fixture(autouse=True)
def no_kept_errors() -> Iterator[None]:
    """pytest keeps what is logged, errors with it, and with their tracebacks the tensors of every frame."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def cpu_studies() -> dict[tuple[str, Start], Study]:
    """The CPU's studies, made once each."""
    return {}


@pytest.mark.parametrize(
    ("family", "start", "count"),
    [
        *((family, "gradient", 4) for family in TRIED),
        *((family, "kernels", 4) for family in ("llama", "gemma3")),  # an untied and a tied head
        *((family, "kernels", 1) for family in ("gpt2", "mixtral")),
        ("llama", "gradient", 1),
    ],
)
def test_study_chat_and_export_give_the_cpu_s_results_and_their_memory_back(
    family: str, start: Start, count: int, cpu_studies: dict[tuple[str, Start], Study], tmp_path: Path
) -> None:
    whole, cpu = start == "gradient", tmp_path / "cpu"
    if (family, start) not in cpu_studies:
        cpu.mkdir()
        cpu_studies[family, start] = make(family, start, device_map(family, 0), None, folder=cpu, whole=whole)
    expected = cpu_studies[family, start]
    graphs = "decoding_graphs=true" if count == 1 else "decoding_graphs=false"
    interval = 2 if count == 1 else decoding.DEFAULT_SYNC_INTERVAL  # graphs do not pay for so short answers otherwise
    with PretendGpus(count) as gpus, mock.patch.object(decoding, "DEFAULT_SYNC_INTERVAL", interval):
        found = make(family, start, device_map(family, count), gpus, graphs, folder=tmp_path, whole=whole)
    replayed = sum(kinds["graph"] for kinds in gpus.kinds.values())
    assert (replayed > 0) == (count == 1)
    assert found.refusals == expected.refusals and found.answer == expected.answer
    assert found.divergences == pytest.approx(expected.divergences, abs=1e-6)
    assert len(found.readings) == len(expected.readings) == (2 if start == "gradient" else 0)
    for (kl, norms), (cpu_kl, cpu_norms) in zip(found.readings, expected.readings, strict=True):
        assert kl == pytest.approx(cpu_kl, abs=1e-6) and norms == pytest.approx(cpu_norms, rel=1e-3)
    assert min(found.bytes["studied"]) > 0, "every GPU had a part of the model"
    assert found.bytes["left"] == [0] * count
    if whole:
        assert 0 <= found.proof < 1e-6 and found.bytes["exported"] == [0] * count


def test_second_study_in_the_same_process_takes_no_more_memory(tmp_path: Path) -> None:
    with PretendGpus(4) as gpus:
        first = make("llama", "kernels", device_map("llama", 4), gpus, folder=tmp_path, whole=False)
        peak = list(gpus.peak)
        gpus.reset()
        second = make(
            "llama", "kernels", device_map("llama", 4), gpus, 'run_name="again"', folder=tmp_path, whole=False
        )
        assert gpus.peak == peak
    assert min(first.bytes["studied"]) > 0 and first.bytes == second.bytes and first.bytes["left"] == [0, 0, 0, 0]
    assert second.divergences == first.divergences


def test_failed_model_leaves_its_memory_to_the_next_plan(tmp_path: Path) -> None:
    """An error after loading: hooks of a spread model are reference cycles, and the next plan must not count them."""
    with PretendGpus(4) as gpus:
        with (
            mock.patch("heretic.session.session.measure_baseline", side_effect=UserError("no", code="tried")),
            pytest.raises(UserError) as error,
        ):
            make("llama", "kernels", device_map("llama", 4), gpus, folder=tmp_path, whole=False)
        assert error.value.code == "tried" and max(gpus.used) == 0, "its traceback holds no weights"
        del error
        again = make("llama", "kernels", device_map("llama", 4), gpus, folder=tmp_path, whole=False)
    assert again.plan is not None
    assert all(load.device.free == 24 << 30 for load in again.plan.loads)


@pytest.mark.parametrize("family", [family for family in (*FAMILIES, *MIXED) if family not in TRIED])
def test_every_family_is_dissected_and_answers_over_four_gpus_as_on_the_cpu(family: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(save_tiny(tmp_path / family, family)))
    sequences = [[5 + (i * 7 + j) % 80 for j in range(8 + i % 3)] for i in range(3)]

    def measured(placed: dict[str, object]) -> tuple[torch.Tensor, list[tuple[str, int]], object]:
        model = load(checkpoint, ["float32"], {"device_map": placed})
        batch = Batcher(8, model.device).batch([0, 1, 2], sequences)
        writers = [(writer.name, len(writer.norms)) for writer in model.structure.writers]
        return next_token_log_probs(model.model, batch).cpu(), writers, model.structure.incomplete

    expected = measured({"": "cpu"})
    with PretendGpus(4):
        found = measured(dict(spread(family)))
    assert found[1:] == expected[1:]
    assert float((expected[0].exp() * (expected[0] - found[0])).sum(-1).abs().max()) < 1e-6


@contextmanager
def llama_over_four() -> Iterator[tuple[PretendGpus, object]]:
    with ExitStack() as stack:
        gpus = stack.enter_context(PretendGpus(4))
        folder = save_tiny(Path("llama"))
        yield gpus, load(open_checkpoint(str(folder)), ["float32"], {"device_map": spread("llama")})


SEQUENCES = [[5 + j for j in range(12)] + [5 + (i * 7 + j) % 80 for j in range(4 + i % 3)] for i in range(8)]


def test_memory_that_runs_out_halves_the_batch_and_changes_no_answer() -> None:
    with llama_over_four() as (gpus, loaded):
        batcher = Batcher(8, loaded.device)

        @at_once
        def step(batch: Batch) -> list[torch.Tensor]:
            return list(next_token_log_probs(loaded.model, batch).cpu())

        weights = list(gpus.used)
        gpus.reset()
        expected = torch.stack(batcher.run("all the memory", SEQUENCES, step))
        gpus.limit[:] = [w + (p - w) * 2 // 3 for w, p in zip(weights, gpus.peak, strict=True)]
        found = torch.stack(batcher.run("two thirds", SEQUENCES, step))
        assert gpus.ooms and batcher.size < 8
        assert torch.allclose(found, expected, atol=1e-5)


def test_memory_that_runs_out_is_not_taken_for_an_architecture_that_cannot_share() -> None:
    with llama_over_four() as (gpus, loaded):
        gpus.limit[:] = [used + 100 for used in gpus.used]
        with pytest.raises(torch.OutOfMemoryError):
            supports_prefix_caching(loaded.model, SEQUENCES, Batcher(8, loaded.device))


def test_memory_that_runs_out_while_loading_is_an_error() -> None:
    folder = save_tiny(Path("llama"))
    with PretendGpus(4) as gpus, pytest.raises(UserError) as error:
        gpus.limit[2] = 8000
        load(open_checkpoint(str(folder)), ["float32"], {"device_map": spread("llama")})
    assert error.value.code == "out-of-memory"


def test_module_that_moves_its_input_to_another_gpu_is_a_mismatch() -> None:
    table = spread("gpt2") | {"lm_head": 3}  # tied to the embedding on the first
    folder = save_tiny(Path("gpt2"), "gpt2")
    with PretendGpus(4), pytest.raises(UserError) as error:
        load(open_checkpoint(str(folder)), ["float32"], {"device_map": table})
    assert error.value.code == "device-mismatch" and error.value.where == "device_map"


@pytest.mark.parametrize(("family", "count"), [("llama", 1), ("gemma3", 2), ("mixtral", 4), ("gpt2", 4)])
def test_host_waits_for_results_only(family: str, count: int, tmp_path: Path) -> None:
    """Once for a pass and its gradients, once for 12 decoded tokens; the logits stay where the head is."""
    checkpoint = open_checkpoint(str(save_tiny(tmp_path / family, family)))
    rows, texts = list(range(8)), [[7, 8]] * 8
    harmless, harmful = (TeacherForcedTexts.of(SEQUENCES, texts) for _ in range(2))

    def waits(work: Callable[[], object]) -> int:
        gpus.reset()
        work()
        return sum(gpus.syncs["-"].values())

    with PretendGpus(count) as gpus:
        model = load(checkpoint, ["float32"], {"device_map": spread(family, count)})
        structure, batcher = model.structure, Batcher(8, model.device)
        directions = Directions(torch.nn.functional.normalize(torch.randn(4, structure.width), dim=-1))
        factory = OperatorFactory.prepare(directions, structure.writers, "norm_preserving")
        original = all_log_probs(model, harmless, batcher, "original")
        objective = Objective(model, factory, batcher, harmless, harmful, original.split(harmless.counts))
        strengths, vector = torch.full((2, 4), 0.5, requires_grad=True), torch.ones(structure.width, requires_grad=True)
        ablation = Ablation(dict(zip(structure.components, strengths, strict=True)), vector=vector)

        def ablated() -> None:
            operators = factory.operators(Ablation({"mlp": (0.5,) * 4}))
            with apply_operators(structure.writers, operators, {}):
                measure_divergence(model, harmless, original, batcher, EditSpec(2))

        def decoded(tokens: int) -> tuple[int, int]:
            found = waits(lambda: finish(decode(model.model, batcher.batch(rows, SEQUENCES), tokens, set())))
            return found, sum(size for (_, _, to, _), size in gpus.peer_bytes.items() if to == 0)

        def verified() -> None:
            batch = batcher.batch(rows, [[*sequence, *text] for sequence, text in zip(SEQUENCES, texts, strict=True)])
            finish(verify_draft(model.model, batch, texts, StopCriteria(1, set())))

        assert waits(verified) == 1
        assert not {key for key in gpus.peer_bytes if key[1] > key[2]} or family in TIED, "nothing returns to a GPU"
        assert waits(lambda: finish(last_token_residuals(model, batcher.batch(rows, SEQUENCES)))) == count
        assert waits(ablated) == 2, "two batches"
        wanted = [strengths, vector]
        assert waits(lambda: objective.evaluate(ablation, 0, rows, rows, wanted=wanted)) == 2, (
            "gradients, then the sums"
        )
        (few, _), (many, to_first) = decoded(1), decoded(13)
        assert many - few == 1
        # Token ids; and the hidden states, where the head lies with the embedding on the first GPU.
        ids, hidden = 8 * 8, 8 * structure.width * 4 * (family in TIED)
        assert to_first / 13 <= ids + hidden


def losses_and_gradients(
    model: LanguageModel, factory: OperatorFactory, texts: TeacherForcedTexts, component: str
) -> list[torch.Tensor]:
    """KL and refusal probability of an ablation with a vector, KLs of two trials of which the second edits nothing; gradients."""
    batcher, components = Batcher(8, model.device), model.structure.components
    original = all_log_probs(model, texts, batcher, "original")
    strengths = torch.full((len(components), 4), 0.5, requires_grad=True)
    vector = torch.ones(factory.directions.all_directions[0].numel(), requires_grad=True)
    ablation = Ablation(dict(zip(components, strengths, strict=True)), vector=vector)
    objective = Objective(model, factory, batcher, texts, texts, original.split(texts.counts))
    found = objective.evaluate(ablation, 0, range(8), range(8), wanted=[strengths, vector])
    with apply_operators(factory.writers, factory.operators(Ablation({component: (0.5,) * 4})), {}):
        trials = measure_divergence(model, texts, original, batcher, EditSpec(2))
    return [torch.tensor([found.kl, found.probability, *(d.mean for d in trials)]), *found.gradients]


@pytest.mark.parametrize("geometry", ["plain", "norm_preserving"])
def test_readers_over_four_gpus_have_the_cpu_s_losses_and_gradients(tmp_path: Path, geometry: str) -> None:
    checkpoint = open_checkpoint(str(save_tiny(tmp_path / "m", "llama")))
    texts = TeacherForcedTexts.of(SEQUENCES, [[7, 8]] * 8)
    directions = normalized(torch.randn(4, 1, 32, generator=torch.Generator().manual_seed(1)))

    def measured(placed: dict[str, Any]) -> list[torch.Tensor]:
        model = load(checkpoint, ["float32"], placed, readers=True)
        factory = OperatorFactory.prepare(directions, model.structure.writers, geometry)
        return losses_and_gradients(model, factory, texts, "mlp_inputs")

    expected = measured({})
    assert all(bool(row.any()) for row in expected[1]), "every component has gradients"
    with PretendGpus(4):
        for found, on_cpu in zip(measured({"device_map": spread("llama", 4)}), expected, strict=True):
            assert torch.allclose(found, on_cpu, rtol=1e-3, atol=1e-6)


def test_conditional_edit_over_four_gpus_has_the_cpu_s_inputs_losses_and_gradients(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(save_tiny(tmp_path / "m", "llama")))
    texts = TeacherForcedTexts.of(SEQUENCES, [[7, 8]] * 8)
    directions = normalized(torch.randn(4, 2, 32, generator=torch.Generator().manual_seed(1)))

    def measured(placed: dict[str, Any]) -> list[torch.Tensor]:
        model = load(checkpoint, ["float32"], placed)
        writers, batcher = model.structure.writers, Batcher(8, model.device)
        keys = writer_inputs(model, writers, "Inputs", SEQUENCES, [[1, 2, 3]] * 8, batcher)
        maps = {w.name: input_map(w.weight(), keys[w.name][:12], keys[w.name][12:]) for w in writers}
        factory = OperatorFactory.prepare(directions, writers, "conditional", input_maps=maps)
        return [*losses_and_gradients(model, factory, texts, "mlp"), *(keys[w.name] for w in writers)]

    expected = measured({})
    assert expected[0].min() < 1e-6 < 1e-3 < expected[0].max(), "the second trial edits nothing"
    with PretendGpus(4):
        for found, on_cpu in zip(measured({"device_map": spread("llama", 4)}), expected, strict=True):
            assert torch.allclose(found, on_cpu, rtol=1e-3, atol=1e-6)
