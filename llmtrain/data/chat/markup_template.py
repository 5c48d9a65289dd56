"""Templates of fixed text around the messages: the built-in ones, and those that a user writes as a string."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from string import Formatter

from llmtrain.base.checks import did_you_mean
from llmtrain.data.chat.template import SPECIAL, ChatTemplate, Message, PartKind, RenderedPart

FIELDS = ("prompt", "instruction", "input", "response")  # of a template of the user's own


@dataclass(frozen=True)
class MarkupTemplate(ChatTemplate):
    """A template of fixed text around the messages.

    ``{system}``, ``{prompt}`` (a message with its input), ``{instruction}`` and ``{input}`` (the two apart) stand for
    what is said.
    """

    user: str
    before: str = ""  # a response
    end: str = ""  # of a response, taught with it; empty: the token that ends a text
    after: str = ""  # a response, if something follows or the template always has it
    user_with_input: str | None = None  # None: as ``user``
    system: str = "{system}\n\n"
    default_system: str = ""
    default_with_input: str | None = None  # where the first message has an input
    begins_text: bool = False  # with the token for that, where the tokenizer has one
    strips: bool = False  # white space around messages
    ends_once: bool = False  # the token that ends a text stands behind the last response, and is taught behind each

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
    ) -> list[RenderedPart]:
        numbered = self._with_system(messages)
        parts = [RenderedPart("", kind=PartKind.begin)] if self.begins_text else []
        is_answer = was_taught = False  # the message before
        for number, message in numbered:
            is_taught = message.role == "assistant" and (trained is None or number in trained)
            if message.role == "assistant":
                content = message.content.strip() if self.strips else message.content
                is_last = number == numbered[-1][0] and not add_generation_prompt
                parts += [
                    RenderedPart(self.before, kind=PartKind.markup),
                    RenderedPart(content, is_taught, is_apart=True),
                ]
                if self.end:
                    parts.append(RenderedPart(self.end, is_taught, PartKind.markup, is_apart=True))
                elif is_last or not self.ends_once:
                    parts.append(RenderedPart("", is_taught, PartKind.end, is_apart=True))
                if not is_last:
                    parts.append(RenderedPart(self.after, kind=PartKind.markup))
            else:
                before = self._fill(message)
                if self.ends_once and is_answer and before:
                    before[0] = before[0]._replace(is_trained=was_taught, ends_text=was_taught, is_apart=True)
                parts += before
            is_answer, was_taught = message.role == "assistant", is_taught
        if add_generation_prompt:
            parts.append(RenderedPart(self.before, kind=PartKind.markup))
        return [part for part in parts if part.text or part.kind in (PartKind.begin, PartKind.end)]

    def _with_system(self, messages: Sequence[Message]) -> list[tuple[int, Message]]:
        """The messages with their numbers, before them what the system says if they do not begin with that."""
        numbered = list(enumerate(messages))
        for number, message in numbered:
            if message.role not in ("system", "user", "assistant"):
                raise ValueError(
                    f"message {number + 1} is of role {message.role!r}; the template has places for system, user and "
                    "assistant"
                )
            if message.role == "system" and number:
                raise ValueError(f"message {number + 1} is of role 'system', which can only come first")
        if messages and messages[0].role == "system":
            return numbered
        has_input = bool(messages and messages[0].input)
        system = self.default_with_input if has_input and self.default_with_input else self.default_system
        return [(-1, Message("system", system)), *numbered] if system else numbered

    def _fill(self, message: Message) -> list[RenderedPart]:
        """A message of the system's or the user's, in what stands around it."""
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
    """A template of the user's own: a turn of each side, with fields."""
    try:
        pieces = list(Formatter().parse(form))
    except ValueError as error:
        raise ValueError(f"template={form!r}: {error}; a brace that is no field is written twice") from error
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
        raise ValueError(
            f"template={form!r}: {{prompt}} or {{instruction}} has to be in it, and behind it, once, {{response}}"
        )
    doubled = (text.replace("{", "{{").replace("}", "}}") for text in texts[:-2])
    user = "".join(f"{text}{{{name}}}" for text, name in zip(doubled, names, strict=False))
    return MarkupTemplate(user=user, before=texts[-2], end=texts[-1], begins_text=True)
