"""The files that a path names, and the account of those that are left out."""

import os
from pathlib import Path

import pytest

from llmtrain.data.sources.search import LeftOut, find_files


def found(folder: Path, left_out: LeftOut | None = None, **options: bool) -> list[str]:
    files = find_files(str(folder), lambda file: file.suffix == ".txt", "text", left_out=left_out, **options)
    return [str(file.relative_to(folder)) for file in files]


def found_by(pattern: Path) -> list[str]:
    return [file.name for file in find_files(str(pattern), lambda file: True, "text")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder, other = tmp_path / "folder", tmp_path / "other"
    for path in (folder / "a.txt", folder / "sub" / "b.txt", other / "c.txt", other / "deep" / "d.txt"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("text")
    return folder


def test_links_to_folders_and_files_are_followed(folder: Path) -> None:
    (folder / "link").symlink_to(folder.parent / "other")
    (folder / "e.txt").symlink_to(folder.parent / "other" / "deep" / "d.txt")  # read through the first of the links
    left_out = LeftOut()
    assert found(folder, left_out) == ["a.txt", "e.txt", "link/c.txt", "link/deep/d.txt", "sub/b.txt"]
    assert found(folder, follows_links=False) == ["a.txt", "e.txt", "sub/b.txt"]


def test_a_folder_with_brackets_is_taken_as_it_is_written(folder: Path) -> None:
    (folder / "sub").rename(folder / "sub [draft]")
    assert found_by(folder / "sub [draft]" / "*.txt") == ["b.txt"]
    assert found_by(folder / "sub [[]draft]" / "[b].txt") == ["b.txt"]
    (folder / "sub d").mkdir()
    (folder / "sub d" / "c.txt").write_text("text")
    assert found_by(folder / "sub [draft]" / "*.txt") == ["c.txt"]  # what a pattern matches comes first
    with pytest.raises(ValueError, match=r"no file matches"):
        found_by(folder / "sub [draft]" / "*.md")


def test_cycles_and_second_ways_to_a_file_are_noticed(folder: Path) -> None:
    (folder / "sub" / "up").symlink_to(folder)
    (folder / "self").symlink_to(folder / "self")
    (folder / "again").symlink_to(folder / "sub")
    (folder / "f.txt").symlink_to(folder / "a.txt")
    left_out = LeftOut()
    assert found(folder, left_out) == ["a.txt", "sub/b.txt"]
    cycles, broken = left_out.notes()
    assert cycles.startswith(
        f"data.path={folder}: left out, no regular file (a pipe, a device, or a link to nothing): 1"
    )
    assert broken.startswith(f"data.path={folder}: left out, a link to a file or folder that is read already: 3 (4 B")


def test_files_left_out_are_counted_and_named(folder: Path) -> None:
    for name in ("a.bin", "b.bin", "c.bin", "d.bin", "e.csv.gz", ".hidden", "noending"):
        (folder / name).write_bytes(b"12345")
    os.mkfifo(folder / "pipe.txt")
    left_out = LeftOut()
    assert found(folder, left_out) == ["a.txt", "sub/b.txt"]
    notes = {note.removeprefix(f"data.path={folder}: left out, ") for note in left_out.notes()}
    assert notes == {
        "hidden: 1 (5 B): .hidden",
        "no regular file (a pipe, a device, or a link to nothing): 1 (0 B): pipe.txt",
        "of another ending: 6 (30 B; 4 .bin, 1 .csv.gz, 1 without ending): a.bin, b.bin, c.bin, …",
    }


def test_an_empty_folder_says_what_it_has(folder: Path) -> None:
    with pytest.raises(
        ValueError, match=r"there is no poem in this folder; data.path=.* left out, of another ending: 2"
    ):
        find_files(str(folder), lambda _: False, "poem")
