"""Devices that a run is planned for: a GPU of the table, or the device of this machine."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from llmtrain.base.device import available_memory, device_name, measure_matmul_flops, peak_rate
from llmtrain.base.gpus import GPUS, Gpu, find_gpu
from llmtrain.base.options import option_name
from llmtrain.kernels.cpu_attention import is_available
from llmtrain.precision import Precision, PrecisionConfig
from llmtrain.precision.fp8 import FP8, FP8Precision

# The share of a GPU's dense peak that whole training steps reach, for an estimate without a measurement: PaLM and
# nanoGPT report 46% and 38 to 50% for the matrix units; the share is higher where the peak is low.
UTILISATION = {"bf16": 0.40, "fp16": 0.40, "fp8": 0.30, "tf32": 0.40, "fp32": 0.65}
# On a CPU everything but the matrix products weighs the more, the faster the products are.  Measured with GPT-2 124M
# on two CPUs, with AVX512-BF16 and with AMX, at 0.16 to 1.3 TFLOP/s per thread: steps reach 77 to 24% of the peak, and
# this model is within a third of that.
CPU_PRODUCTS = 1.1  # time of all matrix products, relative to their time at the rate of the fastest
CPU_OTHERS = 1.6e-12  # seconds per thread of everything else, for each FLOP of the model
CPU_OTHERS_OWN_ATTENTION = 0.8e-12  # the same with the attention kernel of this package; within a sixth for GPT-2


@dataclass(frozen=True)
class DeviceSpec:
    """A device that a run is planned for."""

    name: str
    title: str
    memory_bytes: int | None  # available to a process; None: not known
    flops: Mapping[str, float]  # FLOP/s of dense matrix products, by the name of a precision
    bandwidth: float | None  # of the memory, bytes per second
    watts: float | None  # of the whole board at full load
    is_gpu: bool = True

    @classmethod
    def of(cls, gpu: Gpu) -> "DeviceSpec":
        """Describe a GPU of the table, none of whose memory is in use."""
        return cls(gpu.name, gpu.title, gpu.memory_bytes, gpu.flops, gpu.bandwidth, gpu.watts)

    def peak_flops(self, precision: Precision) -> float:
        """Return the FLOP/s of dense matrix products.  Raises ValueError if the device lacks ``precision``."""
        if precision.name not in self.flops:
            has = ", ".join(self.flops)
            raise ValueError(f"precision={precision.name}: {self.title} does not have it; it has {has}")
        return self.flops[precision.name]

    def utilisation(self, precision: Precision) -> float:
        """Estimate the share of :meth:`peak_flops` that training reaches."""
        if self.is_gpu:
            return UTILISATION.get(precision.name, 0.3)
        has_own = precision.name == "bf16" and is_available()
        others = CPU_OTHERS_OWN_ATTENTION if has_own else CPU_OTHERS
        return 1 / (CPU_PRODUCTS + others * self.peak_flops(precision) / torch.get_num_threads())


def find_device(name: str) -> DeviceSpec:
    """Find a GPU of the table by its name.  Raises ValueError, with the nearest name, for an unknown one."""
    if name in GPUS:
        return DeviceSpec.of(GPUS[name])
    plain = name.lower().replace("-", "").replace("_", "")
    matches = [known for known in GPUS if plain and plain in known.replace("-", "")]
    matches = matches or difflib.get_close_matches(name.lower(), GPUS, n=1)
    hint = f" did you mean {matches[0]}?" if matches else ""
    raise ValueError(f"device={name}: not a known device;{hint} there are: {', '.join(GPUS)}; null: this machine's")


def present_device(device: torch.device, precision: Precision) -> DeviceSpec:
    """Describe the device of this machine, with the memory that is free on it.

    The rate of a CPU, and of a GPU that the table lacks, is measured within some tens of milliseconds.
    """
    title = device_name(device)
    if device.type == "cpu":
        flops = {precision.name: quick_flops(precision)}
        return DeviceSpec("cpu", title, available_memory(), flops, None, None, is_gpu=False)
    free, _ = torch.cuda.mem_get_info(device)
    known = find_gpu(title)
    flops = {} if known is None else dict(known.flops)
    flops.setdefault(precision.name, peak_rate(device, precision.name, precision.dtype).flops)
    bandwidth, watts = (known.bandwidth, known.watts) if known else (None, None)
    return DeviceSpec("cuda", title, free, flops, bandwidth, watts)


def arithmetic(config: PrecisionConfig, spec: DeviceSpec) -> Precision:
    """Choose the arithmetic of a run on ``spec``, for the tensors on a CPU that a plan traces on every machine.

    TensorFloat-32, which a CPU lacks, is replaced by fp32, whose tensors have the same size.
    """
    cpu = torch.device("cpu")
    if not spec.is_gpu:
        return config.build(cpu)
    if isinstance(config, FP8):
        return FP8Precision(cpu, config.recipe)
    name = option_name(config)
    if name == "auto":
        has_bf16 = "bf16" in spec.flops
        return Precision("bf16", cpu, torch.bfloat16) if has_bf16 else Precision("fp32", cpu)
    return Precision("tf32", cpu) if name == "tf32" else config.build(cpu)


def quick_flops(precision: Precision) -> float:
    """Measure the FLOP/s of the fastest of some matrix products of 1 GFLOP on the CPU, in the run's arithmetic."""
    shape = (512, 1024, 1024)
    with precision.arithmetic():
        return measure_matmul_flops(torch.device("cpu"), precision.dtype, shape, most=50, enough_seconds=0.06)
