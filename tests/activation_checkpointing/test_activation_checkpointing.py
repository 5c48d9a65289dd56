"""What is computed again in backward: the same bits, fewer of them kept."""

import gc
import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmtrain.activation_checkpointing import ActivationCheckpointing
from llmtrain.activation_checkpointing.full import Full
from llmtrain.activation_checkpointing.none import KeepAll
from llmtrain.activation_checkpointing.offload import Offloader
from llmtrain.activation_checkpointing.selective import By, Selective
from llmtrain.activation_checkpointing.selective_ops import recompute_cheap
from llmtrain.base.named_generators import NamedGenerators
from llmtrain.model import LanguageModel
from llmtrain.model.gpt import GPTConfig, Initialisation
from tests.helpers.cli import TINY, llmtrain, only_run, rows

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
    return config.create(64, device, NamedGenerators(0))


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


# --- on a GPU -----------------------------------------------------------------------------------------------------


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
