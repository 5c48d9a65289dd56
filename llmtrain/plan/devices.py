"""Known devices, and what the present one is."""

import difflib
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from llmtrain.base.device import available_memory, device_name, peak_flops
from llmtrain.base.options import option_name
from llmtrain.kernels.cpu_attention import is_available
from llmtrain.precision import Precision, PrecisionConfig

# The share of a device's dense peak that whole training steps come to, where nothing was measured: for the matrix
# units of GPUs what PaLM and nanoGPT report (46% and 38 to 50%), and well more where the peak is low.
UTILISATION = {"bf16": 0.40, "fp16": 0.40, "fp8": 0.30, "tf32": 0.40, "fp32": 0.65}
# On a CPU the rest of a step weighs the more, the faster the products are.  Measured with GPT-2 124M on two CPUs with
# AVX512-BF16 and with AMX, whose rates are 0.16 to 1.3 TFLOP/s a thread: 77 to 24% in all, within a third of this.
CPU_PRODUCTS = 1.1  # time of all products over that at the rate of the fastest
CPU_OTHERS = 1.6e-12  # seconds of a thread for everything else, a FLOP of the model
CPU_OTHERS_OWN_ATTENTION = 0.8e-12  # … where attention is our own kernel's: of GPT-2 30M and 124M, within a sixth


@dataclass(frozen=True)
class DeviceSpec:
    """What a plan knows of a device."""

    name: str
    title: str
    memory_bytes: int | None  # that a process can have; None: not known
    flops: Mapping[str, float]  # FLOP/s by the name of a precision, dense
    bandwidth: float | None  # of its memory, bytes a second
    watts: float | None  # of the whole board at full load
    is_gpu: bool = True

    def peak_flops(self, precision: Precision) -> float:
        """FLOP/s of dense matrix products in ``precision``.  Raises ValueError where the device has none such."""
        if precision.name not in self.flops:
            has = ", ".join(self.flops)
            raise ValueError(f"precision={precision.name}: {self.title} does not have it; it has {has}")
        return self.flops[precision.name]

    def utilisation(self, precision: Precision) -> float:
        """The share of :meth:`peak_flops` that training comes to."""
        if self.is_gpu:
            return UTILISATION.get(precision.name, 0.3)
        has_own = precision.name == "bf16" and is_available()
        others = CPU_OTHERS_OWN_ATTENTION if has_own else CPU_OTHERS
        return 1 / (CPU_PRODUCTS + others * self.peak_flops(precision) / torch.get_num_threads())


def _gpu(
    name: str, title: str, gibibytes: float, bandwidth: float, watts: float,
    *, bf16: float | None = None, fp16: float | None = None, fp8: float | None = None, tf32: float | None = None,
    fp32: float,
) -> DeviceSpec:  # fmt: skip
    """Numbers in GiB that torch reports in all, GB/s, watts and TFLOP/s."""
    teraflops = {"bf16": bf16, "fp16": fp16 or bf16, "fp8": fp8, "tf32": tf32, "fp32": fp32}
    flops = {key: 1e12 * value for key, value in teraflops.items() if value is not None}
    return DeviceSpec(name, title, round(gibibytes * 2**30), flops, 1e9 * bandwidth, watts)


# Dense rates (the makers' sheets often show those with sparsity, twice as high) with fp32 accumulation.
DEVICES = {spec.name: spec for spec in (
    # NVIDIA Tesla T4 data sheet, 2019; V100 data sheet, 2020
    _gpu("t4-16gb", "NVIDIA T4", 14.6, 320, 70, fp16=65, fp32=8.1),
    _gpu("v100-16gb", "NVIDIA V100 SXM2 16 GB", 15.8, 900, 300, fp16=125, fp32=15.7),
    _gpu("v100-32gb", "NVIDIA V100 SXM2 32 GB", 31.7, 900, 300, fp16=125, fp32=15.7),
    # NVIDIA A100 data sheet, 2021 (SXM)
    _gpu("a100-40gb", "NVIDIA A100 SXM 40 GB", 39.4, 1555, 400, bf16=312, tf32=156, fp32=19.5),
    _gpu("a100-80gb", "NVIDIA A100 SXM 80 GB", 79.1, 2039, 400, bf16=312, tf32=156, fp32=19.5),
    # NVIDIA Ampere GA102 and Ada architecture white papers, 2021 and 2022
    _gpu("rtx3090-24gb", "NVIDIA RTX 3090", 23.6, 936, 350, bf16=71, tf32=35.6, fp32=35.6),
    _gpu("rtx4090-24gb", "NVIDIA RTX 4090", 23.5, 1008, 450, bf16=165.2, fp8=330.3, tf32=82.6, fp32=82.6),
    _gpu("rtx6000ada-48gb", "NVIDIA RTX 6000 Ada", 47.4, 960, 300, bf16=364.2, fp8=728.5, tf32=182.1, fp32=91.1),
    # NVIDIA L4 and L40S data sheets, 2023
    _gpu("l4-24gb", "NVIDIA L4", 22.0, 300, 72, bf16=121, fp8=242.5, tf32=60, fp32=30.3),
    _gpu("l40s-48gb", "NVIDIA L40S", 44.4, 864, 350, bf16=362, fp8=733, tf32=183, fp32=91.6),
    # NVIDIA H100 data sheet, 2023; H200 data sheet, 2024
    _gpu("h100-80gb", "NVIDIA H100 SXM 80 GB", 79.1, 3350, 700, bf16=989.4, fp8=1978.9, tf32=494.7, fp32=66.9),
    _gpu("h100pcie-80gb", "NVIDIA H100 PCIe 80 GB", 79.1, 2000, 350, bf16=756, fp8=1513, tf32=378, fp32=51.2),
    _gpu("h100nvl-94gb", "NVIDIA H100 NVL 94 GB", 93.1, 3900, 400, bf16=835, fp8=1671, tf32=417, fp32=60),
    _gpu("h200-141gb", "NVIDIA H200 SXM 141 GB", 139.8, 4800, 700, bf16=989.4, fp8=1978.9, tf32=494.7, fp32=66.9),
    # NVIDIA Blackwell data sheet, 2024 (HGX B200)
    _gpu("b200-180gb", "NVIDIA B200 180 GB", 178.0, 7700, 1000, bf16=2250, fp8=4500, tf32=1100, fp32=75),
)}  # fmt: skip


def find_device(name: str) -> DeviceSpec:
    """The device of that name.  Raises ValueError, with the nearest, for one that is not in the table."""
    if name in DEVICES:
        return DEVICES[name]
    plain = name.lower().replace("-", "").replace("_", "")
    matches = [known for known in DEVICES if plain and plain in known.replace("-", "")]
    matches = matches or difflib.get_close_matches(name.lower(), DEVICES, n=1)
    hint = f" did you mean {matches[0]}?" if matches else ""
    raise ValueError(f"device={name}: not a known device;{hint} there are: {', '.join(DEVICES)}; null: this machine's")


def present_device(device: torch.device, precision: Precision) -> DeviceSpec:
    """The device of this machine that training would take, with what of its memory is free.

    A GPU that is not in the table, or a CPU, has its rate measured: some tens of milliseconds.
    """
    title = device_name(device)
    if device.type == "cpu":
        flops = {precision.name: quick_flops(precision)}
        return DeviceSpec("cpu", title, available_memory(), flops, None, None, is_gpu=False)
    free, _ = torch.cuda.mem_get_info(device)
    known = next((spec for spec in DEVICES.values() if spec.title.split(" ", 1)[1].split(" ")[0] in title), None)
    watts = known.watts if known else None
    flops = {precision.name: peak_flops(device, precision.dtype)}
    return DeviceSpec("cuda", title, free, flops, known.bandwidth if known else None, watts)


def arithmetic(config: PrecisionConfig, spec: DeviceSpec | None) -> Precision:
    """The arithmetic of a run on ``spec`` (None: on this machine's CPU), for tensors of a CPU.

    What a CPU does not have is stood in for by the arithmetic whose tensors are as large.
    """
    cpu = torch.device("cpu")
    name = option_name(config)
    if spec is not None and spec.is_gpu and name == "auto":
        has_bf16 = "bf16" in spec.flops
        return Precision("bf16", cpu, torch.bfloat16) if has_bf16 else Precision("fp32", cpu)
    try:
        return config.build(cpu)
    except ValueError:
        if spec is None or not spec.is_gpu:
            raise
        return Precision(name, cpu, torch.bfloat16 if name.startswith("fp8") else torch.float32)


def quick_flops(precision: Precision) -> float:
    """FLOP/s of the fastest of some matrix products on the CPU, 1 GFLOP each, as the run would do them."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(512, 1024, generator=generator).to(precision.dtype)
    b = torch.randn(1024, 1024, generator=generator).to(precision.dtype)
    product = torch.empty(512, 1024, dtype=precision.dtype)
    seconds: list[float] = []
    with precision.arithmetic():
        while len(seconds) < 3 or (len(seconds) < 50 and sum(seconds) < 0.06):
            start = time.perf_counter()
            torch.mm(a, b, out=product)
            seconds.append(time.perf_counter() - start)
    return 2 * 512 * 1024 * 1024 / min(seconds)
