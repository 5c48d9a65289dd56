"""The order in which torch tries its kernels of attention on a GPU, stated for a run rather than left to the wheel.

torch skips a kernel that cannot compute a call: cuDNN's with ``deterministic=true`` (flash attention's backward pass is
deterministic then), with dropout that is no multiple of 1/16, in fp32 or with heads of more than 128 or 256; flash
attention with a mask, in fp32 or with heads of more than 256.  The efficient kernel takes masks and fp32.  The last,
which keeps the matrix of all scores, computes everything: float64, and heads that the others do not take.
"""

import contextlib
import os
from collections.abc import Iterator

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

FASTER_WITH_CUDNN = (9, 10)  # major compute capability: Hopper, and Blackwell of data centres
# Before 9.15.1 its backward pass wrote outside of its tensors for lengths that are no multiple of 128
LEAST_CUDNN = 91501
DECLINED = "TORCH_CUDNN_SDPA_DEPRIORITIZED"  # torch's variable


@contextlib.contextmanager
def training_order(device: torch.device) -> Iterator[None]:
    """Context of a run: cuDNN's kernels first where they are faster and correct, else flash attention."""
    if device.type != "cuda":
        yield
        return
    version = torch.backends.cudnn.version() or 0
    order = backends(torch.cuda.get_device_capability(device), version, is_declined=os.environ.get(DECLINED) == "1")
    with sdpa_kernel(order, set_priority=True):
        yield


def backends(capability: tuple[int, int], cudnn: int, *, is_declined: bool) -> list[SDPBackend]:
    """The kernels for a card of that compute capability and a version of cuDNN, the first choice first."""
    order = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    if capability[0] in FASTER_WITH_CUDNN and cudnn >= LEAST_CUDNN and not is_declined:
        return [SDPBackend.CUDNN_ATTENTION, *order]
    return [*order, SDPBackend.CUDNN_ATTENTION]
