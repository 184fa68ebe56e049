"""The chat of the live page: one thread opens the run, holds the model, and answers one question at a time.

Nothing of a conversation is stored: the page holds it and sends it with every question.
"""

from __future__ import annotations

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
                ending = self._phase == "unloading"
                raise UserError(
                    "The model is being unloaded." if ending else "The model is already loaded.",
                    code="chat-loaded",
                    fix="wait until it is unloaded" if ending else "ask it, or unload it",
                )
            self._phase, self._problem = "loading", ""
            self._reporter, self._stop, self._asked = _NoteTaker(), StopSignal(), SimpleQueue()
            self._thread = threading.Thread(target=self._work, name="chat", daemon=True)
            self._thread.start()

    def unload(self) -> None:
        """See ChatModel."""
        with self._lock:
            if self._phase != "off":
                self._phase, self._stop.requested = "unloading", True
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
        events = self._events(asked)
        next(events)  # closing a generator that has not started would skip its `finally`
        return events

    def _events(self, asked: _Asked) -> Generator[Event | None]:
        try:
            yield None  # to `answer`
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
        problem, path = "", self.folder.path
        try:
            from heretic.pipeline.actions import open_run

            # By its path: a run of the same name in the current folder would come first.
            opened = open_run(str(path), str(path.parent), (), wait=False, reporter=self._reporter, stop=self._stop)
            with opened as run_context:
                run_context.session()
                self._become_ready()
                while (asked := self._asked.get()) is not None:
                    self._reply(run_context, asked)
        except Interrupted:
            pass
        except UserError as error:
            problem = str(error)
        except Exception as error:  # a defect; once the run is open, its traceback is in run.log
            problem = f"The chat ended: {first_line(error)}"
        finally:
            with self._lock:
                self._phase, self._problem = "off", problem
                if self._current is not None:
                    self._current.events.put(None)
                self._current = None

    def _become_ready(self) -> None:
        """End the answer, if there is one, and take the next question, unless the model is being unloaded."""
        with self._lock:
            if self._phase != "unloading":
                self._phase = "ready"
            if self._current is not None:
                self._current.events.put(None)
            self._current = None

    def _reply(self, run_context: RunContext, asked: _Asked) -> None:
        from heretic.model.batching import free_memory, out_of_memory
        from heretic.pipeline.actions import start_chat

        ran_out = False
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
            ran_out = True
        if ran_out:  # only here: until the error is gone, its traceback holds the answer's tensors
            free_memory()
        self._become_ready()
