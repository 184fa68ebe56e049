"""Chat with a trial's model and the original: the same weights with and without the edit."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from heretic.cli.ui.console import escape_terminal, non_interactive_reason, restored_while_stopped
from heretic.errors import UserError, first_line, is_unicode
from heretic.files import expand_user, write_text

Message = dict[str, str]
# (messages, with the edit, callback for each piece of text) -> the complete answer
GenerateFn = Callable[[Sequence[Message], bool, Callable[[str], None]], str]
STYLES = {"original": "bold", "ablated": "bold green"}
SIDE_BY_SIDE_WIDTH = 70  # least columns for two answers side by side

HELP = """/ablated  the trial answers (default)       /original  the original answers
/both     both answer, side by side         /new       start a new conversation
/save F   write the conversation to a file  /quit      quit (or end of input)"""


@dataclass
class Chat:
    """One conversation. If both models answer, it continues from the ablated model's answer."""

    console: Console
    answer: GenerateFn
    messages: list[Message] = field(default_factory=list)
    sides: tuple[bool, ...] = (True,)  # for each answering model whether it is ablated
    shown: list[Message] = field(default_factory=list)
    folder: Path = Path()  # for a conversation saved without a file name
    check: Callable[[], None] = lambda: None  # raises if the program has to stop

    def run(self, lines: Iterable[str]) -> None:
        """Answer lines until the input ends or /quit. Ctrl-C interrupts an answer; between answers it quits."""
        self.console.print(HELP, style="dim", highlight=False)
        with suppress(KeyboardInterrupt):
            for line in lines:
                self.check()
                text = line.strip()
                if not is_unicode(text):
                    self._note("not sent: the line is not valid UTF-8")
                elif text.startswith("/") and not text.startswith("//"):
                    if not self._command(*text[1:].split(maxsplit=1)):
                        return
                elif text:
                    self._turn(text[1:] if text.startswith("//") else text)

    def _command(self, name: str = "", argument: str = "") -> bool:
        sides = {"ablated": (True,), "original": (False,), "both": (False, True)}
        if name in sides:
            self.sides = sides[name]
            self._note(f"{' and '.join('ablated' if s else 'original' for s in self.sides)} from now on")
        elif name == "new":
            self.messages, self.shown = [], []
            self._note("new conversation")
        elif name == "save":
            self._save(argument)
        elif name in ("quit", "exit"):
            return False
        else:
            self._note(f"not sent: there is no command /{name}; //TEXT sends a line that begins with /")
            self.console.print(HELP, style="dim", highlight=False)
        return True

    def _turn(self, text: str) -> None:
        self.messages.append({"role": "user", "content": text})
        self.shown.append(self.messages[-1])
        answers: dict[str, str] = {}
        side_by_side = len(self.sides) > 1 and self.console.is_terminal and self.console.width >= SIDE_BY_SIDE_WIDTH
        columns = partial(_answer_columns, answers)
        try:
            with self._live_view(columns) if side_by_side else nullcontext():
                for ablated in self.sides:
                    self._generate(answers, "ablated" if ablated else "original", quiet=side_by_side)
        except UserError as error:  # a message beyond the model's context is removed again
            self._note(str(error))
            del self.messages[-1], self.shown[-1]
            return
        if side_by_side:
            self.console.print(columns())
        self.shown += [{"role": "assistant", "model": name, "content": text} for name, text in answers.items()]
        self.messages.append({"role": "assistant", "content": list(answers.values())[-1]})
        if not self.messages[-1]["content"].strip():
            self._note("the answer is empty; the conversation goes on without this message")

    def _generate(self, answers: dict[str, str], name: str, *, quiet: bool) -> None:
        """Stream one model's answer into `answers` and, unless quiet, to the screen."""
        answers[name] = ""

        def on_text(text: str) -> None:
            answers[name] += text
            if not quiet:
                self.console.print(escape_terminal(text), end="", highlight=False, soft_wrap=True)

        if not quiet:
            self.console.print(f"{name}: ", style=STYLES[name], end="")
        try:
            answers[name] = self.answer(self.messages, name == "ablated", on_text)
            if not quiet:
                self.console.print()
        except KeyboardInterrupt:
            answers[name] = answers[name].strip()
            self.check()
            self._note("interrupted")

    @contextmanager
    def _live_view(self, columns: Callable[[], Table]) -> Iterator[None]:
        """Show both growing answers within the context."""
        live = Live(get_renderable=columns, console=self.console, transient=True, refresh_per_second=8)
        with live, restored_while_stopped(live.stop, live.start):
            yield

    def _save(self, name: str) -> None:
        try:
            file = expand_user(name) if name else self.folder / "chat.json"
            text = json.dumps(self.shown, indent=2, ensure_ascii=False) + "\n"
            write_text(file, text, private=not name)  # files in a run's folder are private
        except (OSError, ValueError, UserError) as error:
            self._note(f"not saved: {first_line(error)}")
            return
        self._note(f"saved to {file}")

    def _note(self, text: str) -> None:
        self.console.print(escape_terminal(f"({text})"), style="dim", highlight=False)


def _answer_columns(answers: dict[str, str]) -> Table:
    table = Table.grid(expand=True, padding=(0, 2))
    for _ in STYLES:
        table.add_column(ratio=1)
    table.add_row(*(Text(name, style) for name, style in STYLES.items()))
    table.add_row(*(Text.from_markup(escape_terminal(answers.get(name, ""))) for name in STYLES))
    return table


def require_input() -> None:
    """Raise UserError if input comes from a terminal that nobody can type in; pipes and files are fine."""
    if sys.stdin is not None and not sys.stdin.closed and sys.stdin.isatty() and (why := non_interactive_reason()):
        raise UserError(
            f"Chat needs input, but {why}.",
            code="nobody-to-ask",
            where="heretic chat",
            fix="pipe the lines (echo 'hello' | heretic chat RUN), or: heretic compare RUN --trials N --prompts 'hello'",
        )


def input_lines(console: Console) -> Iterable[str]:
    """Yield lines from the terminal or from a pipe until the input ends; lines from a pipe are echoed."""
    while sys.stdin is not None and not sys.stdin.closed:
        try:
            line = console.input("[bold]> [/bold]" if console.is_terminal else "")
        except EOFError:
            return
        if not sys.stdin.isatty():
            console.print(escape_terminal(f"> {line}"), style="bold", highlight=False, soft_wrap=True)
        yield line
