"""The parts of DeepSpeed that our step builds on: where it keeps a rank's elements, and how they become whole again.

Everything here that has no place in DeepSpeed's documentation is checked by the tests, with the version that the extra
``deepspeed`` pins.  A run keeps one fp32 copy of its weights: DeepSpeed's second one, made for weights of 16 bits, is
given up.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llmtrain.distributed.fragments import Fragment
from llmtrain.objective import TrainingUnit


class Partition(ABC):
    """A rank's elements of the parameters of ``unit``, kept by DeepSpeed's ``optimizer``.

    ``names``: of the parameters, by their identity.
    """

    def __init__(self, optimizer: Any, unit: TrainingUnit, names: Mapping[int, str]) -> None:
        self.optimizer, self.unit, self.names = optimizer, unit, names

    @abstractmethod
    def fragments(self) -> dict[str, Fragment]:
        """The rank's elements, in the memory of DeepSpeed, by the names of the parameters that are divided."""

    @abstractmethod
    def gradients(self) -> dict[str, Tensor]:
        """The gradients of the trained fragments after the last backward pass of a step, summed over the ranks."""

    @abstractmethod
    def drop_gradients(self) -> None:
        """Forget the gradients of the step."""

    def forget_whole(self) -> None:  # noqa: B027 (there may be none)
        """Free whole weights that were gathered: the elements are about to change."""

    @abstractmethod
    def gather_whole(self) -> None:
        """Gather the whole weights that the next pass expects, from the elements of all ranks."""

    @contextmanager
    def whole_weights(self) -> Iterator[None]:
        """Context in which one rank alone may call the model; all enter and leave it."""
        yield


class FlatGroup(Partition):
    """ZeRO 1 and 2: the trained parameters one after the other in one tensor, of which each rank has an equal stretch.

    Every rank also has the whole tensor, in which the model's weights lie; the stretch is a view of it.
    """

    def __init__(self, optimizer: Any, unit: TrainingUnit, names: Mapping[int, str]) -> None:
        super().__init__(optimizer, unit, names)
        (partitions,) = optimizer.parallel_partitioned_bit16_groups
        (master,) = optimizer.single_partition_of_fp32_groups
        self.rank: int = torch.distributed.get_rank(optimizer.real_dp_process_group[0])
        self.own: Tensor = partitions[self.rank]
        master.data = self.own

    def fragments(self) -> dict[str, Fragment]:
        found = {}
        for name, parameter in self.unit.trained_weights():
            mapping, whole = parameter._hp_mapping, tuple(parameter.shape)  # type: ignore[attr-defined]
            begin = own = size = 0
            if mapping is not None:
                begin, own = mapping.lp_fragment_address.start, mapping.hp_fragment_address.start
                size = mapping.hp_fragment_address.numel
            found[name] = Fragment(nn.Parameter(self.own.narrow(0, own, size)), begin, whole)
        return found

    def gradients(self) -> dict[str, Tensor]:
        parameters = self.optimizer.params_in_partition[0]
        # in their order; padding between and behind them is marked, or comes last
        parts = [part for part in self.optimizer.averaged_gradients[0] if not getattr(part, "_zero_padding", False)]
        return {self.names[id(each)]: part.reshape(-1) for each, part in zip(parameters, parts, strict=False)}

    def drop_gradients(self) -> None:
        self.optimizer.micro_step_id = -1
        self.optimizer.averaged_gradients[0] = self.optimizer.all_grad_tensors[0] = None
        self.optimizer.zero_grad()

    def gather_whole(self) -> None:
        self.optimizer.update_lp_params()


class DividedParameters(Partition):
    """ZeRO 3: every parameter flattened and divided, its last stretch padded; whole while a pass needs it."""

    def __init__(self, optimizer: Any, unit: TrainingUnit, names: Mapping[int, str]) -> None:
        super().__init__(optimizer, unit, names)
        optimizer.fp32_partitioned_groups_flat = list(optimizer.fp16_partitioned_groups_flat)

    def fragments(self) -> dict[str, Fragment]:
        found = {}
        for name, parameter in self.unit.named_weights():
            divided: Any = parameter
            part, whole = divided.ds_tensor, tuple(divided.ds_shape)
            rank = torch.distributed.get_rank(divided.ds_process_group)
            begin = min(rank * part.ds_numel, divided.ds_numel)
            elements = part.data.narrow(0, 0, min(part.ds_numel, divided.ds_numel - begin))
            found[name] = Fragment(nn.Parameter(elements, requires_grad=parameter.requires_grad), begin, whole)
        return found

    def gradients(self) -> dict[str, Tensor]:
        found = {}
        for number, group in enumerate(self.optimizer.fp16_groups):
            for parameter, part in zip(group, self.optimizer.averaged_gradients[number], strict=True):
                rank = torch.distributed.get_rank(parameter.ds_process_group)
                size = min(part.numel(), max(parameter.ds_numel - rank * part.numel(), 0))
                found[self.names[id(parameter)]] = part.narrow(0, 0, size)
        return found

    def drop_gradients(self) -> None:
        self.optimizer._pre_step()
        self.optimizer.averaged_gradients = {}
        self.optimizer.zero_grad()

    def forget_whole(self) -> None:
        self.optimizer._partition_all_parameters()

    def gather_whole(self) -> None:
        self.optimizer._post_step(set())  # small parameters, which stay whole between passes

    @contextmanager
    def whole_weights(self) -> Iterator[None]:
        import deepspeed

        hooks = self.optimizer.parameter_offload
        self.forget_whole()
        with deepspeed.zero.GatheredParameters(list(self.unit.parameters())):
            for hook in (*hooks.forward_hooks, *hooks.backward_hooks):  # they exchange with other ranks
                hook.remove()
            hooks.forward_hooks, hooks.backward_hooks = [], []
            try:
                yield
            finally:
                hooks._register_deepspeed_module(hooks.module)
        self.gather_whole()
