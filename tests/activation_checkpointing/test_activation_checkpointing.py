"""What is computed again in backward: the same bits, fewer of them kept."""

import gc
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from llmtrain.activation_checkpointing import ActivationCheckpointing
from llmtrain.activation_checkpointing.full import Full
from llmtrain.activation_checkpointing.host_pool import HostPool, Piece
from llmtrain.activation_checkpointing.none import KeepAll
from llmtrain.activation_checkpointing.offload import Offloader, TracedMemory, attach, offload
from llmtrain.activation_checkpointing.recompute import recompute
from llmtrain.activation_checkpointing.selective import By, Selective
from llmtrain.activation_checkpointing.selective_ops import recompute_cheap
from llmtrain.base.host_memory import ALIGNMENT, HostMemory, aligned
from llmtrain.model import LanguageModel
from llmtrain.model.gpt import GPTConfig, Initialisation
from llmtrain.plan.trace import fake_tensors
from llmtrain.train.out_of_memory import is_out_of_memory
from tests.helpers.cli import TINY, llmtrain, only_run, rows
from tests.helpers.host_memory import Registry

CPU = torch.device("cpu")
WAYS = {
    "full": Full(offload=False),
    "block": Selective(By.block, every=2, offload=False),
    "every_block": Selective(By.block, every=1, offload=False),
    "operation": Selective(By.operation, every=2, offload=False),
}
IDS = torch.randint(0, 64, (2, 32), generator=torch.Generator().manual_seed(1))


def make(dropout: float = 0.0, device: torch.device = CPU, hidden_size: int = 64, length: int = 32) -> LanguageModel:
    config = GPTConfig(
        num_layers=4, hidden_size=hidden_size, num_heads=2, context_length=length, vocab_size=None, dropout=dropout,
        qkv_bias=True, tie_embeddings=True, logit_softcap=None, initialisation=Initialisation.gpt2,
    )  # fmt: skip
    return config.create(64, device, torch.Generator(device).manual_seed(0))


def train(model: LanguageModel, dtype: torch.dtype = torch.float32, ids: Tensor = IDS) -> tuple[list[float], list]:
    """Losses of three steps of SGD with two micro-batches each, and the gradients of the last."""
    torch.manual_seed(3)
    losses = []
    for _ in range(3):
        model.zero_grad()
        for piece in ids.split(1):
            with torch.autocast(ids.device.type, dtype, enabled=dtype != torch.float32):
                loss = F.cross_entropy(model.logits(model.hidden(piece)).flatten(0, 1).float(), piece.flatten())
            loss.backward()
            losses.append(loss.item())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
    return losses, [parameter.grad for parameter in model.parameters()]


def assert_same_training(one: LanguageModel, other: LanguageModel, dtype: torch.dtype = torch.float32) -> None:
    (losses, gradients), (expected, expected_gradients) = train(one, dtype), train(other, dtype)
    assert losses == expected
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected_gradients, strict=True))


# --- the same bits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("way", WAYS)
def test_losses_and_gradients_are_equal_to_the_bit(way: str, dropout: float, dtype: torch.dtype) -> None:
    model = make(dropout)
    WAYS[way].apply(model)
    assert_same_training(model, make(dropout), dtype)


@pytest.mark.parametrize("way", ["full", "operation"])
def test_recomputing_through_the_command_gives_equal_losses_and_norms(way: str, tmp_path: Path) -> None:
    option = {"full": ["full"], "operation": ["selective"]}[way]
    arguments = [*TINY, "loop.max_steps=3", "precision=fp32", "model.dropout=0.1", "accumulation.micro_batch_size=2"]
    found = []
    for name in ("none", *option):
        llmtrain("train", *arguments, f"activation_checkpointing={name}", f"output_dir={name}", cwd=tmp_path)
        run = [row for row in rows(only_run(tmp_path / name)) if "loss" in row and "event" not in row]
        found.append([(row["loss"], row["grad_norm"]) for row in run])
    assert len(found[0]) == 3
    assert found[0] == found[1]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize("way", WAYS)
def test_compiled_blocks_give_the_same_gradients(way: str) -> None:
    models = make(0.1), make(0.1)
    WAYS[way].apply(models[0])
    for model in models:
        for block in model.blocks:
            block.compile(dynamic=False, fullgraph=True)
    assert_same_training(*models)


class Attending(nn.Module):
    """A block with something compiled in it, as attention by blocks is."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.attend = torch.compile(lambda query, key: torch.softmax(query @ key.T, -1) @ key)

    def forward(self, x: Tensor, cache: object | None = None) -> Tensor:
        return x + self.attend(self.linear(x), x)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
def test_a_part_compiled_within_a_block_is_recomputed() -> None:
    block, x = Attending(), torch.randn(5, 8, requires_grad=True)
    block(x).sum().backward()
    expected = block.linear.weight.grad
    recompute_cheap(block)
    for _ in range(3):
        block.zero_grad()
        block(x).sum().backward()
        torch.testing.assert_close(block.linear.weight.grad, expected, atol=1e-5, rtol=1e-5)


class Overwriting(nn.Module):
    """A block that writes into the result of a product, and into a view of another."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, cache: object | None = None) -> Tensor:
        hidden = torch.tanh(self.first(x).mul_(2.0))
        out = self.second(hidden)
        out[:, 3:].add_(1.0)
        return torch.sin(out) + x


@pytest.mark.parametrize("host", [False, True])
def test_a_kept_result_that_is_written_to_is_computed_again(host: bool) -> None:
    """torch's contexts would raise an error here."""
    block = Overwriting()
    x = torch.randn(5, 8, requires_grad=True)
    block(x).sum().backward()
    expected = [parameter.grad for parameter in block.parameters()]
    recompute_cheap(block, Offloader(CPU, min_bytes=1) if host else None)
    for _ in range(2):
        block.zero_grad()
        block(x).sum().backward()
        assert all(torch.equal(p.grad, grad) for p, grad in zip(block.parameters(), expected, strict=True))


# --- what is kept ------------------------------------------------------------------------------------------------


def kept_bytes(way: ActivationCheckpointing, dtype: torch.dtype, dropout: float = 0.0) -> float:
    """Bytes that a forward pass through the blocks leaves behind, for each token, block and hidden unit."""
    model = make(dropout, hidden_size=128, length=256)
    way.apply(model)
    x = torch.randn(2, 256, 128, requires_grad=True)

    def forward() -> Tensor:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            y = x
            for block in model.blocks:
                y = block(y)
        return y

    forward().sum().backward()
    gc.collect()
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        y = forward()
    assert y.requires_grad
    events = profile.profiler.kineto_results.events()
    return sum(event.nbytes() for event in events if event.name() == "[memory]") / (2 * 256 * 128 * 4)


def test_a_block_keeps_as_many_bytes_as_computed_by_hand() -> None:
    """A block in fp32 keeps, in multiples of 4 bytes a hidden unit: the inputs of the norms (2), their results (2),
    queries, keys and values (3), attention's result (1), the MLP's hidden layer before and after GELU (4 + 4)."""
    kept = {name: kept_bytes(way, torch.float32) for name, way in (WAYS | {"none": KeepAll()}).items()}
    small = 0.7  # statistics of norms and of attention
    assert kept["none"] == pytest.approx(4 * 16, abs=small)
    # the input, the results of the first three matrix products (3 + 1 + 4) and of attention (1); not of the last one
    assert kept["operation"] == pytest.approx(4 * 10, abs=small)
    assert kept["every_block"] == pytest.approx(4, abs=small)
    assert kept["full"] == pytest.approx(4, abs=small)
    assert kept["block"] == pytest.approx((4 * 16 + 4) / 2, abs=small)


def test_a_block_keeps_less_with_dropout_and_in_bf16() -> None:
    for dtype, dropout in ((torch.float32, 0.1), (torch.bfloat16, 0.0), (torch.bfloat16, 0.1)):
        none, full, operation = (
            kept_bytes(way, dtype, dropout) for way in (KeepAll(), WAYS["full"], WAYS["operation"])
        )
        assert full < operation < 0.7 * none
        assert full < 0.1 * none


@pytest.mark.parametrize("way", WAYS)
def test_recomputing_changes_nothing_without_gradients(way: str) -> None:
    model, plain = make(0.1), make(0.1)
    WAYS[way].apply(model)
    calls = []
    model.blocks[0].attention_norm.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    with torch.no_grad():
        torch.manual_seed(0)
        ours = model(IDS)
        torch.manual_seed(0)
        assert torch.equal(ours, plain(IDS))
    assert calls == [False]
    model.eval(), plain.eval()
    with torch.no_grad():
        cache, expected = model.new_cache(2, torch.float32), plain.new_cache(2, torch.float32)
        for piece in IDS.split([7, 1, 24], dim=1):
            assert torch.equal(model(piece, cache), plain(piece, expected))
    assert cache.length == 32


@pytest.mark.parametrize("way", WAYS)
def test_recomputing_keeps_the_names_of_modules_and_weights(way: str) -> None:
    model = make()
    WAYS[way].apply(model)
    assert list(model.state_dict()) == list(make().state_dict())
    assert [name for name, _ in model.named_modules()] == [name for name, _ in make().named_modules()]


def test_every_nth_block_runs_twice() -> None:
    model = make()
    Selective(By.block, every=3, offload=False).apply(model)
    calls = [0] * 4
    for number, block in enumerate(model.blocks):
        block.mlp_norm.register_forward_hook(lambda *_, number=number: calls.__setitem__(number, calls[number] + 1))
    model(IDS).sum().backward()
    assert calls == [1, 1, 2, 1]


def test_selective_recomputing_repeats_no_matrix_product() -> None:
    calls = {"norm": 0, "product": 0}

    class Counting(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            name = operation.name()
            calls["norm"] += name == "aten::native_layer_norm"
            calls["product"] += name in ("aten::addmm", "aten::_scaled_dot_product_flash_attention_for_cpu")
            return operation(*args, **(kwargs or {}))

    model = make()
    WAYS["operation"].apply(model)
    with Counting():
        model.blocks[0](torch.randn(1, 32, 64, requires_grad=True)).sum().backward()
    assert calls == {"norm": 2 * 2, "product": 5}


# --- in host memory ----------------------------------------------------------------------------------------------


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
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("way", ["none", "full", "block", "operation"])
@pytest.mark.parametrize("offload", [False, True])
def test_recomputing_on_a_gpu_gives_the_same_gradients_and_offloading_takes_less_memory(
    way: str, dropout: float, offload: bool
) -> None:
    """The same losses and gradients, and with ``offload`` less device memory."""
    device = torch.device("cuda")
    ids = torch.randint(0, 64, (2, 1024), device=device, generator=torch.Generator(device).manual_seed(1))
    option = {
        "none": KeepAll(), "full": Full(offload), "block": Selective(By.block, 2, offload),
        "operation": Selective(By.operation, 2, offload),
    }[way]  # fmt: skip
    found = {}
    for name, apply in (("plain", KeepAll().apply), ("ours", option.apply)):
        model = make(dropout, device, hidden_size=512, length=1024)
        apply(model)
        losses, gradients = train(model, torch.bfloat16, ids)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model(ids).sum().backward()
        found[name] = (losses, gradients, torch.cuda.max_memory_allocated() - before)
    assert found["ours"][0] == pytest.approx(found["plain"][0], rel=1e-3)
    for ours, plain in zip(found["ours"][1], found["plain"][1], strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-3, rtol=1e-2)
    if way != "none":
        assert found["ours"][2] < found["plain"][2]


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


# --- mistakes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["full", "activation_checkpointing.offload=true"], "activation_checkpointing.offload=true: what backward"),
        (["selective", "activation_checkpointing.offload=true"], "with the model on cpu, and there is nothing to gain"),
        (["selective", "activation_checkpointing.every=0"], "activation_checkpointing.every=0: must be at least 1"),
        (
            ["selective", "activation_checkpointing.by=block", "activation_checkpointing.every=3"],
            "activation_checkpointing.every=3: the model has 2 blocks, so that none would be recomputed; take",
        ),
        (["selective", "activation_checkpointing.by=layer"], "must be one of block, operation"),
        (["some"], "activation_checkpointing"),
    ],
)
def test_impossible_values_are_refused(arguments: list[str], message: str, tmp_path: Path) -> None:
    option, *keys = arguments
    command = ("train", *TINY, "runtime.device=cpu", f"activation_checkpointing={option}", *keys)
    done = llmtrain(*command, cwd=tmp_path, check=2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_an_unread_key_is_reported(tmp_path: Path) -> None:
    option = ("activation_checkpointing=selective", "activation_checkpointing.every=2", "loop.max_steps=1")
    done = llmtrain("train", *TINY, *option, cwd=tmp_path)
    assert "activation_checkpointing.every=2: has no effect" in done.stdout


def test_resume_with_other_checkpointing_gives_the_same_run(tmp_path: Path) -> None:
    arguments = [*TINY, "precision=fp32", "model.dropout=0.1", "schedule=constant"]
    llmtrain("train", *arguments, "loop.max_steps=4", "run_dir=whole", cwd=tmp_path)
    llmtrain("train", *arguments, "loop.max_steps=2", "run_dir=parts", cwd=tmp_path)
    llmtrain("resume", "parts", "loop.max_steps=4", "activation_checkpointing=full", cwd=tmp_path)
    losses = [
        {row["step"]: row["loss"] for row in rows(tmp_path / name) if "loss" in row and "event" not in row}
        for name in ("whole", "parts")
    ]
    assert losses[0] == losses[1]
    environment = json.loads((tmp_path / "parts" / "environment.json").read_text())
    assert any("activation_checkpointing" in change[0] for change in environment["resumes"][0]["changes"])
