"""The cut of a training unit for tensor parallelism: parameters become parts, hooks pass tensors between ranks.

Parameters stay plain tensors with their names, so that adapters, compiled blocks, recomputation, optimizers and
clipping work as in one process.  (With parameters that are DTensors every operation would pass through their
dispatcher, and an optimizer would need a second, local view.)
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from llmtrain.distributed.cut import Cut, bounded_ranges, even_bounds, even_ranges, with_size
from llmtrain.distributed.plans import Plan, gpt, llama
from llmtrain.distributed.tensor_group import (
    TensorGroup,
    copy_in,
    gather_sequence,
    join_channels,
    join_sequence,
    split_sequence,
    sum_out,
    sum_to_split,
)
from llmtrain.distributed.vocabulary import VocabularyPart
from llmtrain.lora.layers import LoraEmbedding
from llmtrain.model import LanguageModel
from llmtrain.model.gpt import GPT
from llmtrain.model.layers.padded_vocabulary import logit_bias
from llmtrain.model.llama import Llama
from llmtrain.objective import TrainingUnit
from llmtrain.precision.fp8_linear import Fp8Linear


def find_plan(model: LanguageModel) -> Plan:
    """Find the plan of the architecture of ``model``.  Raises ValueError if there is none."""
    if isinstance(model, GPT):
        return gpt.plan(model)
    if isinstance(model, Llama):
        return llama.plan(model)
    raise ValueError(
        f"distributed.tensor: {type(model).__name__} has no plan for tensor parallelism, GPT and Llama have; "
        "take distributed=fsdp"
    )


def check_unit(unit: TrainingUnit, ranks: int) -> None:
    """Raise ValueError unless ``ranks`` can share ``unit``, which may be on the meta device."""
    if ranks < 1:
        raise ValueError(f"distributed.tensor={ranks}: must be at least 1")
    model = unit.model
    find_plan(model).check(ranks)
    if even_bounds(model.padded_vocab_size, ranks)[-2] >= model.vocab_size:
        raise ValueError(f"distributed.tensor={ranks}: the {model.vocab_size} tokens are too few; take less")
    for module in unit.modules():
        if getattr(module, "packed", None) is not None:
            raise ValueError(
                "lora.quantization: packed weights cannot be divided over ranks; take lora.quantization=none, or "
                "distributed.tensor=1"
            )
        if isinstance(module, Fp8Linear):
            raise ValueError(
                "precision=fp8: its scales are those of whole matrices, which no rank has; take precision=bf16, or "
                "distributed.tensor=1"
            )


class UnitCut:
    """A training unit cut over the ranks of a tensor group, in place: after adapters, before the optimizer.

    All ranks hold the same unit before.  With ``sequence_parallel`` a rank computes norms and dropout of some positions
    alone, which takes less memory and as much communication.
    """

    def __init__(self, unit: TrainingUnit, ranks: TensorGroup, *, sequence_parallel: bool) -> None:
        check_unit(unit, ranks.size)
        self.unit = unit
        self.ranks = ranks
        self.sequence_parallel = sequence_parallel
        self.cuts: dict[str, Cut] = {}  # of the parameters of which a rank holds a part
        self.partial: set[str] = set()  # parameters that all hold, with gradients that are to be summed over the ranks
        self._names = {id(parameter): name for name, parameter in unit.named_weights()}
        self.plan = plan = find_plan(unit.model)
        with torch.no_grad():
            for block in unit.model.blocks:
                self._cut_block(block, plan)
            self._cut_vocabulary()
        plan.set_heads(ranks.rank, ranks.size)
        if sequence_parallel:
            self._split_stream(unit.model.get_submodule(plan.first), unit.model.get_submodule(plan.last))

    # --- blocks -----------------------------------------------------------------------------------------------------

    def _cut_block(self, block: nn.Module, plan: Plan) -> None:
        enter = gather_sequence if self.sequence_parallel else copy_in
        for name in plan.shared:
            block.get_submodule(name).register_forward_pre_hook(partial(_change_first, enter, self.ranks))
        for name, sections in plan.by_outputs.items():
            self._cut_by_outputs(block.get_submodule(name), sections)
        for name in plan.by_inputs:
            self._cut_by_inputs(block.get_submodule(name))
        for name in plan.head_norms:
            self._sum_gradients(block.get_submodule(name))
        if self.sequence_parallel:
            for name in plan.stream_norms:
                self._sum_gradients(block.get_submodule(name))

    def _cut_by_outputs(self, layer: nn.Module, sections: tuple[int, ...]) -> None:
        ranges = even_ranges(sections, self.ranks.size)
        for key in ("weight", "bias", "lora_B", "lora_magnitude"):
            self._cut(layer, key, 0, ranges)
        self._sum_gradients(layer, "lora_A")  # a rank has the outputs' gradients of its own heads or channels
        layer.out_features = sum(sections) // self.ranks.size  # type: ignore[assignment]

    def _cut_by_inputs(self, layer: nn.Module) -> None:
        weight = layer._parameters["weight"]
        assert weight is not None
        inputs = weight.shape[1]
        ranges = even_ranges((inputs,), self.ranks.size)
        for key in ("weight", "lora_A"):
            self._cut(layer, key, 1, ranges)
        for key in ("lora_B", "lora_magnitude"):
            self._sum_gradients(layer, key)
        if self.sequence_parallel:
            self._sum_gradients(layer, "bias")
        layer.in_features = inputs // self.ranks.size  # type: ignore[assignment]
        kind: Any = type(layer)
        layer.__class__ = _cut_class(kind, _CutByInputs)
        layer.tensor_ranks = self.ranks  # type: ignore[assignment]
        layer.sum_outputs = sum_to_split if self.sequence_parallel else sum_out  # type: ignore[assignment]

    def _split_stream(self, first: nn.Module, last: nn.Module) -> None:
        first.register_forward_pre_hook(partial(_change_first, split_sequence, self.ranks))
        last.register_forward_hook(lambda module, inputs, y: join_sequence(y, self.ranks))
        self._sum_gradients(last)

    # --- vocabulary -------------------------------------------------------------------------------------------------

    def _cut_vocabulary(self) -> None:
        """Give every rank some rows of embedding and output layer; the loss is computed together."""
        model = self.unit.model
        bounds = even_bounds(model.padded_vocab_size, self.ranks.size)
        first, end = bounds[self.ranks.rank : self.ranks.rank + 2]
        self._cut_embedding(model.get_submodule("token_embedding"), bounds)
        if "head" in dict(model.named_children()):
            head = model.get_submodule("head")
            self._cut(head, "weight", 0, bounded_ranges(bounds, model.padded_vocab_size))
            for key in ("lora_B", "lora_magnitude"):
                self._cut(head, key, 0, bounded_ranges(bounds, model.vocab_size))
            self._sum_gradients(head, "lora_A")
        if model.logit_bias is not None:
            model.logit_bias = model.logit_bias[first:end].clone()
        self.share = VocabularyPart(self.ranks, bounds)
        if self.unit.uses_output_layer:
            self.unit.share_vocabulary(self.share)
        own_logits = model.logits
        sizes = [end - begin for begin, end in pairwise(bounds)]

        def logits(hidden: Tensor) -> Tensor:
            return join_channels(own_logits(copy_in(hidden, self.ranks)), self.ranks, sizes)

        model.logits = logits  # type: ignore[method-assign]

    def _cut_embedding(self, embedding: nn.Module, bounds: tuple[int, ...]) -> None:
        model = self.unit.model
        first, end = bounds[self.ranks.rank : self.ranks.rank + 2]
        self._cut(embedding, "weight", 0, bounded_ranges(bounds, model.padded_vocab_size))
        if isinstance(embedding, LoraEmbedding):
            self._cut(embedding, "lora_A", 1, bounded_ranges(bounds, model.vocab_size))
            for key in ("lora_B", "lora_magnitude"):
                self._sum_gradients(embedding, key)
            embedding.__class__ = _cut_class(type(embedding), _PartOfInputs)
            embedding.tensor_ranks = self.ranks  # type: ignore[assignment]

        forward = embedding.forward

        def look_up(ids: Tensor) -> Tensor:
            if self.ranks.is_suspended:
                return forward(ids)
            is_own = (ids >= first) & (ids < end)
            return sum_out(forward(torch.where(is_own, ids - first, 0)) * is_own[..., None], self.ranks)

        embedding.forward = look_up

    # --- parameters -------------------------------------------------------------------------------------------------

    def _cut(self, module: nn.Module, key: str, dim: int, ranges: tuple[tuple[tuple[int, int], ...], ...]) -> None:
        """Leave the parameter ``key`` of ``module``, if it has one, this rank's part."""
        parameter = module._parameters.get(key)
        if parameter is None or self._names[id(parameter)] in self.cuts:  # tied: cut already
            return
        name, shape = self._names[id(parameter)], tuple(parameter.shape)
        visible = shape[dim] if name.startswith("blocks.") else min(shape[dim], self.unit.model.vocab_size)
        cut = Cut(dim, ranges, shape, visible)
        parameter.data = cut.part(parameter.data, self.ranks.rank)
        self.cuts[name] = cut

    def _sum_gradients(self, module: nn.Module, key: str | None = None) -> None:
        """Have the gradients of the parameter ``key`` of ``module``, if it has one, summed; None: of all."""
        for own, parameter in module._parameters.items():
            if parameter is not None and key in (None, own):
                self.partial.add(self._names[id(parameter)])

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Context in which every rank has the whole unit and can call it alone, without gradients.

        All ranks enter and leave it together.  The whole takes memory beside the parts.
        """
        model, ranks = self.unit.model, self.ranks
        parameters = {name: parameter for name, parameter in self.unit.named_weights() if name in self.cuts}
        parts = {name: parameter.data for name, parameter in parameters.items()}
        bias, shares = model.logit_bias, self.unit.uses_output_layer
        for name, parameter in parameters.items():
            parameter.data = self.whole(name, parameter.data)
        try:
            ranks.is_suspended = True
            model.logit_bias = logit_bias(model.vocab_size, next(model.parameters()).device)
            self.plan.set_heads(0, 1)
            if shares:
                self.unit.share_vocabulary(None)
            with torch.no_grad():
                yield
        finally:
            ranks.is_suspended = False
            model.logit_bias = bias
            self.plan.set_heads(ranks.rank, ranks.size)
            if shares:
                self.unit.share_vocabulary(self.share)
            for name, parameter in parameters.items():
                parameter.data = parts[name]

    def whole(self, name: str, part: Tensor) -> Tensor:
        """Gather the whole of a tensor cut as the parameter ``name`` is, such as its gradient, on all ranks."""
        cut = self.cuts.get(name)
        if cut is None:
            return part
        lengths = [cut.length(rank) for rank in range(self.ranks.size)]
        padded = part.new_zeros(with_size(cut.shape, cut.dim, max(lengths)))
        padded.narrow(cut.dim, 0, part.shape[cut.dim]).copy_(part)
        gathered = self.ranks.gather(padded)
        return cut.join([one.narrow(cut.dim, 0, length) for one, length in zip(gathered, lengths, strict=True)])


def _change_first(change: Any, ranks: TensorGroup, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return change(inputs[0], ranks), *inputs[1:]


class _PartOfInputs:
    """Base of a layer with a part of its inputs: outputs, and the squares in DoRA's norm, are sums over the ranks."""

    tensor_ranks: TensorGroup

    @torch.no_grad()
    def norm(self, dtype: torch.dtype | None = None) -> Tensor:
        norm: Tensor = super().norm(dtype)  # type: ignore[misc]
        return norm if self.tensor_ranks.is_suspended else self.tensor_ranks.sum(norm.square()).sqrt()


class _CutByInputs(_PartOfInputs):
    """Base of a linear layer with a part of its inputs: the bias is added after the sum."""

    sum_outputs: Callable[[Tensor, TensorGroup], Tensor]
    hides_bias = False  # True: within the layer's own pass

    @property
    def bias(self) -> nn.Parameter | None:
        return None if self.hides_bias else self._parameters["bias"]  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        if self.tensor_ranks.is_suspended:
            return super().forward(x)  # type: ignore[misc]
        self.hides_bias = True
        y = self.sum_outputs(super().forward(x), self.tensor_ranks)  # type: ignore[misc]
        self.hides_bias = False
        bias = self.bias
        return y if bias is None else y + bias.to(y.dtype)


@cache
def _cut_class(kind: Any, base: Any) -> Any:
    return type(f"Cut{kind.__name__}", (base, kind), {})
