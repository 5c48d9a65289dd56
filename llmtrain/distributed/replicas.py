"""Replicas that train on their own, each on a rank, and exchange their progress now and then (``local_sgd``)."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmtrain.base.places import OUTER_MOMENTUM, OWN_WEIGHT, Place, Places, Replica
from llmtrain.base.world import World
from llmtrain.clipping import ClipResult
from llmtrain.distributed.exchange import Sum, exchange_of
from llmtrain.distributed.local_sgd import LocalSgd
from llmtrain.distributed.parallel import Parallel
from llmtrain.objective import TrainingUnit

BUCKET = 1 << 24  # weights whose outer gradients are exchanged at once; the next ones are prepared meanwhile


class Replicas(Parallel):
    """A whole unit on each rank, with weights of its own between two exchanges: DiLoCo.

    The unit has the replica's own weights; in :meth:`scoring` and :meth:`whole_weights`, and in the model of a
    checkpoint, the common ones.  The gradient of a replica is the number of replicas times its part of the gradient of
    the whole batch: that of the mean over its own targets, where all replicas have as many.  Each clips its own.

    What an exchange needs (own weights, outer momentum) is in the state of the optimizer, so that saves, resumes and
    rollbacks restore it.

    ``ranks``: the group of the replicas; None: there is one.
    """

    def __init__(
        self, options: LocalSgd, unit: TrainingUnit, world: World, ranks: dist.ProcessGroup | None = None
    ) -> None:
        super().__init__(unit, world)
        self.options = options
        self.outer_weights: dict[str, Tensor] = {}  # the common weights, by name
        self._own: list[nn.Parameter] = []  # in the same order, as the next two
        self._momentum: list[Tensor] = []
        self._inner_state: list[Tensor] = []  # of the inner optimizer
        self._sum: Sum | None = None if ranks is None else exchange_of(options.exchange, ranks)

    @property
    def data_rank(self) -> int:
        return self.world.rank

    @property
    def data_size(self) -> int:
        return self.world.size

    # --- the state --------------------------------------------------------------------------------------------------

    def adopt(self, optimizer: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups:
            for name, weight in zip(group["names"], group["params"], strict=True):
                state = optimizer.state[weight]
                self._inner_state += [
                    value for value in state.values() if isinstance(value, Tensor) and value.device == weight.device
                ]
                self.outer_weights[name] = weight.detach().clone(memory_format=torch.preserve_format)
                state[OWN_WEIGHT] = weight.detach()  # the same memory: what is loaded is trained
                state[OUTER_MOMENTUM] = torch.zeros_like(
                    weight, dtype=torch.float32, memory_format=torch.preserve_format
                )
                self._own.append(weight)
                self._momentum.append(state[OUTER_MOMENTUM])

    def held(self) -> Mapping[str, Tensor]:
        return self.outer_weights

    def places(self) -> Places:
        replica = Replica(self.world.rank, self.world.size)
        return {
            name: Place((0,) * weight.dim(), tuple(weight.shape), self.world.is_first, replica=replica)
            for name, weight in self.outer_weights.items()
        }

    # --- a step -----------------------------------------------------------------------------------------------------

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        (loss * self.data_size).backward()

    def agree_on(self, clip: ClipResult) -> ClipResult:
        """The root mean square of the replicas' norms, and whether one of them clipped; each keeps its own divisor."""
        if self.world.size == 1:
            return clip
        # the largest side by side: the maximum of some libraries loses a NaN
        largest = clip.norm.new_zeros(0 if clip.largest is None else self.world.size)
        if clip.largest is not None:
            largest[self.world.rank] = clip.largest
        own = torch.stack([clip.norm.square() / self.world.size, clip.clipped.to(clip.norm)])
        sums = self.world.sum(torch.cat([own, largest]))
        return clip._replace(
            norm=sums[0].sqrt(), clipped=sums[1] > 0, largest=None if clip.largest is None else sums[2:].amax()
        )

    def after_update(self, step: int, *, is_last: bool) -> dict[str, Tensor]:
        if not is_last and not self.options.exchanges_at(step):
            return {}
        return self.exchange(misses=self.misses(step, self.world.rank))

    def misses(self, step: int, replica: int) -> bool:
        """Return whether ``replica`` misses the exchange after ``step`` steps: drawn, the same in every run."""
        digest = hashlib.sha256(f"{step}/{replica}".encode()).digest()
        return int.from_bytes(digest[:8], "big") < self.options.missed_rounds * 2**64

    # --- the exchange -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def exchange(self, *, misses: bool = False) -> dict[str, Tensor]:
        """Average the outer gradients and update the common weights, which the replicas take up.

        ``misses``: this one does not take part.  The host waits for nothing.  Returns the norm of the mean outer
        gradient, and the number of replicas that did not count.
        """
        outer = list(self.outer_weights.values())
        norm = torch.stack([(c.float() - w.float()).norm() for c, w in zip(outer, self._own, strict=True)]).norm()
        is_finite = norm.isfinite()
        counts = is_finite & (norm > 0) & (not misses)
        counted = self.world.sum(counts.float())
        share = counts.float() / counted.clamp(min=1)
        any_counts = (counted > 0).float()
        norms = []
        for bucket, mean in self._means(counts, share):
            norms.append(mean.norm())
            self._update(bucket, mean, any_counts)
        if not misses:
            torch._foreach_copy_([weight.detach() for weight in self._own], outer)
            for tensor in self._inner_state:  # zeros, as at the start: a moment that is not finite would stay so
                tensor.masked_fill_(~is_finite, 0)
        return {"outer_norm": torch.stack(norms).norm(), "missed_replicas": self.world.size - counted}

    def _means(self, counts: Tensor, share: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield the weights of each bucket, by their numbers, and their mean outer gradients ``(elements,)``."""
        outer, waiting = list(self.outer_weights.values()), None
        for bucket in buckets([weight.numel() for weight in outer]):
            pairs = zip(outer[bucket], self._own[bucket], strict=True)
            flat = torch.cat([(common.float() - own.detach().float()).flatten() for common, own in pairs])
            flat = torch.where(counts, flat * share, 0.0)
            begun = bucket, (lambda flat=flat: flat) if self._sum is None else self._sum.begin(flat)
            if waiting is not None:
                yield waiting[0], waiting[1]()
            waiting = begun
        if waiting is not None:
            yield waiting[0], waiting[1]()

    def _update(self, bucket: slice, mean: Tensor, any_counts: Tensor) -> None:
        """Update some of the common weights by SGD with Nesterov momentum (as torch's), if ``any_counts`` is 1.0.

        v <- momentum v + mean;  w <- w - lr (mean + momentum v)
        """
        momentum, outer = self._momentum[bucket], list(self.outer_weights.values())[bucket]
        means = [
            part.view_as(weight) for part, weight in zip(mean.split([w.numel() for w in outer]), outer, strict=True)
        ]
        decay = self.options.outer_momentum
        torch._foreach_mul_(momentum, 1 + (decay - 1) * any_counts)
        torch._foreach_add_(momentum, means)
        steps = torch._foreach_add(means, momentum, alpha=decay)
        torch._foreach_mul_(steps, -self.options.outer_lr * any_counts)
        for weight, change in zip(outer, steps, strict=True):
            weight.add_(change)

    # --- the common weights -----------------------------------------------------------------------------------------

    @contextmanager
    def scoring(self) -> Iterator[None]:
        with self._common_weights():
            yield

    @contextmanager
    def whole_weights(self) -> Iterator[None]:
        with self._common_weights():
            yield

    @contextmanager
    def _common_weights(self) -> Iterator[None]:
        """Context in which the unit has the common weights, those of the last exchange."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for own, common in zip(self._own, self.outer_weights.values(), strict=True):
            own.data, common.data = common.data, own.data


def buckets(sizes: Sequence[int]) -> Iterator[slice]:
    """Divide tensors of so many elements into runs of up to ``BUCKET`` elements, or of one tensor."""
    begin = elements = 0
    for number, size in enumerate(sizes):
        if number > begin and elements + size > BUCKET:
            yield slice(begin, number)
            begin, elements = number, 0
        elements += size
    if sizes:
        yield slice(begin, len(sizes))
