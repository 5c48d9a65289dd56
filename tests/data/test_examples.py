"""Examples as sequences: what a batch holds, which are visited when, and how much of it is padding."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from llmtrain.data import IGNORE, DataError, padded
from llmtrain.data.cache.token_reader import OpenFile, TokenSlice
from llmtrain.data.examples import BUCKET, GROUP, Examples, ExampleStore, no_target
from llmtrain.data.loader import Loader
from llmtrain.data.order.packing import WINDOW, pack
from llmtrain.data.order.permutation import order
from llmtrain.objective.causal import Causal


def shards(folder: Path, stream: np.ndarray, cuts: tuple[int, ...] = ()) -> list[TokenSlice]:
    """``stream`` in files, cut at ``cuts``."""
    found = []
    for number, part in enumerate(np.split(stream, cuts)):
        path = folder / f"{len(list(folder.iterdir()))}-{number}.bin"
        path.write_bytes(part.tobytes())
        file = OpenFile(path, hashlib.sha256(part.tobytes()).hexdigest())
        found.append(TokenSlice(file, stream.dtype, 0, len(part)))
    return found


def make(
    folder: Path, lengths: np.ndarray, longest: int, *, packed: bool = False, labels: bool = False, seed: int = 0
) -> tuple[Examples, list[np.ndarray], list[np.ndarray]]:
    """Examples of random ids, and what each of them is: inputs and targets."""
    rng = np.random.default_rng(seed)
    inputs = [rng.integers(0, 60_000, length).astype("<u2") for length in lengths]
    if labels:
        classes = rng.integers(0, 5, len(lengths))
        targets = [
            np.append(np.full(length - 1, IGNORE), label) for length, label in zip(lengths, classes, strict=True)
        ]
        stream = np.concatenate(inputs)
    else:
        classes = np.zeros(len(lengths), np.int64)
        targets = [np.where(rng.random(len(i)) < 0.5, i.astype(np.int64) + 1, IGNORE) for i in inputs]
        pairs = zip(inputs, targets, strict=True)
        stored = [np.concatenate([i, np.where(t < 0, no_target(i.dtype), t)]) for i, t in pairs]
        stream = np.concatenate(stored).astype("<u2")
    cuts = tuple(np.sort(rng.integers(0, len(stream), 3)).tolist())  # files end anywhere, also twice at one place
    files = shards(folder, stream, cuts)
    stored_examples = ExampleStore(files, np.asarray(lengths, np.int64), classes.astype(np.int64), not labels)
    return Examples(stored_examples, longest, is_packed=packed), inputs, targets


def random_lengths(number: int, longest: int, seed: int = 0) -> np.ndarray:
    """Lognormal, as those of texts are."""
    lengths = np.random.default_rng(seed).lognormal(4.5, 0.7, number)
    return np.clip(lengths, 1, longest).astype(np.int64)


@pytest.mark.parametrize("labels", [False, True])
def test_rows_are_padded_on_the_right(tmp_path: Path, labels: bool) -> None:
    lengths = random_lengths(200, 300)
    examples, inputs, targets = make(tmp_path, lengths, 300, labels=labels)
    assert (len(examples), examples.tokens) == (200, lengths.sum())
    rng = np.random.default_rng(1)
    for _ in range(50):
        indices = rng.integers(0, 200, 7)
        rows = examples.gather(indices)
        longest = lengths[indices].max()
        assert rows.inputs.shape == rows.targets.shape == (7, padded(int(longest), 300))
        assert rows.inputs.dtype == rows.targets.dtype == np.int64
        assert rows.segments is None
        np.testing.assert_array_equal(rows.lengths, lengths[indices])
        for row, index in enumerate(indices):
            length = lengths[index]
            np.testing.assert_array_equal(rows.inputs[row, :length], inputs[index])
            np.testing.assert_array_equal(rows.targets[row, :length], targets[index])
            assert (rows.inputs[row, length:] == 0).all()
            assert (rows.targets[row, length:] == IGNORE).all()


def test_a_file_that_is_cut_is_noticed(tmp_path: Path) -> None:
    examples, _, _ = make(tmp_path, random_lengths(50, 300), 300)
    examples.gather(np.arange(50))
    path = examples.stored.shards[-1].file.path
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DataError, match=path.name):
        examples.gather(np.arange(50))


# --- order ----------------------------------------------------------------------------------------------------------


def of_lengths(lengths: np.ndarray) -> Examples:
    """Only what the order needs."""
    return Examples(ExampleStore([], lengths, lengths, False), int(lengths.max()))


@pytest.mark.parametrize("number", [1, 2, 31, 32, 33, 1000, 1024, 1025, 1056, 3000, 4096])
def test_every_epoch_visits_every_example_once(number: int) -> None:
    examples = of_lengths(random_lengths(number, 500))
    visits = examples.order(np.arange(3 * number), 7, True).reshape(3, number)
    assert (np.sort(visits, axis=1) == np.arange(number)).all()
    if number > 31:
        assert not (visits[0] == visits[1]).all()
        assert not (examples.order(np.arange(number), 8, True) == visits[0]).all()


@pytest.mark.parametrize("number", [5, 1024, 2500])
def test_order_is_a_function_of_the_position(number: int) -> None:
    """However positions are asked for: one by one, in batches over the ends of epochs, from anywhere, backwards."""
    examples = of_lengths(random_lengths(number, 500))
    every = examples.order(np.arange(3 * number), 3, True)
    rng = np.random.default_rng(0)
    for _ in range(20):
        positions = rng.integers(0, 3 * number, 50)
        np.testing.assert_array_equal(examples.order(positions, 3, True), every[positions])
    for begin in range(0, 3 * number - 24, 24 if number > 100 else 1):
        np.testing.assert_array_equal(examples.order(np.arange(begin, begin + 24), 3, True), every[begin : begin + 24])
    assert examples.order(np.arange(0), 3, True).tolist() == []


def test_without_shuffling_it_is_the_order_of_the_file() -> None:
    examples = of_lengths(random_lengths(100, 500))
    assert examples.order(np.arange(250), 1, False).tolist() == [i % 100 for i in range(250)]


def test_each_bucket_holds_the_examples_of_the_permutation() -> None:
    number = 2 * BUCKET + 100
    examples = of_lengths(random_lengths(number, 500))
    mixed, visits = order(np.arange(number), number, 5, True), examples.order(np.arange(number), 5, True)
    for begin in range(0, number, BUCKET):
        here, plain = visits[begin : begin + BUCKET], mixed[begin : begin + BUCKET]
        assert sorted(here) == sorted(plain)
        lengths = examples.lengths[here]
        whole = len(here) // GROUP
        groups = lengths[: whole * GROUP].reshape(whole, GROUP)
        assert (np.diff(groups, axis=1) >= 0).all()  # sorted inside
        firsts = groups[:, 0]
        if whole == BUCKET // GROUP:
            assert 5 < (np.diff(firsts) < 0).sum() < whole - 5  # and in no order of length among themselves
        assert (lengths[whole * GROUP :] >= lengths[: whole * GROUP].max(initial=0)).all()


def padding(examples: Examples, visits: np.ndarray, batch: int) -> float:
    """Share of padding in batches in the order of ``visits``."""
    lengths = examples.lengths[visits][: len(visits) // batch * batch].reshape(-1, batch)
    return 1 - lengths.sum() / (lengths.max(axis=1).sum() * batch)


def test_sorting_by_length_leaves_little_padding() -> None:
    number = 20_000
    examples = of_lengths(random_lengths(number, 1024))
    shuffled = order(np.arange(number), number, 0, True)
    before = padding(examples, shuffled, 8)
    after = padding(examples, examples.order(np.arange(number), 0, True), 8)
    assert before > 0.4
    assert after < 0.03  # measured: 0.569 before, 0.028 after
    evaluated = padding(examples, examples.alike(np.arange(number)), 8)
    assert evaluated < 0.002


def test_examples_are_grouped_by_length_for_evaluation() -> None:
    examples = of_lengths(np.array([5, 3, 5, 1, 3]))
    assert examples.alike(np.array([0, 1, 2, 3, 4])).tolist() == [3, 1, 4, 0, 2]
    assert examples.alike(np.array([2, 0, 4])).tolist() == [4, 2, 0]


# --- packing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 2, 100, 20_000])
def test_packing_keeps_every_example_and_wastes_little(number: int) -> None:
    lengths = random_lengths(number, 512, seed=number)
    members, begins = pack(lengths, 512)
    assert sorted(members) == list(range(number))  # each once
    rows = np.split(members, begins[1:-1])
    used = np.array([lengths[row].sum() for row in rows])
    assert used.max() <= 512
    assert begins[0] == 0
    assert begins[-1] == number
    if number == 20_000:
        assert 1 - lengths.sum() / (512 * len(rows)) < 0.005  # measured: 0.0013 of the rows is empty
    firsts = [row[0] for row in rows]
    assert all((np.diff(row) > 0).all() for row in rows)
    assert all(max(row) // WINDOW == min(row) // WINDOW for row in rows)
    assert firsts == sorted(firsts)
    again, _ = pack(lengths, 512)
    np.testing.assert_array_equal(members, again)


def test_packing_puts_examples_where_they_fit_best() -> None:
    members, begins = pack(np.array([6, 5, 4, 3, 2]), 10)
    assert [row.tolist() for row in np.split(members, begins[1:-1])] == [[0, 2], [1, 3, 4]]


def test_packed_rows_hold_every_example(tmp_path: Path) -> None:
    lengths = random_lengths(300, 200)
    examples, inputs, targets = make(tmp_path, lengths, 200, packed=True)
    assert examples.tokens == lengths.sum()
    rows = examples.gather(np.arange(len(examples)))
    assert rows.segments is not None
    assert rows.lengths is not None
    assert rows.segments.dtype == np.int32
    found = []
    for row in range(len(examples)):
        segments = rows.segments[row]
        assert (segments[rows.lengths[row] :] == 0).all()
        assert (segments[: rows.lengths[row]] > 0).all()
        assert (rows.targets[row][segments == 0] == IGNORE).all()
        for segment in range(1, segments.max() + 1):
            (places,) = np.nonzero(segments == segment)
            assert (np.diff(places) == 1).all()
            found.append((rows.inputs[row, places].tolist(), rows.targets[row, places].tolist()))
    expected = [(i.tolist(), t.tolist()) for i, t in zip(inputs, targets, strict=True)]
    assert sorted(found) == sorted(expected)
    assert examples.padding() < 0.05


# --- through the loader ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_a_loader_of_examples_resumes_at_its_position(tmp_path: Path, packed: bool) -> None:
    import torch

    examples, _, _ = make(tmp_path, random_lengths(90, 200), 200, packed=packed)

    def load(position: int, step: int, tokens: int) -> Loader:
        return Loader(
            examples, Causal(z_loss=0.0, chunk_tokens=None).collate, seed=3,
            shuffle=True, batch_size=lambda step, tokens: 7, device=torch.device("cpu"),
            position=position, step=step, tokens=tokens,
        )  # fmt: skip

    with load(0, 0, 0) as loader:
        batches = [loader.next() for _ in range(30)]
    tokens = sum(batch.tokens for batch in batches[:17])
    with load(17 * 7, 17, tokens) as loader:
        for batch in batches[17:]:
            other = loader.next()
            assert batch.tensors.keys() == other.tensors.keys()
            assert all(torch.equal(tensor, other.tensors[name]) for name, tensor in batch.tensors.items())
            assert (batch.counts, batch.tokens, batch.lengths) == (other.counts, other.tokens, other.lengths)
            assert ("segments" in batch.tensors) == packed
            assert batch.tokens == sum(batch.lengths["inputs"])
            parts = list(batch.split(2))
            assert sum(int((part.tensors["targets"] != IGNORE).sum()) for part in parts) == batch.counts["next_token"]
