"""Outputs that a user names: files are replaced whole, links stay, pipes and devices are written to, others refused."""

import contextlib
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from llmtrain.base.outputs import check_output, check_output_directory, is_stream, open_output


def write(name: Path | str, text: str) -> None:
    with open_output("json", str(name)) as file:
        file.write(text)


def test_a_new_name_and_a_regular_file_are_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write(path, "one")
    path.chmod(0o640)
    with contextlib.suppress(RuntimeError), open_output("json", str(path)) as file:
        file.write("half")
        file.flush()
        raise RuntimeError
    assert path.read_text() == "one"
    write(path, "two")
    assert path.read_text() == "two"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_name_as_long_as_the_file_system_allows_is_written(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 255)
    write(path, "long")
    assert path.read_text() == "long"


def test_a_link_stays_and_its_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to("target")
    write(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "new"


def make_null(path: Path) -> None:
    """A character device as ``/dev/null`` is, which is not ours to try things on."""
    try:
        os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("only root makes devices")


@pytest.mark.parametrize("linked", [False, True])
def test_a_device_is_written_to_and_stays(tmp_path: Path, linked: bool) -> None:
    name = tmp_path / "null"
    make_null(name)
    if linked:
        name = tmp_path / "link"
        name.symlink_to("null")
    assert is_stream(str(name))
    write(name, "gone")
    assert stat.S_ISCHR((tmp_path / "null").lstat().st_mode)
    assert name.is_symlink() == linked


def test_a_pipe_is_written_to_if_somebody_reads_it(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    check_output("json", str(pipe))
    with pytest.raises(ValueError, match=f"json={pipe}: no process reads this pipe"):
        write(pipe, "x")
    descriptor = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    read: list[bytes] = []
    os.set_blocking(descriptor, True)
    write(pipe, "x" * 30_000)
    reader = threading.Thread(target=lambda: read.append(os.read(descriptor, 40_000)))
    reader.start()
    reader.join(10)
    os.close(descriptor)
    assert read == [b"x" * 30_000]
    assert stat.S_ISFIFO(pipe.lstat().st_mode)


def test_open_descriptors_are_written_to_in_order(tmp_path: Path) -> None:
    """Standard output that goes to a file is no file to replace: what was printed before stays."""
    code = (
        "from llmtrain.base.outputs import open_output\nprint('before')\n"
        "for name in ('-', '/dev/stdout', '/dev/fd/1', '/proc/self/fd/1'):\n"
        "    with open_output('json', name) as file: file.write(name + '\\n')\n"
        "print('after')"
    )
    with (tmp_path / "out").open("w") as out:
        subprocess.run([sys.executable, "-c", code], stdout=out, check=True)
    lines = ["before", "-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "after"]
    assert (tmp_path / "out").read_text().splitlines() == lines
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "a directory, not a file"), ("folder", "a directory, not a file"), ("folder/", "a directory, not a file"),
        ("dangling", "a link to nowhere, which is not there"), ("loop", "Too many levels"), ("disk", "a disk, which"),
        ("nowhere/a", "there is no directory .*nowhere"), ("file/a", "there is no directory .*file"),
        ("x" * 256, "File name too long"), ("/dev/fd/977", "Bad file descriptor"), ("/proc/self/x", "o"),
    ],
)  # fmt: skip
def test_anything_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    if name == "disk":
        try:
            os.mknod(tmp_path / "disk", 0o600 | stat.S_IFBLK, os.makedev(250, 250))
        except PermissionError:
            pytest.skip("only root makes devices")
    before = sorted(tmp_path.iterdir())
    with pytest.raises((ValueError, OSError), match=message) as error:
        write(name, "x")
    assert isinstance(error.value, ValueError) or name == "/proc/self/x"
    assert sorted(tmp_path.iterdir()) == before


def test_a_temporary_file_follows_no_link_that_was_put_there(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / f".tmp-a.json-{os.getpid()}").symlink_to("precious")
    write(tmp_path / "a.json", "new")
    assert (tmp_path / "precious").read_text() == "mine"
    assert (tmp_path / "a.json").read_text() == "new"


@pytest.mark.parametrize("name", ["", "-", "file", "file/below", "dangling", "null/x"])
def test_a_directory_that_cannot_be_made_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    os.mkfifo(tmp_path / "null")
    with pytest.raises(ValueError, match=f"output_dir={name}: "):
        check_output_directory("output_dir", name)
    check_output_directory("output_dir", "new/below")
