"""Recomputation of the cheap operations of a block.

Norms, activations, dropout, casts and additions are recomputed: they take memory and hardly any time.  The results of
matrix products and attention are kept: they take the time.

Within ``torch.compile`` torch's own selective contexts do this.  In eager mode they would keep every such result, also
the last one of a block, which backward never reads, and would not offload any; hence the two modes below
(docs/decisions.md has the figures).
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from llmtrain.activation_checkpointing.offload import OffloadedTensor, Offloader
from llmtrain.activation_checkpointing.recompute import Contexts, checkpoint, recompute

# By name, since some builds of torch lack some of them.  ``bmm`` is not among them: it comes from attention without a
# fused kernel, and its result has a row and a column for each token.
KEPT_NAMES = (
    # matrix products: on every device; fp8; of oneDNN on a CPU
    "aten::mm", "aten::addmm", "aten::linear", "aten::_scaled_mm", "aten::_addmm_activation",
    "mkldnn::_linear_pointwise", "mkl::_mkl_linear",
    # attention: CUDA, CPU, llmtrain's kernel
    "aten::_scaled_dot_product_flash_attention", "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention", "aten::_scaled_dot_product_fused_attention_overrideable",
    "aten::_scaled_dot_product_flash_attention_for_cpu", "llmtrain::causal_attention",
)  # fmt: skip


def recompute_cheap(block: nn.Module, offloader: Offloader | None = None) -> None:
    """Make ``block`` keep only its input and the results of expensive operations, with ``offloader`` in host memory."""
    unneeded: set[int] = set()  # numbers of results that backward did not read: not kept the next time

    def contexts() -> Contexts:
        results = Results(offloader, unneeded)
        return SaveMode(results), ReplayMode(results)

    # torch's compiler supports only its own contexts: it calls the policy when it partitions the graph, and the hooks
    # of the offloader receive the tensors that the graph saves
    compiled = partial(checkpoint, context_fn=partial(create_selective_checkpoint_contexts, policy))
    recompute(block, partial(checkpoint, context_fn=contexts), compiled)
    logging.getLogger("torch._higher_order_ops.wrap").addFilter(is_news)


def is_news(record: logging.LogRecord) -> bool:
    """Return False for the compiler's warning that a selective context is in use, True for any other message."""
    return "context_fn is passed" not in record.getMessage()


def policy(_: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """The decision of :func:`is_kept` as a policy of torch's selective contexts."""
    kept = operation is torch.ops.higher_order.flex_attention or is_kept(operation, args, kwargs)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def is_kept(operation: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Decide if the result of ``operation``, called with these arguments, is kept.

    An operation that draws random numbers is recomputed: if the recomputation skipped it, later operations would draw
    different numbers.  So is one that writes into an argument, as compiled code does.
    """
    rule = rule_of(operation)
    if not rule.is_kept or rule.dropout is None:
        return rule.is_kept
    return not (args[rule.dropout] if rule.dropout < len(args) else kwargs.get("dropout_p", 0.0))


class Rule(NamedTuple):
    """The treatment of an operation."""

    is_kept: bool
    dropout: int | None = None  # position of the argument that must be 0, else the result is not kept
    written: tuple[tuple[int, str], ...] = ()  # positions and names of the arguments that it writes into


@cache  # asked twice for each operation of a step
def rule_of(operation: Any) -> Rule:
    """The rule for ``operation``, of whatever kind."""
    if not isinstance(operation, OpOverload):
        return Rule(is_kept=False)
    arguments = operation._schema.arguments
    written = [(i, each.name) for i, each in enumerate(arguments) if each.alias_info and each.alias_info.is_write]
    is_kept = operation.name().partition(".")[0] in KEPT_NAMES and not operation._schema.is_mutable
    names = [each.name for each in arguments]
    return Rule(is_kept, names.index("dropout_p") if "dropout_p" in names else None, tuple(written))


class Results:
    """Kept results of one call of a block, in the order of computation."""

    def __init__(self, offloader: Offloader | None, unneeded: set[int]) -> None:
        self.offloader = offloader
        self.unneeded = unneeded
        self.kept: list[Any] = []  # None: to be recomputed
        self.places: dict[int, int] = {}  # numbers of the results by their storage

    def keep(self, result: Any) -> None:
        """Add the next result, unless backward does not need it."""
        needed = len(self.kept) not in self.unneeded
        self.kept.append(tree_map_only(Tensor, self._pack, result) if needed else None)

    def take(self, number: int, compute: Callable[[], Any]) -> Any:
        """Remove and return a result; ``compute`` makes it if it was not kept."""
        result, self.kept[number] = self.kept[number], None
        return compute() if result is None else tree_map_only((Tensor, OffloadedTensor), self._unpack, result)

    def forget(self, tensor: Any) -> None:
        """Have a result recomputed that is about to be written to: it would come back with other values."""
        if isinstance(tensor, Tensor) and (number := self.places.get(tensor.untyped_storage()._cdata)) is not None:
            self.kept[number] = None

    def _pack(self, tensor: Tensor) -> Tensor | OffloadedTensor:
        self.places[tensor.untyped_storage()._cdata] = len(self.kept)
        tensor = tensor.detach()  # otherwise there is a reference cycle with the graph
        return tensor if self.offloader is None else self.offloader.pack(tensor)

    def _unpack(self, packed: Tensor | OffloadedTensor) -> Tensor:
        return packed if isinstance(packed, Tensor) else packed.restore()


class ResultsMode(TorchDispatchMode):
    """Base of the two modes; code compiled within a block (FlexAttention) bypasses them and is recomputed."""

    def __init__(self, results: Results) -> None:
        super().__init__()
        self.results = results

    @classmethod
    def ignore_compile_internals(cls) -> bool:  # otherwise torch would run that code uncompiled
        return True


class SaveMode(ResultsMode):
    """Keeps results during the forward pass."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for position, name in rule_of(operation).written:
            self.results.forget(args[position] if position < len(args) else kwargs.get(name))
        result = operation(*args, **kwargs)
        if is_kept(operation, args, kwargs):
            self.results.keep(result)
        return result


class ReplayMode(ResultsMode):
    """Returns kept results during the recomputation, which torch ends once backward has every tensor it needs."""

    def __init__(self, results: Results) -> None:
        super().__init__(results)
        self.number = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not is_kept(operation, args, kwargs):
            return operation(*args, **kwargs)
        self.number += 1
        return self.results.take(self.number - 1, lambda: operation(*args, **kwargs))

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.results.unneeded.update(range(self.number, len(self.results.kept)))
