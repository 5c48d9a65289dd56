"""What is remembered of files, and when it is learnt again."""

import os
from pathlib import Path

import pytest

from llmtrain.data.files import remember, sha256


def test_facts_are_remembered_until_the_file_changes(tmp_path: Path) -> None:
    learnt: list[str] = []

    def learn(file: Path) -> int:
        learnt.append(file.name)
        return file.stat().st_size

    memo = tmp_path / "cache" / "sizes.json"
    files = [tmp_path / name for name in "abc"]
    for size, file in enumerate(files):
        file.write_text("x" * size)
    assert remember(memo, files, learn) == [0, 1, 2]
    assert remember(memo, files[::-1], learn) == [2, 1, 0]
    assert learnt == ["a", "b", "c"]

    stat = files[1].stat()
    files[1].write_text("y")
    os.utime(files[1], ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))  # the same size, another moment
    assert remember(memo, files, learn) == [0, 1, 2]
    assert learnt == ["a", "b", "c", "b"]

    memo.write_text("{")  # damaged
    assert remember(memo, files, learn) == [0, 1, 2]
    assert learnt[4:] == ["a", "b", "c"]


def test_a_memo_that_cannot_be_written_is_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("content")
    assert remember(tmp_path / "file" / "memo.json", [tmp_path / "file"], sha256) == [
        "ed7002b439e9ac845f22357d822bac1444730fbdb6016d3ec9432297b9ec9f73"
    ]
    assert "computed again next time" in caplog.text


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere: No such file"):
        remember(tmp_path / "memo.json", [tmp_path / "nowhere"], sha256)
