"""The machine's own rate: the matrix products of the model's forward pass, each alone, at its best of several times."""

import time
from typing import Any

from benchmarks.task import Task
from benchmarks.workers import serve, synchronize
from benchmarks.workers.peers import start

MAX_ROWS = 16384  # a GPU is full long before
SECONDS = 0.3  # for each product, but at least REPEATS times
REPEATS = 5
LARGER_ERROR = 4.0  # a faster way of multiplying fp32 counts as fp32 up to so many times the default's error


def measure(task: Task) -> dict[str, Any]:
    """FLOP/s by precision, each product's and the best; on a GPU also of a square one."""
    from llmtrain.base.gpus import find_gpu
    from llmtrain.base.process import prepare_process

    prepare_process()
    import torch

    start(task)
    torch.set_grad_enabled(False)
    shapes = task.sizes.products(min(task.batch_size * task.context, MAX_ROWS))
    if task.device == "cuda":
        shapes.append((8192, 8192, 8192))
    rows = {}
    for precision in ("fp32", "bf16") if task.device == "cpu" else ("fp32", "tf32", "bf16"):
        products = {" × ".join(map(str, shape)): rate(shape, precision, task.device) for shape in shapes}
        rows[precision] = {"flops_per_second": max(products.values()), "products": products}
    if task.device == "cuda":
        gpu = find_gpu(torch.cuda.get_device_name())
        rows["bf16"]["data_sheet"] = None if gpu is None else gpu.flops.get("bf16")
    return {"rows": rows}


def rate(shape: tuple[int, int, int], precision: str, device: str) -> float:
    """FLOP/s of one linear layer, the best of its times and, for fp32 on a CPU, of the ways to multiply."""
    import torch

    rows, inputs, outputs = shape
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    x = torch.randn(rows, inputs, device=device).to(dtype)
    weight = torch.randn(outputs, inputs, device=device).to(dtype)
    if device == "cpu" and precision == "fp32":
        seconds = min(measure_seconds(x, weight) for _ in ways_of_fp32(x, weight))
        torch.set_float32_matmul_precision("highest")
    else:
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        seconds = measure_seconds(x, weight)
    return 2 * rows * inputs * outputs / seconds


def ways_of_fp32(x: Any, weight: Any) -> Any:
    """Set one way after the other to multiply fp32 on a CPU, those left out that round to fewer bits."""
    import torch

    exact = x[:64].double() @ weight[:64].double().t()
    allowed = None
    for way in ("highest", "high", "medium"):
        torch.set_float32_matmul_precision(way)
        error = (torch.nn.functional.linear(x, weight)[:64, :64] - exact).abs().mean().item()
        allowed = LARGER_ERROR * error if allowed is None else allowed
        if error <= allowed:
            yield way


def measure_seconds(x: Any, weight: Any) -> float:
    """The shortest time of one product."""
    import torch

    seconds: list[float] = []
    while len(seconds) < REPEATS or sum(seconds) < SECONDS:
        synchronize(x.device.type)
        begin = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        synchronize(x.device.type)
        seconds.append(time.perf_counter() - begin)
    return min(seconds[1:])


if __name__ == "__main__":
    serve(measure, "torch")
