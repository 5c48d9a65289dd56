"""Selective checkpointing by operation.

Norms, activations, dropout, casts and additions take memory and hardly any time: they are recomputed.  The results of
matrix products and of attention, which take the time, are kept.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from llmtrain.activation_checkpointing.offload import Offloaded, Offloader
from llmtrain.activation_checkpointing.recompute import Contexts, again, recompute

# By name, since a build of torch lacks some.  ``bmm`` is left out on purpose: it comes from attention without a fused
# kernel, and its result has a row and a column a token.
KEPT_NAMES = (
    # matrix products: every device; fp8; oneDNN's on a CPU
    "aten::mm", "aten::addmm", "aten::linear", "aten::_scaled_mm", "aten::_addmm_activation",
    "mkldnn::_linear_pointwise", "mkl::_mkl_linear",
    # attention: CUDA, CPU, our own
    "aten::_scaled_dot_product_flash_attention", "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention", "aten::_scaled_dot_product_fused_attention_overrideable",
    "aten::_scaled_dot_product_flash_attention_for_cpu", "llmtrain::causal_attention",
)  # fmt: skip


def recompute_cheap(block: nn.Module, offloader: Offloader | None = None) -> None:
    """Have ``block`` keep its input and the results of its expensive operations, with ``offloader`` in host memory."""
    unneeded: set[int] = set()  # numbers of kept results that backward did not use: not kept the next time

    def contexts() -> Contexts:
        results = Results(offloader, unneeded)
        return SaveMode(results), ReplayMode(results)

    # torch's compiler knows only its own contexts: it calls the policy when it divides the graph, and the kept results
    # reach the hooks of the offloader
    compiled = partial(again, context_fn=partial(create_selective_checkpoint_contexts, policy))
    recompute(block, partial(again, context_fn=contexts), compiled)
    logging.getLogger("torch._higher_order_ops.wrap").addFilter(is_news)


def is_news(record: logging.LogRecord) -> bool:
    """Return False for the compiler's message that a selective context is in use."""
    return "context_fn is passed" not in record.getMessage()


def policy(_: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Return the choice for ``operation`` in the terms of torch's compiler."""
    kept = operation is torch.ops.higher_order.flex_attention or is_kept(operation, args, kwargs)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def is_kept(operation: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Return whether the result of ``operation``, called with these arguments, is kept.

    An operation that draws random numbers is recomputed: without it, later ones would draw other numbers.  An operation
    that writes into an argument, as compiled code does, is recomputed too.
    """
    if not isinstance(operation, OpOverload) or operation.name().partition(".")[0] not in KEPT_NAMES:
        return False
    if operation._schema.is_mutable:
        return False
    position = _position_of_dropout(operation)
    if position is None:
        return True
    return not (args[position] if position < len(args) else kwargs.get("dropout_p", 0.0))


@lru_cache
def _position_of_dropout(operation: OpOverload) -> int | None:
    names = [argument.name for argument in operation._schema.arguments]
    return names.index("dropout_p") if "dropout_p" in names else None


class Results:
    """Kept results of one call of a block, in the order of computation."""

    def __init__(self, offloader: Offloader | None, unneeded: set[int]) -> None:
        self.offloader = offloader
        self.unneeded = unneeded
        self.kept: list[Any] = []  # None: to be recomputed

    def keep(self, result: Any) -> None:
        """Keep a result, unless backward did not need it the last time."""
        needed = len(self.kept) not in self.unneeded
        self.kept.append(tree_map_only(Tensor, self._pack, result) if needed else None)

    def recall(self, number: int, again: Callable[[], Any]) -> Any:
        """Return and release a result; ``again`` recomputes it if it was not kept."""
        result, self.kept[number] = self.kept[number], None
        return again() if result is None else tree_map_only((Tensor, Offloaded), self._unpack, result)

    def _pack(self, tensor: Tensor) -> Tensor | Offloaded:
        tensor = tensor.detach()  # its graph would hold it in a cycle
        return tensor if self.offloader is None else self.offloader.pack(tensor)

    def _unpack(self, packed: Tensor | Offloaded) -> Tensor:
        return packed if isinstance(packed, Tensor) else packed.restore()


class ResultsMode(TorchDispatchMode):
    """A mode that ignores compiled operations in a block (FlexAttention), which are recomputed and never kept."""

    def __init__(self, results: Results) -> None:
        super().__init__()
        self.results = results

    @classmethod
    def ignore_compile_internals(cls) -> bool:  # otherwise torch would run them uncompiled
        return True


class SaveMode(ResultsMode):
    """The mode of the forward pass: save the results of expensive operations."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = operation(*args, **kwargs)
        if is_kept(operation, args, kwargs):
            self.results.keep(result)
        return result


class ReplayMode(ResultsMode):
    """The mode of the recomputation: return saved results.  torch ends it once backward has what it needs."""

    def __init__(self, results: Results) -> None:
        super().__init__(results)
        self.number = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not is_kept(operation, args, kwargs):
            return operation(*args, **kwargs)
        self.number += 1
        return self.results.recall(self.number - 1, lambda: operation(*args, **kwargs))

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.results.unneeded.update(range(self.number, len(self.results.kept)))
