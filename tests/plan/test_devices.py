"""Devices that a run is planned for."""

import pytest
import torch

from llmtrain import Run
from llmtrain.plan.devices import arithmetic, find_device, quick_flops
from llmtrain.precision import Precision


def test_an_unknown_device_is_named_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="device=h100-80: not a known device; did you mean h100-80gb"):
        find_device("h100-80")


def test_automatic_precision_is_that_of_the_device() -> None:
    auto = Run.compose("model=tiny", "tokenizer=byte", "precision=auto").precision
    assert arithmetic(auto, find_device("a100-40gb")).name == "bf16"
    assert arithmetic(auto, find_device("t4-16gb")).name == "fp32"


def test_a_precision_that_only_the_device_has_can_be_planned_on_a_cpu() -> None:
    tf32 = Run.compose("model=tiny", "tokenizer=byte", "precision=tf32").precision
    a100 = find_device("a100-40gb")
    assert a100.peak_flops(arithmetic(tf32, a100)) == 156e12
    v100 = find_device("v100-16gb")
    in_tf32 = arithmetic(tf32, v100)
    with pytest.raises(ValueError, match="precision=tf32: NVIDIA V100 SXM2 16 GB does not have it; it has fp16, fp32"):
        v100.peak_flops(in_tf32)


def test_the_measured_rate_is_plausible() -> None:
    assert 1e8 < quick_flops(Precision("fp32", torch.device("cpu"))) < 1e14
