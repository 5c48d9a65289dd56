"""The ranks that hold the same stages of a pipeline and train on different sequences, and their weights."""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from llmtrain.objective import TrainingUnit

BUCKET_BYTES = 64 << 20  # of gradients that are summed in one exchange: the memory that it takes


class StageWeights:
    """The view of an optimizer of the parameters that this rank's stages hold, on whole tensors."""

    def __init__(self, unit: TrainingUnit, holds: Callable[[str], bool]) -> None:
        self.unit = unit
        self.holds = holds

    @property
    def num_layers(self) -> int:
        return self.unit.num_layers

    @property
    def trained_names(self) -> Sequence[str]:
        return self.unit.trained_names

    def named_weights(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, weight) for name, weight in self.unit.named_weights() if self.holds(name))

    def layer_index(self, name: str) -> int:
        return self.unit.layer_index(name)


class StagePeers:
    """The ranks of a mesh's dimensions ``replicate`` and ``shard`` that have this rank's stages."""

    def __init__(self, mesh: DeviceMesh) -> None:
        parts = [mesh[name] for name in ("replicate", "shard")]
        self.rank = parts[0].get_local_rank() * parts[1].size() + parts[1].get_local_rank()
        self.size = parts[0].size() * parts[1].size()
        self.replicas = parts[0].get_group() if parts[0].size() > 1 else None
        self._groups = [part.get_group() for part in parts if part.size() > 1]

    @property
    def is_first(self) -> bool:
        """True for one of them."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Replace ``tensor`` by its sum over the ranks; returns it."""
        for group in self._groups:
            dist.all_reduce(tensor, group=group)
        return tensor


def sum_over_replicas(gradients: Sequence[Tensor], peers: StagePeers) -> None:
    """Replace ``gradients`` by their sums over the ranks that hold whole ones of the same parameters."""
    if peers.replicas is None:
        return
    bucket: list[Tensor] = []
    for number, gradient in enumerate(gradients, 1):
        bucket.append(gradient)
        following = gradients[number].dtype if number < len(gradients) else None
        if following != gradient.dtype or sum(tensor.nbytes for tensor in bucket) >= BUCKET_BYTES:
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            dist.all_reduce(flat, group=peers.replicas)
            parts = flat.split([tensor.numel() for tensor in bucket])
            torch._foreach_copy_(bucket, [part.view_as(own) for part, own in zip(parts, bucket, strict=True)])
            bucket = []
