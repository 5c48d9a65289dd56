"""The memory of parameters that were described on the meta device, once ranks have divided them."""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh


def device_of(mesh: DeviceMesh) -> torch.device:
    """The device of this rank in ``mesh``."""
    kind = mesh.device_type
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)


def is_described(module: nn.Module) -> bool:
    """Return whether no parameter of ``module`` has memory yet."""
    return all(parameter.is_meta for parameter in module.parameters())


def allocate(module: nn.Module, device: torch.device) -> None:
    """Give every parameter of ``module`` that is on the meta device memory on ``device``, without values.

    Parameters that are sharded get that of this rank's shard.
    """
    module._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)
