"""Parts of ours without what makes them fast, as plugins: what is measured against to name each gain."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain.data import Batch
from llmtrain.kernels import cpu_attention
from llmtrain.model import LanguageModel
from llmtrain.model.gpt import GPT, GPTConfig
from llmtrain.objective.causal import Causal, CausalUnit
from llmtrain.optimizer import Trainable
from llmtrain.optimizer.adamw import AdamW
from llmtrain.optimizer.groups import parameter_groups


@dataclass(frozen=True)
class UnfusedAdamW(AdamW):
    """AdamW as ``torch.optim.AdamW(parameters)`` runs it on this device: operation by operation."""

    def build(self, unit: Trainable) -> torch.optim.Optimizer:
        beta1, beta2 = self.betas
        return torch.optim.AdamW(
            parameter_groups(self.members(unit), self.lr), betas=(beta1, beta2), eps=self.eps, fused=False
        )


@dataclass(frozen=True)
class PlainLoss(Causal):
    """All the logits at once, then torch's cross-entropy."""

    def build(self, model: LanguageModel, *others: Any) -> "PlainUnit":
        return PlainUnit(model, self.loss, self.z_loss, self.chunk_tokens)


class PlainUnit(CausalUnit):
    """The unit of :class:`PlainLoss`."""

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        tensors = batch.tensors
        logits = self.model(tensors["inputs"], segments=tensors.get("segments")).float()
        return {self.loss: F.cross_entropy(logits.flatten(0, 1), tensors["targets"].flatten(), reduction="sum")}


@dataclass(frozen=True)
class TorchAttention(GPTConfig):
    """GPT-2 with torch's attention, in all of the process, where there is one of our own."""

    def build(self, vocab_size: int) -> GPT:
        cpu_attention.find_kernel = lambda: (None, "")  # type: ignore[assignment]
        return super().build(vocab_size)
