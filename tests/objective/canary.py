"""An objective and an architecture from outside: masked words and the order of two halves, in one file.

A plug-in: nothing in ``llmtrain`` knows it.  ``objective=masked`` has two losses with counts of their own,
``model=encoder`` is a small encoder that sees both ways.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmtrain.base.named_generators import NamedGenerators
from llmtrain.data import IGNORE, Batch, Rows
from llmtrain.model import LanguageModel, ModelConfig
from llmtrain.model.initial_values import InitialValues, initialise_own
from llmtrain.model.layers.kv_cache import KVCache
from llmtrain.objective import Objective, TrainingUnit

MASK = 0  # the byte tokenizer's id of NUL, which no text has
BUCKETS = 8  # beginnings that the second loss tells apart


class Encoder(LanguageModel):
    """Token and position embeddings, and blocks that see both ways."""

    def __init__(self, config: "EncoderConfig", vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = self.padded_vocab_size = vocab_size
        self.context_length, self.num_layers, self.logit_softcap = config.context_length, config.num_layers, None
        self.token_embedding = nn.Embedding(vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.context_length, config.hidden_size)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(config.hidden_size, 2, 2 * config.hidden_size, 0.0, batch_first=True)
            for _ in range(config.num_layers)
        )

    def hidden(self, ids: Tensor, cache: KVCache | None = None, segments: Tensor | None = None) -> Tensor:
        x = self.token_embedding(ids) + self.position_embedding(torch.arange(ids.shape[1], device=ids.device))
        return self.run_blocks(x, [()] * self.num_layers)

    @property
    def head_weight(self) -> Tensor:
        return self.token_embedding.weight

    @property
    def head_bias(self) -> Tensor | None:
        return None

    def fill(self, name: str, whole: Tensor, generator: torch.Generator) -> None:
        if whole.dim() > 1:
            whole.normal_(0.0, 0.1, generator=generator)
        else:
            whole.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)

    def new_cache(self, batch_size: int, dtype: torch.dtype) -> KVCache:
        raise AssertionError("an encoder generates nothing")

    def layer_index(self, name: str) -> int:
        return int(name.split(".")[1]) + 1 if name.startswith("blocks.") else 0 if "embedding" in name else 99

    def parameters_by_part(self) -> dict[str, int]:
        return {"all": sum(parameter.numel() for parameter in self.parameters())}

    def attention_flops(self, layer: int, sequence_length: int) -> int:
        return 4 * self.config.hidden_size * sequence_length


@dataclass(frozen=True)
class EncoderConfig(ModelConfig):
    num_layers: int
    hidden_size: int
    context_length: int
    vocab_size: int | None

    def build(self, vocab_size: int) -> Encoder:
        return Encoder(self, vocab_size)


class Start(nn.Linear, InitialValues):
    """The head for the class of the first byte."""

    filled = ("weight", "bias")

    def fill(self, key: str, whole: Tensor, generator: torch.Generator) -> None:
        whole.normal_(0.0, 0.1, generator=generator) if key == "weight" else whole.zero_()


class MaskedUnit(TrainingUnit):
    def __init__(self, model: LanguageModel, start: nn.Linear) -> None:
        super().__init__(model)
        self.start = start

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        tensors = batch.tensors
        hidden = self.model.hidden(tensors["inputs"])
        words = F.linear(hidden, self.model.head_weight).flatten(0, 1)
        starts = self.start(hidden[:, 0])
        return {
            "masked": F.cross_entropy(words, tensors["targets"].flatten(), reduction="sum", ignore_index=IGNORE),
            "start": F.cross_entropy(starts, tensors["starts"], reduction="sum", ignore_index=IGNORE),
        }


@dataclass(frozen=True)
class Masked(Objective):
    """Masked words, drawn anew in every epoch, and for a half of the sequences a class of their first byte."""

    rate: float

    generates = False

    def collate(self, rows: Rows, positions: np.ndarray, seed: int) -> Batch:
        inputs, targets = rows.inputs.copy(), np.full_like(rows.inputs, IGNORE)
        starts = np.full(len(inputs), IGNORE, np.int64)
        for row, position in enumerate(positions.tolist()):
            random = np.random.default_rng((seed, position))
            masked = random.random(inputs.shape[1]) < self.rate
            targets[row, masked] = inputs[row, masked]
            if random.random() < 0.5:
                starts[row] = rows.inputs[row, 0] % BUCKETS
            inputs[row, masked] = MASK
        tensors = {name: torch.from_numpy(value) for name, value in
                   (("inputs", inputs), ("targets", targets), ("starts", starts))}  # fmt: skip
        counts = {"masked": int((targets != IGNORE).sum()), "start": int((starts != IGNORE).sum())}
        return Batch(tensors, counts, rows.tokens, rows.lengths_of(("inputs", "targets")))

    def build(
        self, model: LanguageModel, labels: Sequence[str], generators: NamedGenerators | None,
        class_weights: Sequence[float] = (),
    ) -> MaskedUnit:  # fmt: skip
        weight = model.head_weight
        start = Start(weight.shape[1], BUCKETS, device=weight.device)
        if generators is not None:
            initialise_own(start, "start", generators)
        unit = MaskedUnit(model, start)
        unit.loss_weights = {"start": 0.5}
        return unit
