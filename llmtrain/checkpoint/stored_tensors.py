"""The tensors of a checkpoint, read from the file of one process or from those of several ranks.

Every reader of a checkpoint's tensors goes through here: one process takes whole tensors by :func:`read_group`, a rank
the parts that it holds by :class:`StoredTensors`, which opens only the files that have elements of them.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llmtrain.base.run_files import INDEX
from llmtrain.base.tensor_files import CheckpointError, read_tensors
from llmtrain.checkpoint.index import GROUPS, Index, StoredBox, StoredTensor, read_index
from llmtrain.checkpoint.parts import Box, Part


def is_sharded(checkpoint: Path) -> bool:
    """Return whether several ranks have written the tensors of a checkpoint."""
    return (checkpoint / INDEX).is_file()


def group_file(checkpoint: Path, group: str) -> Path:
    """The file that errors about a group's tensors name: theirs, or the index."""
    return checkpoint / (INDEX if is_sharded(checkpoint) else GROUPS[group])


def read_group(checkpoint: Path, group: str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """The whole tensors of ``group``, ``model`` or ``optimizer``, on ``device``.

    Raises :class:`CheckpointError` naming the file.
    """
    if not is_sharded(checkpoint):
        return read_tensors(checkpoint / GROUPS[group], device)
    with StoredTensors(checkpoint, group) as stored:
        return {name: stored.read(name, device) for name in stored.tensors}


def check_shards(checkpoint: Path, index: Index) -> None:
    """Compare the names, dtypes and shapes in every file of the index with it.  Raises :class:`CheckpointError`."""
    for group in GROUPS:
        with StoredTensors(checkpoint, group, index) as stored:
            stored.check_all()


class StoredTensors(AbstractContextManager["StoredTensors"]):
    """The tensors of one group of a checkpoint, in one file or in boxes over several.  A context manager."""

    tensors: Mapping[str, StoredTensor]

    def __init__(self, checkpoint: Path, group: str, index: Index | None = None) -> None:
        self._checkpoint = checkpoint
        self._stack = ExitStack()
        self._open: dict[str, Any] = {}
        self.path = group_file(checkpoint, group)
        if index is None and is_sharded(checkpoint):
            index = read_index(checkpoint)
        if index is not None:
            self.tensors = index[group]
            self._boxes = _by_file(self.tensors)
        else:
            self._boxes = {}
            self.tensors = self._of_one_file(GROUPS[group])

    def _of_one_file(self, name: str) -> dict[str, StoredTensor]:
        with naming(self._checkpoint / name):
            file = self._file(name)
            tensors = {}
            for key in file.keys():  # noqa: SIM118 - it is no dictionary
                piece = file.get_slice(key)
                shape = tuple(piece.get_shape())
                box = StoredBox(name, key, Box((0,) * len(shape), shape))
                tensors[key] = StoredTensor(piece.get_dtype(), shape, (box,))
            return tensors

    def read(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """The whole tensor ``name``."""
        stored = self.tensors[name]
        first = self._piece(stored.boxes[0], None)
        if first.shape == torch.Size(stored.shape):
            return first.to(device)
        for box in stored.boxes:  # the files hold so many elements: memory is taken for no others
            self._file(box.file)
        whole = torch.empty(stored.shape, dtype=first.dtype, device=device)
        self._copy(name, whole, Box((0,) * len(stored.shape), stored.shape))
        return whole

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor with one dimension or more."""
        box = self.tensors[name].boxes[0]
        with naming(self._checkpoint / box.file):
            return self._file(box.file).get_slice(box.key)[:0].dtype

    def fill(self, part: Part) -> None:
        """Copy the elements of ``part`` into its tensor.

        Raises :class:`CheckpointError` if the whole tensor has another shape or dtype here.
        """
        stored = self._get(part.name)
        if stored.shape != part.whole:
            raise CheckpointError(f"{self.path}: {part.name} is {list(stored.shape)}, this run's is {list(part.whole)}")
        self._copy(part.name, part.tensor, part.box)

    def _get(self, name: str) -> StoredTensor:
        if name not in self.tensors:
            raise CheckpointError(f"{self.path}: {name} is missing")
        return self.tensors[name]

    def _copy(self, name: str, target: Tensor, wanted: Box) -> None:
        for stored in self.tensors[name].boxes:
            common = stored.box.overlap(wanted)
            if common is None:
                continue
            piece = self._piece(stored, common)
            if piece.dtype != target.dtype:
                found, needed = (str(tensor.dtype).removeprefix("torch.") for tensor in (piece, target))
                raise CheckpointError(f"{self._checkpoint / stored.file}: {name} is {found}, this run's is {needed}")
            target[common.slices_in(wanted)].copy_(piece)

    def _piece(self, stored: StoredBox, common: Box | None) -> Tensor:
        """The elements of a box in its file that are in ``common``; None: all."""
        file = self._file(stored.file)
        with naming(self._checkpoint / stored.file):
            if common is None or common == stored.box:
                return file.get_tensor(stored.key)
            return file.get_slice(stored.key)[common.slices_in(stored.box)]

    def check_all(self) -> None:
        """Open every file, which compares it with the index."""
        for name in self._boxes:
            self._file(name)

    def _file(self, name: str) -> Any:
        """The open file ``name``, whose header is compared with the index."""
        if name not in self._open:
            path = self._checkpoint / name
            with naming(path):
                file = self._stack.enter_context(safe_open(path, framework="pt"))
            _compare(path, file, self._boxes.get(name))
            self._open[name] = file
        return self._open[name]

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        self._open.clear()


def _by_file(tensors: Mapping[str, StoredTensor]) -> dict[str, dict[str, tuple[str, StoredTensor, StoredBox]]]:
    """Name, tensor and box of every key, by file."""
    files: dict[str, dict[str, tuple[str, StoredTensor, StoredBox]]] = {}
    for name, tensor in tensors.items():
        for box in tensor.boxes:
            files.setdefault(box.file, {})[box.key] = name, tensor, box
    return files


def _compare(path: Path, file: Any, boxes: Mapping[str, tuple[str, StoredTensor, StoredBox]] | None) -> None:
    """Raise :class:`CheckpointError` unless an open file has the keys, shapes and dtypes that the index has, if any."""
    if boxes is None:
        return
    with naming(path):
        keys = set(file.keys())
        if missing := sorted(boxes.keys() - keys):
            raise CheckpointError(f"{path}: does not hold {missing[0][:200]!r}, which {INDEX} names")
        if extra := sorted(keys - boxes.keys()):
            raise CheckpointError(f"{path}: holds {extra[0][:200]!r}, which {INDEX} does not name")
        for key, (name, tensor, box) in boxes.items():
            piece = file.get_slice(key)
            found, needed = (piece.get_dtype(), tuple(piece.get_shape())), (tensor.dtype, box.box.shape)
            if found != needed:
                raise CheckpointError(f"{path}: {name[:200]!r} is {_kind(*found)}, in {INDEX} {_kind(*needed)}")


def _kind(dtype: str, shape: Sequence[int]) -> str:
    return f"{dtype[:20]} {list(shape)}"


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn errors of safetensors and of the disk into :class:`CheckpointError` that name the file."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: {error}") from error
