"""The index of a checkpoint that several ranks have written: the boxes of every tensor, and the files they are in.

``index.json`` holds, for the model and for the optimizer, each tensor's dtype (as safetensors names it), whole shape
and boxes (file, key in the file, offset, shape).  It is read as a file that may come from elsewhere: the boxes name
files of the checkpoint alone, lie within the whole, do not overlap and leave no hole.
"""

import json
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from llmtrain.base.places import Shape
from llmtrain.base.run_files import INDEX, MODEL, OPTIMIZER
from llmtrain.base.stored_files import (
    COUNT,
    OBJECT,
    OBJECTS,
    TEXT,
    Kind,
    check_kinds,
    parse_json_object,
    read_text_file,
)
from llmtrain.base.tensor_files import CheckpointError
from llmtrain.checkpoint.parts import Box

GROUPS = {"model": MODEL, "optimizer": OPTIMIZER}  # the parts of a checkpoint, and the file of one process
MAX_BYTES = 64 << 20  # of an index: about 700,000 boxes
MAX_DIMENSIONS = 8
MAX_BESIDE = 256  # boxes of a tensor beside one another in each of two dimensions: bounds the time of a check
SHAPE = Kind(
    "a list of whole numbers from 0 on",
    lambda value: type(value) is list and len(value) <= MAX_DIMENSIONS and all(map(COUNT.holds, value)),
)


class StoredBox(NamedTuple):
    """A part of a tensor in a file."""

    file: str
    key: str
    box: Box


class StoredTensor(NamedTuple):
    """A tensor in a checkpoint."""

    dtype: str  # as safetensors names it: F32, BF16 …
    shape: Shape
    boxes: tuple[StoredBox, ...]


Index = Mapping[str, Mapping[str, StoredTensor]]  # by group and by name


def shard_name(group: str, number: int, count: int) -> str:
    """The name of the file ``number``, from 1 on, of the ``count`` that hold a group's tensors."""
    return f"{group}-{number:05d}-of-{count:05d}.safetensors"


def is_shard_name(name: str, group: str) -> bool:
    """Return whether ``name`` is one that :func:`shard_name` gives for ``group``."""
    return re.fullmatch(rf"{group}-\d{{5,9}}-of-\d{{5,9}}\.safetensors", name, re.ASCII) is not None


# --- as text --------------------------------------------------------------------------------------------------------


def render_index(index: Index) -> str:
    """The text of the index, a line a tensor.  Raises :class:`CheckpointError` if it is longer than what is read."""
    groups = []
    for group, tensors in index.items():
        lines = ",\n".join(f" {json.dumps(name)}: {_render(tensor)}" for name, tensor in tensors.items())
        groups.append(f"{json.dumps(group)}: {{\n{lines}\n}}")
    text = "{\n" + ",\n".join(groups) + "\n}\n"
    if len(text) > MAX_BYTES:
        raise CheckpointError(f"{INDEX}: {len(text):,} bytes, for more boxes than an index can hold ({MAX_BYTES:,})")
    return text


def _render(tensor: StoredTensor) -> str:
    boxes = [
        {"file": box.file, "key": box.key, "offset": box.box.offset, "shape": box.box.shape} for box in tensor.boxes
    ]
    return json.dumps({"dtype": tensor.dtype, "shape": tensor.shape, "boxes": boxes})


def read_index(checkpoint: Path) -> Index:
    """The index of a checkpoint.  Raises :class:`CheckpointError` naming the file and the tensor."""
    path = checkpoint / INDEX
    try:
        values = parse_json_object(read_text_file(path, MAX_BYTES), str(path))
        check_kinds(values, dict.fromkeys(GROUPS, OBJECT), str(path))
        if values.keys() != GROUPS.keys():
            raise CheckpointError(f"{path}: has the keys {sorted(values)[:5]}, not {', '.join(GROUPS)}")
        index = {
            group: {name: _parse(entry, group, f"{path}: {name[:200]!r}") for name, entry in values[group].items()}
            for group in GROUPS
        }
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(str(error)) from error
    check_index(index, str(path))
    return index


def _parse(entry: Any, group: str, where: str) -> StoredTensor:
    _check_keys(entry, {"dtype": TEXT, "shape": SHAPE, "boxes": OBJECTS}, where)
    boxes = []
    for value in entry["boxes"]:
        _check_keys(value, {"file": TEXT, "key": TEXT, "offset": SHAPE, "shape": SHAPE}, where)
        if not is_shard_name(value["file"], group):
            raise CheckpointError(
                f"{where}: {value['file'][:200]!r} is not the name of a file of the {group}'s tensors"
            )
        boxes.append(StoredBox(value["file"], value["key"], Box(tuple(value["offset"]), tuple(value["shape"]))))
    return StoredTensor(entry["dtype"], tuple(entry["shape"]), tuple(boxes))


def _check_keys(value: Any, kinds: Mapping[str, Kind], where: str) -> None:
    if not isinstance(value, dict) or value.keys() != kinds.keys():
        raise CheckpointError(f"{where}: must be an object of {', '.join(kinds)}")
    check_kinds(value, kinds, where)


# --- checks ---------------------------------------------------------------------------------------------------------


def check_index(index: Index, where: str) -> None:
    """Raise :class:`CheckpointError`, naming the tensor, unless the boxes of every tensor fill it exactly."""
    used: set[tuple[str, str]] = set()
    for tensors in index.values():
        for name, tensor in tensors.items():
            if problem := _problem(tensor):
                raise CheckpointError(f"{where}: {name[:200]!r}: {problem}")
            for box in tensor.boxes:
                if (box.file, box.key) in used:
                    raise CheckpointError(f"{where}: {name[:200]!r}: {box.key[:200]!r} of {box.file} is named twice")
                used.add((box.file, box.key))


def _problem(tensor: StoredTensor) -> str | None:
    """The way in which the boxes of a tensor do not fill it; None if they do."""
    if not tensor.boxes:
        return "no file holds it"
    boxes = [stored.box for stored in tensor.boxes]
    for box in boxes:
        if not len(box.offset) == len(box.shape) == len(tensor.shape):
            return f"a box has {len(box.offset)} and {len(box.shape)} dimensions, the tensor {len(tensor.shape)}"
        if any(a + n > size for a, n, size in zip(box.offset, box.shape, tensor.shape, strict=True)):
            return f"the box at {list(box.offset)} of shape {list(box.shape)} lies outside of {list(tensor.shape)}"
    try:
        pair = overlapping(boxes)
    except OverflowError:
        return f"{len(boxes):,} boxes in an order that no run writes"
    if pair:
        return f"the boxes at {list(pair[0].offset)} and {list(pair[1].offset)} overlap"
    held, needed = sum(box.numel for box in boxes), Box((0,) * len(tensor.shape), tensor.shape).numel
    if held != needed:
        return f"{held:,} of its {needed:,} elements are in the files"
    if not needed and boxes[0].shape != tensor.shape:
        return f"a box of shape {list(boxes[0].shape)} stands for {list(tensor.shape)}"
    return None


def overlapping(boxes: Iterable[Box]) -> tuple[Box, Box] | None:
    """Two of ``boxes`` that have elements in common; None if there are none.

    They are swept along the dimension with the most different offsets, so that a division along one dimension takes
    n log n steps for n boxes.  Raises OverflowError if more than ``MAX_BESIDE`` lie beside one another.
    """
    filled = [box for box in boxes if box.numel]
    if len(filled) < 2:
        return None
    if not filled[0].shape:
        return filled[0], filled[1]
    axis = max(range(len(filled[0].shape)), key=lambda axis: len({box.offset[axis] for box in filled}))
    active: list[Box] = []
    for box in sorted(filled, key=lambda box: box.offset[axis]):
        active = [other for other in active if other.offset[axis] + other.shape[axis] > box.offset[axis]]
        for other in active:
            if box.overlap(other):
                return other, box
        active.append(box)
        if len(active) > MAX_BESIDE:
            raise OverflowError
    return None


def check_files(index: Index, files: Collection[str], where: str) -> None:
    """Raise :class:`CheckpointError` unless the index names exactly the files of tensors among ``files``."""
    for group, tensors in index.items():
        named = {box.file for tensor in tensors.values() for box in tensor.boxes}
        listed = {name for name in files if is_shard_name(name, group)}
        if missing := sorted(named - listed):
            raise CheckpointError(f"{where}: names {missing[0]}, which the manifest does not list")
        if unused := sorted(listed - named):
            raise CheckpointError(f"{where}: does not name {unused[0]}, which the manifest lists")
