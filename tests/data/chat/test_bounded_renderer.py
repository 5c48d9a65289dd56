"""Templates that never end, or that take all memory: each one a message, and the next one is rendered."""

import os
import signal
import threading
from datetime import datetime

import pytest

from llmtrain.data.chat.bounded_renderer import BoundedRenderer, FailureKind, RenderFailure, RenderJob
from llmtrain.data.chat.jinja_template import JinjaTemplate
from llmtrain.data.chat.template import Message
from tests.data.chat.test_templates import Chat

NOW = datetime(2024, 7, 26)
HI = RenderJob([{"role": "user", "content": "Hi"}], {})
GOOD = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def renderer() -> BoundedRenderer:
    return BoundedRenderer(cpu_seconds=0.5, memory_bytes=256 << 20)


def fail(renderer: BoundedRenderer, source: str) -> RenderFailure:
    (found,) = renderer(source, NOW, [HI])
    assert isinstance(found, RenderFailure)
    assert renderer(GOOD, NOW, [HI]) == ["Hi"]
    return found


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 10**10 }}",
        "{{ messages[0].content * 10**10 }}",
        "{{ 'x'.center(10**10) }}",
        "{{ '%2000000000d' % 1 }}",
        "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "{{ messages | tojson(indent=10**10) }}",
        "{% set x %}{% for i in range(99999) %}{{ 'x' * 9999 }}{% endfor %}{% endset %}",
    ],
)
def test_memory_is_bounded(renderer: BoundedRenderer, source: str) -> None:
    assert fail(renderer, source) == RenderFailure("needs more than 268 MB of memory", FailureKind.limit)


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ (messages | length + 9) ** (10**9) }}",  # one operation, which no check between operations would end
    ],
)
def test_time_is_bounded(renderer: BoundedRenderer, source: str) -> None:
    assert fail(renderer, source) == RenderFailure("takes more than 0.5 s of processor time", FailureKind.limit)


def test_length_is_bounded(renderer: BoundedRenderer) -> None:
    source = "{% for i in range(99999) %}{{ messages[0].content * 1000 }}{% endfor %}"
    assert fail(renderer, source).message == "makes a text of more than 64,000,000 characters"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ messages[0].a.b }}", "raises UndefinedError: 'dict object' has no attribute 'a'"),
        ("{{ 1 + 'a' }}", "raises TypeError: "),
        ("{{ 1 // 0 }}", "raises ZeroDivisionError: "),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "raises RecursionError: "),
        ("{% for i in range(10**9) %}{% endfor %}", "raises OverflowError: "),
        ("{{ 10.0 ** 999 }}", "raises OverflowError: "),
        ("{{ messages.__class__.__mro__ }}", "raises SecurityError: "),
        ("{{ {}.popitem() }}", "raises SecurityError: "),
        ("{{ '{a}'.format() }}", "raises KeyError: 'a'"),
        ("{{ 'a'.encode('none') }}", "raises LookupError: "),
        ("{{ 'a'.index('b') }}", "raises ValueError: "),
        ("{% include 'x' %}", "raises TypeError: "),
    ],
)
def test_every_exception_is_a_message(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"^the tokenizer's chat template ") as error:
        JinjaTemplate(source, Chat()).render([Message("user", "Hi")])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("source", ["{{ ((", "{% nothing %}", "{{ 1 | nothing }}", "{% break %}", "{{ " + "(" * 5000])
def test_a_damaged_template_is_refused_when_it_is_read(source: str) -> None:
    with pytest.raises(ValueError, match="template=tokenizer: the tokenizer's chat template is damaged: "):
        JinjaTemplate(source, Chat())


def test_a_process_that_was_killed_is_started_again(renderer: BoundedRenderer) -> None:
    assert renderer(GOOD, NOW, [HI]) == ["Hi"]
    assert renderer._process is not None
    os.kill(renderer._process.pid, signal.SIGKILL)
    renderer._process.wait()
    assert renderer(GOOD, NOW, [HI]) == ["Hi"]


def test_threads_get_their_own_answers(renderer: BoundedRenderer) -> None:
    wrong = []

    def ask(name: str) -> None:
        for number in range(50):
            said = f"{name} {number}"
            if renderer(GOOD, NOW, [RenderJob([{"role": "user", "content": said}], {})]) != [said]:
                wrong.append(said)

    threads = [threading.Thread(target=ask, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
