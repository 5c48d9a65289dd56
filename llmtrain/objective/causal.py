"""Next-token prediction."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from llmtrain.model import LanguageModel
from llmtrain.objective import Objective


@dataclass(frozen=True)
class Causal(Objective):
    """Cross-entropy of each next token, computed in fp32."""

    def __call__(self, model: LanguageModel, inputs: Tensor, targets: Tensor) -> Tensor:
        logits = model(inputs)
        if logits.dtype.itemsize < 4:
            logits = logits.float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
