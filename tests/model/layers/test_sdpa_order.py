"""The order of torch's kernels of attention."""

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend

from llmtrain.model.layers.sdpa_order import backends, training_order

CUDNN: Any = SDPBackend.CUDNN_ATTENTION
FLASH: Any = SDPBackend.FLASH_ATTENTION


@pytest.mark.parametrize(
    ("capability", "cudnn", "declined", "first"),
    [
        ((9, 0), 91501, False, CUDNN),
        ((10, 0), 92000, False, CUDNN),
        ((10, 3), 92000, False, CUDNN),
        ((9, 0), 91500, False, FLASH),  # its backward pass is wrong for some lengths
        ((9, 0), 92000, True, FLASH),
        ((8, 0), 92000, False, FLASH),
        ((12, 0), 92000, False, FLASH),
        ((9, 0), 0, False, FLASH),
    ],
)
def test_cudnn_is_first_where_it_is_faster_and_correct(
    capability: tuple[int, int], cudnn: int, declined: bool, first: SDPBackend
) -> None:
    order = backends(capability, cudnn, is_declined=declined)
    assert order[0] == first
    assert set(order) == {CUDNN, FLASH, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH}
    assert (order.index(CUDNN) < order.index(SDPBackend.MATH)) == (first == CUDNN)  # behind it, it is never taken


def test_the_order_is_torchs_again_after_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("torch.backends.cudnn.version", lambda: 91900)
    before = torch._C._get_sdp_priority_order()
    with training_order(torch.device("cuda")):
        assert torch._C._get_sdp_priority_order()[0] == int(CUDNN)
    assert torch._C._get_sdp_priority_order() == before
    with training_order(torch.device("cpu")):
        assert torch._C._get_sdp_priority_order() == before


@pytest.mark.gpu
def test_generation_takes_no_cudnn() -> None:
    from llmtrain.inference.decoding import _without_cudnn

    device = torch.device("cuda")
    query = torch.zeros(1, 2, 1, 64, device=device, dtype=torch.bfloat16)
    key = torch.zeros(1, 2, 77, 64, device=device, dtype=torch.bfloat16)
    with training_order(device), _without_cudnn(device):
        assert torch._fused_sdp_choice(query, key, key) == int(FLASH)
    assert torch.backends.cuda.cudnn_sdp_enabled()
