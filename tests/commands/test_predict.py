"""``llmtrain predict``, chat and prompts from files, on runs trained by the command itself."""

import csv
import io
import json
from pathlib import Path

import pytest

from llmtrain.cli.main import main
from tests.helpers.cli import TINY, assert_same_end, cut_back, llmtrain, only_run, rows

WORDS = {"fruit": ("aaa", "aba", "bab", "bbb"), "tool": ("xxx", "xyx", "yxy", "yyy")}


def write_messages(path: Path, number: int = 160) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["label", "text"])
        for index in range(number):
            label = ("fruit", "tool")[index % 3 == 0]
            names = WORDS[label]
            writer.writerow([label, f"{names[index % 4]} {names[(index // 4) % 4]} {index}"])


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with messages, and a run that has learnt to tell them apart, its base beside it."""
    folder = tmp_path_factory.mktemp("predict")
    write_messages(folder / "messages.csv")
    small = [setting for setting in TINY if not setting.startswith("data.")]
    llmtrain("train", *small, "data.sequence_length=64", "loop.max_steps=20", "run_dir=base", cwd=folder)
    llmtrain(
        "train", "model=auto", *small[1:], "data=labelled", "data.path=messages.csv", "objective=classification",
        "weights=checkpoint", "weights.path=base", "lora=lora", "lora.rank=4", "data.sequence_length=64",
        "data.validation_fraction=0.25", "loop.max_steps=60", "loop.eval_every=20", "loop.eval_batches=null",
        "checkpoint.every_steps=30", "checkpoint.keep_last=0", "optimizer.lr=1e-2", "run_dir=run", cwd=folder,
    )  # fmt: skip
    return folder


def test_metrics_hold_accuracy_and_confusion(work: Path) -> None:
    evaluations = [row for row in rows(work / "run") if "val_loss" in row]
    last = evaluations[-1]
    confusion = last["confusion"]
    assert last["labels"] == ["fruit", "tool"]
    assert last["accuracy"] == pytest.approx((confusion[0][0] + confusion[1][1]) / sum(map(sum, confusion)), abs=1e-6)
    assert last["accuracy"] > 0.9
    summary = json.loads((work / "run/summary.json").read_text())
    assert summary["accuracy"] == last["accuracy"]
    report = llmtrain("report", "run", cwd=work).stdout
    assert "accuracy" in report
    assert "true \\ predicted" in report


def test_a_resumed_classifier_ends_on_the_same_bits_and_verifies(work: Path) -> None:
    cut = cut_back(work / "run", 30, work / "cut")
    llmtrain("resume", "cut", cwd=work)
    assert_same_end(cut, work / "run")
    assert "bit for bit" in llmtrain("verify", "run", cwd=work).stdout


def test_predict_classifies_a_text(work: Path) -> None:
    output = llmtrain("predict", "run", "text=xxx yxy 7", cwd=work).stdout
    first = output.splitlines()[0].split()
    assert first[0] == "tool"
    assert float(first[1]) > 0.5


@pytest.mark.parametrize("output", ["found.csv", "found.jsonl"])
def test_predict_classifies_a_file(work: Path, output: str) -> None:
    done = llmtrain("predict", "run", "file=messages.csv", f"output={output}", "batch_size=7", cwd=work)
    assert "160 texts, written to " in done.stderr
    if output.endswith(".csv"):
        with (work / output).open(newline="") as file:
            found = list(csv.DictReader(file))
        sums = [float(row["probability_fruit"]) + float(row["probability_tool"]) for row in found]
    else:
        found = [json.loads(line) for line in (work / output).read_text().splitlines()]
        sums = [sum(row["probabilities"].values()) for row in found]
    with (work / "messages.csv").open(newline="") as file:
        asked = list(csv.DictReader(file))
    assert [row["text"] for row in found] == [row["text"] for row in asked]  # in their order
    assert sums == pytest.approx([1.0] * 160, abs=1e-5)
    right = sum(row["label"] == row["predicted"] for row in found) / 160
    assert f"accuracy {100 * right:.1f}% ({round(160 * right)} of 160 with a label), macro-F1 " in done.stderr
    assert right > 0.9
    hits = [sum(row["label"] == row["predicted"] == label for row in found) for label in WORDS]
    for label, hit in zip(WORDS, hits, strict=True):
        texts, predicted = (sum(row[key] == label for row in found) for key in ("label", "predicted"))
        scores = [2 * hit / (texts + predicted), hit / predicted, hit / texts]
        line = next(line for line in done.stderr.splitlines() if line.startswith(label)).split()
        assert line == [label, *(f"{score:.3f}" for score in scores), str(texts)]
    last = [line.split() for line in done.stderr.splitlines()][-2:]
    assert [row[0] for row in last] == list(WORDS)
    assert [int(row[1 + at]) for at, row in enumerate(last)] == hits  # the diagonal of the confusion matrix


def test_predict_takes_a_text_a_line(work: Path, capfd: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.chdir(work)
    (work / "lines.txt").write_text("aaa bab 1\r\n\nxxx yxy, 2")
    assert main(["predict", "run", "file=lines.txt"]) == 0
    output = capfd.readouterr()
    found = [json.loads(line) for line in output.out.splitlines()]
    assert [(row["text"], row["predicted"]) for row in found] == [("aaa bab 1", "fruit"), ("xxx yxy, 2", "tool")]
    assert "2 texts, 1 empty line skipped" in output.err
    assert "accuracy" not in output.err


def test_predict_scores_labels_of_other_columns(work: Path, capfd: pytest.CaptureFixture[str], monkeypatch) -> None:
    """Rows without a label, and with one that the model does not know, are not scored; the latter are named."""
    monkeypatch.chdir(work)
    rows = [("aaa bab", "fruit"), ("xxx yxy", "fruit"), ("bbb aba", ""), ("yyy xyx", "animal")]
    (work / "other.csv").write_text("kind,words\n" + "".join(f"{label},{text}\n" for text, label in rows))
    assert main(["predict", "run", "file=other.csv", "text_column=words", "label_column=kind"]) == 0
    error = capfd.readouterr().err
    assert "accuracy 50.0% (1 of 2 with a label), macro-F1 0.333" in error
    assert "not scored, as the model has no such label: animal (1)" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "text=null and file=null: give one of them"),
        (("text=a", "file=messages.csv"), "give one of them"),
        (("text= ",), "an empty text has no class"),
        (("file=messages.csv", "output=found.txt"), "the name has to end in .jsonl or .csv"),
        (
            ("file=messages.csv", "text_column=txt"),
            "did you mean text?; there are label, text; name another with text_column=…",
        ),
        (("file=nothing.csv",), "llmtrain: file=nothing.csv: no such file or folder in /"),
        (("file=nothing.txt",), "llmtrain: file=nothing.txt: no such file in /"),
        (("file=messages.csv", "label_column=kind"), "messages.csv:2: there is no column kind; there are label, text"),
        (("text=a", "threshold=2"), "threshold=2"),
    ],
)
def test_mistakes_are_named_and_leave_nothing(
    work: Path, arguments: tuple[str, ...], message: str, capfd: pytest.CaptureFixture[str], monkeypatch
) -> None:
    monkeypatch.chdir(work)
    assert main(["predict", "run", *arguments]) == 2
    assert message in capfd.readouterr().err
    assert not list(work.glob("found.txt*"))


def test_a_run_that_is_no_classifier_is_refused(work: Path, capfd: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.chdir(work)
    assert main(["predict", "base", "text=a"]) == 2
    assert "was not trained to classify texts" in capfd.readouterr().err
    assert main(["chat", "base"]) == 2
    assert "template=null: the run was trained without a template" in capfd.readouterr().err


def test_predict_takes_a_base_that_was_moved(work: Path, capfd: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.chdir(work)
    expected = llmtrain("predict", "run", "text=aba", cwd=work).stdout
    (work / "base").rename(work / "elsewhere")
    try:
        assert main(["predict", "run", "text=aba"]) == 2
        error = capfd.readouterr().err
        assert "base: no such directory" in error
        assert "weights.path=DIR" in error
        assert llmtrain("predict", "run", "text=aba", "weights.path=elsewhere", cwd=work).stdout == expected
        assert main(["predict", "run", "text=aba", "weights.path=run"]) == 2
        assert "not the weights that the adapters were trained on" in capfd.readouterr().err
        more = ("loop.max_steps=62", "weights.path=elsewhere", "run_dir=moved")
        llmtrain("resume", "run", *more, cwd=work)
        assert rows(work / "moved")[-1]["step"] == 62
    finally:
        (work / "elsewhere").rename(work / "base")


def test_data_and_objective_that_do_not_match_are_refused(
    work: Path, capfd: pytest.CaptureFixture[str], monkeypatch
) -> None:
    monkeypatch.chdir(work)
    assert main(["train", "model=tiny", "tokenizer=byte", "data=labelled", "data.path=messages.csv"]) == 2
    assert "objective=causal: does not go with data=labelled, whose targets are classes" in capfd.readouterr().err
    assert main(["train", "model=tiny", "tokenizer=byte", "lora=lora"]) == 2
    assert "adapters on random weights learn nothing" in capfd.readouterr().err


INSTRUCTIONS = [{"instruction": f"Repeat {word}.", "input": "", "output": word} for word in "abcdefghijklmnop"] * 4


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was taught to answer."""
    folder = tmp_path_factory.mktemp("chat")
    (folder / "data.json").write_text(json.dumps(INSTRUCTIONS))
    small = [setting for setting in TINY if not setting.startswith("data.")]
    llmtrain(
        "train", *small, "model.context_length=256", "data=instruction", "data.path=data.json",
        "data.template='Q: {prompt}\\nA: {response}\\n'", "data.validation_fraction=0", "objective=instruction",
        "data.sequence_length=128", "loop.max_steps=150", "optimizer.lr=1e-2", cwd=folder,
    )  # fmt: skip
    only_run(folder / "runs").rename(folder / "run")
    return folder


class Typed(io.StringIO):
    """What somebody types at a terminal."""

    def isatty(self) -> bool:
        return True


def chat(folder: Path, said: str | Typed, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """What is printed when ``said`` comes through a pipe, or is typed."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.stdin", io.StringIO(said) if isinstance(said, str) else said)
    assert main(["chat", "run", "temperature=0", "max_tokens=12"]) == 0
    return capfd.readouterr().out


def test_chat_obeys_its_commands_from_a_pipe(
    talker: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "/history\nRepeat a.\nRepeat b.\n/history\n/save\n/save talk.jsonl\n/undo\n/reset\n/nonsense\n/exit\n"
    output = chat(talker, said, capfd, monkeypatch)
    assert "user: Repeat a." in output
    assert output.startswith("nothing was said yet\n")
    assert "/save FILE: a name is missing" in output
    assert "taken back: Repeat b." in output
    assert "/nonsense: no such command" in output
    saved = [json.loads(line) for line in (talker / "talk.jsonl").read_text().splitlines()]
    roles = [message["role"] for message in saved[0]["messages"]]
    assert roles == ["user", "assistant", "user", "assistant"]
    assert "\nQ:" not in saved[0]["messages"][1]["content"]  # it ends where its turn does


def test_every_word_for_leaving_ends_a_chat(
    talker: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMTRAIN_CACHE", str(talker / "cache"))  # the history of what was typed
    typed = chat(talker, Typed("quit\n/history\n/exit\n"), capfd, monkeypatch)
    assert "/exit leaves, or Ctrl-D" in typed
    assert "user: quit" not in typed
    assert "user: quit" in chat(talker, "quit\n/history\n", capfd, monkeypatch)  # in a file it is what it is


def test_generate_answers_prompts_from_a_file(
    talker: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (talker / "prompts.txt").write_text("Repeat a.\n\nRepeat b.\n")
    asked = ("generate", "run", "file=prompts.txt", "template=run", "temperature=0", "max_tokens=12")
    llmtrain(*asked, "output=texts.jsonl", cwd=talker)
    found = [json.loads(line) for line in (talker / "texts.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in found] == ["Repeat a.", "Repeat b."]
    assert llmtrain(*asked, cwd=talker).stdout == (talker / "texts.jsonl").read_text()
    assert chat(talker, "Repeat a.\n", capfd, monkeypatch).strip() == found[0]["text"].strip()
