"""The process that renders untrusted chat templates, with limited time and memory.

It reads one JSON request a line and writes one JSON answer a line until its input ends. It imports neither torch nor a model.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

CPU_SECONDS = 2.0  # for one conversation; an ordinary template takes less than a millisecond
MEMORY = 256 << 20  # bytes beyond the process's size at the start
EXTRA_CHARACTERS = 200_000  # that a template may add to the conversation

Render = Callable[[str, list[dict[str, Any]], dict[str, Any]], str]


class Clock(datetime.datetime):
    """The clock of the templates: stands still at `fixed` unless that is None."""

    fixed: datetime.datetime | None = None

    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> Any:
        """Return the present."""
        return cls.fixed or datetime.datetime.now(tz)


def limit_memory() -> None:
    """Make allocations beyond the limit raise MemoryError, on systems that support it."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        with open("/proc/self/statm", encoding="ascii") as file:
            pages = int(file.read().split()[0])
        most = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def limit_time(seconds: float) -> None:
    """End this process by SIGPROF after `seconds` of CPU time; 0 removes the limit."""
    if hasattr(signal, "setitimer"):  # elsewhere the parent's watchdog ends it
        signal.setitimer(signal.ITIMER_PROF, seconds)


def render_function() -> Render:
    """Return transformers' function that renders a template."""
    from transformers.utils import chat_template_utils

    # `strftime_now` of the templates reads it, and variables can only be plain data.
    vars(chat_template_utils)["datetime"] = Clock

    def render(template: str, messages: list[dict[str, Any]], variables: dict[str, Any]) -> str:
        rendered: Any = chat_template_utils.render_jinja_template(
            conversations=[messages], chat_template=template, add_generation_prompt=True, **variables
        )
        return str(rendered[0][0])

    return render


def template_line(error: BaseException) -> int | None:
    """Return the line of the template that raised the error; None if unknown."""
    line = getattr(error, "lineno", None)
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename in ("<template>", "<unknown>"):
            line = trace.tb_lineno
        trace = trace.tb_next
    return line if isinstance(line, int) else None


def answer(request: dict[str, Any], render: Render) -> dict[str, Any]:
    """Answer one request with `text`, with `error` and its `line`, or with the `limit` that was exceeded."""
    messages = request["messages"]
    most = EXTRA_CHARACTERS + sum(len(str(m["content"])) for m in messages)
    date = request.get("date")
    Clock.fixed = datetime.datetime.fromisoformat(date) if date else None
    limit_time(CPU_SECONDS)
    try:
        text = render(request["template"], messages, request["variables"])
        if len(text) > most:
            return {"limit": "length"}
        text.encode("utf-8")  # a tokenizer rejects lone surrogates
        return {"text": text}
    except MemoryError:
        return {"limit": "memory"}
    except Exception as error:  # a template raises any type
        return {"error": f"{error}"[:1000] or type(error).__name__, "line": template_line(error)}
    finally:
        limit_time(0)


def main() -> None:
    """Answer requests until the input ends."""
    replies = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # other output must not mix with answers
    render = render_function()
    # The first rendering imports modules, so it runs before the memory limit.
    render("{{ messages[0].content }}", [{"role": "user", "content": ""}], {})
    limit_memory()
    replies.write("ready\n")
    replies.flush()
    for line in sys.stdin.buffer:
        replies.write(json.dumps(answer(json.loads(line), render)) + "\n")
        replies.flush()
