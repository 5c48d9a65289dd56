"""Copies in host memory: the bytes of one moment, in blocks that are no larger than they and are made once."""

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from llmtrain.base.host_memory import ALIGNMENT, registration_for
from llmtrain.checkpoint.snapshot import Layout, Snapshot, layouts_of
from tests.helpers.host_memory import Registry

CPU = torch.device("cpu")
GPU = torch.device("cuda")


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "w": torch.randn(7, 33, generator=generator),
        "half": torch.randn(3, 5, generator=generator).bfloat16(),
        "step": torch.tensor(3.0),
        "flags": torch.tensor([True, False, True]),
        "empty": torch.zeros(0, 3),
        "turned": torch.randn(5, 7, generator=generator).t(),
        "count": torch.tensor(9, dtype=torch.int64),
        "bytes": torch.arange(100, dtype=torch.uint8),
    }


def equal(copies: dict[str, Tensor], sources: dict[str, Tensor]) -> bool:
    return copies.keys() == sources.keys() and all(
        copy.dtype == sources[name].dtype and torch.equal(copy, sources[name]) for name, copy in copies.items()
    )


def memory_of(snapshot: Snapshot, group: str) -> set[tuple[int, int]]:
    """Address and size of the memory that the copies of a group are in."""
    return {
        (copy.untyped_storage().data_ptr(), copy.untyped_storage().nbytes())
        for copy in snapshot.copies[group].values() if copy.nbytes
    }  # fmt: skip


@pytest.mark.parametrize("refuses", [None, "no more"])
def test_a_snapshot_holds_the_exact_bytes_whether_it_is_pinned_or_not(refuses: str | None) -> None:
    model, optimizer = tensors(), {"w/m": torch.randn(7, 33)}
    snapshot = Snapshot(CPU, Registry(refuses))
    snapshot.begin(model=model, optimizer=optimizer)
    snapshot.finish()
    assert equal(snapshot.copies["model"], model)
    assert equal(snapshot.copies["optimizer"], optimizer)
    assert snapshot.refusal == refuses


def test_the_memory_of_a_group_is_one_block_no_larger_than_its_tensors_and_their_alignment() -> None:
    model = tensors()
    registry = Registry()
    snapshot = Snapshot(CPU, registry)
    snapshot.begin(model=model, optimizer={})
    content = sum(tensor.nbytes for tensor in model.values())
    ((_, size),) = memory_of(snapshot, "model")
    assert registry.calls == [f"pin {size}"]
    assert content <= size < content + len(model) * ALIGNMENT
    assert size == Layout.of(model).num_bytes
    assert {copy.data_ptr() % ALIGNMENT for copy in snapshot.copies["model"].values()} == {0}
    large = {"w": torch.zeros(3 * 2**20 + 16, dtype=torch.uint8)}  # a power of two would take a third more
    snapshot.begin(model=large)
    assert {size for _, size in memory_of(snapshot, "model")} == {3 * 2**20 + 64}


def test_the_next_save_reuses_the_memory() -> None:
    model = tensors()
    registry = Registry()
    snapshot = Snapshot(CPU, registry)
    snapshot.make(layouts_of({"model": model}))
    places = memory_of(snapshot, "model")
    for number in range(3):
        model["w"] += number
        snapshot.begin(model=model)
        snapshot.finish()
        assert equal(snapshot.copies["model"], model)
        assert memory_of(snapshot, "model") == places
    assert len(registry.calls) == 1


def test_memory_of_another_layout_takes_the_place_of_the_old() -> None:
    """The old block is given back first: there are never both."""
    registry = Registry()
    snapshot = Snapshot(CPU, registry)
    snapshot.begin(model={"w": torch.zeros(32)}, optimizer={"w/m": torch.zeros(16)})
    snapshot.finish()
    snapshot.begin(model={"w": torch.ones(48)}, optimizer={"w/m": torch.ones(16)})
    snapshot.finish()
    assert registry.calls == ["pin 128", "pin 64", "unpin 128", "pin 192"]
    assert snapshot.copies["model"]["w"].tolist() == [1.0] * 48


def test_closing_gives_all_memory_back() -> None:
    registry = Registry()
    snapshot = Snapshot(CPU, registry)
    snapshot.begin(model=tensors(), optimizer={"w/m": torch.zeros(5)})
    snapshot.finish()
    snapshot.close()
    assert registry.pinned == {}
    assert snapshot.copies == {}


# --- the order on a GPU --------------------------------------------------------------------------------------------


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls that order streams, with stand-ins for CUDA's streams and events; the tensors are on the CPU."""
    calls: list[str] = []

    class Event:
        def record(self, stream: "Stream") -> None:
            calls.append(f"event on {stream.name}")

        def synchronize(self) -> None:
            calls.append("host waits for event")

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait_stream(self, other: "Stream") -> None:
            calls.append(f"{self.name} waits for {other.name}")

        def wait_event(self, event: Event) -> None:
            calls.append(f"{self.name} waits for event")

    @contextlib.contextmanager
    def within(stream: Stream) -> Iterator[None]:
        calls.append(f"queue on {stream.name}")
        yield
        calls.append("end")

    computing = Stream("computing")
    stand_in = SimpleNamespace(
        Stream=lambda device: Stream("side"), Event=Event, stream=within, current_stream=lambda device: computing
    )
    monkeypatch.setattr(torch, "cuda", stand_in)
    return calls


def test_copies_are_ordered_between_the_update_before_and_the_one_after(order: list[str]) -> None:
    model = tensors()
    snapshot = Snapshot(GPU, Registry())
    for _ in range(2):
        order.clear()
        snapshot.begin(model=model)
        assert order == ["side waits for computing", "queue on side", "event on side", "end"]
        snapshot.before_change()
        assert order[4:] == ["computing waits for event"]  # and the host does not
        snapshot.finish()
        assert order[5:] == ["host waits for event"]
    assert equal(snapshot.copies["model"], model)


def test_without_pinned_memory_the_writing_thread_copies(order: list[str]) -> None:
    """A queued copy would hold up the training thread; the order after the update before is the same."""
    model = tensors()
    snapshot = Snapshot(GPU, Registry("no more"))
    snapshot.begin(model=model)
    assert order == ["side waits for computing"]
    assert not snapshot._copied.is_set()  # an update waits for it
    snapshot.finish()
    assert order[1:] == ["queue on side", "end"]
    assert equal(snapshot.copies["model"], model)
    snapshot.before_change()
    assert order[3:] == []


@pytest.mark.gpu
def test_a_save_on_a_gpu_waits_for_nothing_and_holds_the_bytes_of_its_beginning() -> None:
    model = {name: tensor.to(GPU) for name, tensor in (tensors() | {"large": torch.randn(4096, 1024)}).items()}
    snapshot = Snapshot(GPU, registration_for(GPU))
    snapshot.make(layouts_of({"model": model}))
    assert snapshot.refusal is None
    for _ in range(2):
        expected = {name: tensor.cpu() for name, tensor in model.items()}
        torch.cuda.set_sync_debug_mode("error")
        try:
            snapshot.begin(model=model)
            snapshot.before_change()
            model["large"].normal_()  # as the next update would
            model["w"].zero_()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        snapshot.finish()
        assert equal(snapshot.copies["model"], expected)
    snapshot.close()


@pytest.mark.gpu
def test_the_memory_of_a_save_on_a_gpu_is_not_torchs() -> None:
    before = torch.cuda.host_memory_stats()["allocated_bytes.current"]
    model = {"w": torch.zeros(5 * 2**20, device=GPU)}  # 20 MiB; torch's block would be 32
    snapshot = Snapshot(GPU, registration_for(GPU))
    snapshot.begin(model=model)
    snapshot.finish()
    assert torch.cuda.host_memory_stats()["allocated_bytes.current"] == before
    assert {size for _, size in memory_of(snapshot, "model")} == {20 * 2**20}
