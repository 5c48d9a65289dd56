"""The chat template that came with a tokenizer: foreign Jinja source, rendered under limits.

It is rendered as in transformers, except that the result depends on the conversation alone: the date that a template
may ask for is fixed, so that prepared data are the same tomorrow.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from itertools import takewhile
from typing import Any, NamedTuple

from llmtrain.data.chat.bounded_renderer import FailureKind, RenderFailure, RenderJob, shared_renderer
from llmtrain.data.chat.special_tokens import special_tokens
from llmtrain.data.chat.template import NONE, ChatTemplate, Message, PartKind, RenderedPart, Unread
from llmtrain.data.chat.template_process import CLOSE, GUARD, OPEN
from llmtrain.tokenizer import Tokenizer

DATE = datetime(2024, 7, 26)  # the default of Llama 3.1's template
JOBS = 32  # renderings of a request, which has a limit of time
PROBE = "\ufdd3"  # a noncharacter put into a message to find its place
RESERVED = re.compile(f"[{GUARD}{OPEN}{CLOSE}{PROBE}]")
PLACE = re.compile(f"{PROBE}(\\d+){PROBE}")
MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
LISTS = ("tools", "documents")  # variables with content
REASONING = ("reasoning_content", "thinking", "reasoning")  # names of the same field, as in transformers


class Rendering(NamedTuple):
    """The text of a conversation."""

    text: str  # GUARD splits the names of special tokens in messages
    marks: list[tuple[int, int]]  # begin and end of each stretch that the template marks as generated


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
        self.source, self._now, self._system = source, now, system
        self._renderer = shared_renderer()
        self._renderer.compile(source, now)
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

    @property
    def marks_responses(self) -> bool:
        """True if ``{% generation %}`` in the source marks the text that is trained."""
        return MARK.search(self.source) is not None

    @cached_property
    def stop(self) -> tuple[str, ...]:  # type: ignore[override]
        """The special token after a response, found by rendering one."""
        (text, _), *_ = self._render([([Message("user", "U"), Message("assistant", "A")], False)], NONE)
        rest = text[text.rfind("A") + 1 :].strip()
        found = sorted((rest.find(name), -len(name), name) for name in self._special if name in rest)
        return (found[0][2],) if found else ()

    @cached_property
    def lacking_prompt(self) -> str:
        """The header of a response, where the template writes it before a response and not as a generation prompt."""
        return self._header([Message("user", "U")], NONE)

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        trained: Collection[int] | None = None,
        variables: Mapping[str, Any] = NONE,
    ) -> list[RenderedPart]:
        messages, shift = self._with_system(self._readable(messages, variables))
        wanted = [
            number
            for number, message in enumerate(messages)
            if (message.role == "assistant" if trained is None else number - shift in trained)
        ]
        ((text, marks),) = self._render([(messages, add_generation_prompt)], variables)
        if self.marks_responses:
            spans = self._marks_of(messages, wanted, marks, variables)
        else:
            spans = self._find(messages, wanted, text, variables)
        parts, end = [], 0
        for start, stop in spans:
            parts += _split(text[end:start], is_trained=False) + _split(text[start:stop], is_trained=True)
            end = stop
        parts += _split(text[end:], is_trained=False)
        if add_generation_prompt and self.lacking_prompt:
            parts += _split(self._header(messages, variables), is_trained=False)
        return parts

    def unread(self, messages: Sequence[Message], variables: Mapping[str, Any] = NONE) -> list[Unread]:
        messages, shift = self._with_system(self._readable(messages, variables))
        numbered = [m._replace(content=f"{PROBE}{n}{PROBE}{m.content}") for n, m in enumerate(messages)]
        whole, placed = self._try([(messages, False), (numbered, False)], variables)
        if isinstance(whole, RenderFailure):
            raise ValueError(_failure(whole))
        seen = set(PLACE.findall(placed.text)) if isinstance(placed, Rendering) else set()
        probes = list(self._probes(messages, variables, {int(number) for number in seen}))
        unlikely = [probe for probe in probes if not self._names_word(probe[0].name)]
        rest, kept = messages, dict(variables)
        for (number, name), *_ in unlikely:
            if number is None:
                kept.pop(name)
            else:
                rest = _replace(rest, number, _without(rest[number], name))
        if unlikely and self._try([(rest, False)], kept) == [whole]:  # one rendering for all of them
            found = [unread for unread, *_ in unlikely]
            probes = [probe for probe in probes if probe not in unlikely]
        else:
            found = []
        for unread, fewer, others in probes:
            if self._try([(fewer, False)], others) == [whole]:
                found.append(unread)
        return [each if each.number is None else each._replace(number=each.number - shift) for each in found]

    # --- what is not rendered ---------------------------------------------------------------------------------------

    def _probes(
        self, messages: list[Message], variables: Mapping[str, Any], seen: Collection[int]
    ) -> Iterator[tuple[Unread, list[Message], Mapping[str, Any]]]:
        """Conversations that each lack one thing; the words of messages that are not ``seen`` are changed instead."""
        for number, message in enumerate(messages):
            if number not in seen and message.text.strip():
                changed = message._replace(content=f"{PROBE}{message.content}{PROBE}")
                yield Unread(number, "content"), _replace(messages, number, changed), variables
            for name in (name for name, value in message.fields.items() if value):
                yield Unread(number, name), _replace(messages, number, _without(message, name)), variables
        for name in (name for name, value in variables.items() if value):
            if name in LISTS or not self._names_word(name):  # a switch may be set as the template has it anyway
                yield Unread(None, name), messages, {key: value for key, value in variables.items() if key != name}

    def _names_word(self, name: str) -> bool:
        return name == "content" or re.search(rf"\b{re.escape(name)}\b", self.source) is not None

    def _readable(self, messages: Sequence[Message], variables: Mapping[str, Any]) -> Sequence[Message]:
        """``messages`` as the template can render them.

        A null content is empty where the template would fail on it or write "None".
        """
        if all(message.has_content for message in messages):
            return messages
        probed = [m if m.has_content else m._replace(has_content=True, content=PROBE) for m in messages]
        given, put = (self._try([(each, False)], variables)[0] for each in (messages, probed))
        writes_none = (
            isinstance(given, Rendering)
            and isinstance(put, Rendering)
            and given != put
            and put.text.replace(PROBE, "None") == given.text
        )
        if writes_none or isinstance(given, RenderFailure):
            return [message._replace(has_content=True) for message in messages]
        return messages

    # --- what is trained --------------------------------------------------------------------------------------------

    def _with_system(self, messages: Sequence[Message]) -> tuple[list[Message], int]:
        """The messages after the system message of the settings, and the shift of their numbers."""
        if self._system and not (messages and messages[0].role == "system"):
            return [Message("system", self._system), *messages], 1
        return list(messages), 0

    def _marks_of(
        self,
        messages: Sequence[Message],
        wanted: Sequence[int],
        marks: list[tuple[int, int]],
        variables: Mapping[str, Any],
    ) -> list[tuple[int, int]]:
        """The stretches that the template marks as generated, of the messages ``wanted`` alone.

        A message has the marks that the rendering up to it has more than that up to the message before.
        """
        responses = [number for number, message in enumerate(messages) if message.role == "assistant"]
        if list(wanted) == responses:
            return marks
        upto = self._render([(messages[: number + 1], False) for number in responses], variables)
        ends = [0, *(len(rendering.marks) for rendering in upto)]
        if ends != sorted(ends) or ends[-1] != len(marks):
            raise ValueError(
                "the tokenizer's chat template marks other stretches with {% generation %} once others follow, so it "
                "is unknown which message each belongs to; take data.train_on=responses, and messages without weights"
            )
        return [
            mark
            for begin, end, number in zip(ends, ends[1:], responses, strict=False)
            if number in wanted
            for mark in marks[begin:end]
        ]

    def _find(
        self, messages: Sequence[Message], wanted: Sequence[int], text: str, variables: Mapping[str, Any]
    ) -> list[tuple[int, int]]:
        """Begin and end in ``text``, the rendering of all messages, of each of the responses ``wanted``.

        A response is the difference between the rendering up to it and its prompt, without the header of its role.
        Raises ValueError if the template renders earlier turns differently once others follow.
        """
        jobs = [
            (messages[:end], is_prompt)
            for number in wanted
            for end, is_prompt in ((number, False), (number, True), (number + 1, False))
            if end
        ]
        rendered = iter(self._render(jobs, variables))
        spans = []
        for number in wanted:
            before, prompt = (next(rendered).text, next(rendered).text) if number else ("", "")
            upto = next(rendered).text
            start = _common(prompt, text)  # a generation prompt may contain the beginning of the response
            if start < len(before) or not text.startswith(upto):
                raise ValueError(
                    f"message {number + 1}: the tokenizer's chat template renders it differently once others follow, "
                    "so training would differ from generation; take data.train_on=last"
                )
            if prompt == before:
                start += len(self._header_of(messages[: number + 1], upto, len(before), variables))
            stripped = upto.rstrip()
            if any(stripped.endswith(name) for name in self._special):  # white space after the end is of no turn
                upto = stripped
            spans.append((start, max(start, len(upto))))
        return spans

    def _header(self, messages: Sequence[Message], variables: Mapping[str, Any]) -> str:
        """The header of a response to ``messages`` that no generation prompt of the template holds."""
        answer = Message("assistant", "A")
        found = self._try([(messages, False), (messages, True), ([*messages, answer], False)], variables)
        before, prompt, upto = (each.text if isinstance(each, Rendering) else None for each in found)
        if before is None or upto is None or prompt != before or not upto.startswith(before):
            return ""
        return self._header_of([*messages, answer], upto, len(before), variables)

    def _header_of(self, messages: Sequence[Message], upto: str, start: int, variables: Mapping[str, Any]) -> str:
        """The text from ``start`` on that is the same for every response; "" if it is white space.

        White space is a part of the response: the model has to write it.
        """
        last = messages[-1]
        fields = {key: value for key, value in last.fields.items() if key not in ("tool_calls", *REASONING)}
        other = last._replace(content=f"{PROBE}{last.content}", fields=fields, has_content=True)
        (changed,) = self._try([([*messages[:-1], other], False)], variables)
        header = upto[start : _common(upto, changed.text)] if isinstance(changed, Rendering) else ""
        return header if header.strip() else ""

    # --- rendering --------------------------------------------------------------------------------------------------

    def _render(self, jobs: Sequence[tuple[Sequence[Message], bool]], variables: Mapping[str, Any]) -> list[Rendering]:
        """Render conversations, each up to the next response where its flag is set.  Raises ValueError for failures."""
        found = []
        for each in self._try(jobs, variables):
            if isinstance(each, RenderFailure):
                raise ValueError(_failure(each))
            found.append(each)
        return found

    def _try(
        self, jobs: Sequence[tuple[Sequence[Message], bool]], variables: Mapping[str, Any]
    ) -> list[Rendering | RenderFailure]:
        """Render conversations; a failure is a result, unless it is one of time or memory, which raises ValueError."""
        others = {"tools": None, "documents": None, **self._names}  # as transformers: given, with or without a value
        guarded = {name: self._guard_all(value) for name, value in variables.items()}
        made = [
            RenderJob(
                [self._plain(message) for message in messages],
                {**others, **guarded, "add_generation_prompt": is_prompt},
            )
            for messages, is_prompt in jobs
        ]
        found: list[Rendering | RenderFailure] = []
        for begin in range(0, len(made), JOBS):
            for each in self._renderer(self.source, self._now, made[begin : begin + JOBS]):
                if isinstance(each, RenderFailure) and each.kind is FailureKind.limit:
                    raise ValueError(_failure(each))
                found.append(each if isinstance(each, RenderFailure) else _rendering(each))
        return found

    def _plain(self, message: Message) -> dict[str, Any]:
        """A message as the template sees it; reasoning has the names that transformers gives it."""
        fields = self._guard_all(message.fields)
        reasoning = next((fields[name] for name in REASONING if fields.get(name) is not None), None)
        names = {} if reasoning is None else {"thinking": reasoning, **fields, "reasoning_content": reasoning}
        content = self._guard(message.text) if message.has_content else None
        return {"role": message.role, "content": content, **fields, **names}

    def _guard_all(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._guard(value)
        if isinstance(value, Mapping):
            return {self._guard_all(key): self._guard_all(each) for key, each in value.items()}
        return [self._guard_all(each) for each in value] if isinstance(value, list) else value

    def _guard(self, text: str) -> str:
        """``text`` with every name of a special token split."""
        for name in self._special:
            text = text.replace(name, name[0] + GUARD + name[1:])
        return text


def refuse_reserved(text: str, origin: str) -> None:
    """Raise ValueError for a text with a noncharacter that marks places in rendered text."""
    if found := RESERVED.search(text):
        raise ValueError(
            f"{origin} holds U+{ord(found[0]):04X}, a noncharacter that stands for no text; remove it from the text"
        )


def _failure(failure: RenderFailure) -> str:
    if failure.kind is FailureKind.refusal:
        return f"the tokenizer's chat template rejects the messages: {failure.message}"
    return f"the tokenizer's chat template {failure.message}; correct it, or take another, such as template=chatml"


def _rendering(text: str) -> Rendering:
    """``text`` without the marks of generated stretches, and these; of nested ones the outer."""
    pieces, marks, length, begins = [], [], 0, []
    for piece in re.split(f"([{OPEN}{CLOSE}])", text):
        if piece == OPEN:
            begins.append(length)
        elif piece == CLOSE and begins:
            begin = begins.pop()
            if not begins and begin < length:
                marks.append((begin, length))
        elif piece != CLOSE:
            pieces.append(piece)
            length += len(piece)
    return Rendering("".join(pieces), marks)


def _split(text: str, *, is_trained: bool) -> list[RenderedPart]:
    return [RenderedPart(piece, is_trained, PartKind.markup) for piece in text.split(GUARD) if piece]


def _common(left: str, right: str) -> int:
    """The length of the common beginning of both."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False)))


def _replace(messages: Sequence[Message], number: int, message: Message) -> list[Message]:
    return [*messages[:number], message, *messages[number + 1 :]]


def _without(message: Message, name: str) -> Message:
    return message._replace(fields={key: value for key, value in message.fields.items() if key != name})
