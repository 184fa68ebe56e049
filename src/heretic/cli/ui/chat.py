"""A conversation with a trial's model and the original, which are the same weights with and without the edit."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from heretic.cli.ui.console import escape_terminal, non_interactive_reason
from heretic.errors import UserError, first_line
from heretic.files import expand_user, write_text

Message = dict[str, str]
# (messages, with the edit, what to do with every piece of text) -> the whole answer
Answer = Callable[[Sequence[Message], bool, Callable[[str], None]], str]
STYLES = {"original": "bold", "ablated": "bold green"}
BESIDE = 70  # columns of a terminal in which two answers have room beside each other

HELP = """/ablated  the trial answers (at the start)  /original  the original answers
/both     both answer, side by side         /new       forget all that was said
/save F   write the conversation to a file  /quit      leave (or end of input)"""


@dataclass
class Chat:
    """One conversation. Where both answer, it goes on from what the trial's model said."""

    console: Console
    answer: Answer
    messages: list[Message] = field(default_factory=list)
    sides: tuple[bool, ...] = (True,)
    shown: list[Message] = field(default_factory=list)
    folder: Path = Path()  # where a conversation goes that is saved without a name
    check: Callable[[], None] = lambda: None  # raises where the program is to end

    def run(self, lines: Iterable[str]) -> None:
        """Take lines until there are no more or one says /quit. Ctrl-C cuts an answer short; between answers it leaves."""
        self.console.print(HELP, style="dim", highlight=False)
        with suppress(KeyboardInterrupt):
            for line in lines:
                self.check()
                text = line.strip()
                if text.startswith("/"):
                    if not self._command(*text[1:].split(maxsplit=1)):
                        return
                elif text:
                    self._turn(text)

    def _command(self, name: str = "", argument: str = "") -> bool:
        sides = {"ablated": (True,), "original": (False,), "both": (False, True)}
        if name in sides:
            self.sides = sides[name]
            self._note(f"{' and '.join('ablated' if s else 'original' for s in self.sides)} from here on")
        elif name == "new":
            self.messages, self.shown = [], []
            self._note("forgotten")
        elif name == "save":
            self._save(argument)
        elif name in ("quit", "exit"):
            return False
        else:
            self.console.print(HELP, style="dim", highlight=False)
        return True

    def _turn(self, text: str) -> None:
        self.messages.append({"role": "user", "content": text})
        self.shown.append(self.messages[-1])
        said: dict[str, str] = {}
        beside = len(self.sides) > 1 and self.console.is_terminal and self.console.width >= BESIDE
        columns = partial(_beside, said)
        try:
            with self._growing(columns) if beside else nullcontext():
                for ablated in self.sides:
                    self._one(said, "ablated" if ablated else "original", quiet=beside)
        except UserError as error:  # longer than the model can hold: as if it had not been said
            self._note(str(error))
            del self.messages[-1], self.shown[-1]
            return
        if beside:
            self.console.print(columns())
        self.shown += [{"role": "assistant", "model": name, "content": text} for name, text in said.items()]
        self.messages.append({"role": "assistant", "content": list(said.values())[-1]})

    def _one(self, said: dict[str, str], name: str, *, quiet: bool) -> None:
        """One side's answer, which grows in `said` and, unless quiet, on the screen."""
        said[name] = ""

        def piece(text: str) -> None:
            said[name] += text
            if not quiet:
                self.console.print(escape_terminal(text), end="", highlight=False, soft_wrap=True)

        if not quiet:
            self.console.print(f"{name}: ", style=STYLES[name], end="")
        try:
            said[name] = self.answer(self.messages, name == "ablated", piece)
            if not quiet:
                self.console.print()
        except KeyboardInterrupt:
            said[name] = said[name].strip()
            self.check()
            self._note("cut short")

    def _growing(self, columns: Callable[[], Table]) -> AbstractContextManager[object]:
        """Within the context both answers are shown as far as they have come."""
        return Live(get_renderable=columns, console=self.console, transient=True, refresh_per_second=8)

    def _save(self, name: str) -> None:
        try:
            file = expand_user(name) if name else self.folder / "chat.json"
            text = json.dumps(self.shown, indent=2, ensure_ascii=False) + "\n"
            write_text(file, text, private=not name)  # what lies in a run's folder is its owner's
        except (OSError, ValueError, UserError) as error:
            self._note(f"not saved: {first_line(error)}")
            return
        self._note(f"saved to {file}")

    def _note(self, text: str) -> None:
        self.console.print(escape_terminal(f"({text})"), style="dim", highlight=False)


def _beside(said: dict[str, str]) -> Table:
    table = Table.grid(expand=True, padding=(0, 2))
    for _ in STYLES:
        table.add_column(ratio=1)
    table.add_row(*(Text(name, style) for name, style in STYLES.items()))
    table.add_row(*(Text.from_markup(escape_terminal(said.get(name, ""))) for name in STYLES))
    return table


def check_typed() -> None:
    """Raise UserError at a terminal where nobody can type; a pipe or a file is another matter, and ends by itself."""
    if sys.stdin is not None and not sys.stdin.closed and sys.stdin.isatty() and (why := non_interactive_reason()):
        raise UserError(
            f"Nobody can type here: {why}.",
            code="nobody-to-ask",
            where="heretic chat",
            fix="pipe the lines (echo 'hello' | heretic chat RUN), or: heretic compare RUN --trials N --prompts 'hello'",
        )


def typed(console: Console) -> Iterable[str]:
    """Lines that a user types, or that come through a pipe, which are shown; the end of either ends them."""
    while sys.stdin is not None and not sys.stdin.closed:
        try:
            line = console.input("[bold]> [/bold]" if console.is_terminal else "")
        except EOFError:
            return
        if not sys.stdin.isatty():
            console.print(escape_terminal(f"> {line}"), style="bold", highlight=False, soft_wrap=True)
        yield line
