"""8-bit floating-point matrix products in the blocks, bf16 elsewhere."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from llmtrain.precision import Precision, PrecisionConfig, Residual
from llmtrain.precision.auto import Auto
from llmtrain.precision.fp8_linear import MULTIPLE, Fp8Linear, Recipe, convert, quantise_into


@dataclass(frozen=True)
class FP8(PrecisionConfig):
    """For NVIDIA Ada, Hopper and later; weights, their gradients and the optimizer state stay fp32."""

    recipe: Recipe
    residual: Residual

    @property
    def has_low_residual(self) -> bool:
        return self.residual is Residual.bf16

    def build(self, device: torch.device) -> Precision:
        if device.type == "cuda" and torch.version.hip is not None:
            raise ValueError(
                "precision=fp8: needs an NVIDIA GPU, this is an AMD GPU (ROCm), some of which have other 8-bit formats "
                "(e4m3fnuz); take precision=bf16"
            )
        if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
            raise ValueError(
                f"precision=fp8: needs an NVIDIA GPU of compute capability 8.9 or later (Ada, Hopper), not {device}; "
                "take precision=bf16"
            )
        return FP8Precision(device, self.recipe)

    def inference(self, device: torch.device) -> Precision:
        return Auto(self.residual).build(device)  # without gradients nothing is computed in 8 bits


class FP8Precision(Precision):
    """bf16, except in the linear layers that :meth:`apply` replaces."""

    def __init__(self, device: torch.device, recipe: Recipe) -> None:
        super().__init__("fp8", device, torch.bfloat16)
        self.recipe = recipe
        self.layers: list[Fp8Linear] = []

    def apply(self, blocks: torch.nn.Module) -> None:
        if any(hasattr(module, "packed") for module in blocks.modules()):
            raise ValueError(
                "precision=fp8: does not go with adapters, which compute their own matrix products; take "
                "precision=bf16 with lora.quantization=bf16"
            )
        converted, left = convert(blocks, self.recipe)
        if not converted:
            raise ValueError(
                f"precision=fp8: no linear layer of this model has inputs and outputs that are multiples of {MULTIPLE} "
                f"({', '.join(sorted(set(left.values()))) or 'there is none'}); take precision=bf16"
            )
        self.layers = [module for module in blocks.modules() if isinstance(module, Fp8Linear)]
        self.notice = f"fp8, {self.recipe.value}, in {converted} linear layers of the blocks; bf16 in embeddings, head"
        if left:
            names = [f"blocks.{name} ({size})" for name, size in left.items()]
            more = ", …" * (len(names) > 3)
            self.notice += f", and where a size is no multiple of {MULTIPLE}: {', '.join(names[:3])}{more}"

    @contextmanager
    def constant_weights(self, passes: int) -> Iterator[None]:
        """Context of ``passes`` forward and backward passes without an update: weights are quantised once for all.

        Optimizers change the weights without raising their version counter, so only the end of this context tells that
        they may be others.
        """
        quantise = _compiled_quantise() if self.is_compiled else quantise_into
        with super().constant_weights(passes):
            try:
                for layer in self.layers:
                    layer.hold(quantise)
                yield
            finally:
                for layer in self.layers:
                    layer.is_held = False


@cache
def _compiled_quantise() -> Any:
    return torch.compile(quantise_into, dynamic=False)  # one kernel for the largest magnitude, one for the numbers
