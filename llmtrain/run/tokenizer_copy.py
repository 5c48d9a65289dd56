"""A run's own copy of the files that its tokenizer is made of: ``RUN/tokenizer``.

A run moves, and the place that its tokenizer was read from may be gone or hold something else by then.  So a new run
copies the files, with their sha256, and every later start reads the copy.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmtrain.base.files import fsync, replace_directory
from llmtrain.base.run_files import CHECKPOINTS, CONFIG, MANIFEST, TOKENIZER
from llmtrain.base.stored_files import OBJECT, TEXT, StoredFileError, check_kinds, read_json_object, read_regular_file
from llmtrain.tokenizer import Tokenizer, TokenizerConfig

MAX_FILE_BYTES = 1 << 28  # the largest tokenizer.json known has 35 MB


def write_copy(run_dir: Path, config: TokenizerConfig, tokenizer: Tokenizer) -> None:
    """Copy the files of ``tokenizer``, if it is made of any.  Raises OSError; then nothing of the copy remains."""
    files = config.files()
    if not files:
        return
    folder = run_dir / TOKENIZER
    temporary = folder.with_name(f".tmp-{TOKENIZER}-{os.getpid()}")
    manifest = {"fingerprint": tokenizer.fingerprint, "files": _digests(files)}
    try:
        temporary.mkdir()
        for name, content in {**files, MANIFEST: json.dumps(manifest, indent=1).encode() + b"\n"}.items():
            (temporary / name).write_bytes(content)
            fsync(temporary / name)
        fsync(temporary)
        replace_directory(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def stored_tokenizer(config: TokenizerConfig, folder: Path, *, named: bool = False) -> TokenizerConfig:
    """The tokenizer of the run or checkpoint in ``folder``, whose stored option is ``config``: that of the run's copy.

    Where there is no copy, of an older run or a checkpoint without its run, it is ``config``; and where the copy is
    damaged, if its files are those that were copied.  ``named``: the user has given the place in ``config``, which must
    hold the same tokenizer.  Raises ValueError naming the file that is damaged, or the place that holds another one.
    """
    run_dir = run_of(folder)
    manifest = None if run_dir is None else _read_manifest(run_dir / TOKENIZER)
    if manifest is None:
        return config
    assert run_dir is not None
    if named:
        if not _is_copied(config, manifest) and config.build().fingerprint != manifest.get("fingerprint"):
            place = getattr(config, "path", getattr(config, "encoding", ""))
            raise ValueError(
                f"tokenizer.path={place}: not the tokenizer of {run_dir}; the run has a copy of its own: leave it out"
            )
        return config
    try:
        _check_copy(run_dir / TOKENIZER, manifest)
    except StoredFileError:
        if _is_readable_copy(config, manifest):
            return config
        raise
    return config.at(run_dir / TOKENIZER)


def run_of(folder: Path) -> Path | None:
    """The run directory that ``folder`` is, or is a checkpoint of; None for a checkpoint without its run."""
    path = folder.absolute()
    if not (path / MANIFEST).is_file():
        return folder
    return path.parent.parent if path.parent.name == CHECKPOINTS and (path.parent.parent / CONFIG).is_file() else None


def _digests(files: Mapping[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a copy; None if there is no copy."""
    if not os.path.lexists(folder):
        return None
    try:
        manifest = read_json_object(folder / MANIFEST)
    except OSError as error:
        raise StoredFileError(f"{folder / MANIFEST}: {error.strerror}; restore the run's tokenizer, or remove "
                              f"{folder} to read it from its first place") from error  # fmt: skip
    check_kinds(manifest, {"fingerprint": TEXT, "files": OBJECT}, str(folder / MANIFEST))
    files = manifest.get("files", {})
    check_kinds(files, dict.fromkeys(files, TEXT), str(folder / MANIFEST))
    if not files or any(Path(name).name != name or name in (".", "..") for name in files):
        raise StoredFileError(f"{folder / MANIFEST}: lists no files of a tokenizer; restore it")
    return manifest


def _check_copy(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Raise :class:`StoredFileError`, naming the file, unless the copy is as it was written."""
    for name, digest in manifest["files"].items():
        try:
            content = read_regular_file(folder / name, MAX_FILE_BYTES)
        except OSError as error:
            raise StoredFileError(f"{folder / name}: {error.strerror}; restore it") from error
        if hashlib.sha256(content).hexdigest() != digest:
            raise StoredFileError(
                f"{folder / name}: its sha256 is not the one in {MANIFEST}: changed or damaged; restore it"
            )
    if extra := sorted(path.name for path in folder.iterdir() if path.name not in (*manifest["files"], MANIFEST)):
        raise StoredFileError(f"{folder / extra[0]}: no file of the run's tokenizer; remove it")


def _is_copied(config: TokenizerConfig, manifest: Mapping[str, Any]) -> bool:
    return _digests(config.files()) == manifest["files"]


def _is_readable_copy(config: TokenizerConfig, manifest: Mapping[str, Any]) -> bool:
    """True if the first place of the files still holds them."""
    try:
        return _is_copied(config, manifest)
    except ValueError:  # it is gone
        return False
