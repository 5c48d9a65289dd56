"""Checkpoints that several ranks write together: whole or absent, each element once, read by any number of ranks."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llmtrain.base.places import Place
from llmtrain.base.tensor_files import CheckpointError
from llmtrain.base.world import World
from llmtrain.checkpoint.directory import find_checkpoints, step_of
from llmtrain.checkpoint.format import copy_checkpoint, verify_checkpoint, weights_digest, write_checkpoint
from llmtrain.checkpoint.parts import model_parts, whole_bytes
from llmtrain.checkpoint.restore import read_state_parts
from llmtrain.checkpoint.stored_tensors import StoredTensors, read_group
from llmtrain.checkpoint.writer import RunDirectoryGone, SaveResult
from tests.checkpoint.divisions import (
    CONFIG_TEXT,
    KEPT,
    PADDED,
    checkpoint_of,
    held,
    held_state,
    save,
    saver_of,
    state_of,
    whole_model,
)
from tests.helpers.worlds import ThreadWorld, on_ranks

WRITTEN = [
    ("rows", 1), ("rows", 2), ("rows", 3), ("rows", 4), ("grid", 4), ("replicas", 4), ("strips", 2), ("copies", 2),
]  # fmt: skip
READ = [("rows", 1), ("rows", 2), ("rows", 3), ("rows", 4), ("grid", 4), ("replicas", 2), ("strips", 4), ("copies", 3)]


def same_bytes(one: Tensor, other: Tensor) -> bool:
    def raw(tensor: Tensor) -> Tensor:
        return tensor.contiguous().reshape(-1).view(torch.uint8)

    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(raw(one), raw(other))


def stored_model() -> dict[str, Tensor]:
    """The whole model as a checkpoint holds it."""
    return {name: tensor[:KEPT] if name == "embedding" else tensor for name, tensor in whole_model().items()}


def files_of(checkpoint: Path) -> list[str]:
    return sorted(path.name for path in checkpoint.iterdir())


# --- writing and reading --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "size"), WRITTEN)
def test_any_number_of_ranks_reads_the_same_bits(tmp_path: Path, kind: str, size: int) -> None:
    assert {saved.error for saved in save(tmp_path, kind, size)} == {None}
    path = checkpoint_of(tmp_path)
    verify_checkpoint(path)
    model, state = whole_model(), state_of(whole_model())
    for group, expected in (("model", stored_model()), ("optimizer", state)):
        found = read_group(path, group)
        assert found.keys() == expected.keys()
        assert [name for name in expected if not same_bytes(found[name], expected[name])] == []
    for reading, ranks in READ:
        for rank in range(ranks):
            expected, places = held(model, reading, ranks, rank)
            targets = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
            with StoredTensors(path, "model") as stored:
                for part in model_parts(targets, places, is_first=False):
                    stored.fill(part)
            assert [name for name in expected if not same_bytes(targets[name], expected[name])] == []
            expected, found = held_state(state, places), read_state_parts(path, targets, places)
            assert found.keys() == expected.keys()
            assert [name for name in expected if not same_bytes(found[name], expected[name])] == []


def test_a_rank_opens_only_the_files_that_hold_its_elements(tmp_path: Path) -> None:
    save(tmp_path, "rows", 4)
    path = checkpoint_of(tmp_path)
    (path / "model-00002-of-00004.safetensors").unlink()
    target = {"w": torch.zeros(2, 5)}
    with StoredTensors(path, "model") as stored:
        (first,) = model_parts(target, {"w": Place((0, 0), (7, 5), True)}, is_first=False)
        stored.fill(first)
        assert torch.equal(target["w"], whole_model()["w"][:2])
        (second,) = model_parts(target, {"w": Place((1, 0), (7, 5), True)}, is_first=False)
        with pytest.raises(CheckpointError, match=r"model-00002-of-00004\.safetensors"):
            stored.fill(second)


@pytest.mark.parametrize(("kind", "size"), [("copies", 2), ("copies", 4), ("rows", 1)])
def test_ranks_that_hold_everything_write_the_files_of_one_process(tmp_path: Path, kind: str, size: int) -> None:
    save(tmp_path, kind, size)
    alone = tmp_path / "alone" / "step-00000001"
    write_checkpoint(
        alone, model=stored_model(), optimizer=state_of(whole_model()), state={"step": 1}, config=CONFIG_TEXT
    )
    found = checkpoint_of(tmp_path)
    assert files_of(found) == files_of(alone)
    assert [name for name in files_of(alone) if (found / name).read_bytes() != (alone / name).read_bytes()] == []


def test_replicas_write_each_element_once(tmp_path: Path) -> None:
    save(tmp_path, "replicas", 4)
    assert [name for name in files_of(checkpoint_of(tmp_path)) if name.endswith(".safetensors")] == [
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
        "optimizer-00001-of-00002.safetensors", "optimizer-00002-of-00002.safetensors",
    ]  # fmt: skip


@pytest.mark.parametrize("size", [2, 4])
def test_bytes_on_disk_are_those_of_one_process(tmp_path: Path, size: int) -> None:
    whole = torch.randn(400, 500)

    def on_rank(world: World) -> SaveResult | None:
        rows = 400 // world.size
        places = {"w": Place((world.rank * rows, 0), (400, 500), True)}
        part = whole[world.rank * rows : (world.rank + 1) * rows]
        with saver_of(tmp_path, world, places) as saver:
            saver.begin({"w": part}, {"w/exp_avg": part, "w/exp_avg_sq": part}, {"step": 1}, {})  # copied, so apart
            return saver.collect(wait=True)

    on_ranks(size, on_rank)
    alone = tmp_path / "alone"
    write_checkpoint(
        alone, model={"w": whole}, optimizer={"w/exp_avg": whole, "w/exp_avg_sq": whole.clone()}, state={"step": 1},
        config="",
    )  # fmt: skip
    taken, needed = (sum(f.stat().st_size for f in p.iterdir()) for p in (checkpoint_of(tmp_path), alone))
    assert needed <= taken < 1.02 * needed


def test_vocabulary_padding_is_not_written_and_reads_as_it_was(tmp_path: Path) -> None:
    save(tmp_path, "rows", 4)  # the last rank holds nothing but padding
    index = json.loads((checkpoint_of(tmp_path) / "index.json").read_text())
    assert index["model"]["embedding"]["shape"] == [KEPT, 4]
    assert len(index["model"]["embedding"]["boxes"]) == 3
    assert index["optimizer"]["embedding/exp_avg"]["shape"] == [PADDED, 4]
    assert len(index["optimizer"]["embedding/exp_avg"]["boxes"]) == 4


def test_several_parts_of_a_tensor_are_written_without_a_copy(tmp_path: Path) -> None:
    save(tmp_path, "strips", 2, asynchronous=False)
    index = json.loads((checkpoint_of(tmp_path) / "index.json").read_text())
    boxes = index["model"]["qkv"]["boxes"]
    assert [box["key"] for box in boxes] == ["qkv", "qkv#2", "qkv#3"] * 2
    assert [box["offset"][0] for box in boxes] == [0, 4, 8, 2, 6, 10]
    assert torch.equal(read_group(checkpoint_of(tmp_path), "model")["qkv"], whole_model()["qkv"])


def test_single_numbers_are_written_once(tmp_path: Path) -> None:
    save(tmp_path, "grid", 4)
    index = json.loads((checkpoint_of(tmp_path) / "index.json").read_text())
    for entry in ("w/step", "gate/step", "shared/step", "norm/count:int"):
        (box,) = index["optimizer"][entry]["boxes"]
        assert box == {
            "file": "optimizer-00001-of-00004.safetensors", "key": entry, "offset": [], "shape": [],
        }  # fmt: skip


def test_the_size_of_a_checkpoint_is_known_from_any_part_of_it() -> None:
    model = whole_model()
    state = state_of(model)
    expected = sum(tensor.nbytes for tensor in (*stored_model().values(), *state.values()))
    for rank in range(4):
        tensors, places = held(model, "rows", 4, rank)
        assert whole_bytes(tensors, held_state(state, places), places) == expected


def test_state_that_cannot_be_divided_is_refused_before_training(tmp_path: Path) -> None:
    places = {"w": Place((0, 0), (7, 5), True)}
    with (
        saver_of(tmp_path, ThreadWorld.of(2)[0], places) as saver,
        pytest.raises(ValueError, match=r"w/scales: has the shape"),
    ):
        saver.prepare({"w": torch.zeros(4, 5)}, {"w/scales": torch.zeros(3)}, is_copied=True)


def test_a_copy_and_a_digest_of_a_sharded_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, "rows", 2)
    copy = tmp_path / "branch" / "step-00000001"
    copy_checkpoint(checkpoint_of(tmp_path), copy)
    verify_checkpoint(copy)
    assert files_of(copy) == files_of(checkpoint_of(tmp_path))
    assert weights_digest(copy) == weights_digest(checkpoint_of(tmp_path))
    save(tmp_path, "rows", 2, step=2, value=1.0)
    assert weights_digest(checkpoint_of(tmp_path, 2)) != weights_digest(copy)


# --- what does not fit ----------------------------------------------------------------------------------------------


def test_tensors_that_do_not_fit_are_named_with_their_file(tmp_path: Path) -> None:
    save(tmp_path, "rows", 2)
    path = checkpoint_of(tmp_path)
    for name, target, place, message in (
        ("w", torch.zeros(4, 5), Place((0, 0), (8, 5), True), r"index\.json: w is \[7, 5\], this run's is \[8, 5\]"),
        ("w", torch.zeros(4, 5).half(), Place((0, 0), (7, 5), True), r"model-00001-of-.*: w is float32, .* is float16"),
        ("v", torch.zeros(4, 5), Place((0, 0), (7, 5), True), r"index\.json: v is missing"),
    ):
        with StoredTensors(path, "model") as stored, pytest.raises(CheckpointError, match=message):
            stored.fill(model_parts({name: target}, {name: place}, is_first=False)[0])


def test_state_of_another_shape_than_its_parameter_is_not_divided(tmp_path: Path) -> None:
    path = tmp_path / "step-00000001"
    write_checkpoint(
        path, model={"w": torch.zeros(4, 6)}, optimizer={"w/row": torch.zeros(4)}, state={"step": 1}, config=""
    )
    places = {"w": Place((0, 0), (4, 6), True)}
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors: w/row has the shape \[4\], w \[4, 6\]"):
        read_state_parts(path, {"w": torch.zeros(2, 6)}, places)
    assert read_state_parts(path, {"w": torch.zeros(4, 6)}, places)["w/row"].shape == (4,)


# --- agreement ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("offset", "message"), [((2, 0), "overlap"), ((4, 0), "30 of its 35 elements are in the")])
def test_places_that_do_not_fill_a_tensor_fail_the_save_on_all(
    tmp_path: Path, offset: tuple[int, int], message: str
) -> None:
    def on_rank(world: World) -> SaveResult | None:
        places = {"w": Place(offset if world.rank else (0, 0), (7, 5), True)}
        with saver_of(tmp_path, world, places) as saver:
            saver.begin({"w": torch.zeros(3, 5)}, {}, {"step": 1}, {})
            return saver.collect(wait=True)

    for saved in on_ranks(2, on_rank):
        assert saved is not None
        assert isinstance(saved.error, RuntimeError)
        assert "rank 0" in str(saved.error)
        assert message in str(saved.error)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_an_error_of_one_rank_fails_the_save_on_all_and_the_next_one_works(tmp_path: Path) -> None:
    def on_rank(world: World) -> list[SaveResult | None]:
        places = {"w": Place((3 * world.rank, 0), (6, 5), True)}
        results = []
        with saver_of(tmp_path, world, places) as saver:
            for step in (1, 2):
                device = "meta" if (step, world.rank) == (1, 1) else "cpu"  # a tensor without data: not copied
                saver.begin({"w": torch.zeros(3, 5, device=device)}, {}, {"step": step}, {})
                results.append(saver.collect(wait=True))
        return results

    for first, second in on_ranks(2, on_rank):
        assert first is not None
        assert second is not None
        assert str(first.error).startswith("rank 1: TypeError: ")
        assert isinstance(first.error, RuntimeError)
        assert second.error is None
    assert [step_of(path) for path in find_checkpoints(tmp_path)] == [2]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]


@pytest.mark.parametrize(
    ("is_gone", "kind", "message"),
    [
        (True, RunDirectoryGone, "rank 1: .*the run directory was removed"),
        (False, CheckpointError, "rank 1: .*must be on a file system that the machines of all ranks share"),
    ],
)
def test_the_kind_of_an_error_is_the_same_on_all_ranks(
    tmp_path: Path, is_gone: bool, kind: type[Exception], message: str
) -> None:
    def on_rank(world: World) -> SaveResult | None:
        places = {"w": Place((3 * world.rank, 0), (6, 5), True)}
        folder = tmp_path / f"of-rank-{world.rank}"  # two machines without a shared file system
        folder.mkdir()
        with saver_of(folder, world, places) as saver:
            if is_gone and world.rank == 1:
                folder.rename(tmp_path / "elsewhere")
            saver.begin({"w": torch.zeros(3, 5)}, {}, {"step": 1}, {})
            return saver.collect(wait=True)

    for saved in on_ranks(2, on_rank):
        assert saved is not None
        with pytest.raises(kind, match=message):
            raise saved.error  # type: ignore[misc]
    assert not list(tmp_path.rglob("checkpoints/*"))


def test_ranks_that_save_different_steps_are_refused(tmp_path: Path) -> None:
    def on_rank(world: World) -> SaveResult | None:
        with saver_of(tmp_path, world, {}) as saver:
            saver.begin({"w": torch.zeros(3)}, {}, {"step": 1 + world.rank}, {})
            return saver.collect(wait=True)

    for saved in on_ranks(2, on_rank):
        assert saved is not None
        assert "the ranks save different steps: [1, 2]" in str(saved.error)
    assert find_checkpoints(tmp_path) == []


def test_rank_0_alone_decides_what_is_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, "rows", 2, step=step)
    shard = checkpoint_of(tmp_path, 3) / "optimizer-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    results = save(tmp_path, "rows", 2, step=4, keep_last=2)
    assert [saved.removed for saved in results] == [[1], [1]]
    assert len({saved.seconds for saved in results}) == 1
    for saved in results:
        (message,) = saved.damaged
        assert "step-00000003/optimizer-00002-of-00002.safetensors: its sha256" in message
    assert [step_of(path) for path in find_checkpoints(tmp_path)] == [2, 3, 4]


def test_all_ranks_roll_back_to_the_checkpoint_that_rank_0_chooses(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, "rows", 2, step=step)
    (checkpoint_of(tmp_path, 2) / "index.json").write_text("{}")

    def on_rank(world: World) -> tuple[Path | None, list[str]]:
        with saver_of(tmp_path, world, {}) as saver:
            path, errors = saver.newest_to_roll_back_to(at_most=2)
            return path, [str(error) for error in errors]

    first, second = on_ranks(2, on_rank)
    assert first == second
    assert first[0] == checkpoint_of(tmp_path, 1)
    assert "step-00000002/index.json" in first[1][0]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_saves_follow_one_another(tmp_path: Path, asynchronous: bool) -> None:
    def on_rank(world: World) -> None:
        weight = torch.zeros(100, 50)
        places = {"w": Place((100 * world.rank, 0), (200, 50), True)}
        with saver_of(tmp_path, world, places, asynchronous=asynchronous) as saver:
            assert saver.prepare({"w": weight}, {"w/m": weight}, is_copied=True) is None
            for step in (1, 2, 3):
                weight.fill_(step)
                saver.begin({"w": weight}, {"w/m": weight}, {"step": step}, {}, copied=step != 2)
                saver.before_update()
                weight.fill_(-1)
                saved = saver.collect(wait=True)
                assert saved is not None
                assert saved.error is None
                assert not saver.is_done

    on_ranks(2, on_rank)
    for path in find_checkpoints(tmp_path):
        for group in ("model", "optimizer"):
            (tensor,) = read_group(path, group).values()
            assert tensor.unique().tolist() == [step_of(path)]
