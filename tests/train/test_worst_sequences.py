"""The worst sequences of a batch are found, by their own losses, and the place in them."""

import json
import math
from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmtrain.base.named_generators import NamedGenerators
from llmtrain.data import IGNORE, Batch
from llmtrain.data.loader import TrainingStream
from llmtrain.data.sequences import Rows, Sequences, Stream
from llmtrain.metrics.jsonl import to_line
from llmtrain.model.gpt import GPTConfig, Initialisation
from llmtrain.objective.causal import Causal
from llmtrain.tokenizer.byte import Byte
from llmtrain.tokenizer.gpt2 import GPT2
from llmtrain.train.worst_sequences import find_worst_sequences
from tests.helpers.units import as_unit

CPU = torch.device("cpu")
BYTE = Byte().build()
CAUSAL = Causal(z_loss=0.0, chunk_tokens=None)
LENGTH = 256


class Bytes(nn.Module):
    """Finds every byte after an ``a`` or a ``b`` likely but ``z``; reading a ``!``, it has no numbers from there on."""

    def __init__(self) -> None:
        super().__init__()
        table = torch.zeros(256, 256)
        table[:, ord("z")] = -9.0
        self.table = nn.Parameter(table)
        poison = torch.zeros(256)
        poison[ord("!")] = math.nan
        self.register_buffer("poison", poison)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table[ids] + self.poison[ids].cumsum(dim=1)[..., None]


class BytesUnit(nn.Module):
    """The view of a training unit that the search has."""

    loss_weights: ClassVar[dict[str, float]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.model = Bytes()
        self.sizes: list[int] = []  # sequences of each call

    def sequence_losses(self, batch: Batch) -> dict[str, Tensor]:
        logits, targets = self.model(batch.tensors["inputs"]), batch.tensors["targets"]
        self.sizes.append(len(targets))
        return {"next_token": F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").sum(1)}

    def eager(self) -> AbstractContextManager[None]:
        return nullcontext()


def stream_of(sequences: Sequences) -> TrainingStream:
    return TrainingStream(sequences, CAUSAL.collate, 0, False, lambda step, tokens: 1, CPU)


def sequences_of(*texts: str) -> Sequences:
    """Each text, of LENGTH characters, a sequence: its bytes are the targets."""
    data = np.frombuffer((" " + "".join(texts)).encode(), np.uint8).astype(np.uint16)
    made = Stream([data], LENGTH)
    assert len(made) == len(texts)
    return made


def find(sequences: Sequences, count: int, indices: list[int] | None = None) -> list[dict]:
    numbers = np.arange(len(sequences)) if indices is None else np.array(indices)
    return find_worst_sequences(BytesUnit(), BYTE, stream_of(sequences), 0, numbers, count, micro_batch_size=2)


def planted(at: int, what: str) -> str:
    """A harmless text with ``what`` in it."""
    text = ("ab" * LENGTH)[:LENGTH]
    return text[:at] + what + text[at + len(what) :]


TEXTS = [planted(0, ""), planted(100, "z" * 40), planted(200, "zz"), planted(150, "!"), planted(10, "z" * 60)]


def test_the_worst_sequences_come_first_with_their_worst_place() -> None:
    found = find(sequences_of(*TEXTS), 4)
    assert [each["sequence"] for each in found] == [3, 4, 1, 2]
    assert math.isnan(found[0]["loss"])
    likely = math.log(255 + math.exp(-9))
    assert [each["loss"] for each in found[1:]] == pytest.approx([likely + 9 * n / 256 for n in (60, 40, 2)], rel=1e-5)
    assert (
        [each["text"] for each in found]
        == [
            "…" + TEXTS[3][127:160] + "…",  # an eighth of the sequence, and the character before
            "…" + "z" * 33 + "…",
            "…b" + "abab" + "z" * 28 + "…",
            "…" + TEXTS[2][191:224] + "…",
        ]
    )


def test_the_place_of_a_nan_is_shown() -> None:
    found = find(sequences_of(*(planted(at, "!") for at in range(154, 165))), 11)
    assert all("!" in each["text"] for each in found)
    assert all(math.isnan(each["loss"]) for each in found)


def test_at_most_as_many_sequences_of_the_batch_as_asked() -> None:
    sequences = sequences_of(*TEXTS)
    assert [each["sequence"] for each in find(sequences, 2, [2, 0, 0, 2])] == [2, 0]
    assert [each["sequence"] for each in find(sequences, 1, [0, 1, 2])] == [1]
    assert find(sequences, 0) == []


def test_worst_sequences_can_be_logged() -> None:
    found = find(sequences_of(*TEXTS), 5)
    assert json.loads(to_line({"event": "refused", "step": 1, "examples": found}))["examples"][0]["loss"] == "nan"


@pytest.mark.parametrize("length", [1, 3, 63, 64, 65, 100, 1000, 5000])
def test_excerpts_are_short_at_any_length(length: int) -> None:
    data = np.full(2 * length + 1, ord("a"), np.uint16)
    data[length + 1 + length // 2] = ord("z")  # a target of the second sequence
    stream = stream_of(Stream([data], length))
    found = find_worst_sequences(BytesUnit(), BYTE, stream, 0, np.array([0, 1]), 1, micro_batch_size=4)
    assert found[0]["sequence"] == 1
    assert "z" in found[0]["text"]
    assert len(found[0]["text"]) <= 67  # 64 targets, the input before them, two marks


def test_excerpts_of_long_words_are_cut() -> None:
    gpt2 = GPT2().build()
    ids = gpt2.encode(" internationally" * 65).astype(np.uint16)
    assert len(ids) == 65
    model = GPTConfig(1, 32, 2, 64, None, 0.0, True, True, None, Initialisation.gpt2).create(
        gpt2.vocab_size, CPU, NamedGenerators(0)
    )
    stream = stream_of(Stream([ids], 64))
    (found,) = find_worst_sequences(as_unit(model), gpt2, stream, 0, np.array([0]), 1, micro_batch_size=1)
    assert len(found["text"]) == 300
    assert found["text"].startswith("… internationally internationally")


class Masked(Stream):
    """Only every fourth target counts, and none of sequence 0."""

    def gather(self, indices: np.ndarray) -> Rows:
        inputs, targets, *_ = super().gather(indices)
        targets[:, np.arange(targets.shape[1]) % 4 != 0] = IGNORE
        targets[indices == 0] = IGNORE
        return Rows(inputs, targets)


def test_targets_that_carry_no_loss_do_not_count() -> None:
    text = "".join("z" if i % 4 else "a" for i in range(LENGTH))
    data = np.frombuffer((" " + text * 2 + planted(128, "zzzz")).encode(), np.uint8).astype(np.uint16)
    found = find(Masked([data], LENGTH), 5)
    likely = math.log(255 + math.exp(-9))
    assert [each["sequence"] for each in found] == [2, 1]
    assert [each["loss"] for each in found] == pytest.approx([likely + 9 / 64, likely], rel=1e-5)
    assert "z" in found[0]["text"]
    assert "z" not in found[1]["text"][2:]  # after the input that its first target follows


def real_model(dropout: float) -> nn.Module:
    config = GPTConfig(2, 32, 4, LENGTH, None, dropout, True, True, None, Initialisation.torch)
    return config.create(257, CPU, NamedGenerators(3))


def test_a_real_model_is_evaluated_without_dropout_and_left_as_it_was() -> None:
    sequences = sequences_of(*TEXTS)
    model = real_model(0.5).train()
    random = torch.get_rng_state()
    found = find_worst_sequences(as_unit(model), BYTE, stream_of(sequences), 0, np.arange(5), 5, micro_batch_size=3)
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    inputs, targets = (torch.from_numpy(rows) for rows in sequences.gather(np.arange(5))[:2])
    with torch.no_grad():
        logits = model.eval()(inputs)
    means = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").mean(dim=1)
    assert [each["sequence"] for each in found] == means.argsort(descending=True).tolist()
    assert [each["loss"] for each in found] == pytest.approx(means.sort(descending=True).values.tolist(), rel=1e-5)


def test_the_mode_is_restored_after_an_error() -> None:
    class Failing(BytesUnit):
        def sequence_losses(self, batch: Batch) -> dict[str, Tensor]:
            raise RuntimeError("an illegal memory access was encountered")

    unit = Failing().train()
    with pytest.raises(RuntimeError, match="illegal"):
        find_worst_sequences(unit, BYTE, stream_of(sequences_of(*TEXTS)), 0, np.arange(5), 1, micro_batch_size=2)
    assert unit.training


def test_whole_micro_batches_go_through_the_unit() -> None:
    unit = BytesUnit()
    find_worst_sequences(unit, BYTE, stream_of(sequences_of(*TEXTS * 4)), 0, np.arange(20), 1, micro_batch_size=8)
    assert unit.sizes == [8, 8, 4, 8]  # the batch, and the eight parts of the worst sequence


def test_fewer_sequences_at_once_where_memory_runs_out() -> None:
    class Hungry(BytesUnit):
        def sequence_losses(self, batch: Batch) -> dict[str, Tensor]:
            if batch.sequences > 2:
                raise torch.OutOfMemoryError("no room")
            return super().sequence_losses(batch)

    sequences = sequences_of(*TEXTS)
    found = find_worst_sequences(Hungry(), BYTE, stream_of(sequences), 0, np.arange(5), 4, micro_batch_size=5)
    assert json.dumps(found) == json.dumps(find(sequences, 4))


def test_padding_changes_no_loss() -> None:
    """Sequences of different lengths in one micro-batch, in float64: as one by one."""
    lengths = [3, 64, 200, 17]

    class Padded(Stream):
        def gather(self, indices: np.ndarray) -> Rows:
            inputs, targets, *_ = super().gather(indices)
            for row, number in enumerate(indices):
                inputs[row, lengths[number] :], targets[row, lengths[number] :] = 0, IGNORE
            return Rows(inputs, targets, lengths=np.array(lengths)[indices])

    data = np.frombuffer((" " + "".join(TEXTS[:4])).encode(), np.uint8).astype(np.uint16)
    stream, unit = stream_of(Padded([data], LENGTH)), as_unit(real_model(0.0).double())
    one, four = (find_worst_sequences(unit, BYTE, stream, 0, np.arange(4), 4, micro_batch_size=size) for size in (1, 4))
    assert [each["loss"] for each in four] == pytest.approx([each["loss"] for each in one], rel=1e-12)
    assert [{**each, "loss": 0} for each in four] == [{**each, "loss": 0} for each in one]
