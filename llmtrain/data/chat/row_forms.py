"""The forms of rows that hold a conversation, by their columns."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from llmtrain.base.checks import did_you_mean
from llmtrain.data.chat.chat_rows import ChatRow, parsed, read_messages
from llmtrain.data.chat.jinja_template import refuse_reserved
from llmtrain.data.chat.template import Message
from llmtrain.data.sources.records import Record, shown

MESSAGES = ("messages", "conversations")  # columns of conversations, if no other is named
HISTORY = "history"  # earlier turns beside an instruction: a list of [instruction, response]
DOCUMENTS, SETTINGS = "documents", "chat_template_kwargs"  # columns for templates, beside that of the tools
OF_TEMPLATES = ("messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token")  # never settings


@dataclass(frozen=True)
class RowForms:
    """The columns that conversations are read from."""

    instruction: str
    input: str
    output: str
    messages: str | None
    prompt: str
    completion: str
    system: str
    tools: str

    def read(self, record: Record) -> tuple[ChatRow, set[str]]:
        """The conversation in ``record``, and the columns that hold it.

        Raises ValueError, naming file and line, if it has no known form.
        """
        row, columns = self._turns(record)
        variables, more = self._variables(record)
        row = replace(row, variables=variables)
        system = record.values.get(self.system)
        if isinstance(system, str) and system.strip():
            columns.add(self.system)
            row = _with_system(row, system, f"{record.origin}: {self.system}")
        elif system is not None and not isinstance(system, str):
            raise ValueError(f"{record.origin}: {self.system} is {shown(system)}, where a text is needed")
        return row, columns | more

    def _turns(self, record: Record) -> tuple[ChatRow, set[str]]:
        values = record.values
        names = MESSAGES if self.messages is None else (self.messages,)
        if found := [name for name in names if values.get(name) is not None]:
            return read_messages(values[found[0]], f"{record.origin}: {found[0]}"), {found[0]}
        if values.get(self.prompt) is not None:
            return self._completion(record)
        if values.get(self.instruction) is not None:
            return self._instruction(record)
        wanted = [*names, self.prompt, self.instruction]
        near = next((hint for name in values if (hint := did_you_mean(name, wanted))), "")
        raise ValueError(
            f"{record.origin}: there is none of the columns {', '.join(wanted)}{near}; there are "
            f"{', '.join(values) or 'none'}; name those that hold the texts: data.instruction_column=… "
            "data.output_column=…, data.messages_column=…, or data.prompt_column=… data.completion_column=…"
        )

    def _completion(self, record: Record) -> tuple[ChatRow, set[str]]:
        """A prompt and its completion: texts, or messages, of which those of the completion are trained."""
        sides = []
        for column, key, role in (
            (self.prompt, "data.prompt_column", "user"),
            (self.completion, "data.completion_column", "assistant"),
        ):
            if isinstance(record.value(column, key), list):
                sides.append(read_messages(record.values[column], f"{record.origin}: {column}"))
            else:
                text = record.text(column, key)
                refuse_reserved(text, f"{record.origin}: {column}")
                sides.append(ChatRow((Message(role, text),)))
        prompt, answer = sides
        number = len(prompt.messages)
        given = {n for n, message in enumerate(prompt.messages) if message.role == "assistant"}
        untrained = prompt.untrained | given | {number + n for n in answer.untrained}
        claimed = prompt.claimed | {number + n for n in answer.claimed}
        row = ChatRow(prompt.messages + answer.messages, frozenset(untrained), frozenset(claimed))
        return row, {self.prompt, self.completion}

    def _instruction(self, record: Record) -> tuple[ChatRow, set[str]]:
        """An instruction with its response, as in Alpaca, after the turns of a ``history``."""
        instruction = record.text(self.instruction, "data.instruction_column")
        has_input = record.values.get(self.input) is not None
        more = record.text(self.input, "data.input_column") if has_input else ""
        answer = record.text(self.output, "data.output_column")
        columns = {self.instruction, self.input, self.output}
        turns: list[Message] = []
        if history := record.values.get(HISTORY):
            columns.add(HISTORY)
            where = f"{record.origin}: {HISTORY}"
            pairs = parsed(history, where)
            if not isinstance(pairs, list) or not all(
                isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)
                for pair in pairs
            ):
                raise ValueError(f"{where} is {shown(history)}, where a list of [instruction, response] is needed")
            turns = [
                Message(role, text) for pair in pairs for role, text in zip(("user", "assistant"), pair, strict=True)
            ]
        messages = (*turns, Message("user", instruction, more), Message("assistant", answer))
        for message in messages:
            refuse_reserved(message.text, record.origin)
        return ChatRow(messages), columns

    def _variables(self, record: Record) -> tuple[Mapping[str, Any], set[str]]:
        """The values of a row that templates read, by their names, and the columns of those."""
        found: dict[str, Any] = {}
        for column, name in ((self.tools, "tools"), (DOCUMENTS, DOCUMENTS)):
            value = parsed(record.values.get(column), f"{record.origin}: {column}")
            if value in (None, "", []):
                continue
            if not isinstance(value, list) or not all(isinstance(each, Mapping) for each in value):
                raise ValueError(f"{record.origin}: {column} is {shown(value)}, where a list of objects is needed")
            found[name] = value
        columns = {self.tools, DOCUMENTS}
        settings = parsed(record.values.get(SETTINGS), f"{record.origin}: {SETTINGS}")
        if settings:
            if not isinstance(settings, Mapping):
                raise ValueError(f"{record.origin}: {SETTINGS} is {shown(settings)}, where an object is needed")
            if taken := [name for name in settings if name in OF_TEMPLATES]:
                raise ValueError(f"{record.origin}: {SETTINGS} sets {taken[0]}, which is not a row's to set")
            found |= {name: value for name, value in settings.items() if value is not None}
            columns.add(SETTINGS)
        refuse_reserved(str(found) if found else "", record.origin)
        return found, columns


def _with_system(row: ChatRow, system: str, origin: str) -> ChatRow:
    """``row`` behind the system message of a column.  Raises ValueError if it has another one itself."""
    refuse_reserved(system, origin)
    if row.messages and row.messages[0].role == "system":
        if row.messages[0].content.strip() != system.strip():
            raise ValueError(f"{origin} and the first message are different system messages; remove one of them")
        return row
    shifted = [frozenset(number + 1 for number in numbers) for numbers in (row.untrained, row.claimed)]
    return replace(row, messages=(Message("system", system), *row.messages), untrained=shifted[0], claimed=shifted[1])
