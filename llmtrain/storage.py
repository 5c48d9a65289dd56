"""Files that are whole or absent, and the checkpoint directory built from them.

A checkpoint is written into ``.tmp-…``, each file fsynced, the manifest last, then the directory is renamed and its
parent fsynced: a kill at any moment leaves either no checkpoint or a whole one (and a ``.tmp-…`` that the next
writer sweeps away).  Tensors are safetensors, everything else JSON or YAML; nothing is pickled.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

FORMAT = 1
MANIFEST = "manifest.json"
MODEL, OPTIMIZER, STATE, CONFIG = "model.safetensors", "optimizer.safetensors", "state.json", "config.yaml"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file."""


def write_atomically(path: Path, text: str) -> None:
    """Replace ``path`` by ``text`` such that a reader or a crash sees the old or the new, never a part."""
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_checkpoint(
    path: Path, *, model: dict[str, Tensor], optimizer: dict[str, Tensor], state: dict[str, Any], config: str
) -> None:
    """Write the checkpoint directory ``path``.  On any error (no space, …) nothing of it remains; OSError."""
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        temporary.mkdir()
        save_file({k: v.contiguous() for k, v in model.items()}, temporary / MODEL)
        save_file({k: v.contiguous() for k, v in optimizer.items()}, temporary / OPTIMIZER)
        (temporary / STATE).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
        (temporary / CONFIG).write_text(config, encoding="utf-8")
        files = {}
        for name in (MODEL, OPTIMIZER, STATE, CONFIG):
            _fsync(temporary / name)
            files[name] = {"bytes": (temporary / name).stat().st_size, "sha256": sha256(temporary / name)}
        manifest = {"format": FORMAT, "step": state["step"], "files": files}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        _fsync(temporary / MANIFEST)
        _fsync(temporary)
        _replace_directory(temporary, path)
    except SafetensorError as error:  # what safetensors makes of a failed write
        raise OSError(f"writing {path} failed: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace_directory(new: Path, path: Path) -> None:
    """Rename ``new`` to ``path``; an older directory of that name makes room, and comes back if that fails."""
    old = path.with_name(f".tmp-old-{path.name}-{os.getpid()}")
    if path.exists():
        path.rename(old)
    try:
        new.rename(path)
    except OSError:
        if old.exists():
            old.rename(path)
        raise
    _fsync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def verify_checkpoint(path: Path) -> None:
    """Compare every file of the checkpoint with the manifest.  Raises :class:`CheckpointError` naming the file."""
    manifest_path = path / MANIFEST
    if not manifest_path.is_file():
        raise CheckpointError(f"{path}: not a checkpoint (no {MANIFEST})")
    try:
        manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
        found = manifest["format"]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{manifest_path}: damaged ({error})") from error
    if found != FORMAT:
        raise CheckpointError(f"{manifest_path}: format {found!r} is not known here (this version: {FORMAT})")
    if missing := {MODEL, OPTIMIZER, STATE, CONFIG} - files.keys():
        raise CheckpointError(f"{manifest_path}: does not list {', '.join(sorted(missing))}")
    for name, (size, digest) in files.items():
        if Path(name).name != name:
            raise CheckpointError(f"{manifest_path}: {name!r} is not a plain file name")
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file}: missing")
        if file.stat().st_size != size:
            raise CheckpointError(f"{file}: {file.stat().st_size} bytes, the manifest says {size}")
        if sha256(file) != digest:
            raise CheckpointError(f"{file}: its sha256 is not the manifest's; the file was changed or damaged")


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
    return sorted(p for p in (run_dir / "checkpoints").glob("step-*") if p.is_dir())


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
    raise CheckpointError(f"{target}: neither a run directory (no {CONFIG}) nor a checkpoint (no {MANIFEST})")


def sweep_leftovers(directory: Path) -> None:
    """Remove what killed writers left in ``directory``.  Only the holder of the run's lock may call this."""
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
