"""data=labelled through real files: what is read, split, counted and refused."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmtrain.data import IGNORE
from llmtrain.data.examples import Examples
from llmtrain.data.labelled import LabelledText
from llmtrain.data.order.validation_split import set_aside, undersample
from llmtrain.data.sequences import Sequences
from llmtrain.run.run import Run
from llmtrain.tokenizer import Tokenizer

END = 256  # of a text, in bytes


def jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def labelled(folder: Path, path: str, **changes: object) -> LabelledText:
    """The option as conf/data/labelled.yaml has it."""
    keys = {"path": path, "sequence_length": 40, "cache_dir": folder / "cache", **changes}
    values = [f"data.{key}={'null' if value is None else value}" for key, value in keys.items()]
    data = Run.compose("model=tiny", "tokenizer=byte", "data=labelled", "objective=classification", *values).data
    assert isinstance(data, LabelledText)
    return data


def texts(sequences: Sequences | None, tokenizer: Tokenizer) -> list[tuple[str, int]]:
    """What each example says and its target."""
    assert sequences is not None
    rows = sequences.gather(np.arange(len(sequences)))
    assert rows.lengths is not None
    found = []
    for inputs, targets, length in zip(rows.inputs, rows.targets, rows.lengths, strict=True):
        assert (np.delete(targets, length - 1) == IGNORE).all()  # the class is at the last token and nowhere else
        found.append((tokenizer.decode(inputs[:length].tolist()), int(targets[length - 1])))
    return found


def many(number: int) -> list[dict[str, str]]:
    """Texts of which every third is spam."""
    return [{"text": f"message number {i}", "label": "spam" if i % 3 == 0 else "ham"} for i in range(number)]


def test_texts_are_read_with_their_classes(tmp_path: Path, byte: Tokenizer) -> None:
    path = tmp_path / "data.csv"
    path.write_text('text,label\nfree money,spam\n"hi, you",ham\nhow are you?,ham\n')
    corpus = labelled(tmp_path, str(path), validation_fraction=0).build(byte)
    assert corpus.labels == ("ham", "spam")
    assert corpus.label_counts == (2, 1)
    assert corpus.validation is None
    end = "<|endoftext|>"
    assert texts(corpus.train, byte) == [(f"free money{end}", 1), (f"hi, you{end}", 0), (f"how are you?{end}", 0)]
    assert "3 texts for training" in corpus.description
    assert corpus.notes == ()
    bare = labelled(tmp_path, str(path), validation_fraction=0, append_end_of_text=False).build(byte)
    assert texts(bare.train, byte)[0] == ("free money", 1)


def test_every_file_type_gives_the_same_examples(tmp_path: Path, byte: Tokenizer) -> None:
    import pyarrow
    from pyarrow import parquet

    rows = many(60)
    files = [Path(jsonl(tmp_path / "a.jsonl", rows)), tmp_path / "a.json", tmp_path / "a.csv", tmp_path / "a.parquet"]
    files[1].write_text(json.dumps(rows))
    files[2].write_text("text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in rows))
    parquet.write_table(pyarrow.Table.from_pylist(rows), files[3])
    corpora = [labelled(tmp_path, str(file)).build(byte) for file in files]
    for corpus in corpora:
        assert texts(corpus.train, byte) == texts(corpora[0].train, byte)
        assert texts(corpus.validation, byte) == texts(corpora[0].validation, byte)


def test_columns_and_labels_may_be_named(tmp_path: Path, byte: Tokenizer) -> None:
    rows = [{"v": 10, "say": "a"}, {"v": 9, "say": "b"}, {"v": True, "say": "c"}]
    path = jsonl(tmp_path / "a.jsonl", rows)
    keys = {"validation_fraction": 0, "text_column": "say", "label_column": "v"}
    corpus = labelled(tmp_path, path, **keys).build(byte)
    assert corpus.labels == ("9", "10", "True")  # numbers by their value
    ordered = labelled(tmp_path, path, labels="[True,'10','9','7']", **keys).build(byte)
    assert ordered.labels == ("True", "10", "9", "7")
    assert [target for _, target in texts(ordered.train, byte)] == [1, 2, 0]
    assert ordered.label_counts == (1, 1, 1, 0)
    assert ordered.notes == ("no training text has the label '7'",)
    assert ordered.fingerprint != corpus.fingerprint


def test_the_beginning_of_a_long_text_is_kept(tmp_path: Path, byte: Tokenizer) -> None:
    rows = [{"text": "x" * 39, "label": "a"}, {"text": "y" * 40, "label": "b"}, {"text": "z", "label": "a"}]
    corpus = labelled(tmp_path, jsonl(tmp_path / "a.jsonl", rows), validation_fraction=0).build(byte)
    assert texts(corpus.train, byte)[:2] == [("x" * 39 + "<|endoftext|>", 0), ("y" * 39 + "<|endoftext|>", 1)]
    assert corpus.notes == (
        "1 of 3 training texts (33.3%) are longer than data.sequence_length=40: only their beginnings are read",
    )


# --- splitting ------------------------------------------------------------------------------------------------------


def test_the_split_keeps_the_shares_of_the_classes(tmp_path: Path, byte: Tokenizer) -> None:
    rows = many(300)
    corpus = labelled(tmp_path, jsonl(tmp_path / "a.jsonl", rows), validation_fraction=0.2).build(byte)
    validation = texts(corpus.validation, byte)
    assert len(validation) == 60
    assert Counter(target for _, target in validation) == {0: 40, 1: 20}  # as in the whole
    assert corpus.label_counts == (160, 80)
    other = labelled(tmp_path, jsonl(tmp_path / "b.jsonl", rows[::-1]), validation_fraction=0.2).build(byte)
    assert set(texts(other.validation, byte)) == set(validation)  # whatever the order


def test_equal_texts_are_in_one_part(tmp_path: Path, byte: Tokenizer) -> None:
    rows = many(100) * 3
    corpus = labelled(tmp_path, jsonl(tmp_path / "a.jsonl", rows), validation_fraction=0.3).build(byte)
    train, validation = texts(corpus.train, byte), texts(corpus.validation, byte)
    assert len(train) == 210
    assert not set(train) & set(validation)
    assert corpus.notes == ("140 of 210 training texts are duplicates of others",)


def test_each_class_gives_its_share_to_validation() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        number, classes, fraction = int(rng.integers(1, 300)), int(rng.integers(1, 6)), float(rng.uniform(0, 0.99))
        labels = rng.integers(0, classes, number)
        hashes = rng.integers(0, 1 << 62, number)
        validates = set_aside(hashes, labels, fraction)
        for label in np.unique(labels):
            chosen, of_label = validates[labels == label].sum(), (labels == label).sum()
            assert chosen < of_label
            assert abs(chosen - fraction * of_label) <= 1.001
    assert not set_aside(hashes, labels, 0.0).any()


def test_undersampling_leaves_equal_classes() -> None:
    labels = np.array([0] * 50 + [1] * 10 + [2] * 20)
    hashes = np.random.default_rng(0).integers(0, 1 << 62, 80)
    keep = undersample(hashes, labels)
    assert np.bincount(labels[keep]).tolist() == [10, 10, 10]
    mixed = np.random.default_rng(1).permutation(80)
    np.testing.assert_array_equal(undersample(hashes[mixed], labels[mixed]), keep[mixed])


def test_balance_weights_or_undersamples_training_alone(tmp_path: Path, byte: Tokenizer) -> None:
    path = jsonl(tmp_path / "a.jsonl", many(300))
    plain = labelled(tmp_path, path, validation_fraction=0.2).build(byte)
    weighted = labelled(tmp_path, path, validation_fraction=0.2, balance="weights").build(byte)
    even = labelled(tmp_path, path, validation_fraction=0.2, balance="undersample").build(byte)
    assert plain.label_counts == weighted.label_counts == (160, 80)
    assert even.label_counts == (80, 80)
    assert set(texts(even.train, byte)) < set(texts(plain.train, byte))
    assert texts(even.validation, byte) == texts(plain.validation, byte)  # which is as the data are
    assert even.notes[0].startswith("80 of 240 training texts were left out")


def test_validation_may_have_a_file_of_its_own(tmp_path: Path, byte: Tokenizer) -> None:
    (tmp_path / "data").mkdir()
    train, validation = many(30), [*many(3), {"text": "new", "label": "ham"}]
    jsonl(tmp_path / "data" / "train.jsonl", train)
    path = jsonl(tmp_path / "data" / "dev.jsonl", validation)
    corpus = labelled(tmp_path, str(tmp_path / "data"), validation_path=path).build(byte)
    assert (len(corpus.train), len(texts(corpus.validation, byte))) == (30, 4)
    assert corpus.notes == ("3 of 4 validation texts (75.0%) are training data too: their loss measures memorisation",)


def test_conflicting_labels_and_empty_lines_are_reported(tmp_path: Path, byte: Tokenizer) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label\na,x\n\nb,y\na,y\nc,x\n\n")
    corpus = labelled(tmp_path, str(path), validation_fraction=0).build(byte)
    assert corpus.notes == (
        "1 of 4 training texts are duplicates of others",
        "1 texts occur with different labels",
        "2 empty lines were skipped",
    )


# --- several labels -------------------------------------------------------------------------------------------------


def test_texts_with_several_labels_are_read(tmp_path: Path, byte: Tokenizer) -> None:
    rows = [
        {"text": "p", "label": ["b", "a"]}, {"text": "q", "label": "c| a"}, {"text": "r", "label": []},
        {"text": "s", "label": "b"},
    ]  # fmt: skip
    path = jsonl(tmp_path / "a.jsonl", rows)
    corpus = labelled(tmp_path, path, multi_label=True, validation_fraction=0).build(byte)
    assert corpus.labels == ("a", "b", "c")
    assert [target for _, target in texts(corpus.train, byte)] == [0b011, 0b101, 0, 0b010]
    assert corpus.label_counts == (2, 2, 1)


def test_more_than_62_labels_are_refused(tmp_path: Path, byte: Tokenizer) -> None:
    rows = [{"text": f"t{i}", "label": f"l{i:02}"} for i in range(62)]
    path = jsonl(tmp_path / "a.jsonl", rows)
    corpus = labelled(tmp_path, path, multi_label=True, validation_fraction=0).build(byte)
    assert [target for _, target in texts(corpus.train, byte)] == [1 << i for i in range(62)]
    path = jsonl(tmp_path / "b.jsonl", [*rows, {"text": "one more", "label": "l62"}])
    with pytest.raises(ValueError, match="63 labels, and a target has room for 62"):
        labelled(tmp_path, path, multi_label=True, validation_fraction=0).build(byte)


# --- errors ---------------------------------------------------------------------------------------------------------


def refused(folder: Path, rows: list[Any], byte: Tokenizer, **changes: object) -> str:
    data = labelled(folder, jsonl(folder / "a.jsonl", rows), **{"validation_fraction": 0, **changes})
    with pytest.raises(ValueError, match=r".") as error:
        data.build(byte)
    assert not list((folder / "cache").glob(".tmp-*"))  # nothing is left behind
    return str(error.value).removeprefix(f"{folder / 'a.jsonl'}")


def test_errors_name_the_line(tmp_path: Path, byte: Tokenizer) -> None:
    good = many(3)
    for bad, message in {
        '{"text": "  ", "label": "ham"}': ":4: text is empty",
        '{"text": 5, "label": "ham"}': ":4: text is 5 (int), where a text is needed",
        '{"text": "x", "label": ""}': ":4: label is empty",
        '{"text": "x", "label": null}': ":4: label is None (NoneType), where a label is needed",
        '{"text": "x", "label": 0.5}': ":4: label is 0.5 (float), where a label is needed",
        '{"text": "x", "label": ["a"]}': ":4: label is ['a'] (list), where a label is needed; with data.mul",
        '{"text": "x"}': ":4: there is no column label; there are text; name another with data.label_column=…",
    }.items():
        assert refused(tmp_path, [*good, json.loads(bad)], byte).startswith(message)
    assert refused(tmp_path, [*good, {"text": "x", "label": "spa"}], byte, labels="[ham,spam]") == (
        ":4: the label 'spa' is none of data.labels; did you mean spam?; these are 'ham', 'spam'"
    )
    assert ":4: label is 3 (int), where a list of labels is needed" in refused(
        tmp_path, [*good, {"text": "x", "label": 3}], byte, multi_label=True
    )


def test_data_that_cannot_train_or_validate_are_refused(tmp_path: Path, byte: Tokenizer) -> None:
    one = [{"text": "a", "label": "x"}, {"text": "b", "label": "x"}]
    assert "all training texts have the label 'x': there is nothing to classify" in refused(tmp_path, one, byte)
    assert "there is no text in it" in refused(tmp_path, [], byte)
    assert "5 texts make none for validation" in refused(tmp_path, many(5), byte, validation_fraction=0.1)
    path = jsonl(tmp_path / "dev.jsonl", [*many(3), {"text": "x", "label": "eggs"}])
    assert refused(tmp_path, many(9), byte, validation_path=path).startswith(
        f"{path}:4: the label 'eggs' occurs in the validation data alone"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"balance": "undersample", "multi_label": True}, "data.balance=undersample"),
        ({"labels": "[a,a]"}, "data.labels="),
        ({"sequence_length": 1}, "data.sequence_length=1: must be at least 2"),
        ({"validation_fraction": 1}, "data.validation_fraction=1"),
        ({"text_colum": "x"}, "text_colum"),
    ],
)
def test_impossible_options_are_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(Exception, match=message):
        labelled(tmp_path, "a.csv", **changes)


def test_columns_that_nothing_reads_are_counted_and_named(tmp_path: Path, byte: Tokenizer) -> None:
    records = [
        {**record, "id": number, "source": "web" if number < 2 else ""} for number, record in enumerate(many(30))
    ]
    notes = labelled(tmp_path, jsonl(tmp_path / "a.jsonl", records)).build(byte).notes
    assert "columns that nothing reads, with their rows: id (30), source (2)" in notes


# --- the cache ------------------------------------------------------------------------------------------------------


def entry(folder: Path) -> Path:
    """The only entry of the cache."""
    (found,) = (path for path in (folder / "cache").iterdir() if path.is_dir())
    return found


def test_the_cache_key_covers_everything_that_changes_the_examples(
    tmp_path: Path, byte: Tokenizer, gpt2: Tokenizer
) -> None:
    path = jsonl(tmp_path / "a.jsonl", many(30))
    first = labelled(tmp_path, path).build(byte)
    again = labelled(tmp_path, path, shuffle=False).build(byte)
    assert again.fingerprint == first.fingerprint
    assert (entry(tmp_path) / "index.json").is_file()
    others = [labelled(tmp_path, path).build(gpt2)]
    for changes in ({"sequence_length": 39}, {"validation_fraction": 0.2}, {"append_end_of_text": False}):
        others.append(labelled(tmp_path, path, **changes).build(byte))
    jsonl(tmp_path / "a.jsonl", many(31))
    others.append(labelled(tmp_path, path).build(byte))
    assert len({corpus.fingerprint for corpus in [first, *others]}) == 6


def test_a_damaged_entry_is_made_again_and_never_verified(tmp_path: Path, byte: Tokenizer) -> None:
    path = jsonl(tmp_path / "a.jsonl", many(300))
    corpus = labelled(tmp_path, path).build(byte)
    expected = texts(corpus.train, byte)
    files = sorted(entry(tmp_path).iterdir())
    assert [file.name for file in files] == [
        "index.json", "train-00000.bin", "train-examples-00000.bin", "validation-00000.bin",
        "validation-examples-00000.bin",
    ]  # fmt: skip
    for file in files[1:]:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"{file.name}: its sha256 is not the one in index.json"):
            labelled(tmp_path, path).verify(byte)
        mended = labelled(tmp_path, path).build(byte)
        assert texts(mended.train, byte) == expected
        assert labelled(tmp_path, path).verify(byte).fingerprint == corpus.fingerprint


@pytest.mark.parametrize("place", range(0, 1400, 53))
def test_no_flipped_bit_of_the_index_goes_into_training(tmp_path: Path, byte: Tokenizer, place: int) -> None:
    path = jsonl(tmp_path / "a.jsonl", [*many(30), *many(3)])
    corpus = labelled(tmp_path, path).build(byte)
    index = entry(tmp_path) / "index.json"
    stored = bytearray(index.read_bytes())
    stored[place % len(stored)] ^= 1
    index.write_bytes(stored)
    again = labelled(tmp_path, path).build(byte)
    assert texts(again.train, byte) == texts(corpus.train, byte)
    assert texts(again.validation, byte) == texts(corpus.validation, byte)
    assert (again.labels, again.label_counts, again.notes) == (corpus.labels, corpus.label_counts, corpus.notes)


def test_memory_grows_with_the_examples_alone(tmp_path: Path, byte: Tokenizer) -> None:
    corpus = labelled(tmp_path, jsonl(tmp_path / "a.jsonl", many(300))).build(byte)
    assert isinstance(corpus.train, Examples)
    held = [value for value in vars(corpus.train).values() if isinstance(value, np.ndarray)]
    assert all(len(array) <= len(corpus.train) for array in held)


def test_labelled_data_need_objective_classification(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="objective=causal: does not go with data=labelled, whose targets are classes"):
        Run.compose("model=tiny", "tokenizer=byte", "data=labelled", "data.path=a.csv", "objective=causal")
