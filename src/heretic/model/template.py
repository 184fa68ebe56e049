"""Chat templates: select a tokenizer's template, and render it with limited time and memory.

A template is a program of the model's author. jinja's sandbox blocks files and commands but not endless loops, so all templates
run in a separate process (`template_process`), which ends with this one.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from heretic.errors import UserError, first_line, plain_line
from heretic.files import expand_user
from heretic.hardware.processes import ending
from heretic.model.template_process import CPU_SECONDS, EXTRA_CHARACTERS, MEMORY
from heretic.settings import Settings

Messages = Sequence[Mapping[str, str]]

STARTED_WITHIN = 120.0  # wall-clock seconds, on a busy machine
ANSWERED_WITHIN = 60.0  # wall-clock seconds for one conversation, CPU_SECONDS of them computing
LONGEST_MESSAGE = 300  # characters of a template's error message
LARGEST_FILE = 1 << 20  # bytes of a template
OWN_FILE = 'set chat_template = "template.jinja"'
LIMITS = {
    "time": f"The chat template needs more than {CPU_SECONDS:.0f} seconds for one conversation.",
    "memory": f"The chat template needs more than {MEMORY >> 20} MiB of memory for one conversation.",
    "length": f"The chat template adds more than {EXTRA_CHARACTERS:,} characters to a conversation.",
}


def read_template(settings: Settings) -> str:
    """Read the chat template that the settings name; empty for the model's own. Raises UserError."""
    if not settings.chat_template:
        return ""
    path = expand_user(settings.chat_template)
    try:
        if path.exists() and not path.is_file():
            raise OSError("it is not a file")
        if path.stat().st_size > LARGEST_FILE:
            raise OSError(f"it is larger than {LARGEST_FILE >> 20} MiB")
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(
            f"The chat template cannot be read: {first_line(error)}.",
            code="chat-template-file",
            where=f"chat_template = {settings.chat_template!r}",
            fix="name a Jinja file in UTF-8",
        ) from None
    if not text.strip():
        raise UserError(
            "The chat template is empty.",
            code="chat-template-file",
            where=f"chat_template = {settings.chat_template!r}",
            fix="name a Jinja file in UTF-8",
        )
    return text


def template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the template for conversations without tools; empty if there is none. Raises UserError if it is not a text."""
    template: Any = getattr(tokenizer, "chat_template", None)
    if isinstance(template, Mapping):
        if template and "default" not in template:
            names = ", ".join(plain_line(str(name)) for name in sorted(map(str, template)))[:LONGEST_MESSAGE]
            raise UserError(
                f"The model has several chat templates but no default: {names}.",
                code="chat-template-choice",
                where="chat_template",
                fix='save one of them to a file and name it: chat_template = "template.jinja"',
            )
        template = template.get("default")
    if template is None:
        return ""
    if not isinstance(template, str):
        raise UserError(
            f"The model's chat template must be a text, not {type(template).__name__}.",
            code="chat-template-type",
            where="tokenizer_config.json: chat_template",
            fix=OWN_FILE,
        )
    return template


def template_beside(folder: Path) -> str | None:
    """Return the template that a checkpoint has for its processor only (Mistral Small 3.1, Idefics 2); None if there is none."""
    for name in ("chat_template.json", "processor_config.json"):
        with contextlib.suppress(OSError, ValueError):
            data = json.loads((folder / name).read_text(encoding="utf-8"))
            if isinstance(data, dict) and isinstance(template := data.get("chat_template"), str):
                return template
    return None


def today_for(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return today's date as YYYY-MM-DD if the template prints the date (as in Llama 3.1 and gpt-oss), else an empty string."""
    return datetime.date.today().isoformat() if "strftime_now" in template_of(tokenizer) else ""


def render_messages(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, variables: Mapping[str, Any], date: str = ""
) -> str:
    """Render a conversation as text up to the start of the answer.

    Some templates read contents only as a list of parts (SmolVLM) and leave out plain text. They get such a list.

    Raises:
        UserError: if the template fails or exceeds a limit.
    """
    text, failure = "", None
    try:
        text = render(tokenizer, messages, variables, date)
    except UserError as error:
        if error.code != "chat-template":
            raise
        failure = error
    if failure is None and contains(text, messages):
        return text
    in_parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    with contextlib.suppress(UserError):
        parted = render(tokenizer, in_parts, variables, date)
        if contains(parted, messages) and not _prints_lists(parted, messages):
            return parted
    if failure is not None:
        raise failure
    return text


def contains(text: str, messages: Messages) -> bool:
    """Return whether the contents of all messages are in a rendered text, up to blanks around them.

    Answers do not count: templates leave out their thoughts.
    """
    return all(str(m["content"]).strip() in text for m in messages if m["role"] != "assistant")


def _prints_lists(parted: str, messages: Messages) -> bool:
    """Whether a template printed the lists of parts themselves."""
    for message in messages:
        parted = parted.replace(str(message["content"]).strip(), "")
    return re.search(r"""["']type["']:""", parted) is not None


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    variables: Mapping[str, Any],
    date: str = "",
) -> str:
    """Render messages as they are. Raises UserError if the template fails or exceeds a limit."""
    fix = f"leave system_prompt empty, or {OWN_FILE}" if messages[0]["role"] == "system" else OWN_FILE
    if type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template:
        return _render_with_own_code(tokenizer, messages, variables, fix)
    template = template_of(tokenizer)
    if not template.strip():
        raise UserError("The model has no chat template.", code="no-chat-template", where="chat_template", fix=OWN_FILE)
    request = {
        "template": template,
        "messages": [dict(m) for m in messages],
        "variables": {**{k: str(v) for k, v in tokenizer.special_tokens_map.items()}, **variables},
        "date": date,
    }
    reply = PROCESS.ask(request)
    if (limit := reply.get("limit")) is not None:
        raise UserError(LIMITS[limit], code="chat-template-limit", where="chat template", fix=fix)
    if (error := reply.get("error")) is not None:
        raise _template_error(error, reply.get("line"), fix)
    return str(reply["text"])


def _render_with_own_code(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any], fix: str
) -> str:
    """Render with the tokenizer's own code, which is part of transformers or trusted by the user."""
    try:
        plain_messages = [dict(m) for m in messages]
        return str(
            tokenizer.apply_chat_template(plain_messages, tokenize=False, add_generation_prompt=True, **variables)
        )
    except Exception as error:  # custom code raises any type
        raise _template_error(first_line(error), None, fix) from None


def _template_error(text: str, line: int | None, fix: str) -> UserError:
    where = "chat template" if line is None else f"chat template, line {line}"
    message = plain_line(text.strip())[:LONGEST_MESSAGE]
    return UserError(f"The model's chat template failed: {message}", code="chat-template", where=where, fix=fix)


class TemplateProcess:
    """The rendering process, started on first use and restarted after it was killed."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None
        self._ready = self._too_long = False
        self._owner = 0
        self._lock = threading.Lock()

    def start(self) -> None:
        """Start the process without waiting until it is ready."""
        with self._lock:
            self._start()

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Return the process's answer; `limit` if it exceeded one. Raises UserError if the process cannot start."""
        with self._lock:
            process = self._start()
            try:
                return self._exchange(process, request)
            except BaseException:  # an unread answer would be read as the next one
                self._end()
                raise

    def end(self) -> None:
        """Kill the process if it runs."""
        with self._lock:
            self._end()

    def _start(self) -> subprocess.Popen[str]:
        if self.process is not None and self.process.poll() is None and self._owner == os.getpid():
            return self.process
        # With this process's sys.path: files in the current folder cannot shadow packages.
        program = f"import sys; sys.path[:] = {sys.path!r}; from heretic.model.template_process import main; main()"
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-c", program],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                encoding="ascii",
                start_new_session=True,  # Ctrl-C reaches only this process; the child ends with its input
            )
        except (OSError, ValueError) as error:
            raise _not_started(first_line(error)) from None
        self._ready, self._owner = False, os.getpid()
        return self.process

    def _exchange(self, process: subprocess.Popen[str], request: Mapping[str, Any]) -> dict[str, Any]:
        if not self._ready:
            if self._line(process, STARTED_WITHIN) != "ready\n":
                self._end()
                late = f"it was not ready within {STARTED_WITHIN} s"
                raise _not_started(late if self._too_long else f"it {ending(process.returncode)}")
            self._ready = True
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            line = self._line(process, ANSWERED_WITHIN)
        except BrokenPipeError:
            line = ""
        if line.endswith("\n"):
            return dict(json.loads(line))
        self._end()
        if self._too_long or process.returncode == -getattr(signal, "SIGPROF", 0):
            return {"limit": "time"}
        if process.returncode == -getattr(signal, "SIGKILL", 0):  # by the system's out-of-memory killer
            return {"limit": "memory"}
        return {"error": f"the rendering process {ending(process.returncode)}"}

    def _line(self, process: subprocess.Popen[str], seconds: float) -> str:
        """The process's next line; incomplete or empty if it ends or is killed."""
        assert process.stdout is not None
        self._too_long = False
        watchdog = threading.Timer(seconds, self._kill, [process])
        watchdog.daemon = True
        watchdog.start()
        try:
            return process.stdout.readline()
        finally:
            watchdog.cancel()

    def _kill(self, process: subprocess.Popen[str]) -> None:
        self._too_long = True
        process.kill()

    def _end(self) -> None:
        process, self.process = self.process, None
        if process is None or self._owner != os.getpid():
            return
        process.kill()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                try:
                    stream.close()
                except OSError:  # unwritten data for a process that is gone
                    continue
        process.wait()


def _not_started(why: str) -> UserError:
    return UserError(
        f"The process that renders chat templates cannot start: {plain_line(why)}.",
        code="chat-template-process",
        where=sys.executable,
        fix="check that this Python can start a process and import transformers",
    )


PROCESS = TemplateProcess()
atexit.register(PROCESS.end)
