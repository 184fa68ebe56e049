"""A conversation with a trial's model and the original, which are the same weights with and without the edit."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from heretic.errors import UserError, first_line
from heretic.files import expanded
from heretic.screen.console import printable

Message = dict[str, str]
# (messages, with the edit, what to do with every piece of text) -> the whole answer
Answer = Callable[[Sequence[Message], bool, Callable[[str], None]], str]

HELP = """/ablated  the trial answers (at the start)  /original  the original answers
/both     both answer, one after another    /new       forget all that was said
/save F   write the conversation to a file  /quit      leave (or end of input)"""


@dataclass
class Chat:
    """One conversation. Where both answer, it goes on from what the trial's model said."""

    console: Console
    answer: Answer
    messages: list[Message] = field(default_factory=list)
    sides: tuple[bool, ...] = (True,)
    shown: list[Message] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
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
        said = ""
        for ablated in self.sides:
            self.console.print(
                "ablated: " if ablated else "original: ", style="bold green" if ablated else "bold", end=""
            )
            self.pieces.clear()
            try:
                said = self.answer(self.messages, ablated, self._piece)
                self.console.print()
            except UserError as error:  # longer than the model can hold: as if it had not been said
                self._note(str(error))
                del self.messages[-1], self.shown[-1]
                return
            except KeyboardInterrupt:
                said = "".join(self.pieces).strip()
                self.check()
                self._note("cut short")
            self.shown.append({"role": "assistant", "model": "ablated" if ablated else "original", "content": said})
        self.messages.append({"role": "assistant", "content": said})

    def _piece(self, text: str) -> None:
        self.pieces.append(text)
        self.console.print(printable(text), end="", highlight=False, soft_wrap=True)

    def _save(self, name: str) -> None:
        file = expanded(name) if name else self.folder / "chat.json"
        try:
            file.write_text(json.dumps(self.shown, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        except (OSError, ValueError) as error:
            self._note(f"not saved: {first_line(error)}")
            return
        self._note(f"saved to {file}")

    def _note(self, text: str) -> None:
        self.console.print(printable(f"({text})"), style="dim", highlight=False)


def typed(console: Console) -> Iterable[str]:
    """Lines that a user types, or that come through a pipe; the end of either ends them."""
    while sys.stdin is not None:
        try:
            yield console.input("[bold]> [/bold]" if console.is_terminal else "")
        except EOFError:
            return
