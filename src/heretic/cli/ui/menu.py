"""The menu after a run: look at the front, try a trial, keep one, or search on. Everything in it is a command too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from heretic.cli.ui.chat import Chat, typed
from heretic.cli.ui.console import escape_terminal
from heretic.cli.ui.tables import show_benchmark, show_front, show_lines
from heretic.errors import Interrupted, UserError
from heretic.files import expand_user
from heretic.pipeline.run_context import RunContext

ANSWER_TOKENS = 512  # in the chat
COMPARED_TOKENS = 100
MORE_TRIALS = 50

Action = Callable[["Menu"], None]


class _Back(Exception):
    """The user thought better of it."""


@dataclass
class Menu:
    """Asks what to do with a run until the user quits.

    The model stays in memory from one action to the next; only the export puts it away, since the written model is loaded
    to prove it. Ctrl-C goes back to the menu, and from there it quits.
    """

    console: Console
    run_context: RunContext

    def run(self) -> None:
        """Until the user quits. Raises Interrupted where a signal other than Ctrl-C ends the program."""
        self.run_context.stop.reset()
        while True:
            self._show()
            try:
                action = self._choice()
            except (EOFError, KeyboardInterrupt, _Back):
                self.console.print()
                self.run_context.stop.check()
                return
            if action is None:
                return
            self._do(action)

    def _do(self, action: Action) -> None:
        """One action; what goes wrong in it is said and leads back."""
        stop = self.run_context.stop
        try:
            action(self)
        except UserError as error:
            self.console.print(f"[bold red]Error:[/bold red] {escape_terminal(str(error))}", soft_wrap=True)
        except (EOFError, KeyboardInterrupt, _Back):
            stop.check()
            self.console.print()
        except Interrupted:
            if not stop.from_keyboard:
                raise
            stop.reset()
            self.console.print("Stopped. Everything finished is kept.")

    def _show(self) -> None:
        run_context = self.run_context
        picked = run_context.selected()
        self.console.print()
        show_front(
            self.console, run_context.results, run_context.original_refusals, picked[0].number if picked else None
        )
        for number, (name, description, _) in enumerate(ACTIONS, start=1):
            self.console.print(f"  [bold]{number}[/bold] {name:<10}[dim]{description}[/dim]")
        self.console.print(
            f"  [bold]q[/bold] {'quit':<10}[dim]the run is kept: heretic run {escape_terminal(str(run_context.folder.path))}[/dim]"
        )

    def _choice(self) -> Action | None:
        """What the user wants, by number or by the beginning of its name; None to quit."""
        while True:
            said = self.ask("What next?").lower()
            if said and "quit".startswith(said):
                return None
            for number, (name, _, action) in enumerate(ACTIONS, start=1):
                if said and (said == str(number) or name.startswith(said)):
                    return action
            self.console.print(f"A number from 1 to {len(ACTIONS)}, or q.")

    def ask(self, question: str, default: str = "") -> str:
        """A line from the user. Raises KeyboardInterrupt and EOFError, which lead back."""
        shown = f" [dim]\\[{escape_terminal(default)}][/dim]" if default else ""
        with self.run_context.stop.idle():
            return self.console.input(f"[bold]{question}[/bold]{shown} ").strip() or default

    def ask_trial(self) -> int | None:
        """The number of a trial; None where there is none that could be preferred."""
        picked = self.run_context.selected()
        said = self.ask("Which trial?", str(picked[0].number) if picked else "")
        return _number(said) if said else None


def chat(menu: Menu) -> None:
    """Talk to a trial's model and to the original."""
    from heretic.pipeline.actions import start_chat

    _, answer = start_chat(menu.run_context, menu.ask_trial(), ANSWER_TOKENS)
    talked = Chat(menu.console, answer, folder=menu.run_context.folder.path, check=menu.run_context.stop.check)
    with menu.run_context.stop.idle():
        talked.run(typed(menu.console))


def compare(menu: Menu) -> None:
    """The answers of the original and of trials to a prompt, or to a file of them."""
    from heretic.pipeline.actions import compare as compare_trials
    from heretic.prompts import from_text_or_file

    picked = menu.run_context.selected()
    numbers = menu.ask("Which trials, as 3,7?", str(picked[0].number) if picked else "")
    trials = [_number(n) for n in numbers.split(",")]
    said = menu.ask("A prompt, or a file of prompts:")
    if not said:
        raise _Back
    for row in compare_trials(menu.run_context, trials, from_text_or_file(said), COMPARED_TOKENS):
        show_lines(menu.console, list(row.items()))
        menu.console.print()


def benchmark(menu: Menu) -> None:
    """lm-eval's tasks on the original and on a trial."""
    from heretic.pipeline.benchmark import Tasks, benchmark_trial

    trial = menu.ask_trial()
    names = menu.ask("Which tasks of lm-eval, as arc_easy,hellaswag?")
    if not names:
        raise _Back
    limit = menu.ask("How many questions of each task?", "all")
    include = menu.ask("A folder with tasks of your own (none: just Enter):")
    tasks = Tasks(names.split(","), Path(include) if include else None, None if limit == "all" else _number(limit))
    show_benchmark(menu.console, benchmark_trial(menu.run_context, trial, tasks))


def export(menu: Menu) -> None:
    """Write a trial's model to a folder."""
    from heretic.cli.ui.outcome import show_export
    from heretic.export.formats import FORMATS
    from heretic.pipeline.actions import export_from_run

    trial = menu.run_context.result(menu.ask_trial())[0].number
    for name, form in FORMATS.items():
        menu.console.print(f"  {name:<10}[dim]{form.description}[/dim]")
    menu.run_context.set_export_format(menu.ask("In which format?", menu.run_context.settings.export_format))
    folder = menu.ask("To which folder?", str(menu.run_context.folder.path / "models" / f"trial-{trial}"))
    show_export(menu.console, export_from_run(menu.run_context, trial, expand_user(folder)))


def upload(menu: Menu) -> None:
    """Send a model that was written to the hub."""
    from heretic.cli.ui.outcome import confirm_upload
    from heretic.export.upload import check_upload, plan_upload
    from heretic.export.upload import upload as send
    from heretic.runs.folder import exported_folder

    run_context = menu.run_context
    written = sorted(p.parent for p in run_context.folder.path.glob("models/*/manifest.json"))
    folder = menu.ask("Which exported model, by its folder?", str(written[-1]) if written else "")
    repository = menu.ask("To which repository, as user/name?")
    if not folder or not repository:
        raise _Back
    check_upload(repository)
    public = menu.ask("Private or public?", "private").lower() == "public"
    source = exported_folder(folder, str(run_context.folder.path.parent), None)
    planned = plan_upload(source, repository, public=public, reporter=run_context.reporter, stop=run_context.stop)
    confirm_upload(menu.console, planned, yes=False, stop=run_context.stop)
    show_lines(menu.console, [("uploaded to", send(planned, run_context.reporter, run_context.stop))])


def more(menu: Menu) -> None:
    """Search on."""
    from heretic.pipeline.run import run_trials
    from heretic.search.study import n_complete

    done, planned = n_complete(menu.run_context.study), menu.run_context.settings.n_trials
    count = _number(menu.ask("How many more trials?", str(planned - done if planned > done else MORE_TRIALS)))
    if count < 1:
        raise _Back
    menu.run_context.set_n_trials(done + count)
    run_trials(menu.run_context)


# What the menu offers: its name, what it does, and the function. An action more is a line more.
ACTIONS: tuple[tuple[str, str, Action], ...] = (
    ("chat", "talk to a trial's model and to the original", chat),
    ("compare", "their answers to a prompt or a file of prompts", compare),
    ("benchmark", "lm-eval tasks, before and after", benchmark),
    ("export", "write a trial's model to a folder, and prove it", export),
    ("upload", "send an exported model to the hub, private unless you say public", upload),
    ("more", "more trials", more),
)


def _number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UserError(f"Invalid number: {text!r}.", code="invalid-option", fix="write it like 7") from None
