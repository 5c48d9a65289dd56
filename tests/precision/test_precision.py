"""Arithmetic: what is computed in which type, and loss scaling against torch's GradScaler."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from llmtrain.base.device import has_native_bf16
from llmtrain.base.named_generators import NamedGenerators
from llmtrain.model import LanguageModel
from llmtrain.model.gpt import GPTConfig, Initialisation
from llmtrain.precision import LossScaler, Precision, Residual
from llmtrain.precision.auto import Auto
from llmtrain.precision.bf16 import BF16
from llmtrain.precision.fp8 import FP8
from llmtrain.precision.fp8_linear import Recipe
from llmtrain.precision.fp16 import FP16
from llmtrain.precision.fp32 import FP32
from llmtrain.precision.tf32 import TF32
from tests.helpers.batches import batch_of
from tests.helpers.cli import TINY, llmtrain
from tests.helpers.operations import Operations
from tests.helpers.units import as_unit
from tests.model.test_llama import SMALL

CPU = torch.device("cpu")


def tiny() -> LanguageModel:
    config = GPTConfig(2, 32, 2, 16, None, 0.0, True, True, None, Initialisation.gpt2)
    return config.create(64, CPU, NamedGenerators(0))


def loss_of(model: LanguageModel, ids: Tensor) -> Tensor:
    (total,) = as_unit(model)(batch_of(ids, ids)).values()
    return total


@pytest.mark.parametrize("config", [BF16(Residual.fp32), FP16(1024.0, 10)])
def test_norms_and_losses_stay_fp32(config: BF16 | FP16) -> None:
    precision, model = config.build(CPU), tiny()
    seen: dict[str, torch.dtype] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm | nn.Linear):
            module.register_forward_hook(lambda m, args, out, name=name: seen.update({name: out.dtype}))
    ids = torch.randint(0, 64, (2, 16))
    with precision.autocast():
        loss = loss_of(model, ids)
    assert loss.dtype == torch.float32
    assert all(dtype == torch.float32 for name, dtype in seen.items() if "norm" in name)
    assert all(dtype == precision.dtype for name, dtype in seen.items() if "norm" not in name)
    loss.backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize(("config", "tolerance"), [(BF16(Residual.fp32), 0.02), (FP16(1.0, 10), 0.004)])
def test_half_precision_is_near_fp32(config: BF16 | FP16, tolerance: float) -> None:
    model, ids = tiny(), torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0))
    exact = loss_of(model, ids)
    with config.build(CPU).autocast():
        assert loss_of(model, ids).item() == pytest.approx(exact.item(), rel=tolerance)


def test_the_arithmetic_of_before_is_restored() -> None:
    torch.set_float32_matmul_precision("high")
    try:
        precision = FP32().build(CPU)
        with precision.arithmetic():
            assert torch.get_float32_matmul_precision() == precision.matmul
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("shape", [(64, 64, 64), (300, 768, 200), (17, 2048, 33)])
def test_fp32_products_have_the_accuracy_of_fp32(shape: tuple[int, int, int]) -> None:
    m, k, n = shape
    a, b = torch.randn(m, k), torch.randn(k, n)
    exact = a.double() @ b.double()
    with FP32().build(CPU).arithmetic():
        product = a @ b
    assert (product - exact).norm() < 2e-6 * exact.norm()  # bf16 would give 2e-3


def test_auto_is_bf16_where_the_device_has_it() -> None:
    assert Auto(Residual.fp32).build(CPU).name == ("bf16" if has_native_bf16(CPU) else "fp32")


def test_tf32_is_refused_on_a_cpu() -> None:
    with pytest.raises(ValueError, match=r"precision=tf32: needs an NVIDIA GPU, .* not cpu"):
        TF32().build(CPU)
    assert TF32().inference(CPU).name == "fp32"  # its text can be had


def test_the_loss_scale_follows_torchs_scaler() -> None:
    """The scale after any sequence of overflows is that of torch's own scaler."""
    ours = LossScaler(CPU, 1024.0, growth_interval=3)
    scale, tracker = torch.tensor(1024.0), torch.tensor(0, dtype=torch.int32)
    pattern = [0, 0, 0, 1, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 1, 0]
    for overflow in pattern:
        found_inf = torch.tensor(float(overflow))
        ours.update(found_inf)
        torch._amp_update_scale_(scale, tracker, found_inf, 2.0, 0.5, 3)
        assert ours.scale.item() == scale.item()
        assert ours.good_steps.item() == tracker.item()


def test_scaler_state_is_resumed() -> None:
    before, after = FP16(1024.0, 3).build(CPU), FP16(1024.0, 3).build(CPU)
    assert before.scaler is not None
    assert after.scaler is not None
    for overflow in (1.0, 0.0, 0.0):
        before.scaler.update(torch.tensor(overflow))
    after.load_state_dict(before.state_dict())
    assert after.scaler.scale == before.scaler.scale == 512.0
    assert after.scaler.good_steps == before.scaler.good_steps == 2


def test_unscale_undoes_scale() -> None:
    precision = Precision("fp16", CPU, torch.float16, scaler=LossScaler(CPU, 4096.0, 10))
    parameter = nn.Parameter(torch.tensor([1.0, 2.0]))
    precision.scale((parameter**2).sum()).backward()
    precision.unscale([parameter])
    assert torch.equal(parameter.grad, torch.tensor([2.0, 4.0]))


# --- devices, by what torch says of them ---------------------------------------------------------------------------

CUDA = torch.device("cuda")


def pretend(monkeypatch: pytest.MonkeyPatch, name: str, capability: tuple[int, int], hip: str | None = None) -> None:
    """Make torch describe a GPU that is not there."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.version, "hip", hip)


@pytest.mark.parametrize(
    ("name", "capability", "gain"),
    [
        ("Tesla T4", (7, 5), "8 times"),
        ("Tesla V100-SXM2-16GB", (7, 0), "8 times"),
        ("GTX 1660", (7, 5), "several times"),
    ],
)
def test_auto_names_fp16_on_a_gpu_without_bf16(
    name: str, capability: tuple[int, int], gain: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, name, capability)
    precision = Auto(Residual.fp32).build(CUDA)
    assert precision.name == "fp32"
    assert precision.notice == f"auto is fp32 here: {name} has no bf16; precision=fp16 multiplies {gain} as fast"
    assert "precision.residual=bf16 has no effect" in Auto(Residual.bf16).build(CUDA).notice


@pytest.mark.parametrize(
    ("name", "capability", "hip"), [("NVIDIA A100", (8, 0), None), ("AMD Instinct MI300X", (9, 4), "6.4")]
)
def test_auto_is_bf16_on_gpus_that_have_it(
    name: str, capability: tuple[int, int], hip: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, name, capability, hip)
    precision = Auto(Residual.fp32).build(CUDA)
    assert (precision.name, precision.notice) == ("bf16", "")


def test_a_gpu_of_amd_is_refused_where_the_formats_are_nvidias(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its capability, (9, 4), is above what both ask for."""
    pretend(monkeypatch, "AMD Instinct MI300X", (9, 4), "6.4")
    with pytest.raises(ValueError, match=r"precision=fp8: needs an NVIDIA GPU, .*AMD.*e4m3fnuz.*take precision=bf16"):
        FP8(Recipe.tensorwise, Residual.fp32).build(CUDA)
    with pytest.raises(ValueError, match=r"precision=tf32: needs an NVIDIA GPU, .*AMD.*take precision=fp32 or bf16"):
        TF32().build(CUDA)
    assert TF32().inference(CUDA).name == "fp32"
    assert FP8(Recipe.tensorwise, Residual.fp32).inference(CUDA).name == "bf16"


@pytest.mark.parametrize(("capability", "fits"), [((8, 0), False), ((8, 9), True), ((9, 0), True)])
def test_fp8_needs_ada_or_hopper(capability: tuple[int, int], fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "NVIDIA GPU", capability)
    config = FP8(Recipe.tensorwise, Residual.fp32)
    if fits:
        assert config.build(CUDA).name == "fp8"
    else:
        with pytest.raises(ValueError, match=r"compute capability 8\.9 or later"):
            config.build(CUDA)


# --- the residual stream ---------------------------------------------------------------------------------------------


def llama() -> LanguageModel:
    config = replace(SMALL, num_layers=2, hidden_size=32, context_length=16, qk_norm=True)
    return config.create(64, CPU, NamedGenerators(0))


IDS = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(0))


def gradients(model: LanguageModel, precision: Precision) -> Tensor:
    model.zero_grad()
    with precision.autocast():
        loss = loss_of(model, IDS)
    loss.backward()
    return torch.cat([parameter.grad.double().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("make", [tiny, llama])
def test_a_low_residual_stream_is_bf16_from_the_embeddings_to_the_loss(make: Callable[[], LanguageModel]) -> None:
    model = make()
    model.lower_residual()
    seen: dict[str, torch.dtype] = {}
    for name, module in model.named_modules():
        if "norm" in name or name.startswith("blocks."):
            module.register_forward_hook(lambda m, args, out, name=name: seen.update({name: out.dtype}))
    with BF16(Residual.bf16).build(CPU).autocast():
        loss = loss_of(model, IDS)
    assert loss.dtype == torch.float32
    assert {"blocks.0", "blocks.1", "final_norm", "blocks.0.mlp_norm"} <= seen.keys()
    assert set(seen.values()) == {torch.bfloat16}
    loss.backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())
    with torch.no_grad():
        low, model.has_low_residual = loss_of(model, IDS), False
        assert torch.equal(low, loss_of(make(), IDS))  # without autocast nothing changes


@pytest.mark.parametrize("make", [tiny, llama])
def test_gradients_of_a_low_residual_stream_are_near_float64(make: Callable[[], LanguageModel]) -> None:
    exact = gradients(make().double(), FP32().build(CPU))
    precision = BF16(Residual.bf16).build(CPU)
    model = make()
    plain = (gradients(model, precision) - exact).norm() / exact.norm()
    model.lower_residual()
    low = (gradients(model, precision) - exact).norm() / exact.norm()
    assert plain < low < 2.5 * plain
    assert low < 0.02


@pytest.mark.parametrize("precision", ["fp16", "fp32", "tf32"])
def test_a_low_residual_stream_is_refused_without_bf16(precision: str, tmp_path: Path) -> None:
    done = llmtrain("train", *TINY, f"precision={precision}", "precision.residual=bf16", cwd=tmp_path, check=2)
    assert "precision.residual: no such key" in done.stderr
    assert "others have: precision=auto or precision=bf16" in done.stderr


# --- several passes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny, llama])
def test_weights_are_cast_once_for_all_micro_batches_with_the_same_bits(make: Callable[[], LanguageModel]) -> None:
    found, casts = [], []
    for shares in (True, False):
        model, precision = make(), BF16(Residual.fp32).build(CPU)
        operations = Operations()
        with operations, precision.constant_weights(2) if shares else nullcontext():
            for part in IDS.split(2):
                with precision.autocast():
                    loss = loss_of(model, part)
                loss.backward()
        found.append([parameter.grad for parameter in model.parameters()])
        casts.append(operations.counts["_to_copy"])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    linears = [module for module in make().blocks.modules() if isinstance(module, nn.Linear)]
    weights = sum(1 + (linear.bias is not None) for linear in linears)
    assert casts[1] - casts[0] == weights


@pytest.mark.gpu
def test_auto_is_bf16_on_a_gpu() -> None:
    assert Auto(Residual.fp32).build(torch.device("cuda")).name == "bf16"
