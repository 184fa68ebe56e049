"""Python interface; see docs/python.md.

with load("MODEL", n_trials=50) as session:
    with session.attach(session.ablation(attention=1.0)) as model: ...
"""

from __future__ import annotations

import math
import numbers
import operator
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from heretic.ablation.ablation import Ablation
from heretic.ablation.directions import Directions
from heretic.ablation.residual_geometry import GeometryRecorder, ResidualGeometry
from heretic.ablation.strength_kernel import StrengthKernel
from heretic.errors import UserError, first_line
from heretic.export.destination import check_destination
from heretic.export.export import Export, plan_export, write_export
from heretic.export.formats import require_format
from heretic.files import expand_user
from heretic.interrupt import StopSignal
from heretic.pipeline.actions import greedy_answers
from heretic.pipeline.geometry import measure_effects
from heretic.pipeline.prepare import prepare_run
from heretic.pipeline.run import Outcome, device_lock, open_locked_study, own_prompts, run
from heretic.pipeline.run_context import RunContext
from heretic.progress import PYTHON_REPORTER
from heretic.runs.folder import find_existing_run, load_run_settings
from heretic.scoring.comparison import Comparison
from heretic.scoring.direction_effects import DirectionEffects
from heretic.scoring.scores import Scores
from heretic.search.pareto import Result
from heretic.search.summary import StudyReporter
from heretic.session.session import Session, find_model_directions, operator_factory_for
from heretic.settings import Settings
from heretic.settings.sources import Resolved, resolve


def study(
    model: str | Path = "",
    *,
    config: str | Path | None = None,
    reporter: StudyReporter = PYTHON_REPORTER,
    **settings: Any,
) -> Outcome:
    """Run or resume a study like `heretic run`: directions, trials, selection, and export if `save_to` is set.

    Args:
        model: Hub id, local folder or .gguf file; or name or folder of a run.
        config: Settings file; default: `config.toml` in the current folder. HERETIC_ variables apply too.
        reporter: Receives progress and warnings; default: Python's warnings and logging.
        settings: Settings by their names; tables are dictionaries: `search={"start": "kernels"}`.

    Raises:
        UserError: A setting, the model or the machine does not allow the run.
    """
    return run(_resolved(model, config, settings), reporter=reporter, stop=StopSignal())


def load(
    model: str | Path = "",
    *,
    config: str | Path | None = None,
    reporter: StudyReporter = PYTHON_REPORTER,
    **settings: Any,
) -> AblationSession:
    """Load a model with its directions and baseline, measured or read from its run's folder.

    Arguments as for `study`. Holds the locks of the devices and of the run until the session is closed. Raises UserError.
    """
    return open_ablation_session(_resolved(model, config, settings), reporter=reporter, stop=StopSignal())


def open_ablation_session(
    resolved: Resolved, *, wait: bool = False, reporter: StudyReporter, stop: StopSignal
) -> AblationSession:
    """Load a model as `load` does, with settings that are resolved; `wait` waits for devices and runs in use."""
    with ExitStack() as locks:
        locks.enter_context(device_lock(resolved.settings, wait=wait, reporter=reporter, stop=stop))
        read_prompts = own_prompts(resolved, reporter)
        inputs = prepare_run(resolved.settings, force=False, reporter=reporter, read_prompts=read_prompts)
        inputs.folder.create()
        open_study = locks.enter_context(open_locked_study(inputs, wait=wait, reporter=reporter, stop=stop))
        run_context = RunContext(resolved, inputs, open_study, reporter, stop)
        run_context.save_settings()
        run_context.session()
        opened = AblationSession(run_context, locks.pop_all())
    weakref.finalize(opened, opened._locks.close)  # also at the end of a program that does not close it
    return opened


@dataclass
class AblationSession:
    """A loaded model with its directions and baseline; closed at the end of a `with` block or by `close`."""

    run_context: RunContext = field(repr=False)
    _locks: ExitStack = field(repr=False)
    _custom_directions: Directions | None = field(default=None, repr=False)
    _attached: bool = field(default=False, repr=False)
    _closed: bool = field(default=False, repr=False)

    def __enter__(self) -> AblationSession:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the model, its devices and its run."""
        self._closed = True
        self.run_context.unload()
        self._locks.close()

    def _check_open(self) -> None:
        if self._closed:
            raise UserError("The session is closed.", code="session-closed", fix="open another one with load")

    @property
    def session(self) -> Session:
        """The loaded model with everything that measures it; an export unloads it, the next use loads it again.

        Raises UserError after `close`.
        """
        self._check_open()
        session = self.run_context.session()
        if self._custom_directions is None or session.operator_factory.directions is self._custom_directions:
            return session
        factory = operator_factory_for(session.context, self._custom_directions, session.operator_factory.input_maps)
        self.run_context.loaded = replace(session, operator_factory=factory)
        return self.run_context.loaded

    @property
    def _original(self) -> Session:
        """The session while no ablation is attached, which another one would add to. Raises UserError."""
        if self._attached:
            raise UserError(
                "An ablation is attached, and what is measured or exported would have it too.",
                code="ablation-attached",
                fix="call this outside the `with` block of attach",
            )
        return self.session

    @property
    def settings(self) -> Settings:
        """The settings of the session."""
        return self.run_context.settings

    @property
    def model(self) -> Any:
        """The transformers model; ablated within `attach`."""
        return self.session.context.language_model.model

    @property
    def tokenizer(self) -> Any:
        """The transformers tokenizer."""
        return self.session.context.language_model.tokenizer

    @property
    def num_layers(self) -> int:
        """Number of transformer blocks."""
        return self.session.context.language_model.structure.num_layers

    @property
    def components(self) -> tuple[str, ...]:
        """Kinds of residual writers of the model, such as attention and mlp."""
        return self.session.context.language_model.structure.components

    @property
    def directions(self) -> Directions:
        """The direction of every layer."""
        return self.session.operator_factory.directions

    @directions.setter
    def directions(self, vectors: Any) -> None:
        """Use custom directions: Directions, or vectors [layers, width], normalized to 1.

        Raises UserError for another shape, or without a direction.
        """
        expected = tuple(self.directions.vectors.shape)
        if isinstance(vectors, Directions) and tuple(vectors.vectors.shape) == expected:
            self._custom_directions = vectors
            return
        try:
            given = torch.as_tensor(getattr(vectors, "vectors", vectors)).detach()
            if given.is_complex():
                raise TypeError("they are complex")
            rows = given.to_dense().cpu().double()
        except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
            raise UserError(
                f"These are no directions: {first_line(error)}", code="shape-mismatch", fix="pass a tensor"
            ) from None
        if tuple(rows.shape) != expected:
            raise UserError(
                f"The directions have shape {tuple(rows.shape)}, but this model needs {expected}.",
                code="shape-mismatch",
                fix="pass one vector of the hidden size for each layer",
            )
        lengths = rows.norm(dim=-1)
        if bad := (~lengths.isfinite() | (lengths == 0)).nonzero().flatten().tolist():
            raise UserError(
                f"The direction of layer {bad[0]} is zero or not finite.",
                code="no-direction",
                fix="pass a vector with a direction for each layer",
            )
        self._custom_directions = Directions((rows / lengths[:, None]).float())

    def geometry(self) -> ResidualGeometry:
        """Return the geometry of harmful and harmless residuals in every layer."""
        self._check_open()
        stored = self.run_context.folder.load_geometry()
        if stored is None:
            recorder = GeometryRecorder()
            stored = recorder.geometry(find_model_directions(self._original.context, recorder))
        return stored

    def direction_effects(self) -> DirectionEffects:
        """Measure whether each layer's direction carries refusal: with it removed, and added to harmless prompts.

        Raises UserError if the model refuses too few training prompts.
        """
        return measure_effects(self._original.context, self.directions, self.geometry().norms[:, 2])

    def trial(self, number: int | None = None) -> Ablation:
        """Return the ablation of a trial of the run, or of the selected one. Raises UserError."""
        self._check_open()
        return self.run_context.search_space().from_params(self.run_context.result(number)[0].params)

    def ablation(
        self, direction_index: float | None = None, **strengths: float | Sequence[float] | StrengthKernel
    ) -> Ablation:
        """Create an ablation from the strengths of each component.

        Args:
            direction_index: Layer whose direction is removed in all layers; None: each layer's own direction.
            strengths: By component, one number for all layers, one number for each layer, or a kernel.

        Raises:
            UserError: The model lacks the layer or a component, a strength is not finite, or the number of strengths is not that
                of its layers.
        """
        if direction_index is not None:
            check_layer(_number("direction_index", direction_index), self.num_layers, "direction_index")
        profiles: dict[str, tuple[float, ...]] = {}
        for component, strength in strengths.items():
            if component not in self.components:
                raise UserError(
                    f"The model has no component '{component}'.",
                    code="unknown-component",
                    fix=f"one of: {', '.join(self.components)}",
                )
            profile = _profile(component, strength, self.num_layers)
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
        """Ablate the model within the context and yield it; the weights stay unchanged.

        Nothing else can be measured or exported within it. Raises UserError.
        """
        with self._original.applied(ablation):
            self._attached = True
            try:
                yield self.model
            finally:
                self._attached = False

    def score(self, ablation: Ablation | None = None) -> Scores:
        """Measure refusals and KL divergence on all evaluation prompts; without an ablation, those of the original."""
        with self._original.applied(*([] if ablation is None else [ablation])):
            return self.session.evaluator.score(self.session.baseline.log_probs)

    def compare(self, ablation: Ablation) -> tuple[Comparison, ...]:
        """Measure the scorers of which an export tells, with and without the ablation."""
        return self._original.compare(ablation, self._original.context.chosen.exported)

    def answers(self, prompts: str | Sequence[str], ablation: Ablation | None = None, tokens: int = 100) -> list[str]:
        """Return greedy answers of at most `tokens` tokens to one or more prompts, through the chat template. Raises UserError."""
        if isinstance(tokens, bool) or not hasattr(tokens, "__index__") or operator.index(tokens) < 1:
            raise out_of_range("tokens", "that is whole and at least 1")
        model_context = self._original.context
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if wrong := [prompt for prompt in prompts if not isinstance(prompt, str)]:
            raise UserError(
                f"A prompt must be a text, not {type(wrong[0]).__name__}.", code="not-a-prompt", fix="pass texts"
            )
        if not prompts:
            return []
        with self.session.applied(*([] if ablation is None else [ablation])):
            return greedy_answers(model_context, "Answers", prompts, tokens)

    def check_destination(self, destination: str | Path) -> None:
        """Raise UserError if an export cannot be written to this folder, or not in the format of the settings."""
        check_destination(expand_user(destination), self.run_context.folder.name)
        require_format(self.settings, self.run_context.inputs.checkpoint)

    def export(self, ablation: Ablation, destination: str | Path) -> Export:
        """Write the ablated model like `heretic export`, and verify it. Raises UserError and VerificationFailed."""
        target, folder, session = expand_user(destination), self.run_context.folder, self._original
        self.check_destination(target)
        result = Result(MANUAL_TRIAL, ablation.as_dict(), self.score(ablation))
        job = plan_export(session, self.run_context.inputs.plan, Ablation(**result.params), result, folder, target)
        self.run_context.unload()
        return write_export(job, self.run_context.reporter, self.run_context.stop)


MANUAL_TRIAL = -1  # trial number of an ablation that no trial sampled


def _resolved(model: str | Path, config: str | Path | None, settings: Mapping[str, Any]) -> Resolved:
    given = _plain({**settings, "model": model or None})
    if model and config is None and not given["model"].endswith(".gguf"):  # the name of a run, perhaps
        located = resolve(None, {"runs_dir": given.get("runs_dir")}, environment=os.environ)
        if folder := find_existing_run(given["model"], located.settings.runs_dir):
            if given.get("run_name"):
                raise UserError(
                    f"{given['model']} is a run and has its own name.",
                    code="conflicting-options",
                    where="run_name",
                    fix="omit run_name, or name the model",
                )
            fixed = {"model": None, "runs_dir": str(folder.path.parent), "run_name": folder.name}
            return load_run_settings(folder, os.environ, given | fixed)
    return resolve(Path(config) if config is not None else None, given, environment=os.environ)


def _plain(value: Any) -> Any:
    """Return settings with paths as texts and numbers of NumPy as Python's."""
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, (list, tuple, Iterator)):
        return [_plain(one) for one in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _profile(component: str, strength: Any, layers: int) -> tuple[float, ...]:
    """Return the strengths of a component, one per layer if they are as many. Raises UserError for values that are no numbers."""
    if isinstance(strength, StrengthKernel):
        return tuple(strength.strength(layer) for layer in range(layers))
    if isinstance(strength, numbers.Real) or getattr(strength, "ndim", None) == 0:
        return (_number(component, strength),) * layers
    if isinstance(strength, str) or not hasattr(strength, "__iter__"):
        raise out_of_range(component, "for all layers, or one for each layer")
    return tuple(_number(component, one) for one in strength)


def _number(name: str, value: Any) -> float:
    """Return a finite number, also of NumPy and PyTorch. Raises UserError."""
    try:
        number = math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError, RuntimeError):
        number = math.nan
    if not math.isfinite(number):
        raise out_of_range(name, "that is finite")
    return number


def check_layer(layer: float | None, num_layers: int, where: str = "--layer") -> None:
    """Raise UserError for a layer that the model does not have."""
    if layer is not None and not 0 <= layer <= num_layers - 1:
        raise out_of_range(where, f"from 0 to {num_layers - 1}")


def out_of_range(where: str, allowed: str) -> UserError:
    """Create the error for a number that an option or argument cannot have."""
    return UserError("The number is out of range.", code="invalid-option", where=where, fix=f"a number {allowed}")
