"""A trial step on made-up sequences, without lasting effects."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from llmtrain.data import Batch, Rows
from llmtrain.objective import Objective
from llmtrain.train.step import Step


def made_up_batch(objective: Objective, sequences: int, sequence_length: int, *, is_packed: bool) -> Batch:
    """A batch of token 0, every position a target; with ``is_packed`` each row is one example."""
    tokens = np.zeros((sequences, sequence_length), np.int64)
    segments = np.ones(tokens.shape, np.int32) if is_packed else None
    return objective.collate(Rows(tokens, tokens, segments), np.arange(sequences), 0)


@dataclass(frozen=True)
class Rehearsal:
    """The forward and backward pass of a step on made-up sequences."""

    step: Step
    objective: Objective
    device: torch.device
    sequence_length: int
    is_packed: bool = False  # several examples in a row

    def __call__(self, micro_batch_size: int, *, evaluates: bool = False) -> None:
        """Run a micro-batch of ``micro_batch_size`` sequences; with ``evaluates`` also without gradients."""
        step = self.step
        batch = made_up_batch(self.objective, micro_batch_size, self.sequence_length, is_packed=self.is_packed)
        batch = batch.to(self.device)
        with _random_state_kept(self.device), step.precision.arithmetic():
            was_training = step.unit.training
            try:
                step.unit.train()
                step.accumulate(batch, micro_batch_size)
                if evaluates:
                    step.unit.eval()
                    with torch.no_grad(), step.precision.autocast():
                        step.unit(batch)
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
            finally:
                step.unit.train(was_training)
                step.unit.zero_grad(set_to_none=True)

    def evaluate(self) -> None:
        """Run a sequence without gradients."""
        batch = made_up_batch(self.objective, 1, self.sequence_length, is_packed=self.is_packed).to(self.device)
        unit, was_training = self.step.unit, self.step.unit.training
        with _random_state_kept(self.device), torch.no_grad(), self.step.precision.autocast():
            try:
                unit.eval()
                unit(batch)
            finally:
                unit.train(was_training)


@contextmanager
def _random_state_kept(device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
