"""Damaged and hostile checkpoints of several ranks: an error that names the file, never a crash or a write."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llmtrain.base.tensor_files import CheckpointError
from llmtrain.checkpoint import index as index_module
from llmtrain.checkpoint.format import verify_checkpoint
from llmtrain.checkpoint.index import StoredBox, StoredTensor, check_index, overlapping, render_index
from llmtrain.checkpoint.parts import Box
from llmtrain.checkpoint.stored_tensors import read_group
from tests.checkpoint.divisions import checkpoint_of, save

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two ranks; tests leave it as it was."""
    folder = tmp_path_factory.mktemp("run")
    save(folder, "rows", 2)
    return checkpoint_of(folder)


def test_every_flipped_byte_of_every_file_is_found_and_named(checkpoint: Path) -> None:
    files = sorted(checkpoint.iterdir())
    assert len(files) == 8
    for path in files:
        content = path.read_bytes()
        step = 1 if path.name.startswith("model") else 41
        for position in range(0, len(content), step):
            path.write_bytes(content[:position] + bytes([content[position] ^ 0x10]) + content[position + 1 :])
            with pytest.raises(CheckpointError, match=path.name if path.name != "manifest.json" else "step-00000001"):
                verify_checkpoint(checkpoint)
        path.write_bytes(content)
    verify_checkpoint(checkpoint)


def test_a_missing_file_and_one_too_many_are_named(checkpoint: Path) -> None:
    for path in sorted(checkpoint.iterdir()):
        content = path.read_bytes()
        path.unlink()
        with pytest.raises(CheckpointError, match=path.name):
            verify_checkpoint(checkpoint)
        path.write_bytes(content)
    extra = checkpoint / "model-00003-of-00003.safetensors"
    extra.write_bytes(b"")
    with pytest.raises(CheckpointError, match=f"{extra.name}: not of this checkpoint"):
        verify_checkpoint(checkpoint)
    extra.unlink()
    verify_checkpoint(checkpoint)


# --- an index that somebody wrote, with a manifest that agrees --------------------------------------------------------


def rewrite(checkpoint: Path, name: str, content: bytes) -> None:
    """Replace a file, and its entry in the manifest, which then agrees."""
    (checkpoint / name).write_bytes(content)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    del manifest["sha256"]
    digest = hashlib.sha256(json.dumps(manifest, indent=1).encode()).hexdigest()
    (checkpoint / "manifest.json").write_text(json.dumps({**manifest, "sha256": digest}, indent=1) + "\n")


def change(*keys: Any, to: Any) -> Callable[[Any], Any]:
    """A change of one value of the index."""

    def apply(index: Any) -> Any:
        place = index
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = to
        return index

    return apply


def drop(*keys: Any) -> Callable[[Any], Any]:
    """The removal of one value of the index."""

    def apply(index: Any) -> Any:
        place = index
        for key in keys[:-1]:
            place = place[key]
        del place[keys[-1]]
        return index

    return apply


BOX = ("model", "w", "boxes", 0)
HOSTILE: dict[str, Callable[[Any], Any]] = {
    "a list": lambda index: [index],
    "no optimizer": drop("optimizer"),
    "another group": change("other", to={}),
    "a group that is a list": change("model", to=[]),
    "a tensor that is a text": change("model", "w", to="w"),
    "a tensor without a dtype": drop("model", "w", "dtype"),
    "a tensor with another key": change("model", "w", "pickle", to="x"),
    "a dtype that is a number": change("model", "w", "dtype", to=3),
    "another dtype": change("model", "w", "dtype", to="F16"),
    "a shape of texts": change("model", "w", "shape", to=["7", "5"]),
    "a negative shape": change("model", "w", "shape", to=[-7, 5]),
    "a huge shape": change("model", "w", "shape", to=[1 << 62, 1 << 62]),
    "a shape beyond 64 bits": change("model", "w", "shape", to=[10**40, 5]),
    "a shape of a true": change("model", "gate", "shape", to=[True]),
    "another number of dimensions": change("model", "w", "shape", to=[35]),
    "too many dimensions": change("model", "w", "shape", to=[1] * 1000),
    "boxes that are an object": change("model", "w", "boxes", to={}),
    "no boxes": change("model", "w", "boxes", to=[]),
    "a box that is a list": change(*BOX, to=[]),
    "a box without a key": drop(*BOX, "key"),
    "a key that is not there": change(*BOX, "key", to="v"),
    "a key of another tensor": change(*BOX, "key", to="norm"),
    "a file elsewhere": change(*BOX, "file", to="../../secret.safetensors"),
    "an absolute file": change(*BOX, "file", to="/etc/passwd"),
    "a file of another kind": change(*BOX, "file", to="state.json"),
    "a file of the other group": change(*BOX, "file", to="optimizer-00001-of-00002.safetensors"),
    "a file with a newline": change(*BOX, "file", to=FIRST + "\n"),
    "a file that is missing": change(*BOX, "file", to="model-00009-of-00002.safetensors"),
    "the other file": change(*BOX, "file", to=SECOND),
    "a negative offset": change(*BOX, "offset", to=[-1, 0]),
    "a broken offset": change(*BOX, "offset", to=[0.5, 0]),
    "a huge offset": change(*BOX, "offset", to=[1 << 62, 0]),
    "an overlap": change("model", "w", "boxes", 1, "offset", to=[3, 0]),
    "a hole": drop("model", "w", "boxes", 1),
    "the same box twice": lambda index: change("model", "w", "boxes", to=[index["model"]["w"]["boxes"][0]] * 2)(index),
    "a larger box": change(*BOX, "shape", to=[7, 5]),
    "a tensor less": drop("model", "norm"),
    "a tensor more": change("model", "v", to={"dtype": "F32", "shape": [2], "boxes": []}),
    "an empty one for a full one": change("model", "none", "shape", to=[0, 1 << 62]),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_index_is_an_error(tmp_path: Path, name: str) -> None:
    save(tmp_path, "rows", 2)
    path = checkpoint_of(tmp_path)
    index = HOSTILE[name](json.loads((path / "index.json").read_text()))
    rewrite(path, "index.json", json.dumps(index).encode())
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(CheckpointError, match=r"index\.json|manifest\.json|model-0000.-of-00002\.safetensors"):
        verify_checkpoint(path)
    with pytest.raises(CheckpointError, match=r"index\.json|model-0000.-of-00002\.safetensors"):
        read_group(path, "model")
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"{",
        b"null",
        b"[" * 100_000,
        b'{"model": {}, "model": {}}',
        b'{"model": NaN, "optimizer": {}}',
    ],
)
def test_an_index_that_is_no_json_object_is_an_error(tmp_path: Path, content: bytes) -> None:
    save(tmp_path, "rows", 2)
    rewrite(checkpoint_of(tmp_path), "index.json", content)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        verify_checkpoint(checkpoint_of(tmp_path))


def test_a_hostile_file_of_tensors_is_an_error(tmp_path: Path) -> None:
    save(tmp_path, "rows", 2)
    path = checkpoint_of(tmp_path)
    original = (path / FIRST).read_bytes()
    for content in (b"", b"x" * 100, (1 << 62).to_bytes(8, "little") + original[8:], original + b"more"):
        rewrite(path, FIRST, content)
        with pytest.raises(CheckpointError, match=FIRST):
            verify_checkpoint(path)
        with pytest.raises(CheckpointError, match=FIRST):
            read_group(path, "model")


def test_both_forms_in_one_manifest_are_refused(tmp_path: Path) -> None:
    save(tmp_path, "rows", 2)
    rewrite(checkpoint_of(tmp_path), "model.safetensors", (checkpoint_of(tmp_path) / FIRST).read_bytes())
    with pytest.raises(CheckpointError, match=r"lists index\.json and model\.safetensors, which exclude"):
        verify_checkpoint(checkpoint_of(tmp_path))


def test_a_pipe_in_place_of_the_index_does_not_hang(tmp_path: Path) -> None:
    save(tmp_path, "rows", 2)
    (checkpoint_of(tmp_path) / "index.json").unlink()
    os.mkfifo(checkpoint_of(tmp_path) / "index.json")
    with pytest.raises(CheckpointError, match=r"index\.json"):
        verify_checkpoint(checkpoint_of(tmp_path))


# --- boxes ----------------------------------------------------------------------------------------------------------


def test_overlaps_of_boxes_are_those_that_counting_finds() -> None:
    """Random boxes of a small tensor, against counting its elements."""
    chance = torch.Generator().manual_seed(3)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=chance))

    verdicts = set()
    for _ in range(500):
        boxes, counts = [], torch.zeros(6, 5, 3, dtype=torch.int32)
        for _ in range(draw(1, 6)):
            offset = draw(0, 6), draw(0, 5), draw(0, 3)
            shape = tuple(draw(0, min(4, size - start + 1)) for start, size in zip(offset, counts.shape, strict=True))
            boxes.append(Box(offset, shape))
            counts[boxes[-1].slices_in(Box((0, 0, 0), tuple(counts.shape)))] += 1
        verdicts.add(found := overlapping(boxes) is not None)
        assert found == bool(counts.max() > 1), boxes
    assert verdicts == {True, False}


def test_thousands_of_boxes_are_checked_in_a_moment_and_strange_ones_refused() -> None:
    def tensor(boxes: list[Box], shape: tuple[int, ...]) -> StoredTensor:
        return StoredTensor("F32", shape, tuple(StoredBox(FIRST, str(i), box) for i, box in enumerate(boxes)))

    rows = [Box((i, 0), (1, 8)) for i in range(5000)]
    columns = [Box((0, i), (8, 1)) for i in range(5000)]
    cells = [Box((i, j), (1, 1)) for i in range(300) for j in range(300)]
    check_index({"model": {"w": tensor(rows, (5000, 8))}}, "index.json")
    check_index({"model": {"w": tensor(columns, (8, 5000))}}, "index.json")
    with pytest.raises(CheckpointError, match=r"index\.json: 'w': 90,000 boxes in an order that no run writes"):
        check_index({"model": {"w": tensor(cells, (300, 300))}}, "index.json")


def test_an_index_longer_than_what_is_read_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {f"w{i}": StoredTensor("F32", (1,), (StoredBox(FIRST, f"w{i}", Box((0,), (1,))),)) for i in range(9)}
    assert json.loads(render_index({"model": tensors, "optimizer": {}}))["optimizer"] == {}
    monkeypatch.setattr(index_module, "MAX_BYTES", 500)
    with pytest.raises(CheckpointError, match="more boxes than an index can hold"):
        render_index({"model": tensors, "optimizer": {}})
