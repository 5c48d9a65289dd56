"""Conversations in rows of files: the forms that messages have, and what of them carries no loss."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from llmtrain.base.checks import did_you_mean
from llmtrain.data.chat.jinja_template import refuse_reserved
from llmtrain.data.chat.template import NONE, Message
from llmtrain.data.sources.records import shown

ROLES = {
    "human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant",
    "observation": "tool", "function": "tool", "function_response": "tool", "function_call": "assistant",
}  # fmt: skip
KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool", "ipython")
FORMS = (("role", "content"), ("from", "value"))  # of OpenAI; of ShareGPT
CALLS = ("tool_calls", "function_call")  # fields of a response beside its content
WEIGHTS = ("weight", "train", "training", "loss")  # OpenAI's, Axolotl's, XTuner's and ms-swift's: 0 or false is no loss
DETAILS = ("train_detail", "training_detail")  # Axolotl's, for parts of a message
TEXT_PARTS = ("text", "input_text", "output_text")  # types of a part of a content


@dataclass(frozen=True)
class ChatRow:
    """A conversation of a row."""

    messages: tuple[Message, ...]
    untrained: frozenset[int] = frozenset()  # numbers of messages that carry no loss
    claimed: frozenset[int] = frozenset()  # numbers of messages that are no responses, and shall carry loss
    variables: Mapping[str, Any] = field(default_factory=dict)  # tools, documents and others that templates read

    def texts(self) -> tuple[str, ...]:
        """Two conversations with the same texts are the same."""
        plain = [text for message in self.messages for text in message[:3]]
        others = [dict(message.fields) for message in self.messages] if any(m.fields for m in self.messages) else []
        more = [json.dumps(each, sort_keys=True, default=str) for each in (others, dict(self.variables)) if each]
        return (*plain, *more)

    def empty_responses(self) -> Iterator[int]:
        """The numbers of the responses that have neither words nor calls."""
        for number, message in enumerate(self.messages):
            calls = any(message.fields.get(name) for name in CALLS)
            if message.role == "assistant" and not message.content.strip() and not calls:
                yield number


def read_messages(value: Any, origin: str) -> ChatRow:
    """Messages as {role, content} or {from, value}, also as JSON in a text.  Raises ValueError, naming the place."""
    value = parsed(value, origin)
    if not isinstance(value, list):
        raise ValueError(f"{origin} is {shown(value)}, where a list of messages is needed")
    messages, weights = [], []
    for number, each in enumerate(value):
        message, weight = _message(each, f"{origin}[{number}]")
        messages.append(message)
        weights.append(weight)
    untrained = frozenset(number for number, weight in enumerate(weights) if weight is False)
    is_claimed = [weight is True and m.role != "assistant" for m, weight in zip(messages, weights, strict=True)]
    return ChatRow(tuple(messages), untrained, frozenset(n for n, claim in enumerate(is_claimed) if claim))


def parsed(value: Any, origin: str) -> Any:
    """``value``, or what a text that is a list or object in JSON holds, as tables without nested columns have it."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{origin} is {shown(value)}, which begins as JSON and is none: {error}") from error


def _message(value: Any, origin: str) -> tuple[Message, bool | None]:
    """A message and its weight."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{origin} is {shown(value)}, where an object is needed, {{role, content}} or {{from, value}}")
    given = {str(key): each for key, each in value.items() if each is not None}
    for role_key, content_key in FORMS:
        if role_key in value and (content_key in value or any(name in given for name in CALLS)):
            break
    else:
        raise ValueError(
            f"{origin} has {', '.join(map(str, value)) or 'nothing'}, where {{role, content}} or {{from, value}} is "
            "needed"
        )
    role = value[role_key]
    if not isinstance(role, str) or ROLES.get(role, role) not in KNOWN_ROLES:
        raise ValueError(
            f"{origin}.{role_key} is {role!r}{did_you_mean(str(role), [*KNOWN_ROLES, *ROLES])}; there are "
            f"{', '.join([*KNOWN_ROLES, *ROLES])}"
        )
    is_trained = _is_trained(given, origin)
    skipped = {role_key, content_key, *WEIGHTS, *DETAILS}
    fields = {key: each for key, each in given.items() if key not in skipped}
    if "tool_calls" in fields:
        fields["tool_calls"] = parsed(fields["tool_calls"], f"{origin}.tool_calls")
        if not isinstance(fields["tool_calls"], list):
            raise ValueError(f"{origin}.tool_calls is {shown(fields['tool_calls'])}, where a list of calls is needed")
    content = value.get(content_key)
    if role == "function_call":
        fields["tool_calls"], content = _calls(content, f"{origin}.{content_key}"), None
    has_content = content is not None or not any(fields.get(name) for name in CALLS)
    text = _text(content, f"{origin}.{content_key}") if has_content else ""
    for each in (text, json.dumps(fields, ensure_ascii=False, default=str) if fields else ""):
        refuse_reserved(each, origin)
    return Message(ROLES.get(role, role), text, "", fields or NONE, has_content), is_trained


def _text(content: Any, origin: str) -> str:
    """The text of a content: a text, or a list of parts that are texts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(f"{origin} is {shown(content)}, where a text is needed, or a list of parts")
    texts = []
    for number, part in enumerate(content):
        where = f"{origin}[{number}]"
        if isinstance(part, str):
            texts.append(part)
            continue
        if not isinstance(part, Mapping):
            raise ValueError(f'{where} is {shown(part)}, where a part is needed, {{"type": "text", "text": …}}')
        given = {key: each for key, each in part.items() if each not in (None, "", [], {})}
        if (kind := part.get("type", "text")) not in TEXT_PARTS:
            raise ValueError(
                f"{where} is a part of type {kind!r}, and only texts are read; remove the part, or the row"
            )
        if not isinstance(part.get("text"), str):
            raise ValueError(f"{where}.text is {shown(part.get('text'))}, where a text is needed")
        if others := [key for key in given if key not in ("type", "text")]:
            raise ValueError(f"{where} has {', '.join(map(str, others))} beside its text, which cannot be rendered; "
                             "remove it from the part")  # fmt: skip
        texts.append(part["text"])
    return "".join(texts)


def _calls(content: Any, origin: str) -> list[dict[str, Any]]:
    """The calls of ShareGPT's function_call: JSON of a name and arguments, or a list of such."""
    found = parsed(content, origin)
    calls = found if isinstance(found, list) else [found]
    if not calls or not all(isinstance(call, Mapping) and "name" in call for call in calls):
        raise ValueError(f'{origin} is {shown(content)}, where a call is needed, {{"name": …, "arguments": …}}')
    return [{"type": "function", "function": dict(call)} for call in calls]


def _is_trained(given: Mapping[str, Any], origin: str) -> bool | None:
    """The weight of a message, under any of its names; None if there is none.

    Raises ValueError for other values than 0 and 1.
    """
    found = {}
    for name in WEIGHTS:
        if name in given:
            if not isinstance(given[name], bool | int | float) or given[name] not in (0, 1):
                raise ValueError(
                    f"{origin}.{name} is {shown(given[name])}: a message is trained or not, 1 or 0 (true or false); "
                    "leave out rows instead of weighting them lower"
                )
            found[name] = bool(given[name])
    for name in DETAILS:
        if name in given:
            found[name] = _detail(given[name], f"{origin}.{name}")
    if len(set(found.values())) > 1:
        raise ValueError(f"{origin}: {' and '.join(found)} contradict each other; leave one of them")
    return next(iter(found.values()), None)


def _detail(value: Any, origin: str) -> bool:
    """The only value of ``train`` in Axolotl's list of {begin_offset, end_offset, train}."""
    entries = value if isinstance(value, list) else [value]
    flags = {entry.get("train") if isinstance(entry, Mapping) else None for entry in entries}
    if len(flags) != 1 or not isinstance(flag := next(iter(flags)), bool):
        raise ValueError(
            f"{origin} trains parts of a message, and a message is trained or not; give it weight 0 or 1, or split it"
        )
    return flag
