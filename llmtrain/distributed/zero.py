"""ZeRO by DeepSpeed (Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054), below our own step.

DeepSpeed divides parameters, sums their gradients over the ranks and gathers weights; its engine runs each pass and
counts, times and profiles as its JSON says.  The step is ours: losses, norms, clipping, refused steps, the optimizer,
which updates the rank's elements in place, and checkpoints, which are read and written as those elements.
"""

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from llmtrain.base.checks import needing_package
from llmtrain.base.places import Places
from llmtrain.base.world import World
from llmtrain.data import Batch
from llmtrain.distributed.data_parallel import DataParallel, casts_not_kept, refuse_packed
from llmtrain.distributed.deepspeed import MISSING, check_version
from llmtrain.distributed.fragments import Fragments
from llmtrain.distributed.zero_partitions import DividedParameters, FlatGroup, Partition
from llmtrain.objective import TrainingUnit
from llmtrain.optimizer import Trainable, update

CALLS = ("score", "sequence_losses")  # methods of a unit, beside its call, that compute with its weights


class UnitPasses(nn.Module):
    """The forward passes of a unit, by name: DeepSpeed gathers weights for the calls of the module that it is given."""

    def __init__(self, unit: TrainingUnit) -> None:
        super().__init__()
        self.unit = unit
        self._methods = {name: getattr(unit, name) for name in CALLS}

    def forward(self, name: str, batch: Batch, autocast: AbstractContextManager) -> Any:
        """Call ``unit`` (the name ``""``) or a method of it; DeepSpeed switches autocast off, ``autocast`` on again."""
        with autocast:
            return self._methods[name](batch) if name else self.unit(batch)


class Zero(DataParallel):
    """A unit that DeepSpeed divides over the ranks of ``mesh``, by the ``settings`` of its JSON.

    ZeRO 1 divides the optimizer's state, 2 gradients as well, and 3 weights as well.  The unit has its weights, the
    same on every rank.
    """

    holds_parts: ClassVar[bool] = True
    keeps_casts: ClassVar[bool] = False

    def __init__(self, unit: TrainingUnit, world: World, mesh: DeviceMesh, settings: Mapping[str, Any]) -> None:
        super().__init__(unit, world, mesh)
        self.stage: int = settings["zero_optimization"]["stage"]
        if self.divides_weights:
            refuse_packed(unit)
            keep_counts(unit)
        self.device_type = unit.trained_weights()[0][1].device.type
        names = {id(parameter): name for name, parameter in unit.named_weights()}
        self.engine = start_engine(unit, settings)
        optimizer = self.engine.optimizer
        self.partition: Partition = (DividedParameters if self.divides_weights else FlatGroup)(optimizer, unit, names)
        self.fragments = Fragments(unit, world, self.partition.fragments())
        self._update: Callable[[], None] | None = None
        optimizer.step = self._step
        for name in CALLS:
            setattr(unit, name, partial(self._call, name))

    @property
    def divides_weights(self) -> bool:
        """True for ZeRO 3."""
        return self.stage == 3

    @property
    def is_compilable(self) -> bool:
        return not self.divides_weights

    @property
    def trainable(self) -> Trainable:
        return self.fragments

    def weights(self) -> list[tuple[str, nn.Parameter]]:
        return self.fragments.trained()

    def places(self) -> Places:
        return self.fragments.places()

    # --- the step ---------------------------------------------------------------------------------------------------

    def _call(self, name: str, batch: Batch) -> Any:
        device = self.device_type
        autocast = torch.autocast(
            device, torch.get_autocast_dtype(device), enabled=torch.is_autocast_enabled(device),
            cache_enabled=torch.is_autocast_cache_enabled(),
        )  # fmt: skip
        return self.engine(name=name, batch=batch, autocast=autocast)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        sums: dict[str, Tensor] = self._call("", batch)
        return sums

    def prepare(self, *, is_last: bool) -> AbstractContextManager[None]:
        self.engine.set_gradient_accumulation_boundary(is_last)
        return nullcontext()

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        # DeepSpeed takes the mean over the ranks
        self.engine.backward(loss * self.data_size, scale_wrt_gas=False)
        if is_last:
            self.fragments.take_gradients(self.partition.gradients())

    def update(self, optimizer: torch.optim.Optimizer, skipped: Tensor, divisor: Tensor | None) -> None:
        self._update = partial(update, optimizer, skipped, divisor)
        self.engine.step()

    def _step(self) -> None:
        """The step of DeepSpeed's optimizer: ours, and the exchange of the new weights."""
        assert self._update is not None
        self.partition.forget_whole()
        self._update()
        self.partition.gather_whole()
        self._update = None

    def use_loaded(self) -> None:
        self.partition.forget_whole()
        self.partition.gather_whole()

    def drop_gradients(self) -> None:
        self.fragments.drop_gradients()
        self.partition.drop_gradients()

    # --- numbers and passes without gradients -----------------------------------------------------------------------

    def sum_of_squares(self, squares: Tensor, names: Sequence[str]) -> Tensor:
        return self.fragments.sum_of_squares(squares, names)

    def largest(self, value: Tensor) -> Tensor:
        return self.fragments.largest(value)

    def scoring(self) -> AbstractContextManager[None]:
        return casts_not_kept()

    def whole_weights(self) -> AbstractContextManager[None]:
        return self.partition.whole_weights()


def keep_counts(unit: TrainingUnit) -> None:
    """Have ``unit`` count parameters and operations as now, when its parameters are no longer whole."""
    model, counts, parts, operations = (
        unit.model, unit.count_parameters(), unit.model.parameters_by_part(), unit.flops_per_token(0)
    )  # fmt: skip
    trained = [model.layer_index(name) for name, weight in model.named_parameters() if weight.requires_grad]
    reached = min(trained, default=model.num_layers + 1)  # as in LanguageModel.flops_per_token

    def flops_per_token(sequence_length: int) -> int:
        attention = (
            model.attention_flops(layer, sequence_length) * (3 if layer + 1 >= reached else 1)
            for layer in range(model.num_layers)
        )
        return operations + sum(attention)

    unit.flops_per_token = flops_per_token  # type: ignore[method-assign]
    unit.count_parameters = lambda: counts  # type: ignore[method-assign]
    model.parameters_by_part = lambda: parts  # type: ignore[method-assign]


def start_engine(unit: TrainingUnit, settings: Mapping[str, Any]) -> Any:
    """Have DeepSpeed take over the passes of ``unit``, among the ranks that torch.distributed knows already.

    Raises ValueError if it is not installed, or in another version.
    """
    trained = [parameter for _, parameter in unit.trained_weights()]
    deepspeed = import_deepspeed(trained[0].device)
    stand_in = torch.optim.AdamW(trained, lr=0.0)  # an optimizer that DeepSpeed knows; it steps nothing
    size = sum(parameter.numel() for parameter in trained)
    zero = {"reduce_bucket_size": min(size, 500_000_000)} | settings["zero_optimization"]
    with without_packed(unit):
        engine, *_ = deepspeed.initialize(
            model=UnitPasses(unit), optimizer=stand_in, config={**settings, "zero_optimization": zero},
            dist_init_required=False,
        )  # fmt: skip
    return engine


def import_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed for a run on ``device``.  Raises ValueError if it is not installed, or in another version."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # or it takes a GPU that this run does not use
    with needing_package(MISSING):
        import deepspeed
    check_version(deepspeed.__version__)
    # gloo sums as well, and this kernel would be compiled first, for minutes
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)  # that it calls
    return deepspeed


@contextmanager
def without_packed(unit: TrainingUnit) -> Iterator[None]:
    """Context without the parameters that stand, without data, for frozen weights in few bits."""
    hidden = [
        (module, name, parameter)
        for module in unit.modules() for name, parameter in module.named_parameters(recurse=False) if parameter.is_meta
    ]  # fmt: skip
    for module, name, _ in hidden:
        module.register_parameter(name, None)
    try:
        yield
    finally:
        for module, name, parameter in hidden:
            module.register_parameter(name, parameter)
