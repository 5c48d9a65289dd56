"""Messages in the forms of other programs: what is read, what carries no loss, and what is refused with its place."""

import json
from typing import Any

import pytest

from llmtrain.data.chat.chat_rows import read_messages
from llmtrain.data.chat.row_forms import RowForms
from llmtrain.data.chat.template import Message
from llmtrain.data.sources.records import Record

ASK, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}
FORMS = RowForms("instruction", "input", "output", None, "prompt", "completion", "system", "tools")


@pytest.mark.parametrize("name", ["weight", "train", "training", "loss"])
@pytest.mark.parametrize(
    ("value", "untrained"), [(0, {1}), (False, {1}), (0.0, {1}), (1, set()), (True, set()), (None, set())]
)
def test_a_weight_of_0_under_every_name_is_no_loss(name: str, value: Any, untrained: set[int]) -> None:
    row = read_messages([ASK, {**ANSWER, name: value}], "a:1")
    assert row.untrained == untrained
    assert row.messages[1] == Message("assistant", "Hello.")  # a weight is no field that a template sees


def test_details_of_training_are_read_where_they_agree() -> None:
    def detail(*flags: bool) -> list[dict[str, Any]]:
        return [{"begin_offset": 0, "end_offset": 2, "train": flag} for flag in flags]

    assert read_messages([ASK, {**ANSWER, "train_detail": detail(False, False)}], "a:1").untrained == {1}
    with pytest.raises(ValueError, match=r"a:1\[1\].train_detail trains parts of a message"):
        read_messages([ASK, {**ANSWER, "train_detail": detail(True, False)}], "a:1")


def test_contents_in_parts_are_texts() -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "output_text", "text": "lo.", "annotations": [], "image": None}]
    assert read_messages([{"role": "user", "content": parts}], "a:1").messages == (Message("user", "Hello."),)


def test_forms_of_calls_are_read() -> None:
    call = {"name": "look_up", "arguments": {"town": "A"}}
    calls = [{"type": "function", "function": call}]
    expected = Message("assistant", "", "", {"tool_calls": calls}, has_content=False)
    shared = [
        {"from": "human", "value": "Hi"}, {"from": "function_call", "value": json.dumps(call)},
        {"from": "observation", "value": "12"},
    ]  # fmt: skip
    row = read_messages(shared, "a:1")
    assert row.messages == (Message("user", "Hi"), expected, Message("tool", "12"))
    for content in ({"content": None}, {}):
        assert read_messages([{"role": "assistant", **content, "tool_calls": calls}], "a:1").messages == (expected,)
    text = json.dumps([{"role": "assistant", "content": None, "tool_calls": json.dumps(calls)}])
    assert read_messages(text, "a:1").messages == (expected,)  # as a column of CSV holds it


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ({**ANSWER, "weight": 0.5}, "a:1[0].weight is 0.5 (float): a message is trained or not, 1 or 0 (true"),
        ({**ANSWER, "weight": 2}, "a:1[0].weight is 2 (int)"),
        ({**ANSWER, "train": "no"}, "a:1[0].train is 'no' (str)"),
        ({**ANSWER, "weight": 0, "train": True}, "a:1[0]: weight and train contradict each other"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]},
         "a:1[0].content[0] is a part of type 'image_url', and only texts are read; remove the part, or the row"),
        ({"role": "user", "content": [{"type": "text", "text": None}]}, "a:1[0].content[0].text is None (NoneType)"),
        ({"role": "user", "content": [{"type": "text", "text": "a", "style": "bold"}]}, "has style beside its text"),
        ({"role": "user", "content": [7]}, 'content[0] is 7 (int), where a part is needed, {"type": "text"'),
        ({"role": "user", "content": {"text": "x"}}, "where a text is needed, or a list of parts"),
        ({"role": "assistant", "content": None}, "a:1[0].content is None (NoneType), where a text is needed"),
        ({"role": "assistant", "tool_calls": "[{"}, "a:1[0].tool_calls is '[{' (str), which begins as JSON"),
        ({"role": "assistant", "tool_calls": 7}, "a:1[0].tool_calls is 7 (int), where a list of calls is needed"),
        ({"from": "function_call", "value": "look"}, "a:1[0].value is 'look' (str), where a call is needed"),
        ({"role": "asistant", "content": "x"}, "a:1[0].role is 'asistant'; did you mean assistant?"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_with_its_place(message: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=r".") as raised:
        read_messages([message], "a:1")
    assert error in str(raised.value)


# --- rows -----------------------------------------------------------------------------------------------------------


def test_prompts_and_completions_may_be_messages() -> None:
    """As in TRL: the completion alone is trained."""
    values = {"prompt": [ASK, ANSWER, ASK], "completion": [ANSWER], "id": 1}
    row, columns = FORMS.read(Record(values, "a:1"))
    assert [message.role for message in row.messages] == ["user", "assistant"] * 2
    assert row.untrained == {1}
    assert columns >= {"prompt", "completion"}
    assert "id" not in columns


def test_system_messages_and_earlier_turns_have_columns() -> None:
    """As in LLaMA-Factory's files."""
    values = {"system": "Be kind.", "history": [["a", "b"]], "instruction": "c", "input": "", "output": "d"}
    row, _ = FORMS.read(Record(values, "a:1"))
    turns = [("system", "Be kind."), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    assert [(message.role, message.content) for message in row.messages] == turns
    weighted = {"system": "Be kind.", "messages": [ASK, {**ANSWER, "weight": 0}, ASK, ANSWER]}
    row, _ = FORMS.read(Record(weighted, "a:1"))
    assert row.untrained == {2}
    assert FORMS.read(Record({"system": "", "messages": [ASK, ANSWER]}, "a:1"))[0].messages[0].role == "user"


def test_tools_and_settings_of_templates_are_read() -> None:
    tools = [{"name": "look_up"}]
    for given in (tools, json.dumps(tools)):
        row, columns = FORMS.read(
            Record({"messages": [ASK, ANSWER], "tools": given, "chat_template_kwargs": {"think": True}}, "a:1")
        )
        assert row.variables == {"tools": tools, "think": True}
        assert {"tools", "chat_template_kwargs"} <= columns


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"system": "a", "messages": [{"role": "system", "content": "b"}, ASK, ANSWER]}, "different system messages"),
        ({"system": 3, "messages": [ASK, ANSWER]}, "a:1: system is 3 (int), where a text is needed"),
        ({"tools": "look_up", "messages": [ASK, ANSWER]}, "a:1: tools is 'look_up' (str), where a list of objects"),
        ({"chat_template_kwargs": {"messages": 1}, "messages": [ASK]}, "sets messages, which is not a row's to set"),
        ({"history": [["a"]], "instruction": "a", "output": "b"}, "where a list of [instruction, response] is needed"),
        ({"prompt": [{"role": "x"}], "completion": "a"}, "a:1: prompt[0] has role"),
    ],
)
def test_rows_that_contradict_themselves_are_refused(values: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=r"a:1") as raised:
        FORMS.read(Record(values, "a:1"))
    assert error in str(raised.value)
