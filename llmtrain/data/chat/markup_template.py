"""Templates of fixed text around the messages: the built-in ones, and those that a user writes as a string."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any

from llmtrain.base.checks import did_you_mean
from llmtrain.data.chat.template import NONE, SPECIAL, ChatTemplate, Message, PartKind, RenderedPart

FIELDS = ("prompt", "instruction", "input", "response")  # of a template of the user's own


@dataclass(frozen=True)
class MarkupTemplate(ChatTemplate):
    """A template of fixed text around the messages.

    The fields are ``{system}``, ``{prompt}`` (a message with its input), ``{instruction}`` and ``{input}`` (the two
    separately).
    """

    user: str
    before: str = ""  # before a response
    lead: str = ""  # the beginning of a response, trained with it
    end: str = ""  # the end of a response, trained with it; empty: the end-of-text token
    after: str = ""  # after a response that is followed by another message
    user_with_input: str | None = None  # None: as ``user``
    system: str = "{system}\n\n"
    default_system: str = ""
    default_with_input: str | None = None  # the default system message where the first message has an input
    begins_text: bool = False  # starts with the token that begins a text, if the tokenizer has one
    strips: bool = False  # removes white space around messages
    ends_once: bool = False  # the end-of-text token follows only the last response, but is the target after each

    @property
    def stop(self) -> tuple[str, ...]:  # type: ignore[override]
        return (self.end,) if self.end else ()

    def special_names(self) -> frozenset[str]:
        texts = (self.user, self.user_with_input or "", self.before, self.end, self.after, self.system)
        return frozenset(name for text in texts for name in SPECIAL.findall(text))

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        trained: Collection[int] | None = None,
        variables: Mapping[str, Any] = NONE,
    ) -> list[RenderedPart]:
        numbered = self._with_system(messages)
        parts = [RenderedPart("", kind=PartKind.begin)] if self.begins_text else []
        is_answer = was_trained = False  # the previous message
        for number, message in numbered:
            is_trained = message.role == "assistant" and (trained is None or number in trained)
            if message.role == "assistant":
                content = message.content.strip() if self.strips else message.content
                is_last = number == numbered[-1][0] and not add_generation_prompt
                parts += [
                    RenderedPart(self.before, kind=PartKind.markup),
                    RenderedPart(self.lead, is_trained, PartKind.markup, is_apart=True),
                    RenderedPart(content, is_trained, is_apart=True),
                ]
                if self.end:
                    parts.append(RenderedPart(self.end, is_trained, PartKind.markup, is_apart=True))
                elif is_last or not self.ends_once:
                    parts.append(RenderedPart("", is_trained, PartKind.end, is_apart=True))
                if not is_last:
                    parts.append(RenderedPart(self.after, kind=PartKind.markup))
            else:
                before = self._fill(message)
                if self.ends_once and is_answer and before:
                    before[0] = before[0]._replace(is_trained=was_trained, ends_text=was_trained, is_apart=True)
                parts += before
            is_answer, was_trained = message.role == "assistant", is_trained
        if add_generation_prompt:
            parts.append(RenderedPart(self.before, kind=PartKind.markup))
        return [part for part in parts if part.text or part.kind in (PartKind.begin, PartKind.end)]

    def _with_system(self, messages: Sequence[Message]) -> list[tuple[int, Message]]:
        """The messages with their numbers, after the default system message if they do not begin with one."""
        numbered = list(enumerate(messages))
        for number, message in numbered:
            if message.role not in ("system", "user", "assistant"):
                raise ValueError(
                    f"message {number + 1} is of role {message.role!r}; the template supports the roles system, "
                    "user and assistant"
                )
            if message.role == "system" and number:
                raise ValueError(f"message {number + 1} is of role 'system', which can only come first")
        if messages and messages[0].role == "system":
            return numbered
        has_input = bool(messages and messages[0].input)
        system = self.default_with_input if has_input and self.default_with_input else self.default_system
        return [(-1, Message("system", system)), *numbered] if system else numbered

    def _fill(self, message: Message) -> list[RenderedPart]:
        """A system or user message with the text around it."""
        form = self.system if message.role == "system" else self.user
        if message.input and self.user_with_input is not None:
            form = self.user_with_input
        apart = {"instruction": message.content, "input": message.input}
        values = {"system": message.text, "prompt": message.text, **apart}
        parts = []
        for literal, name, _, _ in Formatter().parse(form):
            parts.append(RenderedPart(literal, kind=PartKind.markup))
            if name:
                parts.append(RenderedPart(values[name].strip() if self.strips else values[name]))
        return [part for part in parts if part.text]


def parse_form(form: str) -> MarkupTemplate:
    """Parse a template written by a user: one turn of each side, with fields.  Raises ValueError for a bad one."""
    try:
        pieces = list(Formatter().parse(form))
    except ValueError as error:
        raise ValueError(f"template={form!r}: {error}; write a brace that is no field twice") from error
    texts, names = [""], []  # the text around the fields, one more than these
    for literal, name, specification, conversion in pieces:
        texts[-1] += literal
        if name is None:
            continue
        if name not in FIELDS or specification or conversion:
            raise ValueError(
                f"template={form!r}: there is no field {{{name}}}{did_you_mean(name, FIELDS)}; there are "
                f"{', '.join(f'{{{field}}}' for field in FIELDS)}"
            )
        names.append(name)
        texts.append("")
    if names.count("response") != 1 or names[-1] != "response" or not {"prompt", "instruction"} & set(names):
        raise ValueError(f"template={form!r}: it needs {{prompt}} or {{instruction}}, followed by one {{response}}")
    doubled = (text.replace("{", "{{").replace("}", "}}") for text in texts[:-2])
    user = "".join(f"{text}{{{name}}}" for text, name in zip(doubled, names, strict=False))
    return MarkupTemplate(user=user, before=texts[-2], end=texts[-1], begins_text=True)
