"""Instructions and conversations: the model learns to write the responses."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, ClassVar

import numpy as np

from llmtrain.data import IGNORE
from llmtrain.data.chat.chat_rows import CALLS, ChatRow
from llmtrain.data.chat.encoder import ConversationEncoder
from llmtrain.data.chat.jinja_template import JinjaTemplate
from llmtrain.data.chat.row_forms import RowForms
from llmtrain.data.chat.special_tokens import missing_tokens
from llmtrain.data.chat.template import ChatTemplate, Message
from llmtrain.data.chat.templates import AUTO, OWN, find_template, parse_template, resolve
from llmtrain.data.example_data import ExampleData
from llmtrain.data.example_format import EncodedExample, Example
from llmtrain.data.sources.records import Record
from llmtrain.tokenizer import Tokenizer

MASKED = "every target would be masked; remove it, or fill it in"


class TrainOn(Enum):
    """The tokens that are targets."""

    responses = "every response and its end"
    last = "the last response and its end"
    all = "all tokens"


@dataclass(frozen=True)
class Instruction(ExampleData[ChatRow]):
    """Records that are conversations, in a form that their columns determine.

    The forms: ``instruction``, ``input`` (may be missing) and ``output``, as in Alpaca; ``messages`` or
    ``conversations``, a list of ``{role, content}`` or ``{from, value}``; ``prompt`` and ``completion``, texts or
    messages.  A template (:mod:`llmtrain.data.chat.templates`) turns a conversation into text.
    """

    instruction_column: str
    input_column: str
    output_column: str
    messages_column: str | None
    prompt_column: str
    completion_column: str
    system_column: str
    tools_column: str
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
        if self.template not in (AUTO, OWN):
            parse_template(self.template)

    @property
    def packs(self) -> bool:
        return self.pack

    # --- a record ---------------------------------------------------------------------------------------------------

    @property
    def forms(self) -> RowForms:
        return RowForms(
            self.instruction_column, self.input_column, self.output_column, self.messages_column, self.prompt_column,
            self.completion_column, self.system_column, self.tools_column,
        )  # fmt: skip

    def read(self, record: Record) -> Example[ChatRow]:
        row, columns = self.forms.read(record)
        responses = [number for number, message in enumerate(row.messages) if message.role == "assistant"]
        end = responses[-1] + 1 if responses else 0
        remarks = ["the messages after the last response have no target and were left out"] * bool(row.messages[end:])
        if any(message.role == "user" and not message.text.strip() for message in row.messages[:end]):
            remarks.append("a message of the user is empty")
        row = replace(row, messages=row.messages[:end])
        self._check(row, responses, record.origin)
        unread = [name for name, value in record.values.items() if name not in columns and value not in (None, "")]
        is_new = bool(row.untrained or row.variables or columns & {self.system_column, "history"})
        is_new |= any(message.fields for message in row.messages)
        return Example(row, row.texts(), unread=tuple(unread), remarks=tuple(remarks), is_new=is_new)

    def _check(self, row: ChatRow, responses: Sequence[int], origin: str) -> None:
        """Raise ValueError for a conversation without a target, or with an empty one."""
        if not responses:
            raise ValueError(f"{origin}: there is no response in it: {MASKED}")
        others = [number for number in row.untrained if number not in responses]
        if self.train_on is TrainOn.all and others:
            raise ValueError(
                f"{origin}: message {others[0] + 1} is no response and has weight 0, and data.train_on=all trains "
                "every token; take data.train_on=responses, or remove the weight"
            )
        if self.train_on is not TrainOn.all and row.claimed:
            raise ValueError(
                f"{origin}: message {min(row.claimed) + 1} has weight 1, and only responses carry loss; remove the "
                "weight, or take data.train_on=all for a loss on everything"
            )
        trained = self._trained(row)
        if not trained:
            which = "the last response has" if self.train_on is TrainOn.last else "all responses have"
            raise ValueError(f"{origin}: {which} weight 0: every target would be masked; remove the row")
        if empty := [number for number in row.empty_responses() if number in trained]:
            if len(responses) == 1:
                raise ValueError(f"{origin}: its response is empty: {MASKED}")
            raise ValueError(
                f"{origin}: message {empty[0] + 1}: the response is empty, and the model would learn to say nothing; "
                'fill it in, give it "weight": 0, or remove the row'
            )

    def _trained(self, row: ChatRow) -> list[int]:
        """The numbers of the responses that are targets."""
        responses = [number for number, message in enumerate(row.messages) if message.role == "assistant"]
        if self.train_on is TrainOn.last:
            responses = responses[-1:]
        return [number for number in responses if number not in row.untrained]

    # --- its ids ----------------------------------------------------------------------------------------------------

    def find_template(self, tokenizer: Tokenizer) -> ChatTemplate:
        """The template of training and chat.  Raises ValueError for an unknown name."""
        return find_template(self.template, tokenizer, system=self.system, split_at_responses=self.split_at_responses)

    def conversation_encoder(self, tokenizer: Tokenizer, template: ChatTemplate) -> ConversationEncoder:
        """The encoder of training, chat and export."""
        return ConversationEncoder(tokenizer, template, split_at_responses=self.split_at_responses)

    def encoder(self, tokenizer: Tokenizer) -> Callable[[ChatRow], EncodedExample]:
        template = self.find_template(tokenizer)
        encode_parts = self.conversation_encoder(tokenizer, template)
        name = f"data.template={resolve(self.template, tokenizer)}"

        def encode(row: ChatRow) -> EncodedExample:
            remarks = self._unread(row, template, name)
            ids, targets, spans_border = encode_parts(
                template.render(row.messages, trained=self._trained(row), variables=row.variables)
            )
            if (targets == IGNORE).all():
                raise ValueError("the template marks nothing of it as generated: every target would be masked")
            if self.train_on is TrainOn.all:
                targets, spans_border = np.where(targets == IGNORE, ids, targets), False
                if row.untrained:
                    parts = template.render(row.messages, trained=row.untrained, variables=row.variables)
                    targets[encode_parts(parts).targets != IGNORE] = IGNORE
            inputs, targets = ids[:-1], targets[1:]
            is_cut = len(inputs) > self.sequence_length
            inputs, targets = inputs[: self.sequence_length], targets[: self.sequence_length]
            if (targets == IGNORE).all():  # the trained part was cut off
                inputs = inputs[:0]
            is_new = isinstance(template, JinjaTemplate) and bool(template.marks_responses or template.lacking_prompt)
            return EncodedExample(inputs, targets, is_cut, spans_border, tuple(remarks), is_new)

        return encode

    def _unread(self, row: ChatRow, template: ChatTemplate, setting: str) -> list[str]:
        """Remarks on what the template, named by ``setting``, does not render.

        Raises ValueError for calls, and for words of a message.
        """
        names = set()
        for number, name in template.unread(row.messages, row.variables):
            if number is None:
                names.add(name)
                continue
            if number < 0:
                raise ValueError(f"data.system={self.system!r}: the template has no place for a system message")
            message = row.messages[number]
            if name in CALLS or (name == "content" and not any(message.fields.get(call) for call in CALLS)):
                what = name if name in CALLS else f"the text of a message of role {message.role!r}"
                raise ValueError(
                    f"message {number + 1}: {setting} does not render {what}, so it would be lost; take a template "
                    "that does, such as data.template=tokenizer with a tokenizer whose own template knows it, or "
                    "remove it from the row"
                )
            names.add(f"messages[].{name}")
        return [f"{setting} does not render {name}" for name in sorted(names)]

    def settings(self, tokenizer: Tokenizer) -> list[Any]:
        name = resolve(self.template, tokenizer)
        return [
            self.instruction_column, self.input_column, self.output_column, self.messages_column, self.prompt_column,
            self.completion_column, name, self.system, self.train_on.name,
            tokenizer.chat_template if name == OWN else None,
            *([] if self.split_at_responses else ["whole"]),
        ]  # fmt: skip

    def new_settings(self) -> list[Any]:
        return [self.system_column, self.tools_column]

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
        found = self._doubled_begin(template, tokenizer)
        if missing := missing_tokens(template, tokenizer):
            found.append(
                f"data.template={self.template}: the tokenizer has no {', '.join(missing)}, so "
                f"{'it is' if len(missing) == 1 else 'they are'} spelled out as text, several tokens each"
            )
        if isinstance(template, JinjaTemplate) and (header := template.lacking_prompt):
            found.append(
                f"data.template={self.template}: the tokenizer's chat template ignores add_generation_prompt; this "
                f"program puts {header!r} before a response, and others that serve the model have to do the same"
            )
        return found

    def _doubled_begin(self, template: ChatTemplate, tokenizer: Tokenizer) -> list[str]:
        """A remark on a template that spells out the token that the tokenizer puts before a text."""
        first = tokenizer.begin_names
        name = resolve(self.template, tokenizer)
        if not first:
            return []
        if name != OWN:
            spelled = parse_template(name).begins_text and not getattr(template, "begins_text", True)
            what = f"begins with {first}, which the tokenizer puts before a text too: it stands there once"
            return [f"data.template={name}: {what}"] if spelled else []
        try:
            text = self.conversation_encoder(tokenizer, template).text(template.render([Message("user", "a")]))
        except ValueError:
            return []  # a conversation of the data will tell
        what = f"begins a conversation with {first} twice, as transformers renders it"
        return [f"data.template={name}: {what}"] if text.startswith(2 * first) else []
