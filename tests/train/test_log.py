"""The figures of a step's row: floating-point operations of rows shorter than the sequence length."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from llmtrain.base.device import PeakRate
from llmtrain.cli.main import main
from llmtrain.config.assemble import assemble
from llmtrain.data import Rows
from llmtrain.run.run import Run
from tests.helpers.cli import TINY, rows


def test_the_spans_of_rows_are_their_lengths_or_their_examples() -> None:
    ids = np.zeros((2, 6), np.int64)
    assert Rows(ids, ids).spans == (6, 6)
    assert Rows(ids, ids, lengths=np.array([4, 2])).spans == (4, 2)
    segments = np.array([[1, 1, 1, 2, 2, 0], [1, 2, 3, 3, 3, 3]], np.int32)
    assert Rows(ids, ids, segments, np.array([5, 6])).spans == (3, 2, 1, 1, 4)


@pytest.mark.parametrize("pack", [False, True])
def test_mfu_counts_attention_within_each_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pack: bool) -> None:
    """The sum over the examples of a step of tokens times the operations of a token that attends so far."""
    monkeypatch.chdir(tmp_path)
    texts = [{"instruction": "a" * (at % 5 + 1), "output": "b" * (3 * at % 17 + 1)} for at in range(40)]
    Path("rows.json").write_text(json.dumps(texts))
    options = (
        *TINY[:2], *TINY[3:], "data=instruction", "data.path=rows.json", "data.template=plain", f"data.pack={pack}",
        "data.validation_fraction=0", "data.sequence_length=64", "objective=instruction", "precision=fp32",
        "loop.max_steps=2",
    )  # fmt: skip
    monkeypatch.setattr("llmtrain.run.session.peak_rate", lambda device, name, dtype: PeakRate(1e6, ""))
    assert main(["train", *options, "run_dir=run"]) == 0
    run = Run.compose(*options)
    parts = assemble(run, torch.device("cpu"))
    train = parts.corpus.train
    for row in (row for row in rows(Path("run")) if "loss" in row):
        begin = 4 * (row["step"] - 1)
        numbers = train.order(np.arange(begin, begin + 4), run.runtime.seed, run.data.shuffle)
        spans = train.gather(numbers).spans
        assert (len(spans) > 4) == pack
        flops = sum(span * parts.unit.flops_per_token(span) for span in spans)
        assert row["mfu"] * 1e6 * row["step_seconds"] == pytest.approx(flops, rel=2e-2)
