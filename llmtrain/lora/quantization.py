"""Frozen weights in fewer bits (QLoRA: Dettmers et al. 2023, https://arxiv.org/abs/2305.14314).

Rounding and its inverse are those of bitsandbytes, which has kernels for CPUs and for GPUs.  A packed weight is
unpacked to the dtype of the computation for each product, in forward and again in backward, and not kept between them.
The same weights always give the same bits, so a checkpoint needs only the adapters.
"""

import logging
from abc import ABC, abstractmethod
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

BLOCK = 64  # numbers of a weight that share a scale in nf4, as in QLoRA
SCALES = 256  # scales of nf4 that share a scale
INT8_LARGEST = 127


class Quantization(Enum):
    """The storage format of the blocks' frozen linear layers."""

    none = "none"  # as they are
    bf16 = "bf16"  # 16 bits
    int8 = "int8"  # 8 bits and an fp32 scale a row
    nf4 = "nf4"  # 4 bits in blocks of 64, their scales in 8 bits: 4.13 bits in all

    def pack(self, weight: Tensor) -> "PackedWeight | None":
        """Pack ``weight`` ``(out, in)`` into fewer bits; None for ``none``."""
        return None if self is Quantization.none else PACKED[self](weight.detach())


class PackedWeight(ABC):
    """A matrix in fewer bits; ``stored`` holds its tensors."""

    stored: dict[str, Tensor]

    def __init__(self, weight: Tensor) -> None:
        self.shape = weight.shape
        self.device = weight.device
        self.has_data = not (is_fake(weight) or weight.is_meta)
        if self.has_data:
            self.stored = self.fill(weight)
            assert {key: (tensor.shape, tensor.dtype) for key, tensor in self.stored.items()} == self.layout()
        else:  # a plan, which has no data
            self.stored = {
                key: torch.empty(shape, dtype=dtype, device=weight.device)
                for key, (shape, dtype) in self.layout().items()
            }

    @abstractmethod
    def layout(self) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """Shapes and dtypes of the stored tensors."""

    @abstractmethod
    def fill(self, weight: Tensor) -> dict[str, Tensor]:
        """Pack ``weight`` into the stored tensors."""

    @abstractmethod
    def unpack(self) -> Tensor:
        """Unpack the matrix, in fp32 or fewer bits."""

    def dense(self, dtype: torch.dtype) -> Tensor:
        if not self.has_data:
            return torch.empty(self.shape, dtype=dtype, device=self.device)
        return self.unpack().to(dtype)


class BF16Weight(PackedWeight):
    """A matrix in bf16, autocast's own dtype: with ``precision=bf16`` the results are bit-identical."""

    def layout(self) -> dict[str, tuple[torch.Size, torch.dtype]]:
        return {"packed": (self.shape, torch.bfloat16)}

    def fill(self, weight: Tensor) -> dict[str, Tensor]:
        return {"packed": weight.to(torch.bfloat16)}

    def unpack(self) -> Tensor:
        return self.stored["packed"]


class Int8Weight(PackedWeight):
    """A matrix whose rows are ``q * largest / 127`` with integers ``q`` from -127 to 127."""

    def layout(self) -> dict[str, tuple[torch.Size, torch.dtype]]:
        return {"packed": (self.shape, torch.int8), "scales": (self.shape[:1], torch.float32)}

    def fill(self, weight: Tensor) -> dict[str, Tensor]:
        # the GPU's kernel takes fp16, whose rounding is 1/16 of the least step of 8 bits
        if not bool((weight.abs().amax() <= torch.finfo(torch.float16).max).item()):
            raise ValueError(f"quantization=int8: a weight is not finite, or beyond {torch.finfo(torch.float16).max:g}")
        rounded, largest, _ = functional().int8_vectorwise_quant(weight.to(torch.float16).contiguous())
        return {"packed": rounded, "scales": largest / INT8_LARGEST}

    def unpack(self) -> Tensor:
        return self.stored["packed"] * self.stored["scales"][:, None]


class NF4Weight(PackedWeight):
    """A matrix of 4-bit codes for 16 quantiles of the normal distribution, scaled by each block's largest magnitude."""

    def layout(self) -> dict[str, tuple[torch.Size, torch.dtype]]:
        blocks = -(-self.shape.numel() // BLOCK)
        return {
            "packed": (torch.Size([-(-self.shape.numel() // 2), 1]), torch.uint8),
            "scales": (torch.Size([blocks]), torch.uint8),
            "scales_of_scales": (torch.Size([-(-blocks // SCALES)]), torch.float32),
            "offset": (torch.Size([]), torch.float32),
        }

    def fill(self, weight: Tensor) -> dict[str, Tensor]:
        library = functional()
        packed, state = library.quantize_4bit(
            weight.float().contiguous(), blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
        )
        self._state, self._dequantize = state, library.dequantize_4bit
        return {
            "packed": packed, "scales": state.absmax, "scales_of_scales": state.state2.absmax, "offset": state.offset,
        }  # fmt: skip

    def unpack(self) -> Tensor:
        return self._dequantize(self.stored["packed"], self._state)


PACKED: dict[Quantization, type[PackedWeight]] = {
    Quantization.bf16: BF16Weight,
    Quantization.int8: Int8Weight,
    Quantization.nf4: NF4Weight,
}


def functional() -> Any:
    """Import bitsandbytes' functions.  Raises ValueError that names the extra if it is not installed."""
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns that kernels are missing which are not used here
    try:
        import bitsandbytes.functional
    except ImportError as error:
        raise ValueError(
            'quantization=int8 or nf4: needs bitsandbytes; pip install "llmtrain[quantization]", or take '
            "quantization=bf16, which needs no package"
        ) from error
    finally:
        logger.setLevel(level)
    return bitsandbytes.functional
