"""A run moves: its tokenizer comes along, relative paths are found from its first folder, a base is named anew."""

import io
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import tiktoken

from llmtrain.cli.main import main
from llmtrain.run.tokenizer_copy import stored_tokenizer, write_copy
from llmtrain.tokenizer import TokenizerConfig
from llmtrain.tokenizer.bpe import BPE, PATTERNS, write_ranks
from llmtrain.tokenizer.tiktoken import StoredEncoding, Tiktoken
from tests.helpers.cli import TINY

TEXT = "Once upon a time there was a lamp by the sea. " * 20
RANKS = {bytes([byte]): byte for byte in range(256)}
SMALL = (
    *(argument for argument in TINY if argument != "tokenizer=byte"), "data=text", "data.path=text.txt",
    "data.validation_fraction=0", "loop.max_steps=2", "checkpoint.every_steps=1", "tokenizer=tiktoken",
    "tokenizer.pattern=gpt2", "tokenizer.encoding=here/ranks.tiktoken", "run_dir=run",
)  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, its text and the file of its tokenizer."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "here").mkdir()
    (folder / "here" / "ranks.tiktoken").write_bytes(write_ranks(RANKS | {b"th": 256, b"a ": 257}))
    (folder / "text.txt").write_text(TEXT)
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert main(["train", *SMALL]) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def moved(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run in another folder, which is the working directory; what it was made from is gone, but for the text."""
    shutil.copytree(trained / "run", tmp_path / "run")
    first = Path(shutil.copytree(trained, tmp_path / "first", ignore=shutil.ignore_patterns("here", "run")))
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["directory"] == str(trained)
    environment["directory"] = str(first)
    (tmp_path / "run" / "environment.json").write_text(json.dumps(environment))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(list(arguments)) == 2
    return capsys.readouterr().err


def other_ranks(folder: Path) -> Path:
    """Another tokenizer of as many ids."""
    folder.mkdir()
    (folder / "ranks.tiktoken").write_bytes(write_ranks(RANKS | {b"he": 256, b"e ": 257}))
    return folder / "ranks.tiktoken"


def test_every_verb_uses_the_copy_of_the_tokenizer(
    moved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sorted(path.name for path in (moved / "tokenizer").iterdir()) == ["manifest.json", "ranks.tiktoken"]
    assert main(["generate", "run", "max_tokens=2", "prompt=the"]) == 0
    assert main(["generate", "run/checkpoints/step-00000001", "max_tokens=2"]) == 0
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    assert main(["chat", "run", "template=plain", "max_tokens=2"]) == 0
    assert main(["verify", "run"]) == 0
    assert "bit for bit" in capsys.readouterr().out
    assert main(["resume", "run", "loop.max_steps=3"]) == 0
    assert main(["resume", "run", "step=2", "run_dir=branch", "loop.max_steps=3"]) == 0
    assert (Path("branch") / "tokenizer" / "ranks.tiktoken").exists()
    other_ranks(Path("here"))  # at the place that the config names, from here
    assert main(["generate", "run", "max_tokens=2", "prompt=the"]) == 0


def test_another_tokenizer_is_refused_and_the_same_one_elsewhere_is_not(
    moved: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = other_ranks(Path("other"))
    for verb in (("generate", "run"), ("chat", "run")):
        assert f"tokenizer.path={other}: not the tokenizer of" in refused(capsys, *verb, f"tokenizer.path={other}")
    assert "not the tokenizer of run" in refused(
        capsys, "resume", "run", f"tokenizer.encoding={other}", "loop.max_steps=3"
    )
    same = trained / "here" / "ranks.tiktoken"
    assert main(["resume", "run", f"tokenizer.encoding={same}", "loop.max_steps=3"]) == 0
    assert main(["generate", "run", f"tokenizer.path={same}", "max_tokens=1"]) == 0


def test_a_damaged_copy_is_named_unless_the_first_place_holds_the_same(
    moved: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = moved / "tokenizer" / "ranks.tiktoken"
    copy.write_bytes(copy.read_bytes()[:-3] + b"8\n")
    for verb in (("generate", "run"), ("resume", "run", "loop.max_steps=3")):
        assert "tokenizer/ranks.tiktoken: its sha256 is not the one in manifest.json" in refused(capsys, *verb)
    shutil.copytree(trained / "here", "first/here")
    assert main(["generate", "run", "max_tokens=1"]) == 0


def test_a_run_without_a_copy_works_as_before(moved: Path, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(moved / "tokenizer")
    assert "here/ranks.tiktoken: No such file" in refused(capsys, "generate", "run")
    same = trained / "here" / "ranks.tiktoken"
    assert main(["generate", "run", "max_tokens=1", f"tokenizer.path={same}"]) == 0
    other = other_ranks(Path("other"))
    assert "data: not what this run was started on" in refused(
        capsys, "resume", "run", f"tokenizer.encoding={other}", "loop.max_steps=3"
    )
    assert main(["resume", "run", f"tokenizer.encoding={same}", "loop.max_steps=3"]) == 0
    assert (moved / "tokenizer" / "ranks.tiktoken").read_bytes() == same.read_bytes()  # from now on it has one


def test_the_copy_of_an_encoding_that_tiktoken_downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a plug-in of tiktoken's here, since the published ones need the network."""
    special = {"<|endoftext|>": 300, "<|mark|>": 301}
    encoding = tiktoken.Encoding(
        "mine", pat_str=PATTERNS["cl100k"], mergeable_ranks=RANKS | {b"th": 256}, special_tokens=special
    )
    config = Tiktoken("mine", None, "<|endoftext|>")
    monkeypatch.setattr(tiktoken, "list_encoding_names", lambda: ["mine"])
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    built = config.build()
    write_copy(tmp_path, config, built)
    monkeypatch.undo()
    copy = stored_tokenizer(config, tmp_path)
    assert isinstance(copy, StoredEncoding)
    again = copy.build()
    assert isinstance(again, BPE)
    assert again.fingerprint == built.fingerprint
    assert again.encode(TEXT).tolist() == built.encode(TEXT).tolist()


def test_what_comes_with_the_package_needs_no_copy(tmp_path: Path) -> None:
    from llmtrain.tokenizer.byte import Byte

    config: TokenizerConfig = Byte()
    write_copy(tmp_path, config, config.build())
    assert not list(tmp_path.iterdir())
    assert stored_tokenizer(config, tmp_path) is config


@pytest.mark.parametrize("name", ["../text.txt", "/etc/hostname", "."])
def test_a_copy_names_plain_files_only(moved: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    manifest = json.loads((moved / "tokenizer" / "manifest.json").read_text())
    manifest["files"] = {name: "0" * 64}
    (moved / "tokenizer" / "manifest.json").write_text(json.dumps(manifest))
    assert "lists no files of a tokenizer" in refused(capsys, "generate", "run")


def test_a_moved_base_is_named_with_weights_path(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    shutil.move("run", "base")
    lora = ("weights=checkpoint", "weights.path=base", "lora=lora", "lora.rank=2")
    assert main(["train", *SMALL, *lora]) == 0
    shutil.move("base", "elsewhere")
    shutil.copytree("elsewhere", "other")
    assert main(["resume", "other", "loop.max_steps=3"]) == 0  # other weights
    for verb in (("generate", "run", "max_tokens=1"), ("verify", "run"), ("resume", "run", "loop.max_steps=3")):
        capsys.readouterr()
        assert main([*verb]) != 0
        assert "weights.path=DIR" in "".join(capsys.readouterr())
        assert main([*verb, "weights.path=other"]) != 0
        assert "not the weights that the adapters were trained on" in "".join(capsys.readouterr())
        assert main([*verb, "weights.path=elsewhere"]) == 0
    assert main(["generate", "run", "max_tokens=1", "base=elsewhere"]) == 0  # as earlier versions spelt it
    assert "holds a whole model, no adapters" in refused(capsys, "generate", "elsewhere", "weights.path=other")


def test_a_base_that_was_moved_together_with_its_run_is_found(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = Path(shutil.copytree(trained, tmp_path / "first"))
    monkeypatch.chdir(first)
    Path("runs").mkdir()
    shutil.move("run", "runs/base")
    lora = ("weights=checkpoint", "weights.path=runs/base", "lora=lora", "lora.rank=2", "run_dir=runs/spam")
    assert main(["train", *(argument for argument in SMALL if argument != "run_dir=run"), *lora]) == 0
    shutil.move("runs", tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "moved/spam", "max_tokens=1"]) == 0
    assert main(["generate", "moved/spam/checkpoints/step-00000001", "max_tokens=1"]) == 0
    assert main(["verify", "moved/spam"]) == 0
    assert main(["resume", "moved/spam", "loop.max_steps=3"]) == 0
    shutil.copytree("moved", "again")
    shutil.move("moved", "gone")
    assert main(["generate", "again/spam", "max_tokens=1"]) == 0
    shutil.move("gone", "moved")
    shutil.copytree("moved/spam", "alone/spam")
    for verb in (("generate", "alone/spam"), ("verify", "alone/spam")):
        assert "base: no such directory" in (message := refused(capsys, *verb))
        assert "name their place: weights.path=DIR" in message
    assert main(["resume", "moved/base", "loop.max_steps=3"]) == 0
    assert "not the weights that the adapters were trained on" in refused(capsys, "generate", "moved/spam")


def test_weights_that_were_trained_whole_move_too(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    shutil.move("run", "base")
    assert main(["train", *SMALL, "weights=checkpoint", "weights.path=base"]) == 0
    shutil.copytree("base", "elsewhere")
    assert "cannot continue with another" in refused(
        capsys, "resume", "run", "weights.path=base/checkpoints/step-00000001", "loop.max_steps=3"
    )
    assert main(["resume", "run", "weights.path=elsewhere", "loop.max_steps=3"]) == 0
    shutil.rmtree("base")  # which a checkpoint needs no more
    shutil.rmtree("elsewhere")
    assert main(["resume", "run", "loop.max_steps=4"]) == 0
