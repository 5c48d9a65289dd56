"""What is remembered of files, and when it is learnt again."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmtrain.data.sources.files import read_memo, remember, sha256
from tests.data.harm import flip, flip_unnoticed


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

    assert remember(memo, files, learn, verify=True) == [0, 1, 2]
    assert learnt[4:] == ["a", "b", "c"]


@pytest.mark.parametrize("damage", [b"{", b"[]", b'{"files": {}}', b"\xff", None])
def test_a_damaged_memo_is_forgotten(tmp_path: Path, damage: bytes | None) -> None:
    memo, file = tmp_path / "memo.json", tmp_path / "file"
    file.write_text("content")
    (fact,) = remember(memo, [file], sha256)
    if damage is None:  # one digit of what is remembered
        damage = memo.read_bytes().replace(fact.encode(), b"0" + fact[1:].encode())
    memo.write_bytes(damage)
    assert remember(memo, [file], sha256) == [fact]
    assert read_memo(memo)[str(file)][1] == fact


def test_content_that_changes_unnoticed_is_found_by_verify(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    memo, file = tmp_path / "memo.json", tmp_path / "file"
    file.write_text("content")
    before = remember(memo, [file], sha256)
    flip_unnoticed(file, 0, memo)
    assert remember(memo, [file], sha256) == before  # it was not read
    assert not caplog.records
    with pytest.raises(ValueError, match="file: its content has changed, its size and modification time have not; res"):
        remember(memo, [file], sha256, verify=True)
    assert remember(memo, [file], sha256) == before  # what is wrong is not remembered


def test_a_changed_file_with_its_time_set_back_is_read_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The inode's own time tells."""
    memo, file = tmp_path / "memo.json", tmp_path / "file"
    file.write_text("content")
    os.utime(file, ns=(0, 0))
    before = remember(memo, [file], sha256)
    flip(file, 0)
    os.utime(file, ns=(0, 0))
    with caplog.at_level(logging.WARNING):
        after = remember(memo, [file], sha256)
    assert after == [sha256(file)] != before
    assert f"{file}: its content has changed, its size and modification time have not" in caplog.text


def test_hashes_taken_before_a_failure_are_kept(tmp_path: Path) -> None:
    memo = tmp_path / "memo.json"
    (tmp_path / "a").write_text("content")
    with pytest.raises(ValueError, match="nowhere: No such file"):
        remember(memo, [tmp_path / "a", tmp_path / "nowhere"], sha256)
    assert list(read_memo(memo)) == [str(tmp_path / "a")]


def test_processes_that_write_at_once_lose_no_entry(tmp_path: Path) -> None:
    script = f"""
import sys
from pathlib import Path
from llmtrain.data.sources.files import remember, sha256
for i in range(200):
    file = Path({str(tmp_path)!r}) / f"{{sys.argv[1]}}-{{i}}"
    file.write_text("content")
    remember(Path({str(tmp_path)!r}) / "memo.json", [file], sha256)
"""
    both = [subprocess.Popen([sys.executable, "-c", script, name]) for name in "ab"]
    assert [process.wait() for process in both] == [0, 0]
    assert len(read_memo(tmp_path / "memo.json")) == 400


def test_a_memo_that_cannot_be_written_is_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("content")
    assert remember(tmp_path / "file" / "memo.json", [tmp_path / "file"], sha256) == [
        "ed7002b439e9ac845f22357d822bac1444730fbdb6016d3ec9432297b9ec9f73"
    ]
    assert "computed again next time" in caplog.text


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere: No such file"):
        remember(tmp_path / "memo.json", [tmp_path / "nowhere"], sha256)
