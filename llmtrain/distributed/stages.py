"""The stages of a pipeline: which layers each has, and the modules that run them.

A unit keeps its whole structure on every rank.  What other ranks hold is on ``meta``: names, shapes and counts without
memory.
"""

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from llmtrain.data import Batch
from llmtrain.model import LanguageModel
from llmtrain.objective import MODEL, TrainingUnit, mean_losses

T = TypeVar("T", bound=nn.Module)

# --- the division of the layers -------------------------------------------------------------------------------------


class Cost(NamedTuple):
    """The cost of a block, or of what stands before or behind the blocks."""

    flops: float  # of a token
    parameters: int


NOTHING = Cost(0, 0)


def split_layers(
    blocks: Sequence[Cost], stages: int, *, first: Cost = NOTHING, last: Cost = NOTHING
) -> tuple[range, ...]:
    """Divide ``blocks`` into consecutive ``stages`` so that the slowest is as fast as can be.

    Among such divisions the largest stage, in parameters, is as small as can be.  ``first`` stands before the blocks
    (the embedding), ``last`` behind them (the output layer).  Every stage has a block.
    """
    assert 1 <= stages <= len(blocks)
    flops = _Sums([cost.flops for cost in blocks], first.flops, last.flops, stages)
    parameters = _Sums([cost.parameters for cost in blocks], first.parameters, last.parameters, stages)
    slowest = max(flops.of(stage, *ends) for stage, ends in enumerate(_lowest_peak(flops, lambda *_: True)))
    found = _lowest_peak(parameters, lambda *part: flops.of(*part) <= slowest * (1 + 1e-9))
    return tuple(range(begin, end) for begin, end in found)


class _Sums:
    """The size of a stage, for any blocks that it might have."""

    def __init__(self, sizes: Sequence[float], first: float, last: float, stages: int) -> None:
        self.blocks, self.stages = len(sizes), stages
        self._first, self._last = first, last
        self._until = [0, *accumulate(sizes)]

    def of(self, stage: int, begin: int, end: int) -> float:
        """The size of ``stage`` with the blocks from ``begin`` up to ``end``."""
        own = self._until[end] - self._until[begin]
        return own + self._first * (stage == 0) + self._last * (stage == self.stages - 1)


def _lowest_peak(sums: _Sums, allows: Callable[[int, int, int], bool]) -> list[tuple[int, int]]:
    """The division, begin and end of each stage, whose largest stage is smallest, of those that ``allows`` permits."""
    peaks: list[dict[int, tuple[float, int]]] = [{0: (0.0, 0)}]  # by stage and end: the peak until there, and the begin
    for stage in range(sums.stages):
        ends: dict[int, tuple[float, int]] = {}
        for begin, (before, _) in peaks[-1].items():
            for end in range(begin + 1, sums.blocks - (sums.stages - 1 - stage) + 1):
                peak = max(before, sums.of(stage, begin, end))
                if allows(stage, begin, end) and (end not in ends or peak < ends[end][0]):
                    ends[end] = peak, begin
        peaks.append(ends)
    cuts = [sums.blocks]
    for ends in reversed(peaks[1:]):
        cuts.append(ends[cuts[-1]][1])
    return list(pairwise(reversed(cuts)))


def layer_costs(unit: TrainingUnit) -> tuple[list[Cost], Cost, Cost]:
    """The costs of the blocks of ``unit``, of what stands before them, and of what stands behind them."""
    model, depths = unit.model, unit.num_layers + 2
    parameters = [0] * depths
    matrices = [0] * depths
    for name, parameter in unit.named_weights():
        depth = unit.layer_index(name)
        parameters[depth] += parameter.numel()
        matrices[depth] += parameter.numel() if parameter.dim() > 1 and depth else 0
    if (tied := tied_weight(unit)) is not None:
        size = dict(unit.named_weights())[tied].numel()
        parameters[-1] += size
        matrices[-1] += size
    costs = [
        Cost(
            2 * matrix + (model.attention_flops(depth - 1, model.context_length) if 0 < depth < depths - 1 else 0), all
        )
        for depth, (matrix, all) in enumerate(zip(matrices, parameters, strict=True))
    ]
    return costs[1:-1], costs[0], costs[-1]


def tied_weight(unit: TrainingUnit) -> str | None:
    """The name of the embedding that is the output layer, too; None where each has its own, or none is used."""
    names = {name for name, _ in unit.named_weights()}
    return None if "head.weight" in names or not unit.uses_output_layer else "token_embedding.weight"


@dataclass(frozen=True)
class Division:
    """The stages of a pipeline, which go round its ``processes``: stage i is on rank i modulo their number."""

    blocks: tuple[range, ...]  # of each stage
    processes: int
    tied: str | None  # the weight that the first and the last stage hold

    @property
    def stages(self) -> int:
        """The number of stages."""
        return len(self.blocks)

    def rank_of(self, stage: int) -> int:
        """The rank, among those of the pipeline, that has ``stage``."""
        return stage % self.processes

    def stages_on(self, rank: int) -> range:
        """The stages of ``rank``."""
        return range(rank, self.stages, self.processes)

    def holders(self, name: str, depth: int) -> tuple[int, ...]:
        """The stages that hold the parameter ``name`` of that depth, the one that writes it first."""
        if depth == 0:
            return (0, self.stages - 1) if name == self.tied else (0,)
        if depth > self.blocks[-1].stop:
            return (self.stages - 1,)
        return (next(stage for stage, blocks in enumerate(self.blocks) if depth - 1 in blocks),)


# --- modules --------------------------------------------------------------------------------------------------------


class Elsewhere(nn.Module):
    """A block that another stage runs."""

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        return x


@dataclass(frozen=True)
class Work:
    """The micro-batches that a stage runs next."""

    batches: Sequence[Batch]
    finish: Callable[[TrainingUnit, Batch], Any]  # what the last stage calls: it goes on from the hidden states
    autocast: Callable[[], AbstractContextManager] = nullcontext


class Stage(nn.Module):
    """One stage of a unit: its blocks, and the embedding or the losses where it is the first or the last.

    It runs a view of the unit, whose modules are the unit's own.  A call gives the hidden states for the next stage;
    that of the last stage gives what :attr:`Work.finish` makes of the view and the micro-batch.
    """

    work: Work

    def __init__(self, unit: TrainingUnit, division: Division, stage: int) -> None:
        super().__init__()
        self._whole = (unit,)  # not a child
        self.index = stage
        self.is_first, self.is_last = stage == 0, stage == division.stages - 1
        self.blocks = division.blocks[stage]
        self.unit = _view(unit, division, stage)
        self._received: Tensor | None = None
        if not self.is_first:
            self.unit.model.embed = self._take_received  # type: ignore[method-assign]

    def own_blocks(self) -> list[nn.Module]:
        """The blocks that this stage runs."""
        return [self.unit.model.blocks[number] for number in self.blocks]

    def forward(self, *received: Tensor, number: Tensor) -> Any:
        """Run micro-batch ``number`` of :attr:`work`, on what the stage before has sent, if there is one.

        ``number`` ``(1,)`` is on the host: schedules divide tensors into micro-batches, and nothing else.
        """
        (self._received,) = received or (None,)
        self._follow()
        batch = self.work.batches[int(number)]
        with self.work.autocast():
            if self.is_last:
                return self.work.finish(self.unit, batch)
            return self.unit.model.hidden(batch.tensors["inputs"], segments=batch.tensors.get("segments"))

    def _take_received(self, ids: Tensor, positions: Tensor) -> Tensor:
        assert self._received is not None
        received, self._received = self._received, None
        return received

    def _follow(self) -> None:
        """Take over the state of the whole unit that may change: its mode, and compiled blocks."""
        (whole,) = self._whole
        self.unit.training, self.unit.model.training = whole.training, whole.model.training
        compiled = whole.model.compiled_blocks
        own: list[Any] | None = None
        if compiled is not None:
            own = [compiled[i] if i in self.blocks else block for i, block in enumerate(self.unit.model.blocks)]
        self.unit.model.compiled_blocks = own


def _view(unit: TrainingUnit, division: Division, stage: int) -> TrainingUnit:
    """A unit of the same modules, without those of other stages."""
    view, model = _shallow(unit), _shallow(unit.model)
    view._modules["model"] = model
    is_last = stage == division.stages - 1
    for name, child in unit.model.named_children():
        if name == "blocks":
            blocks = enumerate(unit.model.blocks)
            model._modules[name] = nn.ModuleList(b if i in division.blocks[stage] else Elsewhere() for i, b in blocks)
        elif name == "final_norm" and not is_last:
            model._modules[name] = nn.Identity()
        elif not _has(unit, division, stage, MODEL + name, child):
            del model._modules[name]
    for name, child in unit.heads.items():
        if not _has(unit, division, stage, name, child):
            del view._modules[name]
    return view


def _has(unit: TrainingUnit, division: Division, stage: int, prefix: str, module: nn.Module) -> bool:
    """True if ``stage`` holds a parameter of ``module``, or there is none in it."""
    names = [f"{prefix}.{name}".removeprefix(MODEL) for name, _ in module.named_parameters()]
    return not names or any(stage in division.holders(name, unit.layer_index(name)) for name in names)


def _shallow(module: T) -> T:
    """A module with the same parameters, buffers and hooks, whose children can be exchanged."""
    other = copy.copy(module)
    other.__dict__["_modules"] = dict(module._modules)
    return other


def leave_to_others(unit: TrainingUnit, own: Callable[[str, int], bool]) -> None:
    """Move to ``meta`` every parameter, and every buffer of a block, of which ``own(name, depth)`` is false."""
    for prefix, module in unit.named_modules():
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
            name = f"{prefix}.{key}".removeprefix(MODEL) if prefix else key
            is_outer_buffer = key in module._buffers and not name.startswith("blocks.")
            if tensor is None or is_outer_buffer or own(name, unit.layer_index(name)):
                continue
            set_tensor(module, key, torch.empty_like(tensor, device="meta"))


def set_tensor(module: nn.Module, key: str, tensor: Tensor) -> None:
    """Put ``tensor`` into the place of a parameter or buffer of ``module``."""
    if (old := module._parameters.get(key)) is not None:
        module._parameters[key] = nn.Parameter(tensor, requires_grad=old.requires_grad)
    else:
        module._buffers[key] = tensor


def share_of_loss(unit: TrainingUnit, batch: Batch) -> Tensor:
    """The loss of ``batch``, and its parts by name, as one tensor ``(1 + losses,)``."""
    total, parts = mean_losses(unit, batch)
    return torch.stack([total, *parts.values()])


def refuse_undivided(unit: TrainingUnit) -> None:
    """Raise ValueError for a unit whose forward pass cannot be cut between two blocks."""
    model = unit.model
    if not unit.has_stages or type(model).embed is LanguageModel.embed:
        raise ValueError(
            f"distributed.pipeline: {type(unit).__name__} of {type(model).__name__} has no stages; take "
            "distributed=fsdp"
        )
    if tied_weight(unit) and any(name.startswith("token_embedding.lora_") for name, _ in unit.named_weights()):
        raise ValueError(
            "lora.targets: an adapter of an embedding that is the output layer, too, would be trained in the first "
            "stage of a pipeline alone; leave out token_embedding, or take distributed=fsdp"
        )
