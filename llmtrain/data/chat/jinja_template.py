"""The chat template that came with a tokenizer: foreign Jinja source, rendered in a sandbox.

It is rendered as in transformers, except that the result depends on the messages alone: the date that a template may
ask for is fixed, so that prepared data are the same tomorrow.
"""

import json
from collections.abc import Collection, Sequence
from datetime import datetime
from functools import cached_property
from itertools import takewhile
from typing import Any

from llmtrain.base.checks import needing_package
from llmtrain.data.chat.special_tokens import special_tokens
from llmtrain.data.chat.template import ChatTemplate, Message, PartKind, RenderedPart
from llmtrain.tokenizer import Tokenizer

GUARD = "\ufdd0"  # a noncharacter that splits names of special tokens in messages
DATE = datetime(2024, 7, 26)  # the default of Llama 3.1's template


class JinjaTemplate(ChatTemplate):
    """A Jinja chat template.

    Args:
        source: Jinja source of the template.
        tokenizer: the tokenizer whose special tokens the template names.
        system: the system message of a conversation without one; None: the template's default.
        now: the date and time that the template sees.

    Raises ValueError if it cannot be read.
    """

    def __init__(self, source: str, tokenizer: Tokenizer, system: str | None = None, *, now: datetime = DATE) -> None:
        with needing_package('template=tokenizer: needs jinja2; pip install "llmtrain[huggingface]"'):
            import jinja2
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        if _version(jinja2.__version__) < (3, 1, 6):
            raise ValueError(
                f"template=tokenizer: the sandbox of jinja2 {jinja2.__version__} is not secure; pip install -U jinja2"
            )

        def raise_exception(message: str) -> None:
            raise jinja2.TemplateError(message)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _generation_tag()]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = raise_exception
        environment.globals["strftime_now"] = now.strftime
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"template=tokenizer: the tokenizer's chat template is damaged: {error}") from error
        self._errors = (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, ZeroDivisionError)
        self._system = system
        self._special = special_tokens(tokenizer)
        ids = {"eos_token": tokenizer.end_of_text, "bos_token": tokenizer.bos}
        names = {key: "" if id is None else tokenizer.decode([id]) for key, id in ids.items()}
        self._names = dict(tokenizer.named_tokens) or names

    @classmethod
    def of(cls, tokenizer: Tokenizer, system: str | None = None, *, now: datetime = DATE) -> "JinjaTemplate":
        """The template of ``tokenizer``.  Raises ValueError if it has none."""
        if tokenizer.chat_template is None:
            raise ValueError(
                "template=tokenizer: the tokenizer has no chat template; take tokenizer=huggingface with the "
                "directory of a chat model, or another template, such as chatml"
            )
        return cls(tokenizer.chat_template, tokenizer, system, now=now)

    @cached_property
    def stop(self) -> tuple[str, ...]:  # type: ignore[override]
        """The special token after a response, found by rendering one."""
        text = self._render([Message("user", "U"), Message("assistant", "A")], add_generation_prompt=False)
        rest = text[text.rfind("A") + 1 :].strip()
        found = sorted((rest.find(name), -len(name), name) for name in self._special if name in rest)
        return (found[0][2],) if found else ()

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        trained: Collection[int] | None = None,
    ) -> list[RenderedPart]:
        messages = list(messages)
        shift = 0  # of the numbers of messages
        if self._system and not (messages and messages[0].role == "system"):
            messages, shift = [Message("system", self._system), *messages], 1
        text = self._render(messages, add_generation_prompt=add_generation_prompt)
        parts, end = [], 0
        for number, message in enumerate(messages):
            if message.role != "assistant" or not (trained is None or number - shift in trained):
                continue
            start, stop = self._find(messages, number, text)
            parts += self._split(text[end:start], is_trained=False) + self._split(text[start:stop], is_trained=True)
            end = stop
        return parts + self._split(text[end:], is_trained=False)

    def _find(self, messages: Sequence[Message], number: int, text: str) -> tuple[int, int]:
        """Find the response ``number`` and its end in ``text``, the rendering of all messages: start and stop.

        It is the difference between the rendering up to it and its prompt.  Raises ValueError if the template renders
        earlier turns differently once others follow.
        """
        before = self._render(messages[:number], add_generation_prompt=False)
        prompt = self._render(messages[:number], add_generation_prompt=True)
        upto = self._render(messages[: number + 1], add_generation_prompt=False)
        start = _common(prompt, text)  # a generation prompt may contain the beginning of the response
        if start < len(before) or not text.startswith(upto):
            raise ValueError(
                f"message {number + 1}: the tokenizer's chat template renders it differently once others follow, so "
                "training would differ from generation; take data.train_on=last"
            )
        stripped = upto.rstrip()
        if any(stripped.endswith(name) for name in self._special):  # white space after the end belongs to no turn
            upto = stripped
        return start, len(upto)

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        plain = [{"role": message.role, "content": self._guard(message.text)} for message in messages]
        try:
            return self._template.render(messages=plain, add_generation_prompt=add_generation_prompt, **self._names)
        except self._errors as error:
            raise ValueError(f"the tokenizer's chat template rejects the messages: {error}") from error

    def _guard(self, text: str) -> str:
        """``text`` with every name of a special token split."""
        for name in self._special:
            text = text.replace(name, name[0] + GUARD + name[1:])
        return text

    def _split(self, text: str, *, is_trained: bool) -> list[RenderedPart]:
        return [RenderedPart(piece, is_trained, PartKind.markup) for piece in text.split(GUARD) if piece]


def _common(left: str, right: str) -> int:
    """The length of the common beginning of both."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False)))


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:3] if part.isdigit())


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, sort_keys: bool = False) -> str:
    """``value`` as JSON, without the HTML escapes of Jinja's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, sort_keys=sort_keys)


def _generation_tag() -> type:
    """The tag ``{% generation %}…{% endgeneration %}``, which some templates put around responses; it has no effect."""
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012 - jinja2's

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    return Generation
