"""Folders of compiled code: what others may have written is not loaded."""

import hashlib
import os
from pathlib import Path

import pytest

from llmtrain.base.trusted_files import (
    NotTrusted,
    open_trusted,
    others_may_exchange,
    prepare_compiler_cache,
    private_folder,
    write_trusted,
)

CONTENT = b"code"
DIGEST = hashlib.sha256(CONTENT).hexdigest()
NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with private_folder(tmp_path / "native") as opened:
        write_trusted(opened, "a.so", CONTENT)
    return tmp_path / "native"


def is_trusted(folder: Path, name: str = "a.so") -> bool:
    with private_folder(folder) as opened:
        file = open_trusted(opened, name, DIGEST[:16])
        if file is not None:
            os.close(file)
        return file is not None


def test_a_file_of_this_user_is_trusted(folder: Path) -> None:
    assert is_trusted(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert [path.name for path in folder.iterdir()] == ["a.so"]


def test_a_folder_that_others_may_write_to_is_closed_to_them(folder: Path) -> None:
    folder.chmod(0o777)
    assert is_trusted(folder)
    assert folder.stat().st_mode & 0o777 == 0o755


def test_other_contents_and_other_kinds_of_files_are_not_trusted(folder: Path) -> None:
    file = folder / "a.so"
    file.chmod(0o666)
    assert not is_trusted(folder)
    file.chmod(0o644)
    os.link(file, folder / "b.so")
    assert not is_trusted(folder)
    (folder / "b.so").unlink()
    assert is_trusted(folder)
    file.write_bytes(CONTENT[:2])
    assert not is_trusted(folder)
    os.mkfifo(folder / "pipe.so")
    (folder / "link.so").symlink_to("a.so")
    (folder / "folder.so").mkdir()
    for name in ("pipe.so", "link.so", "folder.so", "nowhere.so"):
        assert not is_trusted(folder, name)


def test_a_link_in_place_of_the_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "file").touch()
    for name in ("link", "file"):
        with pytest.raises(NotTrusted, match=f"{name}: a link or a file"), private_folder(tmp_path / name):
            pass


@as_root
def test_files_and_folders_of_another_user_are_not_trusted(folder: Path) -> None:
    os.chown(folder / "a.so", NOBODY, NOBODY)
    assert not is_trusted(folder)
    os.chown(folder, NOBODY, NOBODY)
    with pytest.raises(NotTrusted, match="belongs to another user"), private_folder(folder):
        pass


def test_a_place_that_others_may_exchange_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "open" / "mine").mkdir(parents=True)
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "link").symlink_to("open/mine")
    assert not others_may_exchange(tmp_path / "nowhere" / "yet")
    for name in ("open/mine", "open", "link"):
        assert others_may_exchange(tmp_path / name)
    (tmp_path / "open").chmod(0o1777)  # sticky, as /tmp is
    assert not others_may_exchange(tmp_path / "open" / "mine")
    assert others_may_exchange(tmp_path / "open")


def test_the_compilers_cache_is_where_only_this_user_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LLMTRAIN_CACHE", str(tmp_path / "cache"))
    chosen = []
    for mode in (0o755, 0o777):
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
        (tmp_path / "cache").mkdir(exist_ok=True)
        (tmp_path / "cache").chmod(mode)
        prepare_compiler_cache()
        chosen.append(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert chosen == [str(tmp_path / "cache" / "compiled"), str(tmp_path / "home" / ".cache" / "llmtrain" / "compiled")]
    assert all(Path(folder).stat().st_mode & 0o777 == 0o700 for folder in chosen)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/mine")
    prepare_compiler_cache()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/mine"
