"""Instructions and conversations: the model learns to write the responses."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

import numpy as np

from llmtrain.base.checks import did_you_mean
from llmtrain.data import IGNORE
from llmtrain.data.chat.encoder import ConversationEncoder
from llmtrain.data.chat.special_tokens import missing_tokens
from llmtrain.data.chat.template import ChatTemplate, Message
from llmtrain.data.chat.templates import OWN, find_template, parse_template
from llmtrain.data.example_data import ExampleData
from llmtrain.data.example_format import EncodedExample, Example
from llmtrain.data.sources.records import Record, shown
from llmtrain.tokenizer import Tokenizer

MESSAGES = ("messages", "conversations")  # columns of conversations, if no other is named
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant"}
KNOWN_ROLES = ("system", "user", "assistant", "tool")


class TrainOn(Enum):
    """The tokens that are targets."""

    responses = "every response and its end"
    last = "the last response and its end"
    all = "all tokens"


@dataclass(frozen=True)
class Instruction(ExampleData[list[Message]]):
    """Records that are conversations, in a form that their columns determine.

    The forms: ``instruction``, ``input`` (may be missing) and ``output``, as in Alpaca; ``messages`` or
    ``conversations``, a list of ``{role, content}`` or ``{from, value}``; ``prompt`` and ``completion``.  A template
    (:mod:`llmtrain.data.chat.templates`) turns a conversation into text.
    """

    instruction_column: str
    input_column: str
    output_column: str
    messages_column: str | None
    prompt_column: str
    completion_column: str
    template: str
    system: str | None
    train_on: TrainOn
    split_at_responses: bool
    pack: bool

    gives = "responses"
    cache_name: ClassVar[str] = "Instruction"
    cut_remark: ClassVar[str] = "the rest was cut off"
    dropped_remark: ClassVar[str] = "nothing of a response was left"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.template != OWN:
            parse_template(self.template)

    @property
    def packs(self) -> bool:
        return self.pack

    # --- a record ---------------------------------------------------------------------------------------------------

    def read(self, record: Record) -> Example[list[Message]]:
        messages = self.messages(record)
        while messages and messages[-1].role != "assistant":
            messages.pop()  # messages after the last response have no targets
        answers = [message.content for message in messages if message.role == "assistant"]
        if self.train_on is TrainOn.last:
            answers = answers[-1:]
        if not any(answer.strip() for answer in answers):
            what = "its response is empty" if answers else "there is no response in it"
            raise ValueError(f"{record.origin}: {what}: every target would be masked; remove it, or fill it in")
        return Example(messages, tuple(text for message in messages for text in message))

    def messages(self, record: Record) -> list[Message]:
        """Read the conversation in ``record``.  Raises ValueError, naming file and line, if it has no known form."""
        columns = record.values
        names = MESSAGES if self.messages_column is None else (self.messages_column,)
        if found := [name for name in names if columns.get(name) is not None]:
            return _conversation(columns[found[0]], f"{record.origin}: {found[0]}")
        if columns.get(self.prompt_column) is not None:
            prompt = record.text(self.prompt_column, "data.prompt_column")
            answer = record.text(self.completion_column, "data.completion_column")
            return [Message("user", prompt), Message("assistant", answer)]
        if columns.get(self.instruction_column) is not None:
            instruction = record.text(self.instruction_column, "data.instruction_column")
            has_input = columns.get(self.input_column) is not None
            more = record.text(self.input_column, "data.input_column") if has_input else ""
            answer = record.text(self.output_column, "data.output_column")
            return [Message("user", instruction, more), Message("assistant", answer)]
        wanted = [*names, self.prompt_column, self.instruction_column]
        near = next((hint for name in columns if (hint := did_you_mean(name, wanted))), "")
        raise ValueError(
            f"{record.origin}: there is none of the columns {', '.join(wanted)}{near}; there are "
            f"{', '.join(columns) or 'none'}; name those that hold the texts: data.instruction_column=… "
            "data.output_column=…, data.messages_column=…, or data.prompt_column=… data.completion_column=…"
        )

    # --- its ids ----------------------------------------------------------------------------------------------------

    def find_template(self, tokenizer: Tokenizer) -> ChatTemplate:
        """The template of training and chat.  Raises ValueError for an unknown name."""
        return find_template(self.template, tokenizer, system=self.system, split_at_responses=self.split_at_responses)

    def conversation_encoder(self, tokenizer: Tokenizer, template: ChatTemplate) -> ConversationEncoder:
        """The encoder of training, chat and export."""
        return ConversationEncoder(tokenizer, template, split_at_responses=self.split_at_responses)

    def encoder(self, tokenizer: Tokenizer) -> Callable[[list[Message]], EncodedExample]:
        template = self.find_template(tokenizer)
        encode_parts = self.conversation_encoder(tokenizer, template)

        def encode(messages: list[Message]) -> EncodedExample:
            last = [len(messages) - 1] if self.train_on is TrainOn.last else None
            ids, targets, spans_border = encode_parts(template.render(messages, trained=last))
            if self.train_on is TrainOn.all:
                targets, spans_border = np.where(targets == IGNORE, ids, targets), False
            inputs, targets = ids[:-1], targets[1:]
            is_cut = len(inputs) > self.sequence_length
            inputs, targets = inputs[: self.sequence_length], targets[: self.sequence_length]
            if (targets == IGNORE).all():  # the trained part was cut off
                inputs = inputs[:0]
            return EncodedExample(inputs, targets, is_cut, spans_border)

        return encode

    def settings(self, tokenizer: Tokenizer) -> list[Any]:
        return [
            self.instruction_column, self.input_column, self.output_column, self.messages_column, self.prompt_column,
            self.completion_column, self.template, self.system, self.train_on.name,
            tokenizer.chat_template if self.template == OWN else None,
            *([] if self.split_at_responses else ["whole"]),
        ]  # fmt: skip

    def border_notes(self, spanning: int, read: int) -> list[str]:
        if not spanning:
            return []
        what = (
            f"in {spanning:,} of {read:,} training examples a token holds the border of a response and text around it"
        )
        if 2 * spanning > read:
            raise ValueError(
                f"data.template={self.template}: {what}, so a model that is asked for a response never sees the tokens "
                "that it was trained on; end the text before a response without a space, take a template whose special "
                "tokens the tokenizer has, or data.split_at_responses=true, with which tokens end at the borders and "
                "differ from those of transformers"
            )
        return [f"{what}: it is a target"]

    def remarks(self, tokenizer: Tokenizer) -> list[str]:
        template = self.find_template(tokenizer)
        missing = missing_tokens(template, tokenizer)
        doubled = self._doubled_begin(template, tokenizer)
        if not missing:
            return doubled
        return [
            *doubled,
            f"data.template={self.template}: the tokenizer has no {', '.join(missing)}, so "
            f"{'it is' if len(missing) == 1 else 'they are'} spelled out as text, several tokens each",
        ]

    def _doubled_begin(self, template: ChatTemplate, tokenizer: Tokenizer) -> list[str]:
        """A remark on a template that spells out the token that the tokenizer puts before a text."""
        first = tokenizer.begin_names
        if not first:
            return []
        if self.template != OWN:
            spelled = parse_template(self.template).begins_text and not getattr(template, "begins_text", True)
            what = f"begins with {first}, which the tokenizer puts before a text too: it stands there once"
            return [f"data.template={self.template}: {what}"] if spelled else []
        try:
            text = self.conversation_encoder(tokenizer, template).text(template.render([Message("user", "a")]))
        except ValueError:
            return []  # a conversation of the data will tell
        what = f"begins a conversation with {first} twice, as transformers renders it"
        return [f"data.template={self.template}: {what}"] if text.startswith(2 * first) else []


def _conversation(value: Any, origin: str) -> list[Message]:
    """Messages in the form of OpenAI (role, content) or ShareGPT (from, value)."""
    if not isinstance(value, list):
        raise ValueError(f"{origin} is {shown(value)}, where a list of messages is needed")
    return [_message(each, f"{origin}[{number}]") for number, each in enumerate(value)]


def _message(value: Any, origin: str) -> Message:
    if not isinstance(value, Mapping):
        raise ValueError(f"{origin} is {shown(value)}, where an object is needed, {{role, content}} or {{from, value}}")
    for role_key, content_key in (("role", "content"), ("from", "value")):
        if role_key in value and content_key in value:
            break
    else:
        raise ValueError(
            f"{origin} has {', '.join(map(str, value)) or 'nothing'}, where {{role, content}} or {{from, value}} is "
            "needed"
        )
    role, content = value[role_key], value[content_key]
    if not isinstance(content, str):
        raise ValueError(f"{origin}.{content_key} is {shown(content)}, where a text is needed")
    if not isinstance(role, str) or ROLES.get(role, role) not in KNOWN_ROLES:
        raise ValueError(
            f"{origin}.{role_key} is {role!r}{did_you_mean(str(role), [*KNOWN_ROLES, *ROLES])}; there are "
            f"{', '.join([*KNOWN_ROLES, *ROLES])}"
        )
    return Message(ROLES.get(role, role), content)
