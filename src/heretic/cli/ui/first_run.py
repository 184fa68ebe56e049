"""Three questions of `heretic` without arguments; the answers become a commented config.toml."""

from __future__ import annotations

import re
from pathlib import Path

from rich.console import Console

from heretic.cli.ui.console import escape_terminal
from heretic.errors import Interrupted, UserError
from heretic.files import expand_user, write_text
from heretic.settings import Settings
from heretic.settings.sources import check_types
from heretic.settings.toml import commented_text

QUICK_TRIALS = 20


def write_first_config(console: Console, path: Path) -> None:
    """Ask for the model, the folder of the result and the number of trials, and write them to `path`.

    An empty answer takes the default in brackets.

    Raises:
        Interrupted: at Ctrl-C or the end of the input; nothing is written.
    """
    usual = Settings().n_trials
    console.print("heretic has no config.toml here. Three questions make one; Ctrl-C ends without writing anything.")
    model = _ask(console, "Which model? A folder, a .gguf file, or owner/name on the hub:", "model", str)
    folder = _ask(console, "To which folder?", "save_to", str, f"models/{_short_name(model)}-ablated")
    console.print(f"Trials: {QUICK_TRIALS} for a first look, {usual} for a thorough search.")
    trials = _ask(console, "How many trials at most?", "n_trials", int, str(QUICK_TRIALS))
    write_text(path, commented_text({"model": model, "save_to": folder, "n_trials": trials}))
    console.print(f"Written: {path}. All other settings keep their defaults (heretic config --defaults).")
    console.print("Check it:  heretic preflight\nStart it:  heretic", highlight=False)


def _ask(console: Console, question: str, key: str, kind: type, default: str = "") -> str | int:
    """Ask until the answer is a valid value of the setting `key`."""
    while True:
        hint = f" [dim]\\[{escape_terminal(default)}][/dim]" if default else ""
        try:
            text = console.input(f"[bold]{question}[/bold]{hint} ").strip() or default
        except (EOFError, KeyboardInterrupt):
            raise Interrupted from None
        try:
            value = kind(text)
            check_types({key: value}, "the answer")
            if key == "model":
                _check_model(text)
        except (UserError, ValueError) as error:
            reason = error.what if isinstance(error, UserError) else "This is not a whole number."
            console.print(escape_terminal(reason))
            continue
        return value


def _check_model(text: str) -> None:
    if not (expand_user(text).exists() if text else False) and not re.fullmatch(r"[\w.-]+/[\w.-]+", text):
        raise UserError("Name an existing folder or file, or a model as owner/name.", code="no-model-folder")


def _short_name(model: str | int) -> str:
    return Path(str(model).rstrip("/")).name.removesuffix(".gguf")
