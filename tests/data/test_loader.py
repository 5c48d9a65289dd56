"""The loader: the right batches, the same after a resume, and no hanging."""

import logging
import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmtrain.data import Batch, DataError
from llmtrain.data import loader as module
from llmtrain.data.cache.integrity import open_checked
from llmtrain.data.cache.token_file import TokenFile
from llmtrain.data.loader import Loader
from llmtrain.data.order.permutation import order
from llmtrain.data.sequences import Sequences, Stream
from llmtrain.objective.causal import Causal
from tests.data.harm import flip

CPU = torch.device("cpu")
CAUSAL = Causal(z_loss=0.0, chunk_tokens=None)
SEQUENCES = Stream([np.arange(0, 61, dtype="<u2"), np.arange(61, 101, dtype="<u2")], 4)  # 25 of them


def inputs(batch: Batch) -> torch.Tensor:
    return batch.tensors["inputs"]


def targets(batch: Batch) -> torch.Tensor:
    return batch.tensors["targets"]


def fixed(size: int) -> Callable[[int, int], int]:
    return lambda step, tokens: size


def ramp(step: int, tokens: int) -> int:
    """By the tokens: 1 sequence, then 2, then 3, …"""
    return 1 + tokens // 40


def open_loader(
    batch_size: Callable[[int, int], int] = lambda step, tokens: 3, sequences: Any = SEQUENCES, **values: Any
) -> Loader:
    defaults = {"seed": 1, "shuffle": True, "device": CPU, "position": 0, "step": 0, "tokens": 0}
    return Loader(sequences, CAUSAL.collate, batch_size=batch_size, **(defaults | values))


def take(loader: Loader, n: int) -> list[Batch]:
    with loader:
        return [loader.next() for _ in range(n)]


def same(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(inputs(x), inputs(y)) and torch.equal(targets(x), targets(y)) and x.counts == y.counts
        for x, y in zip(a, b, strict=True)
    )


def test_batches_follow_the_order() -> None:
    batches = take(open_loader(), 30)  # more than three epochs, whose edges fall inside batches
    expected = SEQUENCES.gather(order(np.arange(90), 25, 1, True))
    assert torch.cat([inputs(b) for b in batches]).tolist() == expected.inputs.tolist()
    assert torch.cat([targets(b) for b in batches]).tolist() == expected.targets.tolist()
    kinds = {(inputs(b).shape, inputs(b).dtype, b.counts["next_token"]) for b in batches}
    assert kinds == {((3, 4), torch.int64, 12)}


def test_without_shuffling_batches_follow_the_text() -> None:
    batches = take(open_loader(shuffle=False), 8)
    assert torch.cat([inputs(b) for b in batches]).flatten().tolist() == list(range(96))


@pytest.mark.parametrize("batch_size", [fixed(1), fixed(3), fixed(60), ramp])
def test_resume_gives_the_same_batches(batch_size: Callable[[int, int], int]) -> None:
    whole = take(open_loader(batch_size), 20)
    position = tokens = 0
    for k, batch in enumerate(whole):  # resumes in the midst of an epoch, at its edge and past it
        assert batch.sequences == batch_size(k, tokens)
        resumed = take(open_loader(batch_size, position=position, step=k, tokens=tokens), len(whole) - k)
        assert same(resumed, whole[k:])
        position += batch.sequences
        tokens += batch.tokens


def test_the_batch_size_follows_step_and_tokens() -> None:
    seen = []
    take(open_loader(lambda step, tokens: seen.append((step, tokens)) or 2, step=5, tokens=100), 3)
    assert seen[:3] == [(5, 100), (6, 108), (7, 116)]


class Failing(Stream):
    """Fails at the third batch."""

    def gather(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls == 3:
            raise OSError("the disk is gone")
        return super().gather(indices)


def test_an_error_in_the_thread_reaches_the_caller() -> None:
    with open_loader(sequences=Failing([np.arange(101)], 4), step=7, position=1000) as loader:
        loader.next()
        loader.next()
        for _ in range(2):  # however often one asks
            with pytest.raises(
                DataError,
                match=r"^loader thread, step 9, sequences 1,006 to 1,008 of the order: OSError: the disk is gone$",
            ) as error:
                loader.next()
            assert isinstance(error.value.__cause__, OSError)


def test_an_error_in_batch_size_reaches_the_caller() -> None:
    def broken(step: int, tokens: int) -> int:
        raise ZeroDivisionError("broken")

    with (
        open_loader(broken) as loader,
        pytest.raises(
            DataError, match=r"^loader thread, step 0, from sequence 0 of the order on: ZeroDivisionError: b"
        ),
    ):
        loader.next()


def test_out_of_memory_in_the_thread_is_reported_as_such() -> None:
    def broken(step: int, tokens: int) -> int:
        raise torch.OutOfMemoryError("of the device")

    with open_loader(broken) as loader, pytest.raises(torch.OutOfMemoryError, match="of the device"):
        loader.next()


def test_batches_are_made_ahead_but_not_far() -> None:
    made = []
    with open_loader(lambda step, tokens: made.append(step) or 1) as loader:
        loader.next()
        deadline = time.monotonic() + 5
        while len(made) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert made == [0, 1, 2]


def test_close_ends_the_thread_and_next_says_so() -> None:
    before = threading.active_count()
    loader = open_loader()
    loader.next()
    loader.close()
    assert threading.active_count() == before
    loader.close()
    with pytest.raises(RuntimeError, match="closed"):
        loader.next()


def test_close_wakes_a_waiting_caller() -> None:
    release = threading.Event()
    loader = open_loader(lambda step, tokens: int(release.wait(10)))
    errors: list[BaseException] = []

    def wait() -> None:
        try:
            loader.next()
        except RuntimeError as error:
            errors.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    closing = threading.Thread(target=loader.close)
    closing.start()
    waiting.join(5)
    assert len(errors) == 1
    release.set()
    closing.join(5)
    assert not closing.is_alive()


def test_closing_does_not_wait_for_a_thread_that_is_held_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "CLOSE_SECONDS", 0.2)
    held, reached = threading.Event(), threading.Event()

    def hold(step: int, tokens: int) -> int:
        if step == 2:
            reached.set()
            held.wait(30)
        return 3

    loader = open_loader(hold)
    loader.next()
    assert reached.wait(10)
    with caplog.at_level(logging.WARNING):
        loader.close()
    assert loader._thread.is_alive()
    assert "left behind: the loader thread, step 2, from sequence 6 of the order on" in caplog.text
    held.set()
    loader._thread.join(5)
    assert not loader._thread.is_alive()


def test_a_long_wait_is_logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(module, "WATCH_SECONDS", 0.01)
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 0.1)
    with caplog.at_level(logging.WARNING), open_loader(lambda step, tokens: time.sleep(0.35) or 1) as loader:
        loader.next()
    assert caplog.records
    assert "still waiting for the loader thread, step 0, from sequence 0 of the order on" in caplog.text


def test_loaders_are_opened_at_other_positions_again_and_again() -> None:
    """As a run does that skips some of its data."""
    before = threading.active_count()
    whole = take(open_loader(fixed(3)), 100)
    for step in (0, 50, 20, 21, 99) * 4:
        with open_loader(fixed(3), position=3 * step, step=step, tokens=12 * step) as loader:
            assert same([loader.next()], [whole[step]])
        assert threading.active_count() == before  # whatever the thread was at: making, or waiting for room


# --- files that are harmed while they are read -------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Three shards of 1,000 tokens: 187 sequences of 16."""
    for i in range(3):
        (tmp_path / f"{i}.bin").write_bytes(np.arange(1000 * i, 1000 * i + 1000).astype("<u2").tobytes())
    return sorted(tmp_path.glob("*.bin"))


def open_files(files: list[Path]) -> Sequences:
    tokens = open_checked([TokenFile(file, "<u2", 0) for file in files], 3000, files[0].parent / "cache")
    return Stream(tokens, 16)


def next_but(loader: Loader, number: int) -> list[Batch]:
    return [loader.next() for _ in range(number)]


def cut(file: Path) -> None:
    os.truncate(file, 100)


def empty(file: Path) -> None:
    os.truncate(file, 0)


def lengthen(file: Path) -> None:
    with file.open("ab") as stream:
        stream.write(b"xx")


def rewrite(file: Path) -> None:
    flip(file, 1999)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (cut, "cut while in use: it ends before byte|changed while in use: it has 100 bytes, and had 2,000"),
        (empty, "cut while in use: it ends before byte|changed while in use: it has 0 bytes, and had 2,000"),
        (lengthen, "changed while in use: it has 2,002 bytes, and had 2,000 when it was checked"),
        (rewrite, "changed while in use: it was written to, and its content has changed"),
    ],
)
def test_a_shard_damaged_while_it_is_read_ends_the_run(
    files: list[Path], harm: Callable[[Path], None], message: str
) -> None:
    sequences = open_files(files)
    with open_loader(sequences=sequences) as loader:
        next_but(loader, 5)
        harm(files[1])
        with pytest.raises(DataError) as error:
            next_but(loader, 100)
    where = r"loader thread, step \d+, sequences \d+ to \d+ of the order"
    assert re.fullmatch(rf"{where}: {re.escape(str(files[1]))}: ({message}).*", str(error.value))
    with pytest.raises(DataError, match=rf"^{re.escape(str(files[1]))}: ({message})"):
        sequences.gather(np.arange(187))  # as an evaluation does


def test_both_shards_at_an_edge_are_watched_for_changes(files: list[Path]) -> None:
    sequences = open_files(files)
    across = np.array([62])  # tokens 992 to 1008
    assert sequences.gather(across)[1].tolist() == [list(range(993, 1009))]
    flip(files[1], 0)
    sequences.gather(np.array([61]))
    with pytest.raises(DataError, match=r"1\.bin: changed while in use"):
        sequences.gather(across)


@pytest.mark.parametrize("harm", ["touched", "replaced", "removed"])
def test_a_shard_touched_without_a_change_does_not_end_the_run(
    files: list[Path], harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    expected = take(open_loader(sequences=open_files(files)), 100)
    with open_loader(sequences=open_files(files)) as loader:
        batches = next_but(loader, 5)
        match harm:
            case "touched":
                os.utime(files[1], ns=(0, 0))
            case "replaced":  # by name; who has it open still reads the old one
                (files[0].parent / "new").write_bytes(b"other")
                (files[0].parent / "new").rename(files[1])
            case "removed":
                files[1].unlink()
        batches += next_but(loader, 95)
    assert same(batches, expected)
    told = [record.getMessage() for record in caplog.records]
    assert told == ([f"{files[1]}: touched while in use; its content is the same"] if harm == "touched" else [])


@pytest.mark.gpu
def test_batches_on_a_gpu_are_those_of_the_cpu() -> None:
    cpu = take(open_loader(ramp), 40)
    gpu = take(open_loader(ramp, device=torch.device("cuda")), 40)
    assert all(inputs(batch).is_cuda and targets(batch).is_cuda for batch in gpu)
    assert same(cpu, [batch.to("cpu") for batch in gpu])


@pytest.mark.gpu
def test_gpu_memory_is_not_reused_while_a_batch_is_in_use() -> None:
    """Sums that are queued behind long work see the batch as it was."""
    large = Stream([np.arange(200_001) % 50_000], 1000)
    device = torch.device("cuda")
    work = torch.randn(4096, 4096, device=device)
    sums = []
    with open_loader(fixed(64), sequences=large, device=device) as loader:
        for _ in range(30):
            batch = loader.next()
            for _ in range(5):
                work = torch.tanh(work @ work)
            sums.append(inputs(batch).sum() + targets(batch).sum())
            del batch
    expected = [int(inputs(b).sum() + targets(b).sum()) for b in take(open_loader(fixed(64), sequences=large), 30)]
    assert [int(each) for each in sums] == expected


def test_a_batch_is_split_with_no_more_padding_than_its_parts_need() -> None:
    lengths = (3, 9, 70, 130)
    ids = torch.zeros(4, 192, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.arange(1, length + 1)
    tensors = {"inputs": ids, "targets": ids.clone(), "segments": (ids > 0).int(), "classes": torch.arange(4)}
    batch = Batch(tensors, {"next_token": 212}, 212, dict.fromkeys(("inputs", "targets", "segments"), lengths))
    parts = list(batch.split(2))
    for name in ("inputs", "targets", "segments"):
        assert [part.tensors[name].shape for part in parts] == [(2, 16), (2, 192)]
    assert [part.tensors["classes"].tolist() for part in parts] == [[0, 1], [2, 3]]  # is padded nowhere
    assert all((part.counts, part.tokens) == (batch.counts, batch.tokens) for part in parts)  # of the whole step
    assert [inputs(part).shape for part in batch.split(1)] == [(1, 8), (1, 16), (1, 128), (1, 192)]
    assert all(int((inputs(part) > 0).sum()) == length for part, length in zip(batch.split(1), lengths, strict=True))
    whole = Batch({"inputs": ids}, {"next_token": 768}, 768, {})
    assert [inputs(part).shape for part in whole.split(3)] == [(3, 192), (1, 192)]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5])
def test_the_shards_of_a_batch_are_its_sequences_in_order(ranks: int) -> None:
    (batch,) = take(open_loader(fixed(7)), 1)
    parts = [batch.shard(rank, ranks) for rank in range(ranks)]
    assert torch.equal(torch.cat([inputs(part) for part in parts]), inputs(batch))
    assert max(part.sequences for part in parts) - min(part.sequences for part in parts) <= 1
    assert all(part.counts == batch.counts for part in parts)
