"""The loop's own step with a GPU's branches: the host waits for nothing.

Tensors without data say that they are on a GPU, so every branch is that of a GPU.  An operation that would make the
host wait is counted: reading a number, a copy between the devices that is not asynchronous, a result whose shape
depends on values.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmtrain import Run
from llmtrain.base.world import ALONE
from llmtrain.data import Batch
from llmtrain.distributed.replicas import Replicas
from llmtrain.plan.blueprint import Blueprint
from llmtrain.plan.trace import fake_tensors
from llmtrain.precision import Precision, PrecisionConfig
from llmtrain.train.loop import Loop
from llmtrain.train.rehearsal import made_up_batch
from llmtrain.train.state import TrainState
from llmtrain.train.step import Step, StepLoss
from tests.helpers.gpu_without_data import allow_gpu_tensors
from tests.helpers.options import make_option, option_names

CPU, GPU = torch.device("cpu"), torch.device("cuda")
RUN = (
    "model=tiny", "model.num_layers=1", "tokenizer=byte", "data.sequence_length=16", "accumulation.batch_size=4",
    "accumulation.micro_batch_size=2", "loop.max_steps=100",
)  # fmt: skip
# the small model's matrices in few bits
OVERRIDES = {"adamw_8bit": ("optimizer.min_elements=4096",), "adamw_bf16": ("optimizer.min_elements=4096",)}
# The options that make the host wait, with the reason: none.
EXCEPTIONS: dict[tuple[str, str], str] = {}
aten = torch.ops.aten
READS = {aten._local_scalar_dense.default, aten.is_nonzero.default, aten.equal.default}
SHAPED_BY_VALUES = {
    aten.nonzero.default, aten.masked_select.default, aten._unique2.default, aten.unique_consecutive.default,
    aten.unique_dim.default, aten.bincount.default, aten.repeat_interleave.Tensor,
}  # fmt: skip
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default}
COPIES = {aten._to_copy.default, aten.copy_.default}


class Synchronisations(TorchDispatchMode):
    """A counter of the operations on ``device``, and of those after which the host waits for it."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.waits: list[str] = []
        self.operations = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.ops.prim.device.default:
            return args[0].fake_device
        tensors = [value for value in tree_leaves([args, kwargs]) if isinstance(value, Tensor)]
        on_device = any(tensor.device.type == self.device.type for tensor in tensors)
        self.operations += on_device
        if on_device and function in READS:
            self.waits.append(str(function))
            return 0.0 if function is aten._local_scalar_dense.default else False
        by_mask = function in INDEXING and any(
            isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1]
        )
        if on_device and (function in SHAPED_BY_VALUES or by_mask):
            self.waits.append(str(function))
        if function is aten._fused_sgd_.default:  # torch has no form of it for tensors without data
            return None
        result = function(*args, **kwargs)
        if function in COPIES and not kwargs.get("non_blocking", args[2] if len(args) > 2 else False):
            source = args[0] if function is aten._to_copy.default else args[1]
            if source.device.type != result.device.type:
                self.waits.append(f"{function} from {source.device.type} to {result.device.type}")
        return result


class Event:
    """A CUDA event that nothing waits for."""

    def __init__(self, enable_timing: bool = False) -> None:
        pass

    def record(self) -> None:
        pass


class StepWithoutModel(Step):
    """A step whose forward and backward pass only make gradients and a loss."""

    def accumulate(self, batch: Batch, micro_batch_size: int) -> StepLoss:
        for _, weight in self.weights:
            weight.grad = torch.empty_like(weight)
        loss = torch.ones((), device=GPU)
        return StepLoss(loss, {"tokens": loss})


def build_precision(name: str) -> Precision:
    """The arithmetic of a GPU of the Hopper generation."""
    option: PrecisionConfig = make_option("precision", name, {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "get_device_capability", lambda *device: (9, 0))
        patch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **keys: True)
        return option.build(GPU)


@contextmanager
def loop_of(step_class: type[Step], precision: Precision, *overrides: str) -> Iterator[tuple[Loop, Synchronisations]]:
    """A real loop on a GPU without data; data, saving, timing and display are stand-ins."""
    allow_gpu_tensors()
    run = Run.compose(*RUN, *overrides)
    with pytest.MonkeyPatch.context() as patch, fake_tensors():
        built = Blueprint(run, 257, precision, 4).build()
        step = step_class(built.unit, built.optimizer, precision, 2)
        batch: Any = made_up_batch(run.objective, 4, 16, is_packed=False)
        batch = batch.map(lambda tensor: torch.zeros(tensor.shape, dtype=tensor.dtype, device=GPU))
        part: Any = SimpleNamespace(
            next=lambda: batch, open=lambda **place: part, before_update=lambda: None, missing_at=lambda step: 0,
            batch_size_at=lambda step, tokens: 4,
            max_steps=1000, clock=lambda: 0.0, restart=lambda: None, device=GPU, log_every=2, flops_of=lambda spans: 0,
            mark=lambda phase: None, start=lambda: None, finish=lambda: None, step=lambda step: None,
        )  # fmt: skip
        part.display = part.timer = part
        recovery = run.recovery.build(GPU)
        loop = Loop(
            run.loop, TrainState(), part, step, part, lambda step: 1e-3, run.clipping, recovery, part, part, part,
            lambda: None,
        )  # fmt: skip
        patch.setattr(torch.cuda, "Event", Event)
        with Synchronisations(GPU) as counter:
            yield loop, counter


Combination = tuple[str, str, Precision]  # clipping, recovery, precision


def combinations() -> list[Combination]:
    """Every clipping with every recovery and every kind of precision.

    After the backward pass a precision is its loss scaler, or nothing.
    """
    allow_gpu_tensors()
    with fake_tensors():
        precisions = {type(built.scaler): built for built in map(build_precision, option_names("precision"))}
    assert len(precisions) == 2
    return list(product(option_names("clipping"), option_names("recovery"), precisions.values()))


def check_steps(optimizer: str, chosen: list[Combination]) -> None:
    """Do a step of each combination; every other step has a row in the metrics."""
    overrides = (f"optimizer={optimizer}", *OVERRIDES.get(optimizer, ()))
    with loop_of(StepWithoutModel, chosen[0][2], *overrides) as (loop, counter):
        for clipping, recovery, precision in chosen:
            loop.clipping = make_option("clipping", clipping, {})
            loop.recovery = make_option("recovery", recovery, {}).build(GPU)
            loop.step.precision = precision
            counter.waits.clear()
            before = counter.operations
            loop.train_step()
            assert counter.operations > before + 10
            if (optimizer, clipping) not in EXCEPTIONS:
                assert counter.waits == [], (clipping, recovery, precision.name)


@pytest.mark.parametrize("optimizer", option_names("optimizer"))
def test_a_step_never_waits_for_the_device(optimizer: str) -> None:
    """Each optimizer with every clipping, and with every recovery and precision; two of them with all combinations."""
    every = combinations()
    some = [combination for at, combination in enumerate(every) if at % 4 == at // 4 % 4]
    assert {clipping for clipping, _, _ in some} == set(option_names("clipping"))
    assert len({(recovery, precision) for _, recovery, precision in some}) == 4
    check_steps(optimizer, every if optimizer in ("sgd", "adamw") else some)


@pytest.mark.parametrize("precision", option_names("precision"))
def test_forward_and_backward_pass_read_no_number(precision: str) -> None:
    """On a CPU's tensors without data, split as on a GPU: torch for CPUs has no backward pass on those of a GPU."""
    run = Run.compose(*RUN, f"precision={precision}")
    try:
        arithmetic = run.precision.build(CPU)
    except ValueError as error:
        pytest.skip(str(error))
    with fake_tensors(planned_for=GPU.type), Synchronisations(CPU) as counter:
        step = Blueprint(run, 257, arithmetic, 4, micro_batch=2).build()
        batch = made_up_batch(run.objective, 4, 16, is_packed=False)
        step.gradients(batch.map(lambda tensor: torch.zeros(tensor.shape, dtype=tensor.dtype)))
    assert counter.operations > 200
    assert counter.waits == []


def mask(tensor: Tensor) -> Tensor:
    return tensor.view(1)[tensor.view(1) > 0]


@pytest.mark.parametrize("function", [Tensor.item, Tensor.cpu, Tensor.nonzero, bool, mask])
def test_operations_that_wait_are_counted(function: Any) -> None:
    allow_gpu_tensors()
    with fake_tensors(), Synchronisations(GPU) as counter:
        with suppress(Exception):  # a shape that depends on values cannot be told without data
            function(torch.zeros((), device=GPU))
        assert len(counter.waits) == 1
        torch.zeros((), device=GPU).add(1).to("cpu", non_blocking=True)
        assert len(counter.waits) == 1


def test_an_exchange_of_replicas_waits_for_nothing() -> None:
    options = make_option("distributed", "local_sgd", {}, sync_every=1)
    with loop_of(StepWithoutModel, build_precision("fp32")) as (loop, counter):
        replicas = Replicas(options, loop.step.unit, ALONE)
        replicas.adopt(loop.step.optimizer)
        loop.step.parallel = replicas
        counter.waits.clear()
        before = counter.operations
        loop.train_step()
        assert "outer_norm" in loop.readback.pending[-1][1]
        assert counter.operations > before + 30
        assert counter.waits == []
