"""Pipeline parallelism: ranks that each hold some of the layers, and train on the same sequences."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from llmtrain.base.places import Place, Places, places_of
from llmtrain.base.world import World
from llmtrain.clipping import ClipResult
from llmtrain.data import Batch
from llmtrain.distributed.allocation import allocate, device_of, is_described
from llmtrain.distributed.data_parallel import Sharded
from llmtrain.distributed.options import Distributed
from llmtrain.distributed.parallel import Parallel
from llmtrain.distributed.pipeline_group import PipelineGroup
from llmtrain.distributed.schedules import Schedules, Shape, fit_batches
from llmtrain.distributed.stage_data import StagePeers, StageWeights, sum_over_replicas
from llmtrain.distributed.stages import (
    Division,
    Stage,
    Work,
    layer_costs,
    leave_to_others,
    refuse_undivided,
    set_tensor,
    share_of_loss,
    split_layers,
    tied_weight,
)
from llmtrain.objective import MODEL, TrainingUnit
from llmtrain.optimizer import Trainable
from llmtrain.precision import Precision

NUMBER = torch.zeros(1, dtype=torch.int64)  # of the only micro-batch of an evaluation


class Pipeline(Parallel):
    """The stages of a unit on the ranks of the mesh's dimension ``pipeline``; each rank holds its own alone.

    Ranks along ``replicate`` and ``shard`` hold the same stages, and train on other sequences: gradients are summed
    over them after the last micro-batch, or by FSDP.

    The losses of a step are those of the last stages, and zero on the other ranks; so are the results of a call of the
    unit, of its ``score`` and its ``sequence_losses``, which run without gradients: all ranks call them together.
    """

    holds_parts: ClassVar[bool] = True

    def __init__(self, unit: TrainingUnit, world: World, mesh: DeviceMesh, options: Distributed) -> None:
        """``unit``: built alike on every rank; what others hold leaves this rank's memory.

        Of a unit on the meta device this rank's stages alone get memory, without values.
        """
        super().__init__(unit, world)
        refuse_undivided(unit)
        device, has_memory = device_of(mesh), not is_described(unit)
        self.ranks = PipelineGroup(mesh.get_group("pipeline"), device)
        degree, name = self.ranks.size, options.pipeline_schedule
        blocks, first, last = layer_costs(unit)
        self.division = Division(
            split_layers(blocks, degree * options.stages_per_process, first=first, last=last), degree, tied_weight(unit)
        )
        self.hidden_size = int(unit.model.head_weight.shape[1])
        self._refuse_idle_ranks()
        leave_to_others(unit, lambda name, depth: self.holds(name))
        self.stages = [Stage(unit, self.division, stage) for stage in self.division.stages_on(self.ranks.rank)]
        self.own = StageWeights(unit, self.holds)
        self.peers = StagePeers(mesh)
        self.inner = self._share_stages(mesh, options)
        for stage in () if has_memory else self.stages:
            allocate(stage, device)
        self._may_compile = name != "zero_bubble"  # which calls backward in two parts
        self.keeps_casts = self.inner is None and name != "zero_bubble"  # type: ignore[misc]
        self.schedules = Schedules(
            name, self.stages, self.division, self.ranks, self.hidden_size, self._boundaries(), lambda loss: loss
        )
        self._counts_shape: torch.Size | str | None = "unknown"
        self._take_calls(unit)

    def _share_stages(self, mesh: DeviceMesh, options: Distributed) -> Sharded | None:
        """FSDP of this rank's stages, if the mesh divides them further."""
        if mesh["shard"].size() == 1:
            return None
        part = mesh["shard"] if mesh["replicate"].size() == 1 else mesh["replicate", "shard"]
        return Sharded(
            self.unit, self.world, part, reshard_after_forward=options.reshard_after_forward,
            roots=[(stage, stage.own_blocks()) for stage in self.stages], own=self.own, peers=self.peers,
        )  # fmt: skip

    def _refuse_idle_ranks(self) -> None:
        """Raise ValueError if a rank would have nothing to train."""
        trained = {rank for name, _ in self.unit.trained_weights() for rank in self._ranks_of(name)}
        if idle := sorted(set(range(self.ranks.size)) - trained):
            number = "first" if idle[0] == 0 else f"{idle[0] + 1}."
            raise ValueError(
                f"distributed.pipeline={self.ranks.size}: the {number} process would hold frozen weights alone, and "
                "have nothing to train; train more layers, or take distributed=ddp or fsdp"
            )

    def _boundaries(self) -> list[bool]:
        """True for each stage whose input has a gradient: something before it is trained."""
        depths = [
            self.division.holders(name, self.unit.layer_index(name))[0] for name, _ in self.unit.trained_weights()
        ]
        return [min(depths) < stage for stage in range(self.division.stages)]

    # --- who holds what ---------------------------------------------------------------------------------------------

    def _ranks_of(self, name: str) -> list[int]:
        """The ranks of the pipeline that hold the parameter ``name``, the one that writes it first."""
        return [self.division.rank_of(stage) for stage in self.division.holders(name, self.unit.layer_index(name))]

    def holds(self, name: str) -> bool:
        """True if a stage of this rank holds the parameter."""
        return self.ranks.rank in self._ranks_of(name)

    @property
    def is_last(self) -> bool:
        """True if this rank has the last stage, and the losses."""
        return self.ranks.rank == self.ranks.last

    @property
    def data_rank(self) -> int:
        return self.peers.rank

    @property
    def data_size(self) -> int:
        return self.peers.size

    @property
    def is_compilable(self) -> bool:
        return self._may_compile

    @property
    def seed_rank(self) -> int:
        return self.ranks.rank * self.data_size + self.data_rank

    @property
    def trainable(self) -> Trainable:
        return self.own if self.inner is None else self.inner.trainable

    def weights(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, weight) for name, weight in self.trainable.named_weights() if weight.requires_grad]

    def places(self) -> Places:
        """The boxes of this rank's parameters, and no box of the others."""
        divided = {} if self.inner is None else self.inner.places()
        places: dict[str, Place | Sequence[Place]] = {}
        for name, tensor in [*self.unit.named_weights(), *self.unit.saved_buffers()]:
            holders = self._ranks_of(name)
            if self.ranks.rank not in holders:
                places[name] = ()
                continue
            shape, is_writer = tuple(tensor.shape), holders[0] == self.ranks.rank
            place = divided.get(name, Place((0,) * len(shape), shape, self.data_rank == 0))
            (place,) = places_of(place)
            places[name] = place if is_writer else Place(place.offset, place.whole, False, place.shape)
        return places

    # --- a step -----------------------------------------------------------------------------------------------------

    def run_all(self, micro_batches: Iterator[Batch], precision: Precision) -> tuple[Tensor, dict[str, Tensor]]:
        given = [self.unit.fit_shape(batch) for batch in micro_batches]
        batches = fit_batches(given, self.schedules.name, self.ranks.size)
        inputs = batches[0].tensors["inputs"]
        with precision.autocast():
            shape = Shape(len(batches), inputs.shape[0], inputs.shape[1], self._stream_dtype())
        for stage in self.stages:
            stage.work = Work(batches, share_of_loss, precision.autocast)
        self.schedules.scale = precision.scale
        results = self.schedules.run(shape)
        self._finish_gradients()
        names = list(batches[0].counts)
        if self.is_last:
            total, *parts = torch.stack(results).sum(0).unbind()
        else:
            total, *parts = self._zeros(1 + len(names)).unbind()
        return total, dict(zip(names, parts, strict=True))

    def _stream_dtype(self) -> torch.dtype:
        """The dtype of the hidden states between stages, in the arithmetic of now."""
        weight = next(weight for _, weight in self.own.named_weights())
        return self.unit.model.residual_stream(torch.empty(0, dtype=weight.dtype, device=self.ranks.device)).dtype

    def _zeros(self, *size: int) -> Tensor:
        """Losses of 0, as of a rank that does not know them."""
        weight = next(weight for _, weight in self.own.named_weights())
        return torch.zeros(size, dtype=torch.promote_types(weight.dtype, torch.float32), device=self.ranks.device)

    @torch.no_grad()
    def _finish_gradients(self) -> None:
        """Sum the gradients over the ranks that hold the same parameters."""
        if self.inner is not None:
            self.inner.take_gradients()
        else:
            sum_over_replicas([weight.grad for _, weight in self.weights() if weight.grad is not None], self.peers)
        tied = [weight.grad for name, weight in self.weights() if name == self.division.tied]
        if any(gradient is not None for gradient in tied):
            self.ranks.add_between_ends([gradient for gradient in tied if gradient is not None])

    def drop_gradients(self) -> None:
        if self.inner is not None:
            self.inner.drop_gradients()
            return
        for _, weight in self.own.named_weights():
            weight.grad = None

    # --- numbers that ranks agree on --------------------------------------------------------------------------------

    def sum_losses(self, losses: Tensor, flags: Tensor | None) -> tuple[Tensor, Tensor | None]:
        both = self.world.sum(losses if flags is None else torch.cat([losses, flags.to(losses)]))
        return both[: len(losses)], None if flags is None else both[len(losses) :]

    def sum_over_data(self, values: Tensor) -> Tensor:
        summed = self.world.sum(values.double() if self.is_last else torch.zeros_like(values, dtype=torch.float64))
        return summed.to(values.dtype) if values.is_floating_point() else summed.round().to(values.dtype)

    def sum_of_squares(self, squares: Tensor, names: Sequence[str]) -> Tensor:
        return squares if self.inner is None else self.inner.sum_of_squares(squares, names)

    def total_norm(self, norms: Tensor, names: Sequence[str]) -> Tensor:
        squares = norms.double().square()
        if self.is_last and (tied := self.division.tied) is not None and tied in names:  # the first stage counts it
            squares[list(names).index(tied)] = 0.0
        return self.ranks.sum(squares.sum()).sqrt().to(norms.dtype)

    def largest(self, value: Tensor) -> Tensor:
        return self.ranks.largest(value if self.inner is None else self.inner.largest(value))

    def agree_on(self, clip: ClipResult) -> ClipResult:
        """The same, and clipped where the gradients of one stage were."""
        return clip._replace(clipped=self.ranks.sum(clip.clipped.float()) > 0)

    # --- evaluation -------------------------------------------------------------------------------------------------

    def _take_calls(self, unit: TrainingUnit) -> None:
        """Have the unit's calls run through all stages."""
        unit.forward = partial(self._losses, _forward)  # type: ignore[method-assign]
        unit.score = self._score  # type: ignore[method-assign]
        unit.sequence_losses = self._sequence_losses  # type: ignore[method-assign]

    @torch.no_grad()
    def _through_stages(self, batch: Batch, finish: Callable[[TrainingUnit, Batch], Any]) -> Any:
        """Run ``batch`` through all stages; what ``finish`` makes of it on the last rank, None on the others."""
        size = (*batch.tensors["inputs"].shape, self.hidden_size)
        result = None
        for stage in self.stages:
            stage.work = Work([batch], finish)
            received: tuple[Tensor, ...] = ()
            if not stage.is_first:
                empty = torch.empty(size, dtype=self._stream_dtype(), device=self.ranks.device)
                received = (self.ranks.receive(empty, self.division.rank_of(stage.index - 1)),)
            result = stage(*received, number=NUMBER)
            if not stage.is_last:
                self.ranks.send(result, self.division.rank_of(stage.index + 1))
        return result if self.is_last else None

    def _losses(self, finish: Callable[[TrainingUnit, Batch], Any], batch: Batch) -> dict[str, Tensor]:
        found = self._through_stages(batch, finish)
        return found if self.is_last else {name: self._zeros() for name in batch.counts}

    def _score(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor | None]:
        found = self._through_stages(batch, lambda unit, batch: unit.score(batch))
        losses, counts = found if self.is_last else ({name: self._zeros() for name in batch.counts}, None)
        if isinstance(self._counts_shape, str):
            self._counts_shape = self.ranks.share_shape(None if counts is None else counts.shape)
        if counts is None and self._counts_shape is not None:
            counts = torch.zeros(self._counts_shape, dtype=torch.int64, device=self.ranks.device)
        return losses, counts

    def _sequence_losses(self, batch: Batch) -> dict[str, Tensor]:
        found = self._through_stages(batch, lambda unit, batch: unit.sequence_losses(batch))
        losses = found if self.is_last else {name: self._zeros(batch.sequences) for name in batch.counts}
        return {name: self.ranks.share_last(values.contiguous()) for name, values in losses.items()}

    @contextmanager
    def scoring(self) -> Iterator[None]:
        if self.inner is None:
            yield
        else:
            with self.inner.scoring():
                yield
        self.ranks.finish_sends()

    @contextmanager
    def whole_weights(self) -> Iterator[None]:
        """Context in which rank 0 has the whole unit, in memory beside its stages, and may call the model alone."""
        if self.inner is None:
            with self._gathered():
                yield
        else:
            with self.inner.whole_weights(), self._gathered():
                yield

    @contextmanager
    def _gathered(self) -> Iterator[None]:
        """The stages of other ranks on the first of this pipeline, if it is rank 0 of the world."""
        lent: list[tuple[nn.Module, str, Tensor]] = []
        if self.data_rank == 0:
            for module, key, name in self._tensors():
                source, tensor = self._ranks_of(name)[0], getattr(module, key)
                if source == 0 or self.ranks.rank not in (0, source):
                    continue
                if self.ranks.rank == 0:
                    lent.append((module, key, tensor))
                    held = torch.empty_like(tensor, device=self.ranks.device)
                    set_tensor(module, key, self.ranks.receive(held.detach(), source))
                else:
                    self.ranks.send(tensor.detach(), 0)
            self.ranks.finish_sends()
        try:
            yield
        finally:
            for module, key, tensor in lent:
                set_tensor(module, key, tensor.detach())

    def _tensors(self) -> Iterator[tuple[nn.Module, str, str]]:
        """Every tensor that one rank holds alone: its module, its key there, and its name."""
        for prefix, module in self.unit.named_modules():
            own = [key for key, tensor in module._parameters.items() if tensor is not None]
            if ".blocks." in f".{prefix}.":
                own += [key for key, tensor in module._buffers.items() if tensor is not None]
            for key in own:
                yield module, key, f"{prefix}.{key}".removeprefix(MODEL)


def _forward(unit: TrainingUnit, batch: Batch) -> dict[str, Tensor]:
    return unit(batch)
