"""The writing of one checkpoint by all ranks of a run.

Every rank writes the parts that it owns into files of its own, in parallel, reads them back, and reports their entries
to rank 0.  Rank 0 makes the temporary directory, which all must see (a shared file system), writes the index and the
manifest once all have confirmed their files, and renames the directory.  A failure of any rank before that leaves
nothing behind.  Where rank 0 alone holds everything, the files are those of one process.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from llmtrain.base.files import fsync
from llmtrain.base.places import Shape
from llmtrain.base.run_files import CONFIG, INDEX, STATE
from llmtrain.base.tensor_files import CheckpointError
from llmtrain.checkpoint.agreement import Agreement
from llmtrain.checkpoint.format import (
    commit,
    confirm_checkpoint,
    confirm_file,
    render_state,
    temporary_of,
    write_checkpoint,
    write_files,
)
from llmtrain.checkpoint.index import GROUPS, StoredBox, StoredTensor, check_index, render_index, shard_name
from llmtrain.checkpoint.parts import Box, Part

Owned = Mapping[str, Mapping[str, Part]]  # the parts that this rank writes, by group and by key in its file
NOT_SHARED = "the run directory must be on a file system that the machines of all ranks share"


def write_together(
    path: Path, ranks: Agreement, state: dict[str, Any], config: str, prepare: Callable[[], Owned]
) -> None:
    """Write the checkpoint ``path``, and confirm every file, with the other ``ranks``.

    ``prepare()`` returns the parts that this rank writes.  On any error of any rank nothing of the checkpoint remains,
    and all raise the error of the first such rank; see :meth:`Agreement.each`.
    """
    own: Owned = {}

    def head() -> dict[str, Any]:
        nonlocal own
        own = prepare()
        num_bytes = sum(part.tensor.nbytes for parts in own.values() for part in parts.values())
        return {"step": state["step"], "bytes": num_bytes, "counts": {group: len(own[group]) for group in GROUPS}}

    heads = ranks.each(head)
    if len(steps := {each["step"] for each in heads}) > 1:
        raise RuntimeError(f"the ranks save different steps: {sorted(steps)}")
    if not any(count for each in heads[1:] for count in each["counts"].values()):
        ranks.first(lambda: _write_alone(path, own, state, config))
        return
    files = _own_files(heads, ranks.world.rank)
    total = sum(each["bytes"] for each in heads)
    if ranks.world.is_first:
        _write_as_first(path, ranks, own, files, total, state, config)
    else:
        temporary = path.parent / ranks.first(lambda: "")
        ranks.each(lambda: _write_own(temporary, own, files, {}))
        ranks.first(lambda: None)


def _write_alone(path: Path, own: Owned, state: dict[str, Any], config: str) -> None:
    """Write the files of one process."""
    for parts in own.values():
        for part in parts.values():
            if part.box != Box((0,) * len(part.whole), part.whole):
                raise RuntimeError(f"{part.name}: no rank writes more of it than {part.box} of {list(part.whole)}")
    model, optimizer = ({name: part.tensor for name, part in own[group].items()} for group in GROUPS)
    write_checkpoint(path, model=model, optimizer=optimizer, state=state, config=config)
    confirm_checkpoint(path, model=model, optimizer=optimizer)


def _own_files(heads: Sequence[dict[str, Any]], rank: int) -> dict[str, str]:
    """The names of the files that this rank writes, by group; those that hold tensors are numbered from 1 on."""
    files = {}
    for group in GROUPS:
        writers = [number for number, head in enumerate(heads) if head["counts"][group]]
        if rank in writers:
            files[group] = shard_name(group, writers.index(rank) + 1, len(writers))
    return files


def _write_as_first(
    path: Path, ranks: Agreement, own: Owned, files: Mapping[str, str], total: int, state: dict[str, Any], config: str
) -> None:
    """The part of rank 0: what the others do, and the directory, the index, the manifest and the renaming."""
    with ExitStack() as stack:
        temporary = path.parent / ranks.first(lambda: stack.enter_context(temporary_of(path, total)).name)
        texts = {STATE: render_state(state), CONFIG: config}
        reports = ranks.each(lambda: _write_own(temporary, own, files, texts))
        ranks.first(lambda: _commit(temporary, path, state["step"], reports))


def _write_own(temporary: Path, own: Owned, files: Mapping[str, str], texts: Mapping[str, str]) -> dict[str, Any]:
    """Write this rank's files and read them back; return their entries for the manifest and the index."""
    if not temporary.is_dir():
        raise CheckpointError(
            f"{temporary.parent}: what rank 0 makes there is not seen from this machine; {NOT_SHARED}"
        )
    tensors = {files[group]: {key: part.tensor for key, part in own[group].items()} for group in files}
    entries = write_files(temporary, tensors, texts)
    fsync(temporary)
    index: dict[str, list[Any]] = {group: [] for group in GROUPS}
    for group, file in files.items():
        dtypes = confirm_file(temporary / file, tensors[file])
        for key, part in own[group].items():
            index[group].append((part.name, dtypes[key], part.whole, file, key, part.offset, part.box.shape))
    return {"files": entries, "index": index}


def _commit(temporary: Path, path: Path, step: int, reports: Sequence[dict[str, Any]]) -> None:
    """Write index and manifest of the files that all ranks have reported, and rename the directory."""
    files = {name: entry for report in reports for name, entry in report["files"].items()}
    for name, entry in files.items():
        if not (temporary / name).is_file() or (temporary / name).stat().st_size != entry["bytes"]:
            raise CheckpointError(
                f"{path.parent}: {name}, which a rank has written, is not seen by rank 0; {NOT_SHARED}"
            )
    index = {group: _merge([report["index"][group] for report in reports]) for group in GROUPS}
    try:
        check_index(index, INDEX)
    except CheckpointError as error:  # not of the disk: the ranks' places are wrong
        raise RuntimeError(str(error)) from error
    files |= write_files(temporary, {}, {INDEX: render_index(index)})
    commit(temporary, path, step, files)


def _merge(reports: Sequence[Sequence[Any]]) -> dict[str, StoredTensor]:
    """The tensors of a group of the index, of the entries that the ranks have reported."""
    kinds: dict[str, tuple[str, Shape]] = {}
    boxes: dict[str, list[StoredBox]] = {}
    for report in reports:
        for name, dtype, whole, file, key, offset, shape in report:
            kind = dtype, tuple(whole)
            if kinds.setdefault(name, kind) != kind:
                raise RuntimeError(f"{name}: ranks hold parts of {kinds[name]} and of {kind}")
            boxes.setdefault(name, []).append(StoredBox(file, key, Box(tuple(offset), tuple(shape))))
    return {name: StoredTensor(*kinds[name], tuple(found)) for name, found in boxes.items()}
