"""Data sheets of GPUs, found by the name that torch reports."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

# Words that make a device another one: slower clocks, fewer units, or a slice of the whole.  A virtual GPU has a
# profile: an "NVIDIA A10-4Q" has 4 GB of an A10.
VARIANTS = re.compile(r"ti|super|d|laptop|max|mobile|mig|vgpu|3e|\d+[abcq]")


@dataclass(frozen=True)
class Gpu:
    """One GPU: its names, its memory and its speed."""

    words: str  # of torch's device name: all of them make it this GPU
    name: str  # in this program, as in `plan device=h100-80gb`
    title: str
    memory_bytes: int  # that torch reports in all
    bandwidth: float  # of the memory, bytes per second
    watts: float  # of the whole board at full load
    flops: Mapping[str, float]  # FLOP/s of dense matrix products, by the name of a precision


def _gpu(
    words: str, name: str, title: str, gibibytes: float, bandwidth: float, watts: float,
    *, bf16: float | None = None, fp16: float | None = None, fp8: float | None = None, tf32: float | None = None,
    fp32: float,
) -> Gpu:  # fmt: skip
    """Build a row from GiB, GB/s, watts and TFLOP/s; without ``fp16`` it is as fast as ``bf16``."""
    teraflops = {"bf16": bf16, "fp16": fp16 or bf16, "fp8": fp8, "tf32": tf32, "fp32": fp32}
    flops = {precision: 1e12 * value for precision, value in teraflops.items() if value is not None}
    return Gpu(words, name, title, round(gibibytes * 2**30), 1e9 * bandwidth, watts, flops)


# Dense rates with fp32 accumulation; the makers' data sheets often show those with sparsity, twice as high.
GPUS = {gpu.name: gpu for gpu in (
    # NVIDIA Tesla T4 data sheet, 2019; V100 data sheet, 2020 (PCIe: 112 and 14 TFLOP/s at 1370 MHz, 250 W)
    _gpu("T4", "t4-16gb", "NVIDIA T4", 14.6, 320, 70, fp16=65, fp32=8.1),
    _gpu("V100 16GB", "v100-16gb", "NVIDIA V100 SXM2 16 GB", 15.8, 900, 300, fp16=125, fp32=15.7),
    _gpu("V100 32GB", "v100-32gb", "NVIDIA V100 SXM2 32 GB", 31.7, 900, 300, fp16=125, fp32=15.7),
    _gpu("V100 PCIE 16GB", "v100pcie-16gb", "NVIDIA V100 PCIe 16 GB", 15.8, 900, 250, fp16=112, fp32=14),
    _gpu("V100 PCIE 32GB", "v100pcie-32gb", "NVIDIA V100 PCIe 32 GB", 31.7, 900, 250, fp16=112, fp32=14),
    # NVIDIA A100 data sheet, 2021
    _gpu("A100 40GB", "a100-40gb", "NVIDIA A100 SXM 40 GB", 39.4, 1555, 400, bf16=312, tf32=156, fp32=19.5),
    _gpu("A100 80GB", "a100-80gb", "NVIDIA A100 SXM 80 GB", 79.1, 2039, 400, bf16=312, tf32=156, fp32=19.5),
    _gpu("A100 PCIE 40GB", "a100pcie-40gb", "NVIDIA A100 PCIe 40 GB", 39.4, 1555, 250, bf16=312, tf32=156, fp32=19.5),
    _gpu("A100 PCIE 80GB", "a100pcie-80gb", "NVIDIA A100 PCIe 80 GB", 79.1, 1935, 300, bf16=312, tf32=156, fp32=19.5),
    # NVIDIA A10 data sheet, 2021; A40 data sheet, 2021; RTX A6000 data sheet, 2020
    _gpu("A10", "a10-24gb", "NVIDIA A10", 22.1, 600, 150, bf16=125, tf32=62.5, fp32=31.2),
    _gpu("A40", "a40-48gb", "NVIDIA A40", 44.4, 696, 300, bf16=149.7, tf32=74.8, fp32=37.4),
    _gpu("RTX A6000", "rtxa6000-48gb", "NVIDIA RTX A6000", 47.4, 768, 300, bf16=154.8, tf32=77.4, fp32=38.7),
    # NVIDIA A10G as Amazon's G5 instances have it: 300 W by nvidia-smi; tensor cores at half the rate of an A10's
    _gpu("A10G", "a10g-24gb", "NVIDIA A10G", 22.1, 600, 300, bf16=70, tf32=35, fp32=35),
    # NVIDIA Ampere GA102, Ada and RTX Blackwell architecture white papers, 2021, 2022 and 2025
    _gpu("RTX 3090", "rtx3090-24gb", "NVIDIA RTX 3090", 23.6, 936, 350, bf16=71, tf32=35.6, fp32=35.6),
    _gpu("RTX 4080", "rtx4080-16gb", "NVIDIA RTX 4080", 15.7, 717, 320, bf16=97.5, fp8=194.9, tf32=48.7, fp32=48.7),
    _gpu("RTX 4090", "rtx4090-24gb", "NVIDIA RTX 4090", 23.5, 1008, 450, bf16=165.2, fp8=330.3, tf32=82.6, fp32=82.6),
    _gpu("RTX 5090", "rtx5090-32gb", "NVIDIA RTX 5090", 31.4, 1792, 575, bf16=209.5, fp8=419, tf32=104.8, fp32=104.8),
    _gpu("RTX 6000 Ada", "rtx6000ada-48gb", "NVIDIA RTX 6000 Ada", 47.4, 960, 300,
         bf16=364.2, fp8=728.5, tf32=182.1, fp32=91.1),
    # NVIDIA L40 data sheet, 2022; L4 and L40S data sheets, 2023
    _gpu("L4", "l4-24gb", "NVIDIA L4", 22.0, 300, 72, bf16=121, fp8=242.5, tf32=60, fp32=30.3),
    _gpu("L40", "l40-48gb", "NVIDIA L40", 44.4, 864, 300, bf16=181, fp8=362, tf32=90.5, fp32=90.5),
    _gpu("L40S", "l40s-48gb", "NVIDIA L40S", 44.4, 864, 350, bf16=362, fp8=733, tf32=183, fp32=91.6),
    # NVIDIA H100 data sheet, 2023; H200 data sheet, 2024
    _gpu("H100", "h100-80gb", "NVIDIA H100 SXM 80 GB", 79.1, 3350, 700, bf16=989.4, fp8=1978.9, tf32=494.7, fp32=66.9),
    _gpu("H100 PCIe", "h100pcie-80gb", "NVIDIA H100 PCIe 80 GB", 79.1, 2000, 350,
         bf16=756, fp8=1513, tf32=378, fp32=51.2),
    _gpu("H100 NVL", "h100nvl-94gb", "NVIDIA H100 NVL 94 GB", 93.1, 3900, 400, bf16=835, fp8=1671, tf32=417, fp32=60),
    _gpu("H200", "h200-141gb", "NVIDIA H200 SXM 141 GB", 139.8, 4800, 700,
         bf16=989.4, fp8=1978.9, tf32=494.7, fp32=66.9),
    _gpu("H200 NVL", "h200nvl-141gb", "NVIDIA H200 NVL 141 GB", 139.8, 4800, 600,
         bf16=835, fp8=1671, tf32=417, fp32=60),
    # NVIDIA H20 data sheet, 2023 (a later one, "H20-3e", has 141 GB)
    _gpu("H20", "h20-96gb", "NVIDIA H20 96 GB", 95.1, 4000, 400, bf16=148, fp8=296, tf32=74, fp32=44),
    # NVIDIA Blackwell data sheet, 2024 (HGX B200)
    _gpu("B200", "b200-180gb", "NVIDIA B200 180 GB", 178.0, 7700, 1000, bf16=2250, fp8=4500, tf32=1100, fp32=75),
    # NVIDIA HGX B300 data sheet, 2025 (eight of them: 18 PFLOP/s in bf16); 1,400 W at most
    _gpu("B300", "b300-288gb", "NVIDIA B300 288 GB", 267.7, 8000, 1400, bf16=2250, fp8=4500, tf32=1125, fp32=75),
    # AMD Instinct MI300X data sheet, 2023.  Its 8-bit formats are not those of precision=fp8, and torch computes in
    # TF32 on it only if an environment variable says so: both are left out.
    _gpu("MI300X", "mi300x-192gb", "AMD Instinct MI300X", 191.7, 5300, 750, bf16=1307.4, fp32=163.4),
)}  # fmt: skip


def find_gpu(device_name: str) -> Gpu | None:
    """Find the data sheet of a GPU by torch's name for it; None if the table has none.

    Every word of a row must be a word of ``device_name``, and the row with the most words wins: an "NVIDIA H100 PCIe"
    is no "H100", an "L40S" no "L4".  A name with a word of :data:`VARIANTS` matches only a row that has it too.
    """
    words = _words(device_name)
    rows = [gpu for gpu in GPUS.values() if _words(gpu.words) <= words]
    rows = [gpu for gpu in rows if not any(VARIANTS.fullmatch(word) for word in words - _words(gpu.words))]
    return max(rows, key=lambda gpu: len(_words(gpu.words)), default=None)


def _words(text: str) -> set[str]:
    return set(re.split(r"[\s-]+", text.lower()))
