"""The contract of chat templates: messages in, parts of text out, each marked with its author.

Names of special tokens become their ids in the text that the template adds, never in a message; so nobody can end a
turn or speak for another by typing such a name.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from enum import Enum, auto
from types import MappingProxyType
from typing import Any, NamedTuple

SPECIAL = re.compile(r"<\|[^|<>\s]+\|>|<reserved_\d+>")  # names of special tokens in templates


NONE: Mapping[str, Any] = MappingProxyType({})


class Message(NamedTuple):
    """A message of a conversation."""

    role: str  # system, user, assistant; or another one of a tokenizer's own template
    content: str
    input: str = ""  # the text that an instruction applies to, if given separately
    fields: Mapping[str, Any] = NONE  # others, for templates that know them: tool_calls, reasoning_content, name
    has_content: bool = True  # False: the content is null, beside tool_calls

    @property
    def text(self) -> str:
        """Content and input in one."""
        return f"{self.content}\n\n{self.input}" if self.input else self.content


class PartKind(Enum):
    """The author of a part."""

    message = auto()  # the words of a message: all of it is text
    markup = auto()  # text of the template: names of special tokens become those tokens
    begin = auto()  # the token that begins a text, if the tokenizer has one
    end = auto()  # the token that ends a text


class RenderedPart(NamedTuple):
    """A stretch of a rendered conversation."""

    text: str
    is_trained: bool = False  # its tokens are targets
    kind: PartKind = PartKind.message
    ends_text: bool = False  # the target at its first token is the end of the text instead
    is_apart: bool = False  # no token spans its borders, so that its targets are the same in every conversation


class Unread(NamedTuple):
    """A part of a conversation that does not change the rendered text."""

    number: int | None  # of the message; None: a variable of the whole conversation
    name: str  # of the field or variable; content: the words of the message


class ChatTemplate(ABC):
    """Contract of a chat template."""

    stop: tuple[str, ...]  # names of special tokens, or texts, that end a response besides the end-of-text token

    @abstractmethod
    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        trained: Collection[int] | None = None,
        variables: Mapping[str, Any] = NONE,
    ) -> list[RenderedPart]:
        """Render a conversation; with ``add_generation_prompt`` up to the beginning of the next response.

        ``trained``: numbers of the messages that are targets, each with its end; None: the assistant's.
        ``variables``: facts of the whole conversation, such as ``tools``.  Raises ValueError for messages that the
        template does not support.
        """

    def unread(self, messages: Sequence[Message], variables: Mapping[str, Any] = NONE) -> list[Unread]:
        """The fields of messages and the variables that the template does not render."""
        found = [Unread(number, name) for number, message in enumerate(messages) for name in message.fields]
        return found + [Unread(None, name) for name in variables]

    def special_names(self) -> frozenset[str]:
        """Special tokens that the template names."""
        return frozenset()
