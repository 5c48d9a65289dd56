"""The rates that a training step cannot exceed, one row each: ``python -m benchmarks.gpu.ceilings``."""

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from benchmarks.gpu.case import print_row

# rows, inputs, outputs: a square one; the layers of 124M and 1558M at 32 and 16 sequences; both heads by chunks
SHAPES = ((8192, 8192, 8192), (32768, 768, 2304), (32768, 768, 3072), (32768, 3072, 768), (16384, 1600, 4800),
          (16384, 1600, 6400), (16384, 6400, 1600), (8192, 768, 50304), (8192, 1600, 50304))  # fmt: skip
ATTENTION = ((32, 12, 1024, 64), (16, 25, 1024, 64), (8, 16, 1024, 128))
SMALL_SHAPES, SMALL_ATTENTION = ((64, 64, 64),), ((2, 2, 32, 16),)


def main() -> None:
    """Print the rows; what one measurement fails with is its row."""
    import torch

    rehearses = "--rehearse" in sys.argv
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes, attention = (SMALL_SHAPES, SMALL_ATTENTION) if rehearses else (SHAPES, ATTENTION)
    for shape in shapes:
        attempt(f"matmul {'×'.join(map(str, shape))}", lambda shape=shape: matmul(device, *shape))
    for shape in shapes[:3]:
        attempt(f"fp8 matmul {'×'.join(map(str, shape))}", lambda shape=shape: fp8_matmul(device, *shape))
    for shape in attention:
        for name in ("CUDNN_ATTENTION", "FLASH_ATTENTION") if device == "cuda" else ("MATH",):
            attempt(f"{name} {'×'.join(map(str, shape))}", lambda shape=shape, name=name: attend(device, name, *shape))
    attempt("memory", lambda: memory(device, 1 << (22 if rehearses else 31)))
    attempt("launch", lambda: launch(device))
    if device == "cuda":
        attempt("pinned memory", lambda: pinned(1 << (24 if rehearses else 31)))


def attempt(case: str, measure: Callable[[], dict[str, Any]]) -> None:
    """Print the row of a measurement."""
    try:
        print_row(case, **measure())
    except (RuntimeError, ValueError, AttributeError) as error:
        print_row(case, status="failed", said=[f"{type(error).__name__}: {str(error).splitlines()[0]}"])


def seconds_of(function: Callable[[], Any], device: str, enough: float = 0.15) -> float:
    """The median seconds of a call, over blocks that take a while."""
    import torch

    def block(calls: int) -> float:
        begin = time.perf_counter()
        for _ in range(calls):
            function()
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - begin) / calls

    block(3)
    calls = max(1, int(enough / 5 / max(block(3), 1e-7)))
    return statistics.median(block(calls) for _ in range(5))


def matmul(device: str, rows: int, inputs: int, outputs: int) -> dict[str, Any]:
    """bf16 TFLOP/s of a linear layer: forward, and both products of backward."""
    import torch

    x, weight, gradient = (
        torch.randn(*shape, device=device, dtype=torch.bfloat16)
        for shape in ((rows, inputs), (outputs, inputs), (rows, outputs))
    )
    work = 2e-12 * rows * inputs * outputs
    return {
        "forward TFLOP/s": work / seconds_of(lambda: x @ weight.t(), device),
        "input gradient": work / seconds_of(lambda: gradient @ weight, device),
        "weight gradient": work / seconds_of(lambda: gradient.t() @ x, device),
    }


def fp8_matmul(device: str, rows: int, inputs: int, outputs: int) -> dict[str, Any]:
    """TFLOP/s of torch's fp8 product with one scale a tensor."""
    import torch

    x = torch.randn(rows, inputs, device=device).to(torch.float8_e4m3fn)
    weight = torch.randn(outputs, inputs, device=device).to(torch.float8_e4m3fn).t()
    one = torch.ones((), device=device)
    work = 2e-12 * rows * inputs * outputs

    def product() -> Any:
        return torch._scaled_mm(x, weight, one, one, out_dtype=torch.bfloat16, use_fast_accum=True)

    return {"forward TFLOP/s": work / seconds_of(product, device)}


def attend(device: str, backend: str, batch: int, heads: int, length: int, size: int) -> dict[str, Any]:
    """Milliseconds of causal attention, forward and backward."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    query, key, value, gradient = (
        torch.randn(batch, heads, length, size, device=device, dtype=torch.bfloat16) for _ in range(4)
    )
    inputs = [tensor.requires_grad_() for tensor in (query, key, value)]
    with sdpa_kernel(getattr(SDPBackend, backend)):
        y = scaled_dot_product_attention(*inputs, is_causal=True)
        forward = seconds_of(lambda: scaled_dot_product_attention(*inputs, is_causal=True), device)
        backward = seconds_of(lambda: torch.autograd.grad(y, inputs, gradient, retain_graph=True), device)
    return {"forward ms": 1e3 * forward, "backward ms": 1e3 * backward}


def memory(device: str, size: int) -> dict[str, Any]:
    """Bytes a second, read and written, of a copy and of a sum."""
    import torch

    x = torch.ones(size // 4, device=device)
    y = torch.empty_like(x)
    return {
        "copy GB/s": 2e-9 * size / seconds_of(lambda: y.copy_(x), device),
        "sum GB/s": 1e-9 * size / seconds_of(x.sum, device),
    }


def launch(device: str) -> dict[str, Any]:
    """Microseconds of the host for an operation."""
    import torch

    x = torch.ones(8, device=device)
    return {"host µs": 1e6 * seconds_of(lambda: x.add_(1.0), device)}


def pinned(size: int) -> dict[str, Any]:
    """Making pinned memory, and the copies to and from it."""
    import torch

    begin = time.perf_counter()
    host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    made = time.perf_counter() - begin
    x = torch.empty(size, dtype=torch.uint8, device="cuda")
    return {
        "made GB/s": 1e-9 * size / made,
        "to the host GB/s": 1e-9 * size / seconds_of(lambda: host.copy_(x, non_blocking=True), "cuda"),
        "to the device GB/s": 1e-9 * size / seconds_of(lambda: x.copy_(host, non_blocking=True), "cuda"),
    }


if __name__ == "__main__":
    main()
