"""The loss on a GPU against the plain form in float64."""

import pytest
import torch
import torch.nn.functional as F

from llmtrain.base.constants import IGNORE
from llmtrain.kernels.linear_cross_entropy import Chunking, Options, linear_cross_entropy

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
TOKENS, HIDDEN, VOCABULARY, PADDED = 700, 64, 5000, 5056


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=draw)
    weight = torch.randn(PADDED, HIDDEN, generator=draw) / 8
    bias = torch.zeros(PADDED)
    bias[VOCABULARY:] = -torch.inf
    targets = torch.randint(0, VOCABULARY, (TOKENS,), generator=draw)
    targets[7:40] = IGNORE
    return hidden, weight, bias, targets


@pytest.mark.parametrize("chunk_tokens", [None, 256])
@pytest.mark.parametrize("options", [Options(), Options(softcap=5.0, z_loss=1e-3)], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)
def test_loss_and_gradients_equal_the_plain_form(
    dtype: torch.dtype, tolerance: float, options: Options, chunk_tokens: int | None
) -> None:
    values = inputs()
    hidden, weight = (tensor.double().requires_grad_() for tensor in values[:2])
    bias, targets = values[2].double(), values[3]
    logits = hidden @ weight.t()
    if options.softcap is not None:
        logits = options.softcap * torch.tanh(logits / options.softcap)
    logits = logits + bias
    expected = F.cross_entropy(logits, targets, reduction="sum")
    z_loss = options.z_loss * torch.logsumexp(logits, -1)[targets != IGNORE].square().sum()
    reference = torch.autograd.grad(expected + z_loss, (hidden, weight))

    ours = [tensor.to(CUDA) for tensor in values]
    leaves = [tensor.requires_grad_() for tensor in ours[:2]]
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        loss = linear_cross_entropy(*leaves, ours[2], ours[3], options, Chunking(chunk_tokens))
    gradients = torch.autograd.grad(loss, leaves)
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance / 10)
    for gradient, exact in zip(gradients, reference, strict=True):
        assert (gradient.cpu().double() - exact).norm() < tolerance * exact.norm()
