"""The chat of the live page: one thread opens the run, holds the model, and answers one question at a time.

Nothing of a conversation is stored: the page holds it and sends it with every question.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from heretic.errors import Interrupted, UserError, first_line, memory_error
from heretic.interrupt import StopSignal
from heretic.progress import NullReporter, Stage
from heretic.report.chat import Question
from heretic.runs.folder import RunFolder

if TYPE_CHECKING:  # the page is there before PyTorch is imported
    from heretic.pipeline.run_context import RunContext

MODELS = ("original", "ablated")
SECONDS_BETWEEN_SIGNS = 1.0  # of life, while there is no text: they show whether the page is still there
SECONDS_TO_END = 20.0  # that closing waits for the thread

log = logging.getLogger("heretic")
Event = dict[str, str]


@dataclass(frozen=True, eq=False)
class _Asked:
    """A question and its events; None ends them."""

    question: Question
    events: SimpleQueue[Event | None] = field(default_factory=SimpleQueue)


class _NoteTaker(NullReporter):
    """Keeps the latest stage or message, for the page."""

    def __init__(self) -> None:
        self.note = ""

    @contextmanager
    def stage(self, name: str, total: int | None) -> Iterator[Stage]:
        """See ProgressReporter."""
        self.note = name
        with super().stage(name, total) as stage:
            yield stage

    def info(self, text: str) -> None:
        """See ProgressReporter."""
        self.note = text


class BrowserChat:
    """Chat with the trials of a run and its original; loads the model when asked to (`heretic.report.chat.ChatModel`)."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self._lock = threading.Lock()  # guards everything below
        self._phase, self._problem = "off", ""
        self._reporter, self._stop = _NoteTaker(), StopSignal()
        self._asked: SimpleQueue[_Asked | None] = SimpleQueue()  # None ends the thread
        self._current: _Asked | None = None
        self._thread: threading.Thread | None = None

    def state(self) -> dict[str, Any]:
        """See ChatModel."""
        with self._lock:
            note = self._reporter.note if self._phase == "loading" else ""
            return {"phase": self._phase, "note": note, "problem": self._problem}

    def load(self) -> None:
        """See ChatModel."""
        with self._lock:
            if self._phase != "off":
                raise UserError("The model is already loaded.", code="chat-loaded", fix="ask it, or unload it")
            self._phase, self._problem = "loading", ""
            self._reporter, self._stop, self._asked = _NoteTaker(), StopSignal(), SimpleQueue()
            self._thread = threading.Thread(target=self._work, name="chat", daemon=True)
            self._thread.start()

    def unload(self) -> None:
        """See ChatModel."""
        with self._lock:
            self._stop.requested = True
            self._asked.put(None)

    def close(self) -> None:
        """Release the model and wait for the thread."""
        self.unload()
        if self._thread is not None:
            self._thread.join(SECONDS_TO_END)

    def stop(self) -> None:
        """See ChatModel."""
        with self._lock:
            if self._current is not None:
                self._stop.requested = True

    def answer(self, question: Question) -> Generator[Event | None]:
        """See ChatModel."""
        asked = _Asked(question)
        with self._lock:
            if self._phase != "ready":
                busy = self._phase == "answering"
                raise UserError(
                    "The model is answering another question." if busy else "The model is not loaded.",
                    code="chat-busy" if busy else "chat-not-loaded",
                    fix="wait for that answer, or stop it" if busy else "load the model first",
                )
            self._stop.reset()
            self._phase, self._current = "answering", asked
            self._asked.put(asked)
        return self._events(asked)

    def _events(self, asked: _Asked) -> Generator[Event | None]:
        try:
            while True:
                try:
                    event = asked.events.get(timeout=SECONDS_BETWEEN_SIGNS)
                except Empty:
                    yield None
                    continue
                if event is None:
                    return
                yield event
        finally:  # the page is gone: nobody reads the rest
            with self._lock:
                if self._current is asked:
                    self._stop.requested = True

    def _work(self) -> None:
        """Open the run, load the model and answer until told to end; the only thread that touches run and model."""
        from heretic.pipeline.actions import open_run

        problem, folder, stop = "", self.folder, self._stop
        try:
            opened = open_run(folder.name, str(folder.path.parent), (), wait=False, reporter=self._reporter, stop=stop)
            with opened as run_context:
                run_context.session()
                self._become("ready")
                while (asked := self._asked.get()) is not None:
                    self._reply(run_context, asked)
        except Interrupted:
            pass
        except UserError as error:
            problem = str(error)
        except Exception as error:  # a defect; its traceback is in the run's log
            problem = f"The chat ended: {first_line(error)}"
            log.exception("the chat ended")
        finally:
            with self._lock:
                self._phase, self._problem = "off", problem
                if self._current is not None:
                    self._current.events.put(None)
                self._current = None

    def _become(self, phase: str) -> None:
        with self._lock:
            self._phase = phase

    def _reply(self, run_context: RunContext, asked: _Asked) -> None:
        from heretic.model.batching import free_memory, out_of_memory
        from heretic.pipeline.actions import start_chat

        try:
            _, generate = start_chat(run_context, asked.question.trial, asked.question.tokens)
            for model in MODELS:
                messages = [message.model_dump() for message in getattr(asked.question, model)]

                def on_text(text: str, model: str = model) -> None:
                    asked.events.put({"model": model, "text": text})

                said = generate(messages, model == "ablated", on_text)
                asked.events.put({"model": model, "answer": said})
        except Interrupted:
            pass
        except UserError as error:
            asked.events.put({"error": str(error)})
        except Exception as error:
            if not out_of_memory(error):
                raise
            asked.events.put({"error": str(memory_error(error))})
            free_memory()
        with self._lock:
            self._phase, self._current = "ready", None
            asked.events.put(None)
