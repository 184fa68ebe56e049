"""heretic from Python: in a few lines what the commands do, on the same paths. docs/python.md shows it.

with load("MODEL", n_trials=50) as lab:
    edit = lab.ablation(attention=1.0)
    with lab.attach(edit):
        ...
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from heretic.ablation.ablation import Ablation
from heretic.ablation.directions import Directions
from heretic.ablation.residual_geometry import ResidualGeometry
from heretic.ablation.strength_kernel import StrengthKernel
from heretic.errors import UserError
from heretic.export.destination import check_destination
from heretic.export.export import Export, plan_export, write_export
from heretic.files import expand_user
from heretic.interrupt import StopSignal
from heretic.model.batching import Batch
from heretic.model.chat_format import check_length
from heretic.model.decoding import decode
from heretic.pipeline.prepare import prepare_run
from heretic.pipeline.run import Outcome, device_lock, open_locked_study, run
from heretic.pipeline.run_context import RunContext
from heretic.progress import NULL_REPORTER
from heretic.scoring.evaluator import Scores
from heretic.search.pareto import Result
from heretic.search.space import SearchSpace
from heretic.search.summary import StudyReporter
from heretic.session.session import Session, measure_residual_geometry, operator_factory_for
from heretic.settings import Settings
from heretic.settings.sources import Resolved, resolve


def study(
    model: str = "", *, config: str | Path | None = None, reporter: StudyReporter = NULL_REPORTER, **settings: Any
) -> Outcome:
    """`heretic run`: directions, trials, choice, and export if `save_to` is set; resumes. Raises UserError.

    Settings are named as in a settings file, tables are dictionaries: `search={"start": "kernels"}`. As for the command, a
    `config.toml` in the current folder and HERETIC_ variables count too.
    """
    return run(_resolved(model, config, settings), reporter=reporter, stop=StopSignal())


def load(
    model: str = "", *, config: str | Path | None = None, reporter: StudyReporter = NULL_REPORTER, **settings: Any
) -> AblationSession:
    """A model ready for ablations: loaded, with its directions and its answers measured, or read from its run's folder if they
    are there. Settings as for `study`. Its devices and its run are held until the lab is closed. Raises UserError."""
    resolved, stop = _resolved(model, config, settings), StopSignal()
    with ExitStack() as held:
        held.enter_context(device_lock(resolved.settings, wait=False, reporter=reporter, stop=stop))
        inputs = prepare_run(resolved.settings, force=False, reporter=reporter)
        inputs.folder.create()
        opened = held.enter_context(open_locked_study(inputs, wait=False, reporter=reporter, stop=stop))
        run_context = RunContext(resolved, inputs, opened, reporter, stop)
        run_context.save_settings()
        run_context.session()
        return AblationSession(run_context, held.pop_all())


@dataclass
class AblationSession:
    """A loaded model and what is known of it; closed at the end of a `with`, or by `close`."""

    run_context: RunContext
    _held: ExitStack = field(repr=False)
    _own: Directions | None = field(default=None, repr=False)

    def __enter__(self) -> AblationSession:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the model, of its devices and of its run."""
        self.run_context.unload()
        self._held.close()

    @property
    def session(self) -> Session:
        """The model in memory with all that measures it; loaded again after an export."""
        session = self.run_context.session()
        if self._own is None or session.operator_factory.directions is self._own:
            return session
        self.run_context.loaded = replace(session, operator_factory=operator_factory_for(session.context, self._own))
        return self.run_context.loaded

    @property
    def settings(self) -> Settings:
        """What it was loaded with."""
        return self.run_context.settings

    @property
    def model(self) -> Any:
        """The model itself, of transformers; within `attach` it is ablated."""
        return self.session.context.language_model.model

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer, of transformers."""
        return self.session.context.language_model.tokenizer

    @property
    def num_layers(self) -> int:
        """Number of its blocks."""
        return self.session.context.language_model.structure.num_layers

    @property
    def components(self) -> tuple[str, ...]:
        """Kinds of writers that it has, such as attention and mlp."""
        return self.session.context.language_model.structure.components

    @property
    def directions(self) -> Directions:
        """The direction of every layer."""
        return self.session.operator_factory.directions

    @directions.setter
    def directions(self, vectors: Tensor) -> None:
        """Go on with vectors of one's own [layers, width], which are scaled to norm 1. Raises UserError for another shape."""
        wanted = tuple(self.directions.vectors.shape)
        if tuple(vectors.shape) != wanted:
            raise UserError(
                f"The directions have shape {tuple(vectors.shape)}, but this model needs {wanted}.",
                code="shape-mismatch",
                fix="pass one vector of the hidden size for each layer",
            )
        self._own = Directions(torch.nn.functional.normalize(vectors.float(), dim=-1))

    def geometry(self) -> ResidualGeometry:
        """How harmful and harmless residuals lie to each other, layer by layer."""
        stored = self.run_context.folder.load_geometry()
        return stored if stored is not None else measure_residual_geometry(self.session.context)

    def trial(self, number: int | None = None) -> Ablation:
        """The ablation of a trial of its run, or of the one that the settings prefer. Raises UserError."""
        return self.run_context.space.from_params(self.run_context.result(number)[0].params)

    def ablation(
        self, direction_index: float | None = None, **strengths: float | Sequence[float] | StrengthKernel
    ) -> Ablation:
        """An ablation by its strengths, a component each: a number for all layers, one a layer, or a kernel.

        `direction_index` is the layer whose direction is removed everywhere; without it each layer's own is. Raises UserError for
        a component that the model does not have, or a wrong number of layers.
        """
        profiles: dict[str, tuple[float, ...]] = {}
        for component, given in strengths.items():
            if component not in self.components:
                raise UserError(
                    f"The model has no component '{component}'.",
                    code="unknown-component",
                    fix=f"one of: {', '.join(self.components)}",
                )
            if isinstance(given, StrengthKernel):
                profile = tuple(given.strength(layer) for layer in range(self.num_layers))
            else:
                profile = (float(given),) * self.num_layers if isinstance(given, (int, float)) else tuple(given)
            if len(profile) != self.num_layers:
                raise UserError(
                    f"{component} has {len(profile)} strengths, but the model has {self.num_layers} layers.",
                    code="shape-mismatch",
                    fix="pass one number, or one number for each layer",
                )
            profiles[component] = profile
        mixture = Ablation.from_kernels({}, self.num_layers, direction_index).mixture
        return Ablation(profiles, mixture)

    @contextmanager
    def attach(self, ablation: Ablation) -> Iterator[Any]:
        """Within the context the model is ablated; gives the model. The weights are not touched."""
        with self.session.applied(ablation):
            yield self.model

    def score(self, ablation: Ablation | None = None) -> Scores:
        """Refusals and KL divergence on the evaluation prompts, measured in full; without an ablation of the original."""
        with self.session.applied(*([] if ablation is None else [ablation])):
            return self.session.context.evaluator.score(self.session.baseline.log_probs)

    def answers(self, prompts: Sequence[str], ablation: Ablation | None = None, tokens: int = 100) -> list[str]:
        """Greedy answers of at most so many tokens, through the chat template."""
        model_context = self.session.context
        encoded = model_context.chat.encode(prompts)
        check_length("prompts", encoded, model_context.language_model.context, tokens)

        def step(batch: Batch) -> list[list[int]]:
            return decode(model_context.language_model.model, batch, tokens, model_context.language_model.end_tokens)

        with self.session.applied(*([] if ablation is None else [ablation])):
            return [model_context.chat.text(said) for said in model_context.batcher.run("Answers", encoded, step)]

    def export(self, ablation: Ablation, destination: str | Path) -> Export:
        """`heretic export` of this ablation: write the model, load it again, prove it. Raises UserError and VerificationFailed."""
        place, folder = expand_user(destination), self.run_context.folder
        check_destination(place, folder.name)
        given = Result(MANUAL_TRIAL, ablation.as_dict(), self.score(ablation))
        space = _ManualSpace(self.settings.search, self.num_layers, self.components)
        job = plan_export(self.session, self.run_context.inputs.plan, space, given, folder, place)
        self.run_context.unload()
        return write_export(job, self.run_context.reporter, self.run_context.stop)


MANUAL_TRIAL = -1  # in place of a trial's number, of an ablation that no trial has drawn


class _ManualSpace(SearchSpace):
    """Of ablations that no trial has drawn: their parameters are themselves."""

    def from_params(self, params: Mapping[str, Any]) -> Ablation:
        """What `Ablation.as_dict` gave."""
        return Ablation(**params)


def _resolved(model: str, config: str | Path | None, settings: Mapping[str, Any]) -> Resolved:
    file = Path(config) if config is not None else None
    return resolve(file, {**settings, "model": model or None}, environment=os.environ)
