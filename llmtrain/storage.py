"""Files that are whole or absent, and the checkpoint directory built from them.

A checkpoint is written into ``.tmp-…``, each file fsynced, the manifest last, then the directory is renamed and its
parent fsynced: a kill at any moment leaves either no checkpoint or a whole one (and a ``.tmp-…`` that the next
writer sweeps away).  Tensors are safetensors, everything else JSON or YAML; nothing is pickled.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

FORMAT = 2
MANIFEST = "manifest.json"
MODEL, OPTIMIZER, STATE, CONFIG = "model.safetensors", "optimizer.safetensors", "state.json", "config.yaml"
REPLACED = ".tmp-replaced-"  # a checkpoint that a new one of its name is taking the place of
CHUNK = 1 << 22  # bytes compared at once


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file."""


def write_atomically(path: Path, text: str) -> None:
    """Replace ``path`` by ``text`` such that a reader or a crash sees the old or the new, never a part."""
    with written_whole(path) as file:
        file.write(text)


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[IO[str]]:
    """A text file that takes the place of ``path`` once all of it is written; after an error nothing does."""
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _fsync(path.parent)
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(path)) from error  # a write's error names no file
    finally:
        temporary.unlink(missing_ok=True)


class AppendedFile:
    """Lines at the end of a file; each has left the process when :meth:`append` returns.

    Where the disk is full, what does not fit waits in memory and goes first the next time: a run does not die of its
    log, and no line is torn or lost unless the process ends before there is room.  The next process leaves a torn line
    as a line of its own.  The file is made by the first line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None
        self._waiting = b""  # from the beginning of a line on
        self._written = 0  # bytes of it that are in the file already: the line there is torn

    def append(self, text: str) -> None:
        """Write ``text``, which ends with a newline.  Raises OSError for anything but a full disk."""
        self._waiting += text.encode("utf-8", errors="backslashreplace")
        try:
            if self._descriptor is None:
                self._descriptor = self._open()
            while self._written < len(self._waiting):
                self._written += os.write(self._descriptor, self._waiting[self._written :])
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
        whole = self._waiting.rfind(b"\n", 0, self._written) + 1
        self._waiting, self._written = self._waiting[whole:], self._written - whole

    def _open(self) -> int:
        # Not through a link: that of a run from elsewhere may lead to any file of the user's.
        descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        size = os.fstat(descriptor).st_size
        if size == 0 or os.pread(descriptor, 1, size - 1) == b"\n":
            self._written = 0  # if a line was torn, it went when the file was rewritten
        elif self._written == 0:  # torn by a process that ended before there was room
            self._waiting = b"\n" + self._waiting
        return descriptor

    def rewrite(self, change: Callable[[], None]) -> None:
        """Call ``change()``, which may replace the file, and go on at the end of what is there then."""
        self.close()
        change()

    def close(self) -> None:
        """Close the file; the next line opens it again."""
        if self._waiting:
            self.append("")
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def write_checkpoint(
    path: Path, *, model: dict[str, Tensor], optimizer: dict[str, Tensor], state: dict[str, Any], config: str
) -> None:
    """Write the checkpoint directory ``path``.  On any error (no space, …) nothing of it remains; OSError."""
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    if not path.parent.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        _fsync(path.parent.parent)
    check_room(path.parent, sum(tensor.nbytes for tensors in (model, optimizer) for tensor in tensors.values()))
    try:
        temporary.mkdir()
        with ThreadPoolExecutor(1) as synced:  # one file goes to the disk and is hashed while the next is written
            entries = {}
            for name, tensors in ((MODEL, model), (OPTIMIZER, optimizer)):
                save_file({k: v.contiguous() for k, v in tensors.items()}, temporary / name)
                share(temporary / name)
                entries[name] = synced.submit(_manifest_entry, temporary / name)
            for name, text in ((STATE, json.dumps(state, indent=1) + "\n"), (CONFIG, config)):
                (temporary / name).write_text(text, encoding="utf-8")
                entries[name] = synced.submit(_manifest_entry, temporary / name)
            files = {name: entry.result() for name, entry in entries.items()}
        manifest = {"format": FORMAT, "step": state["step"], "files": files}
        (temporary / MANIFEST).write_text(_render_manifest(manifest), encoding="utf-8")
        _fsync(temporary / MANIFEST)
        _fsync(temporary)
        _replace_directory(temporary, path)
    except SafetensorError as error:  # what safetensors makes of a failed write
        raise OSError(f"writing {path} failed: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def share(path: Path) -> None:
    """Give a file the permissions that its directory has: safetensors makes files that its owner alone can read."""
    path.chmod(path.parent.stat().st_mode & 0o666)


def _manifest_entry(path: Path) -> dict[str, Any]:
    """What the manifest says of a file, once that is on the disk."""
    _fsync(path)
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def check_room(folder: Path, needed_bytes: int) -> None:
    """Raise OSError if the disk of ``folder`` has less room than that."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise OSError(errno.ENOSPC, f"{needed_bytes:,} bytes are needed and {free:,} are free", str(folder))


def _render_manifest(manifest: dict[str, Any]) -> str:
    """The manifest's text, its own sha256 in it: a change of any byte of it shows."""
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(body, indent=1).encode()).hexdigest()
    return json.dumps({**body, "sha256": digest}, indent=1) + "\n"


def _replace_directory(new: Path, path: Path) -> None:
    """Rename ``new`` to ``path``.

    An older directory of that name makes room first.  It comes back if the renaming fails, and, after a kill between
    the two, when leftovers are swept.
    """
    old = path.with_name(f"{REPLACED}{path.name}")
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
    try:
        new.rename(path)
    except OSError:
        if old.exists():
            old.rename(path)
        raise
    _fsync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def copy_checkpoint(source: Path, path: Path) -> None:
    """Make ``path`` the checkpoint that ``source`` is, whole or not at all: hard links where the disk has them.

    A checkpoint's files are replaced, never changed in place, so two runs can share them.  Raises OSError, and
    :class:`CheckpointError` if a copy is not what the manifest says.
    """
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        temporary.mkdir()
        for name in (*_read_manifest(source), MANIFEST):
            try:
                os.link(source / name, temporary / name)
            except OSError:  # another disk, or a file system without links
                shutil.copyfile(source / name, temporary / name)
                _fsync(temporary / name)
        verify_checkpoint(temporary)
        _fsync(temporary)
        _replace_directory(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint: a kill on the way leaves it whole, or leftovers to be swept."""
    doomed = path.with_name(f".tmp-removed-{path.name}-{os.getpid()}")
    path.rename(doomed)
    _fsync(path.parent)
    shutil.rmtree(doomed, ignore_errors=True)


def confirm_checkpoint(path: Path, *, model: dict[str, Tensor], optimizer: dict[str, Tensor]) -> None:
    """Read a checkpoint back and compare it with the tensors that it was written from, byte by byte.

    Raises :class:`CheckpointError` naming the file and the tensor.
    """
    for name, tensors in ((MODEL, model), (OPTIMIZER, optimizer)):
        with safe_open(path / name, framework="pt") as file:
            if set(file.keys()) != tensors.keys():
                raise CheckpointError(f"{path / name}: holds other tensors than were written")
            for key, tensor in tensors.items():
                if not _same_bytes(file.get_tensor(key), tensor):
                    raise CheckpointError(f"{path / name}: {key} reads back differently from what was written")


def _same_bytes(one: Tensor, other: Tensor) -> bool:
    left, right = (_bytes(tensor.contiguous()) for tensor in (one, other.cpu()))
    pieces = range(0, len(left), CHUNK)
    return len(left) == len(right) and all(np.array_equal(left[i : i + CHUNK], right[i : i + CHUNK]) for i in pieces)


def _bytes(tensor: Tensor) -> np.ndarray:
    return tensor.reshape(-1).view(torch.uint8).numpy()


def verify_checkpoint(path: Path, *, only: str | None = None) -> None:
    """Compare every file of the checkpoint, or ``only`` one, with the manifest.

    Raises :class:`CheckpointError` naming the file.
    """
    files = _read_manifest(path)
    for name, (size, digest) in files.items():
        if only not in (None, name):
            continue
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file}: missing")
        if file.stat().st_size != size:
            raise CheckpointError(f"{file}: {file.stat().st_size} bytes, the manifest says {size}")
        try:
            found = sha256(file)
        except OSError as error:  # a bad block of the disk
            raise CheckpointError(f"{file}: {error.strerror}") from error
        if found != digest:
            raise CheckpointError(f"{file}: its sha256 is not the manifest's; the file was changed or damaged")
    if extra := sorted(entry.name for entry in path.iterdir() if entry.name not in (*files, MANIFEST)):
        raise CheckpointError(f"{path / extra[0]}: not of this checkpoint; its manifest does not list it")


def _read_manifest(path: Path) -> dict[str, tuple[int, str]]:
    """Size and sha256 of every file of a checkpoint.  Raises :class:`CheckpointError` for a damaged manifest."""
    manifest_path = path / MANIFEST
    if not manifest_path.is_file():
        raise CheckpointError(f"{path}: not a checkpoint (no {MANIFEST})")
    try:
        text = manifest_path.read_text(encoding="utf-8")
        manifest = json.loads(text)
        found = manifest["format"]
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{manifest_path}: damaged ({type(error).__name__}: {error})") from error
    if found != FORMAT:
        raise CheckpointError(f"{manifest_path}: format {found!r} is not known here (this version: {FORMAT})")
    for name in files:
        if Path(name).name != name or name in (".", ".."):
            raise CheckpointError(f"{manifest_path}: {name!r} is not a plain file name")
    if text != _render_manifest(manifest):
        raise CheckpointError(f"{manifest_path}: it does not have the sha256 that it names; changed or damaged")
    if missing := {MODEL, OPTIMIZER, STATE, CONFIG} - files.keys():
        raise CheckpointError(f"{manifest_path}: does not list {', '.join(sorted(missing))}")
    return files


def read_tensors(path: Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """The tensors of a safetensors file.  Raises :class:`CheckpointError` naming it."""
    try:
        return load_file(path, device=str(device))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def read_state(checkpoint: Path) -> dict[str, Any]:
    """``state.json`` of a checkpoint."""
    try:
        return json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{checkpoint / STATE}: {error}") from error


def find_checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoint directories of a run, oldest first."""
    folders = (run_dir / "checkpoints").glob("step-*")
    return sorted(path for path in folders if re.fullmatch(r"step-\d+", path.name) and path.is_dir())


def locate_checkpoint(target: Path) -> Path:
    """The checkpoint that ``target`` names: itself, or the newest of a run directory.  Raises CheckpointError."""
    if (target / MANIFEST).is_file():
        return target
    if checkpoints := find_checkpoints(target):
        return checkpoints[-1]
    if not target.exists():
        raise CheckpointError(f"{target}: no such directory")
    if (target / CONFIG).is_file():
        raise CheckpointError(f"{target}: this run has no checkpoint yet")
    if (target / "config.json").is_file():
        raise CheckpointError(
            f"{target}: a model in Hugging Face's form, for transformers; a run starts from it with "
            f"weights=huggingface weights.path={target}, and is what this verb takes"
        )
    raise CheckpointError(
        f"{target}: neither a run directory (no {CONFIG}) nor a checkpoint (no {MANIFEST}){newest_run_in(target)}"
    )


def newest_run_in(folder: Path) -> str:
    """What to say of a folder that is no run: which of the runs in it is the newest."""
    runs = [path.parent for pattern in ("*", "*/*") for path in folder.glob(f"{pattern}/{CONFIG}")]
    if not runs:
        return ""
    return f"; the newest run in it is {max(runs, key=lambda run: (run / CONFIG).stat().st_mtime)}"


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint's name says."""
    return int(checkpoint.name.rpartition("-")[2])


def sweep_leftovers(directory: Path) -> None:
    """Remove what killed writers left in ``directory``.  Only the holder of the run's lock may call this."""
    for replaced in directory.glob(f"{REPLACED}*"):
        with contextlib.suppress(OSError):  # the new one is in place: the old one is left over
            replaced.rename(replaced.with_name(replaced.name.removeprefix(REPLACED)))
    for leftover in directory.glob(".tmp-*"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
