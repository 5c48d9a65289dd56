"""Arithmetic: what is computed in which type, and loss scaling against torch's GradScaler."""

import pytest
import torch
from torch import Tensor, nn

from llmtrain.model import LanguageModel
from llmtrain.model.gpt import GPTConfig, Initialisation
from llmtrain.precision import LossScaler, Precision
from llmtrain.precision.auto import Auto, has_native_bf16
from llmtrain.precision.bf16 import BF16
from llmtrain.precision.fp16 import FP16
from llmtrain.precision.fp32 import FP32
from llmtrain.precision.tf32 import TF32
from tests.helpers.batches import batch_of
from tests.helpers.units import as_unit

CPU = torch.device("cpu")


def tiny() -> LanguageModel:
    config = GPTConfig(2, 32, 2, 16, None, 0.0, True, True, None, Initialisation.gpt2)
    return config.create(64, CPU, torch.Generator().manual_seed(0))


def loss_of(model: LanguageModel, ids: Tensor) -> Tensor:
    (total,) = as_unit(model)(batch_of(ids, ids)).values()
    return total


@pytest.mark.parametrize("config", [BF16(), FP16(1024.0, 10)])
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


@pytest.mark.parametrize(("config", "tolerance"), [(BF16(), 0.02), (FP16(1.0, 10), 0.004)])
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
    assert Auto().build(CPU).name == ("bf16" if has_native_bf16(CPU) else "fp32")


def test_tf32_is_refused_on_a_cpu() -> None:
    with pytest.raises(ValueError, match="tf32 needs an NVIDIA GPU"):
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


@pytest.mark.gpu
def test_auto_is_bf16_on_a_gpu() -> None:
    assert Auto().build(torch.device("cuda")).name == "bf16"
