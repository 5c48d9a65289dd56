"""Faults of the data through the real command line: named, with the right status, and nothing half-written."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llmtrain.cli.main import main
from llmtrain.data.cache.token_cache import DocumentSource, prepare
from llmtrain.data.sources.documents import DocumentPiece
from llmtrain.tokenizer import Tokenizer
from tests.data.harm import flip
from tests.helpers.cli import TINY, llmtrain, rows, start

QUICK = (*TINY, "loop.max_steps=2")
SHARDS = ("data=shards", "data.path=corpus", "data.validation_fraction=0")
Refused = Callable[..., str]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test works in a folder of its own, the cache included."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLMTRAIN_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Refused:
    """Run a command line that must end with status 2, one message, and no run begun."""

    def run(*arguments: str) -> str:
        before = sorted(tmp_path.rglob("step-*"))
        assert main(arguments) == 2
        error = capfd.readouterr().err
        assert "Traceback" not in error
        (message,) = (line for line in error.splitlines() if line.startswith("llmtrain: "))
        assert not (tmp_path / "runs").exists()
        assert sorted(tmp_path.rglob("step-*")) == before
        return message

    return run


@pytest.fixture
def corpus(tmp_path: Path, byte: Tokenizer) -> Path:
    """Five shards of this program, all of a size but the last."""
    text = " ".join(str(i**3) for i in range(600))[:4000]
    source = DocumentSource("a test", "x", lambda: iter([DocumentPiece(text, True)]))
    made = prepare(source, byte, 0, tmp_path / "made", shard_tokens=900)
    shutil.move(made.folder, tmp_path / "corpus")
    return tmp_path / "corpus"


# --- before training ---------------------------------------------------------------------------------------------


def test_a_run_on_damaged_shards_is_refused(tmp_path: Path, corpus: Path, refused: Refused) -> None:
    one, other = corpus / "train-00000.bin", corpus / "train-00002.bin"
    flip(other, 1234)
    assert refused("train", *QUICK, *SHARDS) == (
        "llmtrain: corpus/train-00002.bin: its sha256 is not the one in index.json: its content has been changed; "
        "restore it from a copy or prepare the shards again"
    )
    flip(other, 1234)
    one.rename(tmp_path / "aside")
    other.rename(one)
    (tmp_path / "aside").rename(other)
    assert (
        "corpus/train-00000.bin: its sha256 is not the one in index.json: its content is that of train-00002.bin: "
        "shards were exchanged" in refused("train", *QUICK, *SHARDS)
    )


def test_a_damaged_cache_is_made_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *QUICK, "run_dir=one"]) == 0
    shard = max((tmp_path / "cache").glob("*/train-00000.bin"), key=os.path.getsize)  # validation text has an entry too
    flip(shard, 77)
    damaged = shard.read_bytes()
    assert main(["train", *QUICK, "run_dir=other"]) == 0
    error = capfd.readouterr().err
    assert f"data cache: {shard}: its sha256 is not the one in index.json" in error
    assert "the text is tokenised again" in error
    assert shard.read_bytes() != damaged
    one, other = ([row.get("loss") for row in rows(tmp_path / name)] for name in ("one", "other"))
    assert one == other


def test_foreign_shards_that_changed_are_refused_on_resume(tmp_path: Path, refused: Refused) -> None:
    """A single bit, where no sampling would look."""
    (tmp_path / "corpus").mkdir()
    file = tmp_path / "corpus" / "a.bin"
    file.write_bytes((np.arange(1_000_000) % 250).astype("<u2").tobytes())
    assert main(["train", *QUICK, *SHARDS, "run_dir=run"]) == 0
    flip(file, 1_234_560)
    assert "data: not what this run was started on" in refused("resume", "run", "loop.max_steps=4")
    flip(file, 1_234_560)
    assert main(["resume", "run", "loop.max_steps=4"]) == 0


def wait_for(something: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not something():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# --- while training ----------------------------------------------------------------------------------------------


def test_a_shard_cut_while_a_run_reads_it_ends_the_run(tmp_path: Path, corpus: Path, refused: Refused) -> None:
    shard = corpus / "train-00001.bin"
    whole = shard.read_bytes()
    long = ("loop.max_steps=100000", "checkpoint.every_steps=10", "run_dir=run")
    process = start("train", *TINY, *SHARDS, *long, cwd=tmp_path)
    wait_for(lambda: (tmp_path / "run" / "checkpoints" / "step-00000010").exists())
    os.truncate(shard, 100)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1, output
    assert "Traceback" not in output
    (message,) = [line for line in output.splitlines() if line.startswith("llmtrain: ")]
    assert message.startswith("llmtrain: loader thread, step ")
    assert "of the order: corpus/train-00001.bin: " in message
    assert "while in use" in message
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["exit_reason"] == "failed"
    refusal = refused("resume", "run")
    assert "corpus/train-00001.bin: has 100 bytes, not 1800; restore it from a copy or prepare the shards" in refusal
    shard.write_bytes(whole)
    steps = json.loads((tmp_path / "run" / "summary.json").read_text())["step"] + 5
    assert main(["resume", "run", f"loop.max_steps={steps}"]) == 0


# --- while text is prepared --------------------------------------------------------------------------------------


def write_text(folder: Path, lines: int) -> None:
    with (folder / "text.txt").open("w") as file:
        file.writelines(
            f"line {i} of a text that takes a while to tokenise, {i * i} and {i**3}\n" for i in range(lines)
        )


TEXT = ("data=text", "data.path=text.txt", "data.cache_dir=cache")


def test_tokenising_on_a_full_disk_ends_with_a_message(tmp_path: Path) -> None:
    write_text(tmp_path, 5000)
    done = llmtrain("train", *QUICK, *TEXT, cwd=tmp_path, check=2, file_bytes=1 << 18)
    (message,) = [line for line in done.stderr.splitlines() if line.startswith("llmtrain: ")]
    assert message == (
        "llmtrain: data.cache_dir=cache: File too large; name a writable place with room: data.cache_dir=DIR"
    )
    assert not (tmp_path / "cache").exists()
    assert not (tmp_path / "runs").exists()
    assert main(["train", *QUICK, *TEXT]) == 0


def test_tokenising_resumes_after_a_kill(tmp_path: Path) -> None:
    write_text(tmp_path, 300_000)
    arguments = ("train", *[value for value in QUICK if value != "tokenizer=byte"], "tokenizer=gpt2", *TEXT)
    process = start(*arguments, cwd=tmp_path)
    wait_for(lambda: list((tmp_path / "cache").glob(".tmp-*/train-00000.bin")))
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert list((tmp_path / "cache").glob(".tmp-*"))  # it was killed on the way
    assert not list((tmp_path / "cache").glob("*/index.json"))
    write_text(tmp_path, 5000)  # another text, which has another entry
    assert main(arguments) == 0
    assert not list((tmp_path / "cache").glob(".tmp-*"))
    assert len(list((tmp_path / "cache").glob("*/index.json"))) == 1
