"""The parts of a batch that ranks and micro-batches are given."""

import pytest
import torch

from llmtrain.data import Batch


def make_batch(sequences: int) -> Batch:
    rows = torch.arange(sequences)[:, None].expand(sequences, 4)
    return Batch({"inputs": rows}, {"next_token": 4 * sequences}, 4 * sequences, {})


@pytest.mark.parametrize(("sequences", "ranks"), [(8, 2), (5, 2), (7, 3), (2, 4), (1, 3)])
def test_parts_of_ranks_hold_every_sequence_once(sequences: int, ranks: int) -> None:
    batch = make_batch(sequences)
    parts = [batch.shard(rank, ranks) for rank in range(ranks)]
    real = [part for part in parts if not part.is_filler]
    assert torch.cat([part.tensors["inputs"] for part in real])[:, 0].tolist() == list(range(sequences))
    assert {part.step_sequences for part in parts} == {sequences}
    assert {part.tokens for part in parts} == {batch.tokens}
    largest = max(part.sequences for part in real)
    assert {part.largest_part(ranks) for part in parts} == {largest}
    assert all(part.sequences == 1 for part in parts if part.is_filler)


def test_micro_batches_keep_the_size_of_the_step() -> None:
    part = make_batch(5).shard(1, 2)
    assert [micro.step_sequences for micro in part.split(2)] == [5, 5]
    assert not any(micro.is_filler for micro in part.split(2))


def test_whole_batch_is_its_own_largest_part() -> None:
    assert make_batch(5).largest_part(1) == 5
