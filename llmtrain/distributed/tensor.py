"""Tensor parallelism: ranks that share the work of every layer, and train on the same sequences."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from llmtrain.base.places import Place, Places, Shape, places_of
from llmtrain.data import Batch
from llmtrain.distributed.cut import with_size
from llmtrain.distributed.parallel import Parallel
from llmtrain.distributed.unit_cut import UnitCut
from llmtrain.optimizer import ShardedTrainable, Trainable


class TensorShards:
    """The view of an optimizer of a cut unit: ``inner``, of this rank's parts, and their places in whole parameters."""

    def __init__(self, inner: Trainable, cut: UnitCut, places: Places) -> None:
        self.inner = inner
        self.cut = cut
        self._places = places

    @property
    def num_layers(self) -> int:
        return self.inner.num_layers

    @property
    def trained_names(self) -> Sequence[str]:
        return self.inner.trained_names

    def named_weights(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self.inner.named_weights()

    def layer_index(self, name: str) -> int:
        return self.inner.layer_index(name)

    def whole_shape(self, name: str) -> Shape:
        """Shape of the whole parameter."""
        return self._first_box(name).whole

    def first_element(self, name: str) -> int:
        """Number, in the whole parameter, of the first element of this rank's part."""
        return self._first_box(name).first_element

    def gather(self, name: str, part: Tensor) -> Tensor:
        """Put together the whole tensor from each rank's ``part``, which lies as the parameter; all ranks call this."""
        if isinstance(self.inner, ShardedTrainable):
            part = self.inner.gather(name, part)
        return self.cut.whole(name, part)

    def own_part(self, name: str, whole: Tensor) -> Tensor:
        """This rank's part of ``whole``: the inverse of :meth:`gather`."""
        if name in self.cut.cuts:
            whole = self.cut.cuts[name].part(whole, self.cut.ranks.rank)
        return self.inner.own_part(name, whole) if isinstance(self.inner, ShardedTrainable) else whole

    def _first_box(self, name: str) -> Place:
        if name in self._places:
            return places_of(self._places[name])[0]
        shape = tuple(dict(self.named_weights())[name].shape)
        return Place((0,) * len(shape), shape, is_owner=False)


class TensorParallel(Parallel):
    """A tensor group's share of a unit.

    ``inner`` is the way in which several such groups share it, on other sequences; ``Parallel(cut.unit, world)`` where
    there is one group.  It has been made over ``cut.unit`` after the cut, so that it sees this rank's parts.
    """

    holds_parts: ClassVar[bool] = True

    def __init__(self, inner: Parallel, cut: UnitCut) -> None:
        super().__init__(inner.unit, inner.world)
        assert inner.unit is cut.unit
        self.inner = inner
        self.cut = cut
        self.keeps_casts = inner.keeps_casts  # type: ignore[misc]

    @property
    def data_rank(self) -> int:
        return self.inner.data_rank

    @property
    def data_size(self) -> int:
        return self.inner.data_size

    @property
    def seed_rank(self) -> int:
        return self.inner.seed_rank

    @property
    def trainable(self) -> TensorShards:
        return TensorShards(self.inner.trainable, self.cut, self.places())

    def weights(self) -> list[tuple[str, nn.Parameter]]:
        return self.inner.weights()

    def places(self) -> Places:
        held, rank, cuts = self.inner.places(), self.cut.ranks.rank, self.cut.cuts
        places: dict[str, Place | Sequence[Place]] = {}
        for name, weight in self.inner.trainable.named_weights():
            if name in cuts:
                part = with_size(cuts[name].shape, cuts[name].dim, cuts[name].length(rank))
                own = held.get(name, Place((0,) * len(part), part, self.seed_rank == 0))
                assert isinstance(own, Place)
                places[name] = cuts[name].places(rank, own, tuple(weight.shape))
            elif name in held:  # the same on all ranks of the group: one of them writes it
                of_others = [replace(box, is_owner=box.is_owner and rank == 0) for box in places_of(held[name])]
                places[name] = of_others if len(of_others) > 1 else of_others[0]
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

    def largest(self, value: Tensor) -> Tensor:
        return self.cut.ranks.gather(self.inner.largest(value)).amax()  # NaN if one of them is

    @contextmanager
    def whole_weights(self) -> Iterator[None]:
        """Context in which one rank alone may call the model; every rank enters and leaves it at the same place.

        In it each rank has the whole unit, in memory beside its parts.
        """
        with self.inner.whole_weights(), self.cut.suspended():
            yield

    def scoring(self) -> AbstractContextManager[None]:
        return self.inner.scoring()
