"""The losses of single sequences: together as one by one, and their sum is the loss of the batch."""

import numpy as np
import pytest
import torch

from llmtrain.base.named_generators import NamedGenerators
from llmtrain.data import IGNORE, Rows
from llmtrain.model.gpt import GPTConfig, Initialisation
from llmtrain.objective import Objective, TrainingUnit
from llmtrain.objective.causal import Causal
from llmtrain.objective.classification import Classification, Part

LABELS = ("ham", "spam", "other")
CLASSES = {"train": Part.all, "last_layers": 1, "weighted_mean": False}


@pytest.mark.parametrize(
    ("objective", "weights"),
    [
        (Causal(z_loss=0.0, chunk_tokens=7), ()),
        (Classification(multi_label=False, **CLASSES), (1.0, 2.0, 0.5)),
        (Classification(multi_label=True, **CLASSES), ()),
    ],
)
def test_losses_of_sequences_are_those_of_each_alone(objective: Objective, weights: tuple[float, ...]) -> None:
    config = GPTConfig(2, 32, 2, 24, None, 0.0, True, True, None, Initialisation.gpt2)
    generators = NamedGenerators(1)
    model = config.create(50, torch.device("cpu"), generators)
    unit = objective.build(model, LABELS, generators, weights).double().eval()
    numbers = np.random.default_rng(0)
    tokens, targets = numbers.integers(0, 50, (5, 24)), np.full((5, 24), IGNORE)
    lengths = np.array([24, 3, 17, 9, 24])
    for row, length in enumerate(lengths):
        tokens[row, length:] = 0
        if isinstance(objective, Causal):
            targets[row, :length] = numbers.integers(0, 50, length)
        elif row != 3:  # one without a class
            targets[row, length - 1] = row % 3
    segments = (np.arange(24) // 9 + 1).repeat(5).reshape(24, 5).T.astype(np.int32)
    rows = Rows(tokens, targets, segments if isinstance(objective, Causal) else None, lengths)
    batch = objective.collate(rows, np.arange(5), 0)
    (name,) = batch.counts
    with torch.no_grad():
        together, alone = unit.sequence_losses(batch)[name], TrainingUnit.sequence_losses(unit, batch)[name]
        total = unit(batch)[name]
    assert together.shape == (5,)
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(together.sum(), total, rtol=1e-12, atol=0.0)
