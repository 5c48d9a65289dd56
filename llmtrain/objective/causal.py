"""Next-token prediction."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from llmtrain.base.checks import non_negative, positive
from llmtrain.base.named_generators import NamedGenerators
from llmtrain.data import Batch
from llmtrain.kernels.linear_cross_entropy import Chunking, Options, linear_cross_entropy
from llmtrain.kernels.row_losses import VocabularyShare
from llmtrain.model import LanguageModel
from llmtrain.objective import Objective, TrainingUnit


class CausalUnit(TrainingUnit):
    """A decoder with the cross-entropy of each next token, in fp32, with the logits of a chunk of tokens at a time."""

    has_stages: ClassVar[bool] = True

    def __init__(self, model: LanguageModel, loss: str, z_loss: float, chunk_tokens: int | None) -> None:
        super().__init__(model)
        self.loss = loss
        self.options = Options(model.logit_softcap, z_loss)
        self.chunking = Chunking(chunk_tokens)
        self.share: VocabularyShare | None = None

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        hidden = self.model.hidden(batch.tensors["inputs"], segments=batch.tensors.get("segments"))
        return {self.loss: self._loss(hidden.flatten(0, 1), batch.tensors["targets"].flatten())}

    def sequence_losses(self, batch: Batch) -> dict[str, Tensor]:
        hidden = self.model.hidden(batch.tensors["inputs"], segments=batch.tensors.get("segments"))
        rows = zip(hidden, batch.tensors["targets"], strict=True)
        return {self.loss: torch.stack([self._loss(*row) for row in rows])}

    def _loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return linear_cross_entropy(
            hidden, self.model.head_weight, self.model.head_bias, targets, self.options, self.chunking, self.share
        )

    def compile_loss(self) -> None:
        self.chunking = replace(self.chunking, is_compiled=True)

    def share_vocabulary(self, share: VocabularyShare | None) -> None:
        self.share = share


@dataclass(frozen=True)
class Causal(Objective):
    """Cross-entropy of each next token."""

    sums_positions: ClassVar[bool] = True

    z_loss: float
    chunk_tokens: int | None

    def __post_init__(self) -> None:
        non_negative(z_loss=self.z_loss)
        if self.chunk_tokens is not None:
            positive(chunk_tokens=self.chunk_tokens)

    @property
    def is_likelihood(self) -> bool:
        return not self.z_loss

    def build(
        self,
        model: LanguageModel,
        labels: Sequence[str],
        generators: NamedGenerators | None,
        class_weights: Sequence[float] = (),
    ) -> CausalUnit:
        return CausalUnit(model, self.loss, self.z_loss, self.chunk_tokens)
