"""The contract of chat templates: messages in, parts of text out, each part marked with its author.

Names of special tokens become their ids in what the template adds and never in a message, so nobody can end a turn or
speak for another by typing a name.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from enum import Enum, auto
from typing import NamedTuple

SPECIAL = re.compile(r"<\|[^|<>\s]+\|>|<reserved_\d+>")  # how names of special tokens look in the templates here


class Message(NamedTuple):
    """What one side says."""

    role: str  # system, user, assistant; or one that a tokenizer's own template knows
    content: str
    input: str = ""  # what an instruction is to be done to, if that is given apart

    @property
    def text(self) -> str:
        """Content and input in one."""
        return f"{self.content}\n\n{self.input}" if self.input else self.content


class PartKind(Enum):
    """Who a part is from."""

    message = auto()  # somebody's words: whatever stands in them is text
    markup = auto()  # the template's own: names of special tokens are those tokens
    begin = auto()  # the token that a text begins with, where the tokenizer has one
    end = auto()  # the token that ends a text


class RenderedPart(NamedTuple):
    """A stretch of a rendered conversation."""

    text: str
    is_trained: bool = False  # whether its tokens are to be predicted
    kind: PartKind = PartKind.message
    ends_text: bool = False  # what is to be predicted in place of its first token is the end of the text
    is_apart: bool = False  # whether no token goes over its borders: what is a target in one place is one in all


class ChatTemplate(ABC):
    """Contract of a template."""

    stop: tuple[str, ...]  # what ends a response, besides the token that ends a text: a special token's name, or text

    @abstractmethod
    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        trained: Collection[int] | None = None,
    ) -> list[RenderedPart]:
        """The parts of a conversation; with ``add_generation_prompt`` up to where a response is to begin.

        ``trained``: which of the messages, by number, are taught, each with what ends it; None: the assistant's.
        Raises ValueError for messages that the template has no place for.
        """

    def special_names(self) -> frozenset[str]:
        """Special tokens that the template names."""
        return frozenset()
