"""Next-token prediction."""

from dataclasses import dataclass

from torch import Tensor

from llmtrain.base.checks import non_negative, positive
from llmtrain.kernels.linear_cross_entropy import Options, linear_cross_entropy
from llmtrain.model import LanguageModel
from llmtrain.objective import Objective


@dataclass(frozen=True)
class Causal(Objective):
    """Cross-entropy of each next token, in fp32, with the logits of a chunk of tokens at a time."""

    z_loss: float
    chunk_tokens: int | None

    def __post_init__(self) -> None:
        non_negative(z_loss=self.z_loss)
        if self.chunk_tokens is not None:
            positive(chunk_tokens=self.chunk_tokens)

    def __call__(self, model: LanguageModel, inputs: Tensor, targets: Tensor, segments: Tensor | None = None) -> Tensor:
        return linear_cross_entropy(
            model.hidden(inputs, segments=segments).flatten(0, 1), model.head_weight, model.head_bias,
            targets.flatten(), Options(model.logit_softcap, self.z_loss), self.chunk_tokens,
        )  # fmt: skip
