"""data=instruction through real files, and a run that is trained on it."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmtrain.data import IGNORE
from llmtrain.data.cache.entries import name_of
from llmtrain.data.chat.templates import describe
from llmtrain.data.instruction import Instruction
from llmtrain.data.sequences import Sequences
from llmtrain.run.run import Run
from llmtrain.tokenizer import Tokenizer
from tests.helpers.cli import assert_same_end, cut_back, llmtrain, only_run, rows

SAMPLE = Path(__file__).parents[2] / "data" / "instructions.json"
ALPACA = {"instruction": "Add.", "input": "2 and 3", "output": "5"}
CHAT = [
    {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "2"},
]  # fmt: skip


def jsonl(path: Path, records: list[Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def instruction(folder: Path, path: str, **changes: object) -> Instruction:
    """The option as conf/data/instruction.yaml has it, and without validation."""
    keys = {"path": path, "sequence_length": 400, "cache_dir": folder / "cache", "validation_fraction": 0, **changes}
    values = [f"data.{key}={'null' if value is None else value}" for key, value in keys.items()]
    data = Run.compose(
        "model=tiny", "model.context_length=400", "tokenizer=byte", "data=instruction", "objective=instruction", *values
    ).data
    assert isinstance(data, Instruction)
    return data


def taught(sequences: Sequences, tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """What each example says, and what of it is to be predicted; stretches of that with ``|`` between."""
    found = []
    for index in range(len(sequences)):
        each = sequences.gather(np.array([index]))
        assert each.lengths is not None
        length = int(each.lengths[0])
        inputs, targets = each.inputs[0, :length], each.targets[0, :length]
        following = np.append(inputs[1:], targets[-1])
        assert ((targets == following) | (targets == IGNORE)).all()
        stretches = np.split(targets, np.flatnonzero(np.diff(targets != IGNORE)) + 1)
        said = [tokenizer.decode(part.tolist()) for part in stretches if part[0] != IGNORE]
        found.append((tokenizer.decode(inputs.tolist()), "|".join(said)))
    return found


def build(folder: Path, records: list[Any], tokenizer: Tokenizer, **changes: object) -> list[tuple[str, str]]:
    data = instruction(folder, jsonl(folder / "a.jsonl", records), **changes)
    return taught(data.build(tokenizer).train, tokenizer)


END = "<|endoftext|>"


def test_every_form_of_record_is_read(tmp_path: Path, byte: Tokenizer) -> None:
    shared = [{"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]} for m in CHAT]
    records = [
        {"prompt": "Q", "completion": "A"}, {"messages": CHAT}, {"conversations": shared, "id": 5}, ALPACA,
        {"instruction": "Add.", "output": "5"}, {"instruction": "Add.", "input": None, "output": "5"},
    ]  # fmt: skip
    assert build(tmp_path, records, byte, template="plain") == [
        ("QA", f"A{END}"),
        (f"HiHello.{END}1+1?2", f"Hello.{END}|2{END}"),
        (f"HiHello.{END}1+1?2", f"Hello.{END}|2{END}"),
        ("Add.\n\n2 and 35", f"5{END}"),
        ("Add.5", f"5{END}"),
        ("Add.5", f"5{END}"),
    ]


def test_columns_may_have_other_names(tmp_path: Path, byte: Tokenizer) -> None:
    record = {"ask": "Q", "with": "it", "response": "A"}
    names = {"instruction_column": "ask", "input_column": "with", "output_column": "response"}
    assert build(tmp_path, [record], byte, template="plain", **names) == [("Q\n\nitA", f"A{END}")]
    talk = build(tmp_path, [{"talk": CHAT}], byte, template="plain", messages_column="talk")
    assert talk == [(f"HiHello.{END}1+1?2", f"Hello.{END}|2{END}")]


def test_train_on_chooses_the_responses_with_loss(tmp_path: Path, byte: Tokenizer) -> None:
    records = [{"messages": [*CHAT, {"role": "user", "content": "And nobody answers"}]}]
    every = f"HiHello.{END}1+1?2"
    assert build(tmp_path, records, byte, template="plain", train_on="last") == [(every, f"2{END}")]
    assert build(tmp_path, records, byte, template="plain", train_on="all") == [(every, f"{every[1:]}{END}")]


def test_system_is_put_before_each_conversation(tmp_path: Path, byte: Tokenizer) -> None:
    ((text, _),) = build(tmp_path, [{"messages": CHAT[:2]}], byte, template="chatml", system="Be kind.")
    assert text.startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>")


def test_a_users_template_is_used(tmp_path: Path, byte: Tokenizer) -> None:
    form = "'Q: {prompt} A: {response}'"
    assert build(tmp_path, [ALPACA], byte, template=form) == [("Q: Add.\n\n2 and 3 A: 5", f" 5{END}")]
    apart = build(tmp_path, [ALPACA], byte, template=form, split_at_responses=True)
    assert apart == [("Q: Add.\n\n2 and 3 A: 5", f"5{END}")]


def test_long_examples_are_cut_or_left_out_and_counted(tmp_path: Path, byte: Tokenizer) -> None:
    records = [
        {"prompt": "p" * 5, "completion": "c" * 5}, {"prompt": "p" * 5, "completion": "d" * 6},
        {"prompt": "p" * 10, "completion": "e"}, {"prompt": "p" * 11, "completion": "f"},
    ]  # fmt: skip
    data = instruction(tmp_path, jsonl(tmp_path / "a.jsonl", records), template="plain", sequence_length=10)
    corpus = data.build(byte)
    assert taught(corpus.train, byte) == [
        ("pppppccccc", f"ccccc{END}"), ("pppppddddd", "dddddd"), ("pppppppppp", "e"),
    ]  # fmt: skip
    assert corpus.notes == (
        "2 of 4 training examples (50.0%) are longer than data.sequence_length=10: the rest was cut off",
        "1 of 4 training examples (25.0%) are longer than data.sequence_length=10: nothing of a response was left, so "
        "they are left out",
    )
    short = instruction(tmp_path, data.path, template="plain", sequence_length=4)
    with pytest.raises(ValueError, match="of all 4 examples for training nothing of a response was left; raise it"):
        short.build(byte)


def test_marks_missing_in_the_tokenizer_are_reported(tmp_path: Path, byte: Tokenizer) -> None:
    data = instruction(tmp_path, jsonl(tmp_path / "a.jsonl", [ALPACA]), template="chatml")
    assert data.build(byte).notes == (
        "data.template=chatml: the tokenizer has no <|im_end|>, <|im_start|>, so they are spelled out as text, several "
        "tokens each",
    )


def test_packed_data_hold_the_same_examples(tmp_path: Path, gpt2: Tokenizer) -> None:
    keys = {"sequence_length": 256, "validation_fraction": 0.1}
    plain = instruction(tmp_path, str(SAMPLE), **keys).build(gpt2)
    packed = instruction(tmp_path, str(SAMPLE), pack=True, **keys).build(gpt2)
    assert packed.fingerprint != plain.fingerprint  # positions count other things
    assert instruction(tmp_path, str(SAMPLE), pack=True, **keys).packs
    assert len(packed.train) < 0.6 * len(plain.train)
    found = {}
    for corpus in (plain, packed):
        rows = corpus.train.gather(np.arange(len(corpus.train)))
        segments = np.arange(rows.inputs.shape[1]) < rows.lengths[:, None] if rows.segments is None else rows.segments
        found[corpus.fingerprint] = sorted(
            (inputs[s == number].tolist(), targets[s == number].tolist())
            for inputs, targets, s in zip(rows.inputs, rows.targets, segments, strict=True)
            for number in range(1, int(s.max()) + 1)
        )
    assert found[plain.fingerprint] == found[packed.fingerprint]


WRONG = [CHAT[0], {"role": "assistant", "content": "WRONG", "weight": 0}, *CHAT[2:]]


def test_messages_of_weight_0_carry_no_loss(tmp_path: Path, byte: Tokenizer) -> None:
    every = f"HiWRONG{END}1+1?2"
    assert build(tmp_path, [{"messages": WRONG}], byte, template="plain") == [(every, f"2{END}")]
    assert build(tmp_path, [{"messages": WRONG}], byte, template="plain", train_on="last") == [(every, f"2{END}")]
    ((_, said),) = build(tmp_path, [{"messages": WRONG}], byte, template="plain", train_on="all")
    assert said == f"i|1+1?2{END}"  # the first token is no target


def test_parts_of_contents_are_read(tmp_path: Path, byte: Tokenizer) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, CHAT[1]]
    assert build(tmp_path, [{"messages": parts}], byte, template="plain") == [("HiHello.", f"Hello.{END}")]


def test_what_nothing_reads_is_counted_and_named(tmp_path: Path, byte: Tokenizer) -> None:
    records = [
        {"messages": [CHAT[0], {**CHAT[1], "mood": "glad"}], "tools": [{"name": "a"}], "id": 1, "source": "web"},
        {"messages": [*CHAT, CHAT[0]], "id": 2, "source": None},
        {"messages": [{"role": "user", "content": " "}, CHAT[1]], "id": 3},
    ]
    data = instruction(tmp_path, jsonl(tmp_path / "a.jsonl", records), template="plain")
    assert data.build(byte).notes == (
        "1 of 3 examples: a message of the user is empty",
        "1 of 3 examples: the messages after the last response have no target and were left out",
        "columns that nothing reads, with their rows: id (3), source (1)",
        "1 of 3 examples: data.template=plain does not render messages[].mood",
        "1 of 3 examples: data.template=plain does not render tools",
    )
    assert data.build(byte).notes == data.build(byte).notes  # from the cache


def test_examples_that_are_as_before_keep_their_fingerprint(tmp_path: Path, byte: Tokenizer) -> None:
    """A run of an earlier version resumes on them; one whose messages it taught wrongly does not."""
    path = jsonl(tmp_path / "a.jsonl", [{"messages": CHAT, "id": 1}, {"messages": CHAT[2:]}])
    corpus = instruction(tmp_path, path, template="plain").build(byte)
    data = instruction(tmp_path, path, template="plain")
    key = ["Instruction", data.hashes([Path(path)], verify=False), [[".jsonl"]], 1, 0.0, 400, data.settings(byte)]
    assert corpus.fingerprint == name_of(["examples-1", *key, byte.fingerprint])
    jsonl(tmp_path / "a.jsonl", [{"messages": WRONG}])
    key[1] = data.hashes([Path(path)], verify=True)
    changed = instruction(tmp_path, path, template="plain").build(byte)
    assert changed.fingerprint != name_of(["examples-1", *key, byte.fingerprint])


def test_auto_takes_the_tokenizers_own_template(tmp_path: Path, byte: Tokenizer) -> None:
    class Own(type(byte)):  # type: ignore[misc]
        chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"

    (alpaca,) = build(tmp_path, [{"messages": CHAT[:2]}], byte)
    assert "### Response:" in alpaca[0]
    assert build(tmp_path, [{"messages": CHAT[:2]}], Own()) == [("[user]Hi[assistant]Hello", "Hello.")]
    assert describe("auto", Own()) == "the tokenizer's own (data.template=auto)"
    assert describe("auto", byte) == "alpaca (data.template=auto: the tokenizer has none of its own)"
    assert describe("chatml", Own()) == "chatml"


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({**ALPACA, "output": ""}, ":2: its response is empty: every target would be masked"),
        ({**ALPACA, "output": " \n"}, ":2: its response is empty: every target would be masked"),
        ({"messages": CHAT[:1]}, ":2: there is no response in it: every target would be masked"),
        ({"messages": []}, ":2: there is no response in it"),
        ({"instruction": "x"}, ":2: there is no column output; there are instruction; name another with data.output_"),
        ({"prompt": "x", "response": "y"}, ":2: there is no column completion"),
        ({"instructions": "x", "outputs": "y"}, ":2: there is none of the columns messages, conversations, prompt, "
         "instruction; did you mean instruction?; there are instructions, outputs; name those"),
        ({**ALPACA, "input": 3}, ":2: input is 3 (int), where a text is needed"),
        ({"messages": "x"}, ":2: messages is 'x' (str), where a list of messages is needed"),
        ({"messages": ["x"]}, ":2: messages[0] is 'x' (str), where an object is needed"),
        ({"messages": [{"role": "user"}]}, ":2: messages[0] has role, where {role, content} or {from, value}"),
        ({"messages": [{"role": "usr", "content": "x"}]}, ":2: messages[0].role is 'usr'; did you mean user?"),
        ({"messages": [{"role": "user", "content": None}]}, ":2: messages[0].content is None (NoneType), where a text"),
        ({"messages": [*CHAT, {"role": "assistant", "content": " "}]}, ":2: message 5: the response is empty, and the"),
        ({"messages": [CHAT[0], {**CHAT[1], "weight": 0}]}, ":2: all responses have weight 0: every target would be"),
        ({"messages": [{**CHAT[0], "weight": 1}, CHAT[1]]}, ":2: message 1 has weight 1, and only responses carry"),
        ({"messages": [*CHAT[:3], {"role": "assistant", "content": None, "tool_calls": [{"name": "a"}]}]},
         ":2: message 4: data.template=alpaca does not render tool_calls, so it would be lost; take a template that"),
        ({"messages": [CHAT[0], {"role": "tool", "content": "x"}, CHAT[1]]}, ":2: message 2 is of role 'tool'; the"),
        ({"messages": [*CHAT, {"role": "system", "content": "x"}, *CHAT]}, ":2: message 5 is of role 'system'"),
    ],
)  # fmt: skip
def test_errors_name_the_line(tmp_path: Path, byte: Tokenizer, record: dict[str, Any], message: str) -> None:
    path = jsonl(tmp_path / "a.jsonl", [ALPACA, record])
    with pytest.raises(ValueError, match=r".") as error:
        instruction(tmp_path, path).build(byte)
    assert str(error.value).startswith(f"{path}{message}")


def test_unknown_templates_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data.template=alpaka: there is no such template; did you mean alpaca"):
        instruction(tmp_path, "a", template="alpaka")
    with pytest.raises(ValueError, match=r"there is no field {promt}; did you mean prompt"):
        instruction(tmp_path, "a", template="'{promt}{response}'")


# --- a run ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pack", ["false", "true"])
def test_a_run_resumes_exactly_and_verifies(tmp_path: Path, pack: str) -> None:
    shutil.copy(SAMPLE, tmp_path)
    llmtrain(
        "train", "model=tiny", "model.context_length=256", "tokenizer=byte", "data=instruction",
        "objective=instruction", f"data.path={SAMPLE.name}", f"data.pack={pack}", "runtime.num_threads=1",
        "metrics.log_every=1", "accumulation.batch_size=4", "accumulation.micro_batch_size=3", "loop.max_steps=12",
        "loop.eval_every=6", "loop.eval_batches=2", "loop.sample_every=0", "checkpoint.every_steps=4",
        "checkpoint.keep_last=9", "optimizer.lr=3e-3", cwd=tmp_path,
    )  # fmt: skip
    whole = only_run(tmp_path / "runs")
    losses = [row["loss"] for row in rows(whole) if "loss" in row]
    assert len(losses) == 12
    assert losses[-1] < losses[0] - 0.3
    copy = cut_back(whole, 4, whole.with_name("copy"))
    llmtrain("resume", str(copy), cwd=tmp_path)
    assert_same_end(whole, copy)
    assert "bit for bit" in llmtrain("verify", str(whole), cwd=tmp_path).stdout


def test_a_template_without_bound_is_one_message_with_its_row(tmp_path: Path, byte: Tokenizer) -> None:
    class Own(type(byte)):  # type: ignore[misc]
        chat_template = "{{ messages[0].content * 10**10 }}"

    path = jsonl(tmp_path / "a.jsonl", [{"messages": CHAT}])
    data = instruction(tmp_path, path)
    with pytest.raises(ValueError, match=r".") as error:
        data.build(Own())
    assert str(error.value) == (
        f"{path}:1: the tokenizer's chat template needs more than 537 MB of memory; correct it, or take another, such "
        "as template=chatml"
    )
    assert not list((tmp_path / "cache").glob("*/index.json"))
