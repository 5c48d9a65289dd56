"""The loss on responses: against a reference of its own, and whatever way the examples share rows and batches."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from llmtrain.base.named_generators import NamedGenerators
from llmtrain.config.assemble import build_unit
from llmtrain.data import IGNORE, Batch, Corpus
from llmtrain.data.sequences import Rows
from llmtrain.objective import TrainingUnit
from llmtrain.run.run import Run

SAMPLE = Path(__file__).parents[2] / "data" / "instructions.json"
MODELS = ("tiny", "llama_tiny")


def compose(folder: Path, name: str, *overrides: str) -> Run:
    return Run.compose(
        f"model={name}", "model.context_length=320", "tokenizer=byte", "data=instruction", "objective=instruction",
        f"data.path={SAMPLE}", "data.sequence_length=320", f"data.cache_dir={folder}", "data.template=chatml",
        "data.validation_fraction=0.9", *overrides,
    )  # fmt: skip


@pytest.fixture(params=MODELS)
def made(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Run, TrainingUnit, Corpus, Corpus]:
    """A run, its unit in float64, and the data unpacked and packed."""
    run, packed = (compose(tmp_path, request.param, f"data.pack={pack}") for pack in ("false", "true"))
    tokenizer = run.tokenizer.build()
    generators = NamedGenerators(1)
    unit = build_unit(run, tokenizer.vocab_size, (), torch.device("cpu"), generators, load_weights=True).double()
    return run, unit, run.data.build(tokenizer), packed.data.build(tokenizer)


def batches(run: Run, rows: Rows, size: int) -> Iterator[Batch]:
    """The micro-batches of a step of ``rows``."""
    return run.objective.collate(rows, np.arange(len(rows.inputs)), 0).split(size)


def loss_and_gradient(run: Run, unit: TrainingUnit, rows: Rows, size: int) -> tuple[float, Tensor]:
    """Mean over the targets, and its gradient: that of all parameters in one."""
    number = int((rows.targets != IGNORE).sum())
    unit.zero_grad(set_to_none=True)
    total = 0.0
    for batch in batches(run, rows, size):
        assert batch.counts == {run.objective.loss: number}
        loss = unit(batch)[run.objective.loss] / number
        loss.backward()
        total += loss.item()
    return total, torch.cat([p.grad.ravel() for p in unit.parameters() if p.grad is not None])


def test_the_loss_covers_responses_alone(made: tuple[Run, TrainingUnit, Corpus, Corpus]) -> None:
    """Each example by itself, softmax written out, the response found in its text."""
    run, unit, corpus, _ = made
    tokenizer = run.tokenizer.build()
    lengths = corpus.train.gather(np.arange(len(corpus.train))).lengths
    assert lengths is not None
    rows = corpus.train.gather(np.flatnonzero(lengths < 320)[:6])  # whole ones
    assert rows.lengths is not None
    total, number = 0.0, 0
    for inputs, length in zip(rows.inputs, rows.lengths, strict=True):
        text = tokenizer.decode(inputs[:length].tolist())
        begin = len(text[: text.index("<|im_start|>assistant\n")].encode()) + len("<|im_start|>assistant\n")
        # the last of "<|im_end|>" is a target, and no input
        ids = [*inputs[:length].tolist(), ord(">")]
        assert bytes(ids).endswith(b"<|im_end|>")
        with torch.no_grad():
            logits = unit.model(torch.tensor([ids[:-1]]))[0].numpy()
        for place in range(begin, len(ids)):
            row = logits[place - 1]
            row = row[np.isfinite(row)]
            total += np.log(np.exp(row - row.max()).sum()) + row.max() - logits[place - 1, ids[place]]
            number += 1
    with torch.no_grad():
        loss = unit(next(batches(run, rows, 6)))[run.objective.loss].item()
    assert number == (rows.targets != IGNORE).sum()
    assert number < rows.lengths.sum() / 2  # most is not trained on
    assert loss == pytest.approx(total, rel=1e-12)


def test_packing_changes_no_gradient(made: tuple[Run, TrainingUnit, Corpus, Corpus]) -> None:
    run, unit, plain, packed = made
    assert len(packed.train) < len(plain.train)
    one = loss_and_gradient(run, unit, plain.train.gather(np.arange(len(plain.train))), 8)
    rows = packed.train.gather(np.arange(len(packed.train)))
    assert rows.segments is not None
    assert rows.segments.max() > 1
    other = loss_and_gradient(run, unit, rows, 8)
    assert one[0] == pytest.approx(other[0], rel=1e-12)
    torch.testing.assert_close(one[1], other[1], rtol=1e-6, atol=1e-12)
    alone = loss_and_gradient(run, unit, rows._replace(segments=np.minimum(rows.segments, 1)), 8)
    assert (alone[1] - other[1]).norm() > 1e-3 * other[1].norm()  # attention across examples would


@pytest.mark.parametrize("packed", [False, True])
def test_micro_batches_change_no_gradient(made: tuple[Run, TrainingUnit, Corpus, Corpus], packed: bool) -> None:
    run, unit, *corpora = made
    rows = corpora[packed].train.gather(np.arange(8))
    whole = loss_and_gradient(run, unit, rows, 8)
    for size in (1, 3):
        loss, gradient = loss_and_gradient(run, unit, rows, size)
        assert loss == pytest.approx(whole[0], rel=1e-12)
        torch.testing.assert_close(gradient, whole[1], rtol=1e-9, atol=1e-14)


def test_data_without_responses_are_refused() -> None:
    with pytest.raises(ValueError, match="objective=instruction: does not go with data=python_docs"):
        Run.compose("model=tiny", "tokenizer=byte", "data=python_docs", "objective=instruction")
