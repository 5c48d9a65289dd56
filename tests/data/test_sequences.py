"""Sequences against plain slicing of the whole stream."""

import numpy as np
import pytest

from llmtrain.data.sequences import Stream, slice_stream


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
@pytest.mark.parametrize("length", [1, 2, 5, 16])
def test_gathered_sequences_are_slices_of_the_stream(length: int, dtype: str) -> None:
    rng = np.random.default_rng(length)
    for _ in range(100):
        sizes = rng.integers(0, 40, rng.integers(1, 6))
        stream = rng.integers(0, 60_000, sizes.sum()).astype(dtype)
        sequences = Stream(np.split(stream, np.cumsum(sizes)[:-1]), length)
        n = max(len(stream) - 1, 0) // length
        assert len(sequences) == n
        assert sequences.tokens == len(stream)
        if n:
            indices = rng.integers(0, n, 20)
            inputs, targets, *_ = sequences.gather(indices)
            assert inputs.dtype == targets.dtype == np.int64
            assert inputs.flags.c_contiguous
            assert targets.flags.c_contiguous
            for row, i in enumerate(indices):
                np.testing.assert_array_equal(inputs[row], stream[i * length : i * length + length])
                np.testing.assert_array_equal(targets[row], stream[i * length + 1 : i * length + length + 1])


def test_every_token_but_the_first_is_a_target_once() -> None:
    sequences = Stream([np.arange(30, dtype="<u2"), np.arange(30, 101, dtype="<u2")], 10)
    inputs, targets, *_ = sequences.gather(np.arange(len(sequences)))
    assert inputs.ravel().tolist() == list(range(100))
    assert targets.ravel().tolist() == list(range(1, 101))


@pytest.mark.parametrize("tokens", [0, 1, 10])
def test_too_few_tokens_make_no_sequence(tokens: int) -> None:
    sequences = Stream([np.zeros(tokens, "<u2")], 10)
    assert len(sequences) == 0


def test_no_indices_give_no_rows() -> None:
    inputs, targets, *_ = Stream([np.zeros(11, "<u2")], 10).gather(np.arange(0))
    assert inputs.shape == targets.shape == (0, 10)


def test_a_sequence_spans_shards_of_two_types() -> None:
    sequences = Stream([np.arange(5, dtype="<u2"), np.arange(70_000, 70_006, dtype="<u4")], 10)
    inputs = sequences.gather(np.array([0])).inputs
    assert inputs.tolist() == [[0, 1, 2, 3, 4, 70_000, 70_001, 70_002, 70_003, 70_004]]


def test_any_slice_of_a_stream_is_that_of_its_shards() -> None:
    shards = [np.arange(3), np.arange(3, 3), np.arange(3, 10)]
    for begin in range(10):
        for end in range(begin, 11):
            views = slice_stream(shards, begin, end)
            assert np.concatenate([[], *views]).tolist() == list(range(begin, end))
