"""Layers with a frozen weight, with and without an adapter.

They replace an ``nn.Linear`` or ``nn.Embedding`` and keep its parameters ``weight`` and ``bias``.  An adapter adds
``lora_A`` ``(rank, inputs)`` and ``lora_B`` ``(outputs, rank)``, with DoRA ``lora_magnitude`` ``(outputs,)``, stored in
fp32 and multiplied in autocast's dtype.  Only DoRA's norm and the head need the product ``B A`` in a forward pass.
"""

import math
from abc import abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmtrain.lora.quantization import PackedWeight
from llmtrain.model.initial_values import InitialValues


class PackedProduct(torch.autograd.Function):
    """``x @ weight.T + bias`` with a frozen packed weight, unpacked for each product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, packed: PackedWeight) -> Tensor:
        ctx.packed = packed
        return F.linear(x, packed.dense(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (g,) = gradients
        needs_x, needs_bias, _ = ctx.needs_input_grad
        grad_x = g @ ctx.packed.dense(g.dtype) if needs_x else None
        return grad_x, g.flatten(0, -2).sum(0, dtype=torch.float32) if needs_bias else None, None


class FrozenLinear(nn.Linear):
    """The layer ``linear`` with a frozen weight, stored in ``packed`` if given.

    With a packed weight the parameter ``weight`` keeps its name and shape, on the meta device, without data.
    """

    def __init__(self, linear: nn.Linear, packed: PackedWeight | None) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.register_parameter("bias", linear.bias)
        self.packed = packed
        if packed is None:
            self.weight = linear.weight
        else:
            self.weight.requires_grad_(False)
            for name, tensor in packed.stored.items():  # so that memory counts include them
                self.register_buffer(f"weight_{name}", tensor, persistent=False)
        self.train(linear.training)

    @property
    def own_weight(self) -> Tensor:
        """The weight ``(outputs, inputs)`` without its adapter."""
        return self.weight if self.packed is None else self.packed.dense(torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(to_autocast_dtype(x), self.bias)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``x @ weight.T + bias`` in the dtype of ``x``."""
        if self.packed is None:
            return F.linear(x, self.weight, bias)
        return PackedProduct.apply(x, bias, self.packed)


def to_autocast_dtype(x: Tensor) -> Tensor:
    """Convert ``x`` to autocast's dtype, once for the products of the weight and of the adapter."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def without_autocast(device: torch.device) -> AbstractContextManager:
    """A context that disables autocast; on the meta device, where autocast does not exist, it does nothing."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


class Adapter(nn.Module, InitialValues):
    """Base class of layers with an adapter."""

    filled: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B")

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_magnitude: nn.Parameter | None
    scaling: float
    dropout: float
    axis: int  # dimension of the weight that DoRA's norm reduces

    @property
    @abstractmethod
    def own_weight(self) -> Tensor:
        """The weight without its adapter, vocabulary padding included."""

    def delta(self, dtype: torch.dtype) -> Tensor:
        """The product that the adapter adds to the weight, without vocabulary padding."""
        return self.scaling * (self.lora_B.to(dtype) @ self.lora_A.to(dtype))

    def adapt(self, rank: int, scaling: float, dropout: float) -> None:
        """Add the matrices of an adapter, which have no values yet."""
        self.scaling = scaling
        self.dropout = dropout
        inputs, outputs = self.adapter_sizes()
        weight = self.own_weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.lora_A = nn.Parameter(torch.empty(rank, inputs, dtype=dtype, device=weight.device))
        self.lora_B = nn.Parameter(torch.empty(outputs, rank, dtype=dtype, device=weight.device))
        self.register_parameter("lora_magnitude", None)

    def add_magnitude(self) -> None:
        """Add DoRA's magnitude, with which the adapter changes nothing at first."""
        self.lora_magnitude = nn.Parameter(self.norm())

    @abstractmethod
    def adapter_sizes(self) -> tuple[int, int]:
        """The number of inputs and outputs of the adapter."""

    def fill(self, key: str, whole: Tensor, generator: torch.Generator) -> None:
        """Initialise A as torch does a linear layer, and B with zeros (Hu et al. 2021, section 4.1)."""
        if key == "lora_A":
            nn.init.kaiming_uniform_(whole, a=math.sqrt(5), generator=generator)
        else:
            nn.init.zeros_(whole)

    def adapted(self, dtype: torch.dtype) -> Tensor:
        """The weight with its adapter, in ``dtype``; differentiable, vocabulary padding included."""
        delta, weight = self.delta(dtype), self.own_weight.to(dtype)
        padding = weight.shape[0] - delta.shape[0]
        adapted = weight + F.pad(delta, (0, 0, 0, padding))
        if self.lora_magnitude is None:
            return adapted
        scale = self.lora_magnitude.to(dtype) / self.norm(dtype)
        if self.axis == 0:
            return scale * adapted
        return F.pad(scale, (0, padding), value=1.0)[:, None] * adapted

    @torch.no_grad()
    def norm(self, dtype: torch.dtype | None = None) -> Tensor:
        """DoRA's ``|W + delta|`` along :attr:`axis`, in the dtype of the adapter by default."""
        dtype = dtype or self.lora_A.dtype
        with without_autocast(self.lora_A.device):
            delta = self.delta(dtype)
            return torch.linalg.vector_norm(self.own_weight[: len(delta)].to(dtype) + delta, dim=self.axis)

    def low_rank(self, x: Tensor) -> Tensor:
        """``scaling * A x`` ``(…, rank)``."""
        return F.linear(x, self.lora_A) * self.scaling


class LoraLinear(FrozenLinear, Adapter):
    """``W x + scaling B A x + bias``."""

    axis = 1

    def adapter_sizes(self) -> tuple[int, int]:
        return self.in_features, self.out_features

    def forward(self, x: Tensor) -> Tensor:
        x = to_autocast_dtype(x)
        y = self.product(x, self.bias)
        drops = self.training and self.dropout > 0
        inputs = F.dropout(x, self.dropout) if drops else x
        low = self.low_rank(inputs)
        if self.lora_magnitude is None:  # addmm adds within the product, which saves a tensor of the size of y
            low, up = low.flatten(0, -2), self.lora_B.t()
            return torch.addmm(y.flatten(0, -2), low, up).view(y.shape)
        scale = self.lora_magnitude / self.norm()
        plain = y if self.bias is None else y - self.bias.to(y.dtype)
        if drops:  # dropout applies to the part scaled by the magnitude too, as in PEFT
            plain = self.product(inputs, None)
        return y + (scale - 1).to(y.dtype) * plain + scale.to(y.dtype) * F.linear(low, self.lora_B)


class LoraHead(Adapter):
    """The output layer with an adapter.

    The model reads its matrix, :attr:`adapted_weight`, and calls no product.  The parameter ``weight`` is its own.
    """

    weight: nn.Parameter

    axis = 1

    def __init__(self, linear: nn.Linear, rows: int) -> None:
        super().__init__()
        assert linear.bias is None
        self.in_features: int = linear.in_features
        self.rows: int = rows  # without vocabulary padding
        self.weight = linear.weight
        self.train(linear.training)

    @property
    def own_weight(self) -> Tensor:
        return self.weight

    def adapter_sizes(self) -> tuple[int, int]:
        return self.in_features, self.rows

    @property
    def adapted_weight(self) -> Tensor:
        """The adapted matrix ``(padded_vocab_size, hidden)``."""
        with without_autocast(self.lora_A.device):
            return self.adapted(self.lora_A.dtype)


class LoraEmbedding(nn.Embedding, Adapter):
    """``W[id] + scaling B A[:, id]``; ``lora_A`` is ``(rank, rows)``.  As in PEFT, A starts at zero and B is normal."""

    axis = 0

    def __init__(self, embedding: nn.Embedding, rows: int) -> None:
        super().__init__(embedding.num_embeddings, embedding.embedding_dim, device="meta")
        self.weight = embedding.weight
        self.rows = rows  # without vocabulary padding
        self.train(embedding.training)

    @property
    def own_weight(self) -> Tensor:
        return self.weight

    def adapter_sizes(self) -> tuple[int, int]:
        return self.rows, self.embedding_dim

    def fill(self, key: str, whole: Tensor, generator: torch.Generator) -> None:
        if key == "lora_A":
            nn.init.zeros_(whole)
        else:
            nn.init.normal_(whole, generator=generator)

    def delta(self, dtype: torch.dtype) -> Tensor:
        return self.scaling * (self.lora_A.to(dtype).t() @ self.lora_B.to(dtype).t())

    def forward(self, ids: Tensor) -> Tensor:
        y = F.embedding(ids, self.weight)
        added = F.linear(F.embedding(ids, self.lora_A.t()) * self.scaling, self.lora_B)
        if self.lora_magnitude is None:
            return y + added
        scale = self.lora_magnitude / self.norm()
        return scale * y + scale * added
