"""Chat templates that mean harm: whatever they hold, rendering them gives a text or one short error, in bounded time."""

from __future__ import annotations

import time
from functools import cache

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from heretic.errors import UserError
from heretic.model.template import PROCESS, render
from heretic.model.template_process import CPU_SECONDS, EXTRA_CHARACTERS
from tests.faults.conftest import FULL, Amount, Tally
from tests.tiny import TEMPLATE, tiny_tokenizer

TIMES = 2000 if FULL else 30
MANY = settings(max_examples=TIMES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
MESSAGES = [{"role": "user", "content": "tell \x1b[2J me"}]
CODES = {"chat-template", "chat-template-limit", "no-chat-template", "chat-template-type", "chat-template-choice"}
LONGEST = 2 * CPU_SECONDS + 20  # seconds of the clock, on a machine that has other work
# What templates reach the inside of Python by, fail by, and never end by.
PIECES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.append.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.system('touch executed') }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os }}",
    "{{ raise_exception(messages[0].content) }}",
    "{{ 1 // 0 }}",
    "{{ 9 ** 5000 }}",
    "{{ messages * 10 ** 9 }}",
    "{{ ('x' * 10 ** 9) * 10 ** 9 }}",
    "{{ 'x'.center(10 ** 11) }}",
    "{{ '%0*d' % (10 ** 10, 1) }}",
    "{{ range(10 ** 18) | list }}",
    "{{ [[]] | sort(attribute='x') }}",
    "{{ ('[' * 10 ** 5) | tojson }}",
    "{{ strftime_now('%Y' * 10 ** 5) }}",
    "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "{% set ns = namespace(a='ab') %}{% for i in range(99) %}{% set ns.a = ns.a + ns.a %}{% endfor %}{{ ns.a }}",
    "{% set ns = namespace(__class__=1) %}",
    "{% for m in messages %}{{ m.content }}{% endfor %}",
    "{{ messages[0]['content'] | replace('', 'y' * 10 ** 4) }}",
    "{% generation %}{{ x }}{% endgeneration %}",
    "{{ '\\ud800\\x1b]0;t\\x07' }}",
    "{% raw %}", "{{", "%}", "{#", "{% endfor %}", "\x00", "\x1b[31m", "\u202e",
]  # fmt: skip
ENDLESS = [
    "{% for i in range(10 ** 5) %}{% for j in range(10 ** 5) %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{{ 7 ** (10 ** 8) % 3 }}",
    "{% for i in range(99999) %}{% if range(99999) | sum %}{% endif %}{% endfor %}",
]


the_tokenizer = cache(tiny_tokenizer)


def outcome(template: object) -> str:
    """The code of the error that a template ends in; empty where it gives a text. Everything is checked that has to hold."""
    tokenizer = the_tokenizer()
    tokenizer.chat_template = template
    began = time.monotonic()
    try:
        text = render(tokenizer, MESSAGES, {})
    except UserError as error:
        assert error.code in CODES, error
        assert len(str(error)) < 800 and len(str(error).splitlines()) <= 3
        assert all(line.isprintable() for line in str(error).splitlines())
        return error.code
    finally:
        assert time.monotonic() - began < LONGEST
    assert len(text) <= EXTRA_CHARACTERS + 100
    return ""


@given(template=st.lists(st.sampled_from(PIECES), min_size=1, max_size=4).map("\n".join))
@MANY
def test_pieces_of_hostile_templates_in_any_order(template: str) -> None:
    outcome(template)


@given(template=st.text(alphabet=st.sampled_from("{}%#-|.()[]'\"*+~ \n0123456789abcforendif\x1b\ud800"), max_size=80))
@MANY
def test_any_text_as_a_template(template: str) -> None:
    outcome(template)


@given(
    template=st.one_of(
        st.integers(), st.floats(), st.booleans(), st.lists(st.text()), st.dictionaries(st.text(), st.text())
    )
)
@MANY
def test_anything_as_a_template(template: object) -> None:
    outcome(template)


def test_templates_without_end_are_stopped_and_others_go_on(amount: Amount, tally: Tally) -> None:
    stopped = ENDLESS[: amount(1, len(ENDLESS))]
    for template in stopped:
        assert outcome(template) == "chat-template-limit"
        assert outcome(TEMPLATE) == ""
    tally("chat templates that compute without end", len(stopped), "nothing: stopped, the next one renders")
    assert PROCESS.process is not None


def test_counted(tally: Tally) -> None:
    tally(
        "chat templates of hostile pieces, of random text, and of other types",
        3 * TIMES,
        "nothing: a text or one error",
    )
