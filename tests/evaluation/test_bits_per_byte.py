"""Bits per byte of validation text."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from llmtrain import Run
from llmtrain.data import IGNORE
from llmtrain.data.sequences import Rows, Stream
from llmtrain.evaluation.bits_per_byte import bits_per_byte, mean_target_bytes
from llmtrain.tokenizer.byte import Byte
from llmtrain.tokenizer.gpt2 import GPT2
from tests.helpers.cli import rows

TEXT = "The lamp of the lighthouse 🙂 burned all night — “always”. "


def test_a_uniform_model_of_bytes_has_eight_bits() -> None:
    assert bits_per_byte(math.log(256), 1.0) == pytest.approx(8.0)
    assert bits_per_byte(1.0, 0.0) is None  # no text at all
    assert bits_per_byte(math.nan, 1.0) is None


def test_the_bytes_of_the_targets_are_those_of_the_text() -> None:
    tokenizer = GPT2().build()
    ids = tokenizer.encode(TEXT * 9)
    stream = Stream([ids], 16)
    targets = stream.gather(np.arange(len(stream))).targets.ravel()
    expected = len(tokenizer.decode_bytes(targets.tolist())) / len(targets)
    assert mean_target_bytes(stream, tokenizer, None) == pytest.approx(expected)
    first = stream.gather(np.arange(2)).targets.ravel().tolist()
    assert mean_target_bytes(stream, tokenizer, 2) == pytest.approx(len(tokenizer.decode_bytes(first)) / 32)


def test_ends_of_documents_are_no_text() -> None:
    tokenizer = Byte().build()
    ids = np.array([*b"abc", tokenizer.end_of_text, *b"de"])
    assert mean_target_bytes(Stream([ids], 5), tokenizer, None) == 4 / 5


def test_masked_targets_do_not_count() -> None:
    class Masked(Stream):
        def gather(self, indices: np.ndarray) -> Rows:
            found = super().gather(indices)
            return found._replace(targets=np.where(found.targets == ord("b"), IGNORE, found.targets))

    assert mean_target_bytes(Masked([np.array([*b"abcbd"])], 4), Byte().build(), None) == 1.0


def test_a_run_reports_the_bits_of_its_validation_text(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    small = ("model=tiny", "tokenizer=python4096", "loop.max_steps=1", "loop.eval_batches=1", "loop.sample_every=0")
    result = Run.compose(*small, f"run_dir={tmp_path / 'run'}", "model.hidden_size=8").train()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    last = [row for row in rows(tmp_path / "run") if "val_loss" in row][-1]
    nats_a_byte = last["bits_per_byte"] * math.log(2)
    assert 2 < last["val_loss"] / nats_a_byte < 6  # bytes of a token
    assert summary["bits_per_byte"] == last["bits_per_byte"] == result.summary["bits_per_byte"]
    output = capfd.readouterr()
    assert f"{last['bits_per_byte']:.3f} bits per byte" in output.out + output.err


def test_a_loss_that_is_no_likelihood_has_no_bits(tmp_path: Path) -> None:
    small = ("model=tiny", "tokenizer=byte", "loop.max_steps=1", "loop.eval_batches=1", "loop.sample_every=0")
    Run.compose(*small, "objective.z_loss=1e-3", f"run_dir={tmp_path / 'run'}").train()
    assert all("bits_per_byte" not in row for row in rows(tmp_path / "run"))
