"""A step on made-up sequences, without lasting effects."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from llmtrain.clipping import Clipping
from llmtrain.data import Batch, Rows
from llmtrain.objective import Objective
from llmtrain.optimizer import update
from llmtrain.train.step import Step


def made_up_batch(objective: Objective, sequences: int, sequence_length: int, *, is_packed: bool) -> Batch:
    """A batch of token 0, every position a target; with ``is_packed`` each row is one example."""
    tokens = np.zeros((sequences, sequence_length), np.int64)
    segments = np.ones(tokens.shape, np.int32) if is_packed else None
    return objective.collate(Rows(tokens, tokens, segments), np.arange(sequences), 0)


@dataclass(frozen=True)
class Rehearsal:
    """A step on made-up sequences, and an evaluation if the run evaluates."""

    step: Step
    objective: Objective
    clipping: Clipping
    device: torch.device
    sequence_length: int
    is_packed: bool  # several examples in a row
    evaluates: bool

    def __call__(self, micro_batch_size: int, batch_size: int, *, repeats: int = 1) -> None:
        """Run the step of ``batch_size`` sequences in micro-batches; weights, state and generators stay as they are.

        Of the micro-batches two are run at most: from the second on the gradients of earlier ones are in memory.  The
        update is skipped as that of a step that is not finite, on the device: it takes the memory of any other.  An
        optimizer that leaves this decision to the host (a plug-in's) is not run.
        """
        step, sequences = self.step, min(batch_size, 2 * micro_batch_size)
        batch = made_up_batch(self.objective, sequences, self.sequence_length, is_packed=self.is_packed)
        batch = batch.to(self.device)
        with _random_state_kept(self.device), step.precision.arithmetic():
            was_training = step.unit.training
            try:
                for _ in range(repeats):
                    self._train(batch, micro_batch_size)
                    if self.evaluates:
                        self._evaluate(batch.rows(0, micro_batch_size))
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
            finally:
                step.unit.train(was_training)
                step.drop_gradients()

    def _train(self, batch: Batch, micro_batch_size: int) -> None:
        step = self.step
        step.unit.train()
        step.accumulate(batch, micro_batch_size)
        step.precision.unscale([weight for _, weight in step.weights])
        clip = step.clip(self.clipping, self.clipping.start_step)
        update(step.optimizer, torch.ones((), device=self.device), clip.divisor)
        step.drop_gradients()

    def _evaluate(self, batch: Batch) -> None:
        self.step.unit.eval()
        with torch.no_grad(), self.step.parallel.scoring(), self.step.precision.autocast():
            self.step.unit.score(self.step.unit.fit_shape(batch))

    def evaluate(self) -> None:
        """Run a sequence without gradients."""
        batch = made_up_batch(self.objective, 1, self.sequence_length, is_packed=self.is_packed).to(self.device)
        unit, was_training = self.step.unit, self.step.unit.training
        with _random_state_kept(self.device), torch.no_grad(), self.step.precision.autocast():
            try:
                unit.eval()
                self.step.parallel.forward(batch)
            finally:
                unit.train(was_training)


@contextmanager
def _random_state_kept(device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
