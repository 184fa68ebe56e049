"""Chat templates: which one a tokenizer has, and rendering it where its time and memory are limited.

A template is a program of the model's author. jinja's sandbox keeps it from files and commands, not from computing for ever, so
it runs in a process of its own (`template_process`), one for all templates, that ends with this one.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from heretic.errors import UserError, first_line, plain_line
from heretic.files import expand_user
from heretic.model.template_process import CPU_SECONDS, EXTRA_CHARACTERS, MEMORY
from heretic.settings import Settings

Messages = Sequence[Mapping[str, str]]

STARTED_WITHIN = 120.0  # seconds of the clock, on a machine that has much else to do
ANSWERED_WITHIN = 60.0  # likewise, for one conversation, of which CPU_SECONDS may be computed
LONGEST_MESSAGE = 300  # characters of what a template says of its error
LARGEST_FILE = 1 << 20  # bytes of a template
OWN_FILE = 'set chat_template = "template.jinja"'
LIMITS = {
    "time": f"The chat template takes more than {CPU_SECONDS:.0f} seconds for one conversation.",
    "memory": f"The chat template needs more than {MEMORY >> 20} MiB of memory for one conversation.",
    "length": f"The chat template adds more than {EXTRA_CHARACTERS:,} characters to a conversation.",
}


def read_template(settings: Settings) -> str:
    """The chat template that the settings name; empty for the model's own. Raises UserError."""
    if not settings.chat_template:
        return ""
    path = expand_user(settings.chat_template)
    try:
        if path.exists() and not path.is_file():
            raise OSError("it is no file")
        if path.stat().st_size > LARGEST_FILE:
            raise OSError(f"it is larger than {LARGEST_FILE >> 20} MiB")
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(
            f"The chat template cannot be read: {plain_line(first_line(error))}.",
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
    """The template that a conversation without tools is rendered by; empty if there is none. Raises UserError for what is none."""
    given: Any = getattr(tokenizer, "chat_template", None)
    if isinstance(given, Mapping):
        if given and "default" not in given:
            names = ", ".join(plain_line(str(name)) for name in sorted(map(str, given)))[:LONGEST_MESSAGE]
            raise UserError(
                f"The model has several chat templates and none is the default: {names}.",
                code="chat-template-choice",
                where="chat_template",
                fix='write one of them to a file and name it: chat_template = "template.jinja"',
            )
        given = given.get("default")
    if given is None:
        return ""
    if not isinstance(given, str):
        raise UserError(
            f"The model's chat template is of type {type(given).__name__}; a text is needed.",
            code="chat-template-type",
            where="tokenizer_config.json: chat_template",
            fix=OWN_FILE,
        )
    return given


def render(tokenizer: PreTrainedTokenizerBase, messages: Messages, variables: Mapping[str, Any]) -> str:
    """A conversation as text up to where the answer begins. Raises UserError where the template fails or takes too much."""
    fix = f"leave system_prompt empty, or {OWN_FILE}" if messages[0]["role"] == "system" else OWN_FILE
    if type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template:
        return _by_own_code(tokenizer, messages, variables, fix)
    template = template_of(tokenizer)
    if not template.strip():
        raise UserError("The model has no chat template.", code="no-chat-template", where="chat_template", fix=OWN_FILE)
    request = {
        "template": template,
        "messages": [dict(m) for m in messages],
        "variables": {**{k: str(v) for k, v in tokenizer.special_tokens_map.items()}, **variables},
    }
    reply = PROCESS.ask(request)
    if (limit := reply.get("limit")) is not None:
        raise UserError(LIMITS[limit], code="chat-template-limit", where="chat template", fix=fix)
    if (error := reply.get("error")) is not None:
        raise _failed(error, reply.get("line"), fix)
    return str(reply["text"])


def _by_own_code(tokenizer: PreTrainedTokenizerBase, messages: Messages, variables: Mapping[str, Any], fix: str) -> str:
    """A tokenizer that renders conversations by code of its own, which is part of transformers or trusted by the user."""
    try:
        given = [dict(m) for m in messages]
        return str(tokenizer.apply_chat_template(given, tokenize=False, add_generation_prompt=True, **variables))
    except Exception as error:  # its code raises what its author thought of
        raise _failed(first_line(error), None, fix) from None


def _failed(text: str, line: int | None, fix: str) -> UserError:
    place = "chat template" if line is None else f"chat template, line {line}"
    said = plain_line(text.strip())[:LONGEST_MESSAGE]
    return UserError(f"The model's chat template fails: {said}", code="chat-template", where=place, fix=fix)


class TemplateProcess:
    """The process that renders, started when it is first needed, and again after one that had to be ended."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None
        self._ready = self._too_long = False
        self._owner = 0
        self._lock = threading.Lock()

    def start(self) -> None:
        """Begin, without waiting until it is ready."""
        with self._lock:
            self._start()

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The process's answer; `limit` where it had to be ended. Raises UserError where there is no such process."""
        with self._lock:
            process = self._start()
            try:
                return self._exchange(process, request)
            except BaseException:  # an answer that nobody took would be taken for the next one's
                self._end()
                raise

    def end(self) -> None:
        """End it, if it runs."""
        with self._lock:
            self._end()

    def _start(self) -> subprocess.Popen[str]:
        if self.process is not None and self.process.poll() is None and self._owner == os.getpid():
            return self.process
        # The path as it is here: what lies in the current folder under the name of a package is not imported.
        program = f"import sys; sys.path[:] = {sys.path!r}; from heretic.model.template_process import main; main()"
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-c", program],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                encoding="ascii",
                start_new_session=True,  # a Ctrl-C is for us; its end comes with that of its input
            )
        except (OSError, ValueError) as error:
            raise _not_started(first_line(error)) from None
        self._ready, self._owner = False, os.getpid()
        return self.process

    def _exchange(self, process: subprocess.Popen[str], request: Mapping[str, Any]) -> dict[str, Any]:
        if not self._ready:
            if self._line(process, STARTED_WITHIN) != "ready\n":
                self._end()
                raise _not_started(f"it ended with status {process.returncode}")
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
        if process.returncode == -getattr(signal, "SIGKILL", 0):  # by the system, which has no memory left
            return {"limit": "memory"}
        return {"error": f"it ends the process that renders it (status {process.returncode})"}

    def _line(self, process: subprocess.Popen[str], seconds: float) -> str:
        """Its next line; cut short or empty where it ends or has to be ended."""
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
                except OSError:  # what was not written yet, to one that is gone
                    continue
        process.wait()


def _not_started(why: str) -> UserError:
    return UserError(
        f"The process that renders chat templates does not start: {plain_line(why)}.",
        code="chat-template-process",
        where=sys.executable,
        fix="check that this Python can start a process and import transformers",
    )


PROCESS = TemplateProcess()
atexit.register(PROCESS.end)
