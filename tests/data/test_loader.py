"""The loader: the right batches, the same after a resume, and no hanging."""

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from llmtrain.data import Batch
from llmtrain.data.loader import Loader
from llmtrain.data.order import order
from llmtrain.data.sequences import Sequences

CPU = torch.device("cpu")
SEQUENCES = Sequences([np.arange(0, 61, dtype="<u2"), np.arange(61, 101, dtype="<u2")], 4)  # 25 of them


def fixed(size: int) -> Callable[[int, int], int]:
    return lambda step, tokens: size


def ramp(step: int, tokens: int) -> int:
    """By the tokens: 1 sequence, then 2, then 3, …"""
    return 1 + tokens // 40


def open_loader(
    batch_size: Callable[[int, int], int] = lambda step, tokens: 3, sequences: Any = SEQUENCES, **values: Any
) -> Loader:
    defaults = {"seed": 1, "shuffle": True, "device": CPU, "position": 0, "step": 0, "tokens": 0}
    return Loader(sequences, batch_size=batch_size, **(defaults | values))


def take(loader: Loader, n: int) -> list[Batch]:
    with loader:
        return [loader.next() for _ in range(n)]


def same(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x.inputs, y.inputs) and torch.equal(x.targets, y.targets) and x.num_targets == y.num_targets
        for x, y in zip(a, b, strict=True)
    )


def test_batches_follow_the_order() -> None:
    batches = take(open_loader(), 30)  # more than three epochs, whose edges fall inside batches
    inputs, targets = SEQUENCES.gather(order(np.arange(90), 25, 1, True))
    assert torch.cat([b.inputs for b in batches]).tolist() == inputs.tolist()
    assert torch.cat([b.targets for b in batches]).tolist() == targets.tolist()
    assert {(b.inputs.shape, b.inputs.dtype, b.num_targets) for b in batches} == {((3, 4), torch.int64, 12)}


def test_not_shuffled_is_the_text() -> None:
    batches = take(open_loader(shuffle=False), 8)
    assert torch.cat([b.inputs for b in batches]).flatten().tolist() == list(range(96))


@pytest.mark.parametrize("batch_size", [fixed(1), fixed(3), fixed(60), ramp])
def test_resume_gives_the_same_batches(batch_size: Callable[[int, int], int]) -> None:
    whole = take(open_loader(batch_size), 20)
    position = tokens = 0
    for k, batch in enumerate(whole):  # resumes in the midst of an epoch, at its edge and past it
        assert len(batch.inputs) == batch_size(k, tokens)
        resumed = take(open_loader(batch_size, position=position, step=k, tokens=tokens), len(whole) - k)
        assert same(resumed, whole[k:])
        position += len(batch.inputs)
        tokens += batch.num_targets


def test_ramp_sees_step_and_tokens() -> None:
    seen = []
    take(open_loader(lambda step, tokens: seen.append((step, tokens)) or 2, step=5, tokens=100), 3)
    assert seen[:3] == [(5, 100), (6, 108), (7, 116)]


class Failing(Sequences):
    """Fails at the third batch."""

    def gather(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls == 3:
            raise OSError("the disk is gone")
        return super().gather(indices)


def test_an_error_in_the_thread_reaches_the_caller() -> None:
    with open_loader(sequences=Failing([np.arange(101)], 4)) as loader:
        loader.next()
        loader.next()
        for _ in range(2):  # however often one asks
            with pytest.raises(OSError, match="the disk is gone"):
                loader.next()


def test_an_error_in_batch_size_reaches_the_caller() -> None:
    def broken(step: int, tokens: int) -> int:
        raise ZeroDivisionError("broken")

    with open_loader(broken) as loader, pytest.raises(ZeroDivisionError, match="broken"):
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


@pytest.mark.gpu
def test_batches_on_a_gpu() -> None:
    cpu = take(open_loader(ramp), 40)
    gpu = take(open_loader(ramp, device=torch.device("cuda")), 40)
    assert all(batch.inputs.is_cuda and batch.targets.is_cuda for batch in gpu)
    assert same(cpu, [Batch(b.inputs.cpu(), b.targets.cpu(), b.num_targets) for b in gpu])


@pytest.mark.gpu
def test_gpu_memory_is_not_reused_while_a_batch_is_in_use() -> None:
    """Sums that are queued behind long work see the batch as it was."""
    large = Sequences([np.arange(200_001) % 50_000], 1000)
    device = torch.device("cuda")
    work = torch.randn(4096, 4096, device=device)
    sums = []
    with open_loader(fixed(64), sequences=large, device=device) as loader:
        for _ in range(30):
            batch = loader.next()
            for _ in range(5):
                work = torch.tanh(work @ work)
            sums.append(batch.inputs.sum() + batch.targets.sum())
            del batch
    expected = [int(b.inputs.sum() + b.targets.sum()) for b in take(open_loader(fixed(64), sequences=large), 30)]
    assert [int(each) for each in sums] == expected
