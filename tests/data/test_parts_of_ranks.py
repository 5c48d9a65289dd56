"""The batches of several ranks: each collates its own sequences, as a division of the whole batch gives them."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmtrain.data import Batch, Count, Rows
from llmtrain.data.loader import Loader
from llmtrain.data.sequences import Sequences, Stream
from llmtrain.objective import Objective
from llmtrain.objective.causal import Causal
from llmtrain.objective.classification import Classification, Part
from tests.data.test_examples import make, random_lengths

CAUSAL = Causal(z_loss=0.0, chunk_tokens=None)
CLASSES = Classification(Part.all, 1, multi_label=False, weighted_mean=True)
WEIGHTS = (0.1, 0.7, 1.3, 2.9, 3.3)


class Recorded(Sequences):
    """Sequences that record which of them are read."""

    def __init__(self, inner: Sequences) -> None:
        self.inner, self.read = inner, 0
        self.sequence_length, self.tokens = inner.sequence_length, inner.tokens
        self.order, self.outline = inner.order, inner.outline  # type: ignore[method-assign]

    def __len__(self) -> int:
        return len(self.inner)

    def gather(self, indices: np.ndarray) -> Rows:
        self.read += len(indices)
        return self.inner.gather(indices)


def load(sequences: Sequences, objective: Objective, count: Count | None, part: tuple[int, int]) -> list[Batch]:
    options: dict[str, Any] = {} if count is None else {"count": count}
    with Loader(
        sequences, objective.collator(WEIGHTS), seed=3, shuffle=True, batch_size=lambda step, tokens: 5 - step % 2,
        device=torch.device("cpu"), part=part, position=0, step=0, tokens=0, **options,
    ) as loader:  # fmt: skip
        return [loader.next() for _ in range(12)]


def stream(folder: Path) -> Sequences:
    return Stream([np.arange(0, 61, dtype="<u2"), np.arange(61, 101, dtype="<u2")], 4)


def examples(folder: Path, **keys: bool) -> Sequences:
    return make(folder, random_lengths(90, 200), 200, **keys)[0]


@pytest.mark.parametrize(
    ("build", "objective"),
    [
        (stream, CAUSAL),
        (examples, CAUSAL),
        (partial(examples, packed=True), CAUSAL),
        (partial(examples, labels=True), CLASSES),
        (partial(examples, labels=True), Classification(Part.all, 1, multi_label=False, weighted_mean=False)),
    ],
)
def test_a_rank_collates_its_part_alone(
    tmp_path: Path, build: Callable[[Path], Sequences], objective: Objective
) -> None:
    sequences = build(tmp_path)
    count = partial(objective.count, class_weights=WEIGHTS)
    for rank, of in ((0, 2), (1, 2), (2, 3), (1, 7), (6, 7)):  # of 7 ranks some have no sequence
        recorded = Recorded(sequences)
        divided, own = load(sequences, objective, None, (rank, of)), load(recorded, objective, count, (rank, of))
        for expected, batch in zip(divided, own, strict=True):
            assert batch.tensors.keys() == expected.tensors.keys()
            assert all(torch.equal(tensor, expected.tensors[name]) for name, tensor in batch.tensors.items())
            for key in ("counts", "tokens", "lengths", "spans", "step_sequences", "is_filler"):
                assert getattr(batch, key) == getattr(expected, key), key
        assert recorded.read <= 15 * (-(-5 // of))  # made ahead: two or three more


def test_an_objective_that_collates_otherwise_sees_the_whole_batch(tmp_path: Path) -> None:
    class Shifted(Causal):
        def collate(self, rows: Rows, positions: np.ndarray, seed: int) -> Batch:
            assert len(positions) >= 4
            return super().collate(rows, positions, seed)

    objective = Shifted(z_loss=0.0, chunk_tokens=None)
    sequences = stream(tmp_path)
    own = load(sequences, objective, objective.count, (1, 2))
    assert [batch.sequences for batch in own[:2]] == [3, 2]
    assert own[0].counts == {"next_token": 20}
