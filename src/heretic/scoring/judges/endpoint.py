"""An OpenAI-compatible endpoint: one question, one reply, and what failures mean.

Questions go only to the configured endpoint: redirects are not followed. The API key is never stored or shown.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any

from heretic.errors import JudgeFailed, UserError, plain_line
from heretic.settings import LlmSettings

TEMPORARY = (408, 409, 425, 429)  # and every status from 500
OF_THE_TEXT = (400, 403, 413, 422)  # a filter of contents, or a text that is too long
MAX_REPLY_BYTES = 1 << 20  # bytes
LONGEST_REASON = 200  # characters of the endpoint's own message


class Failed(Exception):
    """A failed attempt that can be retried, after `after` seconds if the endpoint sent Retry-After."""

    def __init__(self, what: str, *, after: float | None = None) -> None:
        super().__init__(what)
        self.after = after


class NoVerdict(Failed):
    """A reply without a verdict."""


class Rejected(NoVerdict):
    """A request that the endpoint refuses, perhaps because of its text; another attempt would not help."""


@dataclass(frozen=True)
class Reply:
    """The text of a reply, and whether the limit of tokens cut it off."""

    text: str
    cut_off: bool


class Endpoint:
    """Sends questions to the endpoint of the settings."""

    def __init__(self, settings: LlmSettings, key: str) -> None:
        """Raises UserError for a key that no header can hold."""
        self._settings, self._key = settings, key.strip()
        if not self._key.isascii() or not self._key.isprintable():
            raise UserError(
                f"The key in {settings.key_variable} has characters that HTTP headers forbid.",
                code="invalid-key",
                where="judge.llm.key_variable",
                fix=f"set {settings.key_variable} again",
            )
        self._opener = urllib.request.build_opener(_NoRedirection)
        self._limit, self._temperature = "max_tokens", True

    def ask(self, instruction: str, question: str) -> Reply:
        """Ask once. Raises Failed, Rejected, and JudgeFailed for what no other text or attempt would change."""
        while True:
            limit, temperature = self._limit, self._temperature
            try:
                return self._ask(instruction, question)
            except Rejected as rejected:
                adapted = self._adapts_to(str(rejected)) or (limit, temperature) != (self._limit, self._temperature)
                if not adapted:  # nor by another thread meanwhile
                    raise

    def rejects(self, reason: Exception | str) -> JudgeFailed:
        """Return the error for an endpoint that takes no questions."""
        return JudgeFailed(
            f"The judge at {self._settings.base_url} rejects requests: {reason}.",
            where="judge.llm",
            fix="check base_url (usually ends in /v1), model and the key in key_variable, then run the same command again; "
            "finished trials are kept",
        )

    def _adapts_to(self, reason: str) -> bool:
        """Whether the reason names a parameter that models differ in and that has not been changed yet."""
        if "max_completion_tokens" in reason and self._limit == "max_tokens":
            self._limit = "max_completion_tokens"  # OpenAI's reasoning models
            return True
        if "temperature" in reason and self._temperature:
            self._temperature = False
            return True
        return False

    def _ask(self, instruction: str, question: str) -> Reply:
        settings = self._settings
        body = {
            "model": settings.model,
            "messages": [{"role": "system", "content": instruction}, {"role": "user", "content": question}],
            self._limit: settings.max_tokens,
        } | ({"temperature": 0} if self._temperature else {})
        headers = {"Content-Type": "application/json", "User-Agent": "heretic"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        url = settings.base_url.rstrip("/") + "/chat/completions"
        request = urllib.request.Request(url, json.dumps(body).encode(), headers, method="POST")
        content: Any = None
        try:
            with self._opener.open(request, timeout=settings.timeout) as reply:
                content = json.loads(reply.read(MAX_REPLY_BYTES))
            choice = content["choices"][0]
            return Reply(str(choice["message"]["content"] or ""), choice.get("finish_reason") == "length")
        except urllib.error.HTTPError as error:
            reason = f"status {error.code}{self._message(_body(error))}"
            if error.code in TEMPORARY or error.code >= 500:
                raise Failed(reason, after=_seconds(error.headers.get("Retry-After"))) from None
            if error.code in OF_THE_TEXT:
                raise Rejected(reason) from None
            raise self.rejects(reason) from None
        except (OSError, HTTPException) as error:  # no connection, lost connection or timeout
            raise Failed(str(getattr(error, "reason", None) or error) or type(error).__name__) from None
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            raise Failed(self._message(content)[2:] or "its reply is not in the OpenAI-compatible format") from None

    def _message(self, content: Any) -> str:
        """Return the endpoint's own message after a colon, without the key; empty without one."""
        error = content.get("error") if isinstance(content, dict) else None
        text = error.get("message") if isinstance(error, dict) else error
        if not isinstance(text, str) or not text.strip():
            return ""
        plain = plain_line(" ".join(text.split()))
        return f": {(plain.replace(self._key, '***') if self._key else plain)[:LONGEST_REASON].rstrip('.')}"


class _NoRedirection(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """Follow no redirect: prompts and key go to the configured endpoint only."""


def _body(error: urllib.error.HTTPError) -> Any:
    try:
        return json.loads(error.read(MAX_REPLY_BYTES))
    except (OSError, HTTPException, ValueError):
        return None


def _seconds(text: str | None) -> float | None:
    try:
        return max(0.0, float(text)) if text else None
    except ValueError:  # a date
        return None
