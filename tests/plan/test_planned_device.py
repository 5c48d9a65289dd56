"""A plan for a GPU is the same on the machine of the GPU and on any other, and follows the GPU's way to compute."""

import json
from pathlib import Path

import pytest
import torch

from llmtrain import Run
from llmtrain.activation_checkpointing.offload import IN_FLIGHT
from llmtrain.base.device import device_type
from llmtrain.base.gpus import GPUS
from llmtrain.cli.main import main
from llmtrain.plan.blueprint import Blueprint
from llmtrain.plan.devices import arithmetic, find_device
from llmtrain.plan.memory import estimate
from llmtrain.plan.trace import fake_tensors, trace_step
from llmtrain.precision import Precision
from tests.helpers.cli import TINY
from tests.helpers.gpu_without_data import skip_without_driver
from tests.helpers.pretended_gpu import pretend_gpu

SMALL = ("tokenizer=byte", "data.sequence_length=64", "accumulation.batch_size=8", "accumulation.micro_batch_size=8")


@pytest.mark.parametrize("options", [("precision=auto", "model.dropout=0.1"), ("precision=fp8",)])
def test_a_plan_beside_the_gpu_equals_the_one_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    skip_without_driver()
    monkeypatch.chdir(tmp_path)
    command = ("plan", *TINY, *options, "probe=false", "loop.max_steps=5")
    assert main([*command, "device=h200-141gb", "json=named.json"]) == 0
    pretend_gpu(monkeypatch, "NVIDIA H200", GPUS["h200-141gb"].memory_bytes)
    assert main([*command, "json=present.json"]) == 0
    named, present = (json.loads(Path(name).read_text()) for name in ("named.json", "present.json"))
    assert present.pop("device") == "NVIDIA H200"
    assert named.pop("device") == "NVIDIA H200 SXM 141 GB"
    assert named["memory_bytes"]["activations"] > 0
    assert present == named


def activations(*overrides: str, precision: Precision | None = None, gpu: bool = True) -> int:
    run = Run.compose(*SMALL, *overrides)
    chosen = precision or arithmetic(run.precision, find_device("h200-141gb"))
    return estimate(Blueprint(run, 257, chosen, 8), gpu=gpu).parts["activations"]


def test_dropout_on_a_gpu_keeps_masks_of_a_byte_and_no_scores() -> None:
    plain, dropped = (activations("model=tiny", "precision=bf16", f"model.dropout={rate}") for rate in (0, 0.1))
    layers, elements = 2, 8 * 64 * 32
    masks = (2 * layers + 1) * elements  # behind attention and MLP of each layer, and behind the embeddings
    assert dropped - plain == pytest.approx(masks, rel=0.05)


def test_a_norm_on_a_gpu_keeps_its_input_alone() -> None:
    """F.rms_norm is one kernel there, and keeps its input in fp32; on a CPU it also keeps the normalised input."""
    bf16 = Precision("bf16", torch.device("cpu"), torch.bfloat16)
    on_cpu, on_gpu = (activations("model=llama_tiny", precision=bf16, gpu=gpu) for gpu in (False, True))
    layers, elements = 2, 8 * 64 * 32
    assert on_cpu - on_gpu > 0.85 * (2 * layers + 1) * 4 * elements


def test_fp8_keeps_inputs_of_a_byte_a_number() -> None:
    run = Run.compose(*SMALL, "model=tiny", "precision=fp8")
    chosen = arithmetic(run.precision, find_device("h200-141gb"))
    assert (chosen.name, chosen.device.type) == ("fp8", "cpu")
    sizes: dict[torch.dtype, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + 1
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        trace_step(Blueprint(run, 257, chosen, 8), planned_for="cuda")
    assert sizes[torch.float8_e4m3fn] == 2 * 2 * 4  # input and weight of the four linear layers of each of two blocks


def test_tensors_without_data_stand_for_those_of_the_device_planned_for() -> None:
    assert device_type(torch.zeros(1)) == "cpu"
    with fake_tensors():
        assert device_type(torch.zeros(1)) == "cpu"
    with fake_tensors(planned_for="cuda"):
        assert device_type(torch.zeros(1)) == device_type(torch.nn.Parameter(torch.zeros(1))) == "cuda"


@pytest.mark.parametrize("kept", ["full", "selective"])
def test_recomputation_on_a_gpu_planned_for_keeps_as_much_as_the_first_pass(kept: str) -> None:
    """A Llama's norms, which a GPU fuses, are computed again in the backward pass."""
    fp32 = Precision("fp32", torch.device("cpu"))
    peaks = {}
    for option in ("none", kept):
        run = Run.compose(*SMALL, "model=llama_tiny", f"activation_checkpointing={option}")
        peaks[option] = estimate(Blueprint(run, 257, fp32, 8), gpu=True, copied=False).parts["activations"]
    assert peaks[kept] < peaks["none"]


@pytest.mark.gpu
@pytest.mark.parametrize("overrides", [("model=tiny",), ("model=tiny", "model.dropout=0.1"), ("model=llama_tiny",)])
def test_the_trace_on_cpu_tensors_equals_the_one_on_a_gpus(overrides: tuple[str, ...]) -> None:
    run = Run.compose(*SMALL, "precision=bf16", *overrides)
    peaks = []
    for device in ("cpu", "cuda"):
        blueprint = Blueprint(run, 257, run.precision.build(torch.device(device)), 8)
        rows = trace_step(blueprint, planned_for="cuda").timeline()
        peaks.append(max(int(row.sum(axis=1).max()) for row in rows))
    assert peaks[0] == pytest.approx(peaks[1], rel=0.03)


def test_offloaded_tensors_wait_on_the_host_all_but_the_last_few() -> None:
    layers = 12
    overrides = (*SMALL, "model=tiny", f"model.num_layers={layers}", "activation_checkpointing=full",
                 "accumulation.batch_size=512", "accumulation.micro_batch_size=512")  # fmt: skip
    runs = [Run.compose(*overrides, f"activation_checkpointing.offload={offload}") for offload in ("false", "true")]
    fp32 = Precision("fp32", torch.device("cpu"))
    kept, moved = (estimate(Blueprint(run, 257, fp32, 512), gpu=True, copied=False) for run in runs)
    held = 512 * 64 * 32 * 4  # bytes, of a block's input
    assert moved.host == pytest.approx((layers + 1) * held, rel=0.01)  # the final norm's input too
    assert kept.parts["activations"] - moved.parts["activations"] > 0.9 * (layers - IN_FLIGHT) * held
