"""What backward needs, in host memory: it comes back unchanged, from memory that is made once."""

import gc
import random

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from llmtrain.activation_checkpointing.full import Full
from llmtrain.activation_checkpointing.host_pool import HostPool, Piece
from llmtrain.activation_checkpointing.offload import Offloader, TracedMemory, attach, offload
from llmtrain.activation_checkpointing.recompute import recompute
from llmtrain.activation_checkpointing.selective_ops import recompute_cheap
from llmtrain.base.host_memory import ALIGNMENT, HostMemory, aligned
from llmtrain.model import LanguageModel
from llmtrain.plan.trace import fake_tensors
from llmtrain.train.out_of_memory import is_out_of_memory
from tests.activation_checkpointing.test_activation_checkpointing import CPU, IDS, assert_same_training, make, train
from tests.helpers.host_memory import Registry


class RecordingPool(HostPool):
    """A pool that records its requests, and the number of pieces for each."""

    def __init__(self) -> None:
        self.registry = Registry()
        super().__init__(self.registry, min_piece=1)
        self.requests: list[tuple[int, int]] = []

    def take(self, num_bytes: int) -> list[Piece]:
        pieces = super().take(num_bytes)
        self.requests.append((num_bytes, len(pieces)))
        return pieces


def offloaded(model: LanguageModel, way: str, host: HostPool | None = None) -> Offloader:
    """``model`` with everything that is worth it on the host, and on a CPU as well."""
    offloader = Offloader(next(model.parameters()).device, min_bytes=1, host=host)
    attach(model, offloader)
    for number, block in enumerate(model.blocks):
        if way == "operation":
            recompute_cheap(block, offloader)
        elif way == "full" or (way == "block" and number % 2):
            recompute(block)
    return offloader


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("way", ["nothing_recomputed", "full", "block", "operation"])
def test_offloaded_tensors_return_unchanged(way: str, dropout: float, dtype: torch.dtype) -> None:
    model = make(dropout)
    offloader = offloaded(model, way)
    assert_same_training(model, make(dropout), dtype)
    forward = offloader.forward
    assert len(forward.order) > len(forward.recent) + 4  # more than what never left the device
    assert [storage() for storage in forward.storages] == [None] * len(forward.storages)  # nothing is left behind


def test_offloaded_tensors_are_fetched_in_the_order_of_the_last_backward_pass() -> None:
    model = make()
    offloader = offloaded(model, "operation")
    train(model)
    order = offloader.forward.order
    assert order != sorted(order, reverse=True)  # within a block forwards
    offloader.begin(model.parameters())
    assert offloader.after(order[0], offloader.planned) == order[1:5]
    assert offloader.after(order[-1], offloader.planned) == []
    assert offloader.after(7, offloader.planned + 1) == [6, 5, 4, 3]  # another number of them: the other way round


def test_offloading_skips_parameters_and_copies_a_storage_once() -> None:
    layer = nn.Linear(32, 96)
    offloader = Offloader(CPU, min_bytes=1)
    offloader.begin(layer.parameters())
    assert offloader.pack(layer.weight) is layer.weight
    cast = layer.weight.bfloat16().t()
    assert offloader.pack(cast) is cast
    heads = layer(torch.randn(4, 32)).unflatten(-1, (3, 32))
    query, key = (offloader.pack(heads[:, number].t()) for number in (0, 1))
    assert query.storage is key.storage
    assert torch.equal(key.restore(), heads[:, 1].t())
    assert key.restore().stride() == heads[:, 1].t().stride()
    last = heads[:1, 0, :8]  # a small part of a large storage
    assert offloader.pack(last) is last


def test_offloading_copies_a_changed_tensor_again() -> None:
    offloader = Offloader(CPU, min_bytes=1)
    offloader.begin([])
    tensor = torch.zeros(8)
    before = offloader.pack(tensor)
    tensor += 1
    after = offloader.pack(tensor)
    others = [offloader.pack(torch.zeros(8)) for _ in range(5)]  # by now the first ones are on the host alone
    assert torch.equal(before.restore(), torch.zeros(8))
    assert torch.equal(after.restore(), torch.ones(8))
    assert len(others) == 5


def test_offloading_leaves_small_tensors_on_the_device() -> None:
    offloader = Offloader(CPU)
    offloader.begin([])
    small, large = torch.zeros(2**18 - 1), torch.zeros(2**18)
    assert offloader.pack(small) is small
    assert offloader.pack(large) is not large


def test_offloading_allows_two_forward_passes_before_a_backward_pass() -> None:
    model, plain = make(), make()
    offloaded(model, "operation")
    for each in (model, plain):
        first, second = (each(ids).logsumexp(-1).sum() for ids in IDS.split(1))
        second.backward()
        first.backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), plain.parameters(), strict=True))


def test_host_memory_is_made_in_the_first_step_and_used_by_all_others() -> None:
    """Also by smaller micro-batches, by shorter sequences, and beside an evaluation."""
    model, pool = make(0.1), RecordingPool()
    offloaded(model, "operation", pool)
    ids = torch.randint(0, 64, (4, 32), generator=torch.Generator().manual_seed(1))
    step(model, ids)
    made = list(pool.registry.calls)
    assert pool.num_bytes == sum(pool.registry.pinned.values()) == sum(aligned(size) for size, _ in pool.requests)
    step(model, ids, ids)
    with torch.no_grad():
        model(ids)
    assert {pieces for _, pieces in pool.requests} == {1}
    step(model, *ids.split(2))
    step(model, *ids[:, :17].split(1))
    step(model, ids)
    assert pool.registry.calls == made
    del model
    gc.collect()
    assert pool.registry.pinned == {}


@pytest.mark.parametrize("way", ["nothing_recomputed", "full", "operation"])
def test_a_traced_step_takes_the_host_memory_of_a_real_one(way: str) -> None:
    real = RecordingPool()
    model = make()
    offloaded(model, way, real)
    step(model, IDS)
    traced = HostPool(None, min_piece=1, memory=TracedMemory)
    with fake_tensors():
        model = make()
        offloaded(model, way, traced)
        step(model, torch.zeros_like(IDS))
    assert traced.num_bytes == real.num_bytes > 0
    assert all(is_fake(block.data) for block in traced.blocks)


def test_a_model_without_memory_is_left_as_it_is() -> None:
    """Its sizes alone are asked for, as a plan does."""
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    assert offload(model) is None  # type: ignore[arg-type]


def step(model: LanguageModel, *batches: Tensor) -> None:
    for batch in batches:
        model(batch).logsumexp(-1).sum().backward()


def test_host_memory_of_a_pass_without_backward_is_used_again() -> None:
    """As after a forward pass that ran out of memory: the garbage collector is not needed for it."""
    model, pool = make(), RecordingPool()
    offloaded(model, "nothing_recomputed", pool)
    gc.disable()
    try:
        model(IDS)  # its graph is gone at once
        made = pool.num_bytes
        for _ in range(10):
            model(IDS)
        step(model, IDS)
    finally:
        gc.enable()
    assert pool.num_bytes < 1.5 * made  # a pass holds its last tensors until the next one begins


@pytest.mark.parametrize("sizes", [[100, 30, 30, 500], [1], [64, 64, 64]])
def test_the_pool_gives_the_same_sizes_their_places_again(sizes: list[int]) -> None:
    pool = HostPool(None, min_piece=ALIGNMENT)
    first = [pool.take(size) for size in sizes]
    assert pool.num_bytes == sum(map(aligned, sizes))
    for order in (range(len(sizes)), reversed(range(len(sizes)))):
        for number in order:
            pool.give(first[number])
        assert [pool.take(size) for size in sizes] == first
    assert [
        [len(tensor) for tensor in pool.tensors(pieces, size)] for pieces, size in zip(first, sizes, strict=True)
    ] == [[size] for size in sizes]


def test_the_pool_is_no_larger_than_the_bytes_in_use_at_once_and_gives_no_byte_twice() -> None:
    generator = random.Random(3)
    pool = HostPool(None, min_piece=ALIGNMENT)
    held: list[tuple[list, int, int]] = []
    most = 0
    for number in range(600):
        if held and generator.random() < 0.5 - 0.4 * (number % 100 < 30):
            pieces, size, mark = held.pop(generator.randrange(len(held)))
            assert all(bool((tensor == mark).all()) for tensor in pool.tensors(pieces, size))
            pool.give(pieces)
        else:
            size = generator.randint(1, 1000)
            pieces, mark = pool.take(size), number % 251
            parts = pool.tensors(pieces, size)
            assert sum(map(len, parts)) == size
            for part in parts:
                part.fill_(mark)
            held.append((pieces, size, mark))
        most = max(most, sum(aligned(size) for _, size, _ in held))
        assert pool.num_bytes == most
    for pieces, _, _ in held:
        pool.give(pieces)
    pool.give(pool.take(1))
    pool.take(1)
    assert len(pool.free) == len(pool.blocks)  # all neighbours are joined


def test_host_memory_that_is_not_pinned_is_used_and_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    pool = HostPool(Registry("CUDA: out of memory"))
    pool.take(100), pool.take(100)
    (message,) = (record.getMessage() for record in caplog.records)
    assert "activation_checkpointing.offload=true: host memory could not be pinned (CUDA: out of memory)" in message


def test_a_lack_of_host_memory_is_one_that_halves_the_micro_batch() -> None:
    def no_memory(num_bytes: int, registration: object) -> HostMemory:
        raise OSError(12, "Cannot allocate memory")

    with pytest.raises(torch.OutOfMemoryError, match="128 more bytes of host memory: Cannot allocate memory") as error:
        HostPool(None, memory=no_memory).take(100)
    assert is_out_of_memory(error.value)


@pytest.mark.gpu
def test_offloading_waits_for_nothing_on_a_gpu() -> None:
    device = torch.device("cuda")
    model = make(0.0, device, hidden_size=512, length=1024)
    Full(offload=True).apply(model)
    ids = torch.zeros(2, 1024, dtype=torch.int64, device=device)
    model(ids).sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(ids).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
