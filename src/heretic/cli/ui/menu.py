"""Menu after a run: chat with a trial, compare, benchmark, export, upload, or run more trials; each is a command too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from rich.console import Console

from heretic.cli.ui.chat import Chat, input_lines
from heretic.cli.ui.console import escape_terminal
from heretic.cli.ui.tables import show_benchmark, show_lines, show_pareto_front
from heretic.errors import Interrupted, UserError
from heretic.files import expand_user
from heretic.pipeline.run_context import RunContext

ANSWER_TOKENS = 512  # in the chat
COMPARED_TOKENS = 100
MORE_TRIALS = 50

Action = Callable[["Menu"], None]


class _BackToMenu(Exception):
    """The user canceled an action."""


@dataclass
class Menu:
    """Asks what to do with a run until the user quits.

    The model stays in memory between actions, except after an export, which loads the written model to verify it.
    Ctrl-C returns to the menu, and from there it quits.
    """

    console: Console
    run_context: RunContext

    def run(self) -> None:
        """Run actions until the user quits. Raises Interrupted after a signal other than Ctrl-C."""
        self.run_context.stop.reset()
        while True:
            self._show()
            try:
                action = self._choice()
            except (EOFError, KeyboardInterrupt, _BackToMenu):
                self.console.print()
                self.run_context.stop.check()
                return
            if action is None:
                return
            self._do(action)

    def _do(self, action: Action) -> None:
        """Run one action; an error is printed and returns to the menu."""
        stop = self.run_context.stop
        try:
            action(self)
        except UserError as error:
            self.console.print(f"[bold red]Error:[/bold red] {escape_terminal(str(error))}", soft_wrap=True)
        except (EOFError, KeyboardInterrupt, _BackToMenu):
            stop.check()
            self.console.print()
        except Interrupted:
            if not stop.from_keyboard:
                raise
            stop.reset()
            self.console.print("Stopped. All finished work is kept.")

    def _show(self) -> None:
        run_context = self.run_context
        selected = run_context.selected()
        self.console.print()
        show_pareto_front(
            self.console,
            run_context.results,
            run_context.original_refusals,
            selected.result.number if selected else None,
            run_context.original_values,
        )
        for number, (name, description, _) in enumerate(ACTIONS, start=1):
            self.console.print(f"  [bold]{number}[/bold] {name:<10}[dim]{description}[/dim]")
        self.console.print(
            f"  [bold]q[/bold] {'quit':<10}[dim]to resume: heretic run {escape_terminal(quote(str(run_context.folder.path)))}[/dim]"
        )

    def _choice(self) -> Action | None:
        """Ask for an action by its number or the beginning of its name; None to quit."""
        while True:
            answer = self.ask("What next?").lower()
            if answer and "quit".startswith(answer):
                return None
            for number, (name, _, action) in enumerate(ACTIONS, start=1):
                if answer and (answer == str(number) or name.startswith(answer)):
                    return action
            self.console.print(f"Enter a number from 1 to {len(ACTIONS)}, or q.")

    def ask(self, question: str, default: str = "") -> str:
        """Ask for a line. Raises KeyboardInterrupt and EOFError, which return to the menu."""
        hint = f" [dim]\\[{escape_terminal(default)}][/dim]" if default else ""
        with self.run_context.stop.raise_immediately():
            return self.console.input(f"[bold]{question}[/bold]{hint} ").strip() or default

    def ask_trial(self) -> int | None:
        """Ask for the number of a trial; None without an answer and without a selected trial."""
        selected = self.run_context.selected()
        answer = self.ask("Which trial?", str(selected.result.number) if selected else "")
        return _parse_number(answer) if answer else None


def chat(menu: Menu) -> None:
    """Chat with a trial's model and with the original."""
    from heretic.pipeline.actions import start_chat

    _, answer = start_chat(menu.run_context, menu.ask_trial(), ANSWER_TOKENS)
    conversation = Chat(menu.console, answer, folder=menu.run_context.folder.path, check=menu.run_context.stop.check)
    with menu.run_context.stop.raise_immediately():
        conversation.run(input_lines(menu.console))


def compare(menu: Menu) -> None:
    """Print the answers of the original and of trials to a prompt or to a file of prompts."""
    from heretic.pipeline.actions import compare as compare_trials
    from heretic.prompts.sets import from_text_or_file

    selected = menu.run_context.selected()
    numbers = menu.ask("Which trials (such as 3,7)?", str(selected.result.number) if selected else "")
    trials = [_parse_number(n) for n in numbers.split(",")]
    prompts = menu.ask("A prompt, or a file of prompts:")
    if not prompts:
        raise _BackToMenu
    for row in compare_trials(menu.run_context, trials, from_text_or_file(prompts), COMPARED_TOKENS):
        show_lines(menu.console, list(row.items()))
        menu.console.print()


def benchmark(menu: Menu) -> None:
    """Run lm-eval tasks on the original and on a trial."""
    from heretic.pipeline.benchmark import Tasks, benchmark_trial

    trial = menu.ask_trial()
    names = menu.ask("Which tasks of lm-eval (such as arc_easy,hellaswag)?")
    if not names:
        raise _BackToMenu
    limit = menu.ask("How many questions of each task?", "all")
    include = menu.ask("Folder with your own tasks (Enter for none):")
    tasks = Tasks(
        names.split(","), Path(include) if include else None, None if limit == "all" else _parse_number(limit)
    )
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
    """Upload an exported model to the hub."""
    from heretic.cli.ui.outcome import confirm_upload
    from heretic.export.upload import check_upload, plan_upload
    from heretic.export.upload import upload as send_files
    from heretic.runs.folder import exported_folder

    run_context = menu.run_context
    written = sorted(p.parent for p in run_context.folder.path.glob("models/*/manifest.json"))
    folder = menu.ask("Which exported model (its folder)?", str(written[-1]) if written else "")
    repository = menu.ask("To which repository (user/name)?")
    if not folder or not repository:
        raise _BackToMenu
    check_upload(repository)
    public = menu.ask("Private or public?", "private").lower() == "public"
    source = exported_folder(folder, str(run_context.folder.path.parent), None)
    planned = plan_upload(source, repository, public=public, reporter=run_context.reporter, stop=run_context.stop)
    confirm_upload(menu.console, planned, yes=False, stop=run_context.stop)
    show_lines(menu.console, [("uploaded to", send_files(planned, run_context.reporter, run_context.stop))])


def more(menu: Menu) -> None:
    """Run more trials."""
    from heretic.pipeline.run import run_trials
    from heretic.runs.metadata import warn_of_other_versions
    from heretic.search.study import n_complete

    done, planned = n_complete(menu.run_context.study), menu.run_context.settings.n_trials
    count = _parse_number(menu.ask("How many more trials?", str(planned - done if planned > done else MORE_TRIALS)))
    if count < 1:
        raise _BackToMenu
    menu.run_context.request_trials(done + count)
    warn_of_other_versions(menu.run_context.study, menu.run_context.reporter)
    run_trials(menu.run_context)


# Actions of the menu: name, description, function.
ACTIONS: tuple[tuple[str, str, Action], ...] = (
    ("chat", "chat with a trial's model and with the original", chat),
    ("compare", "compare answers to a prompt or a file of prompts", compare),
    ("benchmark", "run lm-eval tasks before and after the ablation", benchmark),
    ("export", "write a trial's model to a folder and verify it", export),
    ("upload", "upload an exported model to the hub; private by default", upload),
    ("more", "run more trials", more),
)


def _parse_number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UserError(f"Invalid number: {text!r}.", code="invalid-option", fix="write it like 7") from None
