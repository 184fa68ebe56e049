"""Table of scorers by name; a user's own are loaded from the Python files that the settings name."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib.util
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from heretic.errors import UserError, first_line, plain_line
from heretic.files import expand_user, sha256
from heretic.scoring.objectives import NAME, Limits, Objective
from heretic.scoring.scorers.answer_kl import AnswerKl
from heretic.scoring.scorers.arithmetic import Arithmetic
from heretic.scoring.scorers.borderline_refusals import BorderlineRefusals
from heretic.scoring.scorers.copying import Copying
from heretic.scoring.scorers.evaluated import Kl, Refusals
from heretic.scoring.scorers.harmless_answers import Degenerate, OverRefusals
from heretic.scoring.scorers.kept_refusals import KeptRefusals
from heretic.scoring.scorers.language import LanguageSwitched
from heretic.scoring.scorers.measuring import called
from heretic.scoring.scorers.own_answer_kl import OwnAnswerKl
from heretic.scoring.scorers.own_perplexity import OwnPerplexity
from heretic.scoring.scorers.refusals_after_thought import RefusalsAfterThought
from heretic.scoring.scorers.refusals_by_length import RefusalsByLength
from heretic.scoring.scorers.repetition import Repetition
from heretic.scoring.scorers.scorer import Measurement, Scorer
from heretic.scoring.scorers.text_perplexity import TextPerplexity
from heretic.scoring.scorers.unanswered import Unanswered
from heretic.scoring.scorers.unchanged import Unchanged
from heretic.settings import Settings

SCORERS: dict[str, type[Scorer]] = {
    scorer.name: scorer
    for scorer in (
        Kl,
        Refusals,
        OverRefusals,
        Degenerate,
        AnswerKl,
        OwnAnswerKl,
        RefusalsByLength,
        RefusalsAfterThought,
        Unanswered,
        BorderlineRefusals,
        KeptRefusals,
        OwnPerplexity,
        TextPerplexity,
        Repetition,
        Unchanged,
        LanguageSwitched,
        Arithmetic,
        Copying,
    )
}


@dataclass(frozen=True)
class ChosenScorers:
    """The scorers that the settings choose, and what for."""

    scorers: Mapping[str, Scorer]  # by name
    objectives: tuple[Objective, ...]
    limits: Limits
    measures: tuple[str, ...]  # measured only of the original and of an exported or evaluated model

    @property
    def of_trials(self) -> tuple[str, ...]:
        """Scorers of objectives and constraints that the evaluator does not measure itself."""
        wanted = dict.fromkeys(_scorer_of(name) for name in (*(o.name for o in self.objectives), *self.limits.bounds))
        return tuple(name for name in wanted if not self.scorers[name].in_evaluator)

    @property
    def exported(self) -> tuple[str, ...]:
        """Scorers measured on the original and an exported trial, of which manifest and card tell."""
        return tuple(dict.fromkeys((*self.of_trials, *self.measures)))

    def by_models(self, names: Sequence[str]) -> list[list[str]]:
        """Divide these scorers into those that need one model in memory and those that need two."""
        return [[name for name in names if self.scorers[name].needs_original == both] for both in (False, True)]

    @staticmethod
    def values(measured: Mapping[str, Measurement]) -> dict[str, float]:
        """Return all numbers of these measurements by full name, as `Scores.values` holds them."""
        return {full: number for name, found in measured.items() for full, number in found.named(name).items()}

    def worst_values(self) -> dict[str, float]:
        """Return infinitely bad values of the scorers `of_trials`, for a destroyed model."""
        worst: dict[str, float] = {}
        for name in self.of_trials:
            number = -math.inf if self.scorers[name].better == "higher" else math.inf
            worst |= Measurement(number, dict.fromkeys(self.scorers[name].details, number)).named(name)
        return worst


def choose_scorers(settings: Settings) -> ChosenScorers:
    """Make the scorers that the settings name, with their options; runs the Python files of `scorer_files`.

    Raises:
        UserError: a name, an option or a file is wrong.
    """
    table = {**SCORERS, **user_scorers(settings.scorer_files)}
    named = {
        "objectives": settings.objectives,
        "constraints": list(settings.constraints),
        "measures": settings.measures,
    }
    for key, names in named.items():
        for name in names:
            _check_name(name, table, key)
    for name in settings.scorers:
        _check_name(name, table, "scorers", details=False)
    if inside := [name for name in settings.measures if table[_scorer_of(name)].in_evaluator]:
        raise UserError(
            f"'{inside[0]}' is measured in any case.",
            code="unknown-scorer",
            where="measures",
            fix="remove it from measures",
        )
    standard = [name for name, scorer in SCORERS.items() if scorer.standard]
    made = {
        name: called(
            name,
            functools.partial(_make, table[name], {**table[name].defaults(settings), **settings.scorers.get(name, {})}),
        )
        for name in dict.fromkeys([*standard, *(_scorer_of(name) for names in named.values() for name in names)])
    }

    def better(name: str) -> Any:
        return made[_scorer_of(name)].better

    return ChosenScorers(
        scorers=made,
        objectives=tuple(Objective(name, better(name)) for name in settings.objectives),
        limits=Limits({name: (limit, better(name)) for name, limit in settings.constraints.items()}),
        measures=tuple(dict.fromkeys([*standard, *map(_scorer_of, settings.measures)])),
    )


def check_scorers(settings: Settings) -> None:
    """Check names, options and files of the scorers that the settings choose, without a model. Raises UserError."""
    for name, scorer in choose_scorers(settings).scorers.items():
        called(name, scorer.check)


def _scorer_of(name: str) -> str:
    """Return the scorer's part of the name of a number: `kl` of `kl.p95`."""
    return name.partition(".")[0]


def _check_name(name: str, table: Mapping[str, type[Scorer]], key: str, *, details: bool = True) -> None:
    scorer, _, detail = name.partition(".")
    known = table.get(scorer)
    if known is not None and (not detail or (details and detail in known.details)):
        return
    names = list(table) if known is None or not details else [f"{scorer}.{d}" for d in known.details]
    near = difflib.get_close_matches(name, names, n=1)
    raise UserError(
        f"Unknown scorer '{plain_line(name)[:100]}'.",
        code="unknown-scorer",
        where=key,
        fix=f"did you mean '{near[0]}'?" if near else f"use one of: {', '.join(names) or scorer}",
    )


def _make(scorer: type[Scorer], options: Mapping[str, Any]) -> Scorer:
    """Construct a scorer with its options. Raises UserError for an unknown or invalid option."""
    where = f"scorers.{scorer.name}"
    fields: list[str] = [f.name for f in dataclasses.fields(scorer)] if dataclasses.is_dataclass(scorer) else []
    hints = get_type_hints(scorer, include_extras=True)
    values = {}
    for name, value in options.items():
        if name not in fields:
            raise UserError(
                f"The scorer '{scorer.name}' has no option '{plain_line(name)[:100]}'.",
                code="scorer-option",
                where=where,
                fix=f"use one of: {', '.join(fields)}" if fields else "remove it",
            )
        try:
            values[name] = TypeAdapter(hints[name]).validate_python(value)
        except ValidationError as error:
            problem = error.errors()[0]["msg"].replace("Input should", "it should")
            raise UserError(
                f"The option '{name}' of the scorer '{scorer.name}' is invalid: {problem}.",
                code="scorer-option",
                where=f"{where}.{name}",
                fix="see docs/scorers.md for the options",
            ) from None
    return scorer(**values)


def user_scorers(files: Sequence[str]) -> dict[str, type[Scorer]]:
    """Run the Python files and return the scorers that they define, by name. Raises UserError."""
    found: dict[str, type[Scorer]] = {}
    for file in files:
        path = expand_user(file)
        if not path.is_file():
            raise UserError(
                "The scorer file does not exist.", code="missing-file", where=file, fix="correct scorer_files"
            )
        for scorer in _scorers_in(str(path.resolve()), sha256(path)):
            if scorer.name in SCORERS or scorer.name in found:
                raise UserError(
                    f"There is another scorer named '{scorer.name}'.",
                    code="scorer-class",
                    where=file,
                    fix="choose another name",
                )
            found[scorer.name] = scorer
    return found


@functools.cache
def _scorers_in(path: str, digest: str) -> tuple[type[Scorer], ...]:
    """Run a file and return its scorers; once per content, so that its module-level code runs once."""
    name = f"heretic_scorers_{digest[:16]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError("The scorer file is no Python file.", code="scorer-import", where=path, fix="name it *.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise UserError(
            f"The scorer file failed with {type(error).__name__}: {first_line(error)[:200]}",
            code="scorer-import",
            where=path,
            fix="correct the file; it runs like any Python file: python FILE",
        ) from error
    own = [v for v in vars(module).values() if isinstance(v, type) and v.__module__ == name and issubclass(v, Scorer)]
    if not own:
        raise UserError(
            "The file defines no scorer.",
            code="scorer-class",
            where=path,
            fix="define a subclass of heretic.scoring.scorers.scorer.Scorer; see docs/scorers.md",
        )
    bases = {base for scorer in own for base in scorer.__mro__[1:]}
    own = [scorer for scorer in own if scorer not in bases]  # what others derive from is a helper
    for scorer in own:
        if problem := _problem(scorer):
            raise UserError(
                f"The class {scorer.__name__} is no complete scorer: {problem}.",
                code="scorer-class",
                where=path,
                fix="see docs/scorers.md",
            )
    return tuple(own)


def _problem(scorer: type[Scorer]) -> str:
    """Return what a user's class lacks; empty if nothing."""
    names = [str(getattr(scorer, "name", "")), *(f"x.{detail}" for detail in scorer.details)]
    if not all(map(NAME.fullmatch, names)) or "." in names[0]:
        return "`name` and `details` must be lower-case letters, digits and underscores"
    if scorer.better not in ("lower", "higher"):
        return '`better` must be "lower" or "higher"'
    if scorer.score is Scorer.score:
        return "it has no method `score`"
    if scorer.in_evaluator:
        return "`in_evaluator` is for scorers of heretic itself"
    return ""
