"""The checkpoint directory: complete or absent, with a manifest of its files.

A checkpoint is written into ``.tmp-…``, each file fsynced, the manifest last, then the directory is renamed and its
parent fsynced: a kill at any moment leaves either no checkpoint or a complete one (and a ``.tmp-…`` that the next
writer sweeps away).  Tensors are safetensors, everything else JSON or YAML; nothing is pickled.

Where one process holds every tensor there is one file of the model's and one of the optimizer's; where several ranks
hold parts, each writes its own, and an index tells them apart (``index.py``, ``sharded.py``).
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmtrain.base.files import check_room, fsync, replace_directory, sha256, share
from llmtrain.base.run_files import CONFIG, INDEX, MANIFEST, MODEL, OPTIMIZER, STATE
from llmtrain.base.stored_files import parse_json_object, read_json_object, read_text_file
from llmtrain.base.tensor_files import CheckpointError
from llmtrain.checkpoint.index import check_files, is_shard_name, read_index, render_index
from llmtrain.checkpoint.stored_tensors import check_shards

FORMAT = 2  # also of checkpoints with an index: versions that know none refuse them, as files are missing
CHUNK = 1 << 22  # bytes compared at once


def write_checkpoint(
    path: Path, *, model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor], state: dict[str, Any], config: str
) -> None:
    """Write the checkpoint directory ``path``.  On any error (no space, …) nothing of it remains; OSError."""
    with temporary_of(path, sum(tensor.nbytes for tensors in (model, optimizer) for tensor in tensors.values())) as new:
        texts = {STATE: render_state(state), CONFIG: config}
        files = write_files(new, {MODEL: model, OPTIMIZER: optimizer}, texts)
        commit(new, path, state["step"], files)


@contextlib.contextmanager
def temporary_of(path: Path, num_bytes: int) -> Iterator[Path]:
    """Make the directory that becomes the checkpoint ``path``; what is left of it at the end is removed.

    Raises OSError, also for a disk without room for ``num_bytes``.
    """
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    if not path.parent.exists():
        path.parent.mkdir(exist_ok=True)  # without its parents: a run directory that was removed is not made again
        fsync(path.parent.parent)
    check_room(path.parent, num_bytes)
    try:
        temporary.mkdir()
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def render_state(state: Mapping[str, Any]) -> str:
    """The text of ``state.json``."""
    return json.dumps(state, indent=1) + "\n"


def write_files(
    folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], texts: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """Write files of tensors and of text, by name, to the disk; return their entries in the manifest."""
    try:
        with ThreadPoolExecutor(1) as synced:  # one file goes to the disk and is hashed while the next is written
            entries = {}
            for name, content in tensors.items():
                save_file({k: v.contiguous() for k, v in content.items()}, folder / name)
                share(folder / name)
                entries[name] = synced.submit(_manifest_entry, folder / name)
            for name, text in texts.items():
                (folder / name).write_text(text, encoding="utf-8")
                entries[name] = synced.submit(_manifest_entry, folder / name)
            return {name: entry.result() for name, entry in entries.items()}
    except SafetensorError as error:  # safetensors' error for a failed write
        raise OSError(f"writing into {folder} failed: {error}") from error


def commit(temporary: Path, path: Path, step: int, files: Mapping[str, dict[str, Any]]) -> None:
    """Write the manifest of ``files``, which are on the disk, and rename ``temporary`` to the checkpoint ``path``."""
    manifest = {"format": FORMAT, "step": step, "files": dict(files)}
    (temporary / MANIFEST).write_text(_render_manifest(manifest), encoding="utf-8")
    fsync(temporary / MANIFEST)
    fsync(temporary)
    replace_directory(temporary, path)


def _manifest_entry(path: Path) -> dict[str, Any]:
    """Sync a file to the disk; return its entry in the manifest."""
    fsync(path)
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def _render_manifest(manifest: dict[str, Any]) -> str:
    """The manifest's text, with its own sha256: a change of any byte is found."""
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(body, indent=1).encode()).hexdigest()
    return json.dumps({**body, "sha256": digest}, indent=1) + "\n"


def copy_checkpoint(source: Path, path: Path) -> None:
    """Copy the checkpoint ``source`` to ``path``, completely or not at all; as hard links where the disk allows.

    A checkpoint's files are replaced, never changed in place, so two runs can share them.  Raises OSError, and
    :class:`CheckpointError` if a copy does not agree with the manifest.
    """
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        temporary.mkdir()
        for name in (*_read_manifest(source), MANIFEST):
            if not (source / name).is_file():
                raise CheckpointError(f"{source / name}: missing")
            try:
                if (source / name).is_symlink():
                    raise OSError("a link to it would be copied")
                os.link(source / name, temporary / name)
            except OSError:  # another disk, or a file system without links
                shutil.copyfile(source / name, temporary / name)
                fsync(temporary / name)
        verify_checkpoint(temporary)
        fsync(temporary)
        replace_directory(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint: a kill meanwhile leaves it intact, or leftovers to be swept."""
    if path.is_symlink():  # what it leads to is not the run's
        path.unlink()
        return
    doomed = path.with_name(f".tmp-removed-{path.name}-{os.getpid()}")
    path.rename(doomed)
    fsync(path.parent)
    shutil.rmtree(doomed, ignore_errors=True)


def confirm_checkpoint(path: Path, *, model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> None:
    """Read a checkpoint back and compare it with the tensors that it was written from, byte by byte.

    Raises :class:`CheckpointError` naming the file and the tensor.
    """
    for name, tensors in ((MODEL, model), (OPTIMIZER, optimizer)):
        confirm_file(path / name, tensors)


def confirm_file(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Read one file back as :func:`confirm_checkpoint` does; return the tensors' dtypes, as safetensors names them."""
    with safe_open(path, framework="pt") as file:
        if set(file.keys()) != tensors.keys():
            raise CheckpointError(f"{path}: does not hold the tensors that were written")
        for key, tensor in tensors.items():
            if not _same_bytes(file.get_tensor(key), tensor):
                raise CheckpointError(f"{path}: {key} reads back differently from what was written")
        return {key: file.get_slice(key).get_dtype() for key in tensors}


def _same_bytes(one: Tensor, other: Tensor) -> bool:
    left, right = (_bytes(tensor.contiguous()) for tensor in (one, other.cpu()))
    pieces = range(0, len(left), CHUNK)
    return len(left) == len(right) and all(np.array_equal(left[i : i + CHUNK], right[i : i + CHUNK]) for i in pieces)


def _bytes(tensor: Tensor) -> np.ndarray:
    return tensor.reshape(-1).view(torch.uint8).numpy()


def verify_checkpoint(path: Path, *, only: str | None = None) -> None:
    """Compare every file of the checkpoint, or ``only`` one, with the manifest; then an index with the files it names.

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
    if INDEX in files and only is None:
        index = read_index(path)
        check_files(index, files, str(path / INDEX))
        check_shards(path, index)


def _read_manifest(path: Path) -> dict[str, tuple[int, str]]:
    """Size and sha256 of every file of a checkpoint.

    Raises :class:`CheckpointError` for a damaged manifest, and for a folder that has the name of another step.
    """
    manifest_path = path / MANIFEST
    if not manifest_path.is_file():
        raise CheckpointError(f"{path}: not a checkpoint (no {MANIFEST})")
    try:
        text = read_text_file(manifest_path)
        manifest = parse_json_object(text, "damaged")
        found, step = manifest["format"], manifest["step"]
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
    if INDEX in files and (both := {MODEL, OPTIMIZER} & files.keys()):
        raise CheckpointError(f"{manifest_path}: lists {INDEX} and {', '.join(sorted(both))}, which exclude each other")
    if missing := {STATE, CONFIG, *(() if INDEX in files else (MODEL, OPTIMIZER))} - files.keys():
        raise CheckpointError(f"{manifest_path}: does not list {', '.join(sorted(missing))}")
    if re.fullmatch(r"step-\d+", path.name) and int(path.name.removeprefix("step-")) != step:
        raise CheckpointError(f"{path}: holds step {step}, by {MANIFEST}: the folder was renamed; restore its name")
    return files


def read_state(checkpoint: Path) -> dict[str, Any]:
    """``state.json`` of a checkpoint.  Raises :class:`CheckpointError` naming it."""
    try:
        return read_json_object(checkpoint / STATE)
    except (OSError, ValueError) as error:
        message = str(error) if isinstance(error, ValueError) else f"{checkpoint / STATE}: {error.strerror}"
        raise CheckpointError(message) from error


def weights_digest(checkpoint: Path) -> str:
    """The sha256 of a checkpoint's weights, by its manifest; of several files, one of theirs and of their boxes.

    Raises :class:`CheckpointError`.
    """
    files = _read_manifest(checkpoint)
    if INDEX not in files:
        return files[MODEL][1]
    index = read_index(checkpoint)
    shards = {name: digest for name, (_, digest) in sorted(files.items()) if is_shard_name(name, "model")}
    text = render_index({"model": index["model"]}) + json.dumps(shards)
    return hashlib.sha256(text.encode()).hexdigest()
