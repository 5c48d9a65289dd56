"""Tensor parallelism: ranks that share the work of every layer, and train on the same sequences."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from llmtrain.data import Batch
from llmtrain.distributed.cut import box_within
from llmtrain.distributed.parallel import Parallel, Place
from llmtrain.distributed.unit_cut import UnitCut
from llmtrain.optimizer import Trainable


class TensorParallel(Parallel):
    """A tensor group's share of a unit.

    ``inner`` is the way in which several such groups share it, on other sequences; ``Parallel(cut.unit, world)`` where
    there is one group.  It has been made over ``cut.unit`` after the cut, so that it sees this rank's parts.
    """

    def __init__(self, inner: Parallel, cut: UnitCut) -> None:
        super().__init__(inner.unit, inner.world)
        assert inner.unit is cut.unit
        self.inner = inner
        self.cut = cut

    @property
    def data_rank(self) -> int:
        return self.inner.data_rank

    @property
    def data_size(self) -> int:
        return self.inner.data_size

    @property
    def trainable(self) -> Trainable:
        return self.inner.trainable

    def weights(self) -> list[tuple[str, nn.Parameter]]:
        return self.inner.weights()

    def places(self) -> Mapping[str, Sequence[Place]]:
        held, rank = self.inner.places(), self.cut.ranks.rank
        places: dict[str, Sequence[Place]] = {}
        for name, cut in self.cut.cuts.items():
            own = cut.places(rank, is_owner=name in held or self.data_rank == 0)
            local = list(cut.shape)
            local[cut.dim] = sum(end - begin for begin, end in cut.ranges[rank])
            places[name] = box_within(own, held[name], tuple(local)) if name in held else own
        for name in held.keys() - places.keys():  # the same on all ranks of the group: one of them writes it
            places[name] = [
                Place(box.offset, box.whole, box.is_owner and rank == 0, box.start, box.shape) for box in held[name]
            ]
        return places

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return self.inner.forward(batch)

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        self.inner.backward(loss, is_last=is_last)
        if is_last:
            self._sum_partial_gradients()

    @torch.no_grad()
    def _sum_partial_gradients(self) -> None:
        """Sum the gradients that each rank has computed from its heads, channels or positions alone."""
        gradients = [weight.grad for name, weight in self.weights() if name in self.cut.partial]
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for gradient in gradients:
            if gradient is not None and gradient.numel():
                by_dtype.setdefault(gradient.dtype, []).append(gradient)
        for tensors in by_dtype.values():  # small ones: in one collective
            flat = self.cut.ranks.sum(torch.cat([tensor.reshape(-1) for tensor in tensors]))
            parts = flat.split([tensor.numel() for tensor in tensors])
            torch._foreach_copy_(tensors, [part.view_as(own) for part, own in zip(parts, tensors, strict=True)])

    def prepare(self, *, is_last: bool) -> AbstractContextManager[None]:
        return self.inner.prepare(is_last=is_last)

    def drop_gradients(self) -> None:
        self.inner.drop_gradients()

    def sum_of_squares(self, squares: Tensor, names: Sequence[str]) -> Tensor:
        squares = self.inner.sum_of_squares(squares, names)
        is_cut = [name in self.cut.cuts for name in names]
        # a power of two mostly, so that the sum of equal parts is exact
        held = torch.tensor([1.0 if cut else 1.0 / self.cut.ranks.size for cut in is_cut], dtype=squares.dtype)
        return self.cut.ranks.sum(squares * held.to(squares.device, non_blocking=True))

    @contextmanager
    def whole_weights(self) -> Iterator[None]:
        """Context in which one rank alone may call the model; every rank enters and leaves it at the same place.

        In it each rank has the whole unit, in memory beside its parts.
        """
        with self.cut.suspended():
            yield

    def scoring(self) -> AbstractContextManager[None]:
        return self.inner.scoring()
