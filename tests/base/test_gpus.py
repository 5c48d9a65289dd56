"""The table of GPUs, and the names that torch reports."""

import pytest
import torch

from llmtrain.base.device import PeakRate, peak_rate
from llmtrain.base.gpus import GPUS, find_gpu

CUDA = torch.device("cuda")


def test_the_table_of_gpus_is_plausible() -> None:
    for gpu in GPUS.values():
        nominal = float(gpu.name.rpartition("-")[2].removesuffix("gb"))  # GB, or GiB, by the maker's habit
        assert 0.9 * nominal < gpu.memory_bytes / 1e9 < 1.08 * nominal
        assert all(value > 0 for value in gpu.flops.values())
    h100 = GPUS["h100-80gb"]
    assert h100.flops["bf16"] == 989.4e12  # the data sheet's 1,979 is with sparsity
    assert h100.watts == 700


@pytest.mark.parametrize(
    ("device_name", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-80gb"),
        ("NVIDIA H100 PCIe", "h100pcie-80gb"),
        ("NVIDIA H100 NVL", "h100nvl-94gb"),
        ("NVIDIA H200", "h200-141gb"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100 80GB PCIe", "a100pcie-80gb"),
        ("NVIDIA A10G", "a10g-24gb"),
        ("NVIDIA L4", "l4-24gb"),
        ("NVIDIA L40S", "l40s-48gb"),
        ("Tesla T4", "t4-16gb"),
        ("Tesla V100-SXM2-32GB", "v100-32gb"),
        ("Tesla V100-PCIE-16GB", "v100pcie-16gb"),
        ("NVIDIA GeForce RTX 4090", "rtx4090-24gb"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx6000ada-48gb"),
        ("NVIDIA RTX A6000", "rtxa6000-48gb"),
        ("NVIDIA GeForce RTX 5090", "rtx5090-32gb"),
        ("NVIDIA A10", "a10-24gb"),
        ("NVIDIA A40", "a40-48gb"),
        ("NVIDIA L40", "l40-48gb"),
        ("NVIDIA H20", "h20-96gb"),
        ("NVIDIA B300 SXM6 AC", "b300-288gb"),
        ("AMD Instinct MI300X", "mi300x-192gb"),
    ],
)
def test_a_gpu_is_found_by_the_words_of_its_device_name(device_name: str, name: str) -> None:
    gpu = find_gpu(device_name)
    assert gpu is not None
    assert gpu.name == name


@pytest.mark.parametrize(
    "device_name",
    ["NVIDIA L20", "NVIDIA GH200 480GB", "Quadro RTX 6000", "NVIDIA GeForce RTX 3090 Ti", "NVIDIA H20-3e",
     "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 5090 D", "NVIDIA GeForce RTX 3060", "NVIDIA A10-4Q",
     "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "AMD Instinct MI300A"],
)  # fmt: skip
def test_a_gpu_of_a_similar_name_is_not_in_the_table(device_name: str) -> None:
    assert find_gpu(device_name) is None


def test_the_peak_is_the_data_sheets_by_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert peak_rate(CUDA, "fp16", torch.float16) == PeakRate(65e12, "")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert peak_rate(CUDA, "bf16", torch.bfloat16) == PeakRate(989.4e12, "")
    assert peak_rate(CUDA, "fp8", torch.bfloat16) == PeakRate(1978.9e12, "")
    assert peak_rate(CUDA, "tf32", torch.float32) == PeakRate(494.7e12, "")


def test_the_peak_of_an_unknown_gpu_is_measured_and_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3 MIG 1g.10gb")
    monkeypatch.setattr(
        "llmtrain.base.device.measure_matmul_flops", lambda device, dtype: {torch.bfloat16: 5e13}[dtype]
    )
    assert peak_rate(CUDA, "bf16", torch.bfloat16) == PeakRate(5e13, "measured")
    assert peak_rate(CUDA, "fp8", torch.bfloat16) == PeakRate(5e13, "measured in bf16")
