"""Looks at the model on the way: evaluation and samples.  They change nothing that training depends on."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llmtrain.base.files import AppendedFile
from llmtrain.data import Corpus
from llmtrain.data.sequences import Sequences
from llmtrain.display import Display
from llmtrain.evaluation.loss import Evaluated, LossSum, Score, evaluate
from llmtrain.inference.generate import generate
from llmtrain.metrics import Metrics, ValidationScore, validation_score
from llmtrain.metrics.jsonl import drop_rows
from llmtrain.model import LanguageModel
from llmtrain.precision import Precision
from llmtrain.tokenizer import Tokenizer
from llmtrain.train.config import LoopConfig
from llmtrain.train.out_of_memory import halve_on_out_of_memory, is_out_of_memory
from llmtrain.train.state import TrainState

MEASURES = ("accuracy", "macro_f1", "confusion", "labels")  # of a validation row, where classes are told apart
Stop = Callable[[], str | None]  # why to leave off, once there is a reason


@dataclass
class Looks:
    """What a run is looked at with, and what was seen last."""

    config: LoopConfig
    corpus: Corpus
    tokenizer: Tokenizer
    model: LanguageModel
    loss_sum: LossSum
    plain_loss_sum: LossSum  # not compiled, for batches of any shape
    precision: Precision
    device: torch.device
    seed: int
    batch_size: int  # sequences that one of ``eval_batches`` stands for
    metrics: Metrics
    display: Display
    samples: AppendedFile
    score: Score | None = None  # where more is counted than the loss
    measures: Callable[[Tensor], dict[str, Any]] = lambda counted: {}  # what is told of that
    generates: bool = True  # whether samples of text say something

    standings: dict[int, ValidationScore] = field(default_factory=dict, init=False)  # by step, of the best the least
    last_val_loss: float | None = field(default=None, init=False)
    last_train_loss: float | None = field(default=None, init=False)  # evaluated as the validation loss is
    last_measures: dict[str, Any] = field(default_factory=dict, init=False)  # accuracy and so on
    evaluated_step: int | None = field(default=None, init=False)
    sampled_step: int | None = field(default=None, init=False)

    def evaluates(self, step: int, *, at_end: bool) -> bool:
        """Whether to evaluate after ``step`` steps."""
        every = self.config.eval_every
        if self.corpus.validation is None or every == 0 or step == self.evaluated_step:
            return False
        return at_end or step % every == 0

    def samples_at(self, step: int, *, at_end: bool) -> bool:
        """Whether to sample after ``step`` steps."""
        every = self.config.sample_every
        return self.generates and every > 0 and step > 0 and step != self.sampled_step and (at_end or step % every == 0)

    def look(self, state: TrainState, *, at_end: bool, micro_batch_size: int, stop: Stop) -> None:
        """Evaluate and sample, whichever is due; leaves off when ``stop`` gives a reason."""
        with self.precision.autocast():  # around all of it: the weights are cast once
            if self.evaluates(state.step, at_end=at_end):
                self.evaluate(state, min(micro_batch_size, self.batch_size), stop)
            if self.samples_at(state.step, at_end=at_end) and not stop():
                self.sample(state.step)

    def evaluate(self, state: TrainState, micro_batch_size: int, stop: Stop) -> None:
        """The validation loss, and that of some training data if asked for, into metrics and state."""
        assert self.corpus.validation is not None
        parts = {"val_loss": (self.corpus.validation, self.config.eval_batches)}
        if self.config.eval_train_batches:
            parts["train_loss"] = (self.corpus.train, self.config.eval_train_batches)
        row: dict[str, Any] = {"step": state.step, "tokens": state.tokens, "epoch": self.epoch(state.tokens)}
        for name, (sequences, batches) in parts.items():
            found = self.loss_on(sequences, batches, micro_batch_size, stop)
            if found is None:
                return
            row[name] = found.loss
            if found.counted is not None and name == "val_loss":
                row |= self.measures(found.counted)
        self.note(row, state)
        self.metrics.row(row)
        self.display.validation(row)

    def loss_on(self, sequences: Sequences, batches: int | None, micro_batch_size: int, stop: Stop) -> Evaluated | None:
        """What so many batches (None: all there is) come to; None if asked to leave off."""
        max_sequences = None if batches is None else batches * self.batch_size

        def at(size: int) -> Evaluated | None:
            return evaluate(
                self.loss_sum, self.plain_loss_sum, self.model, sequences, batch_size=size, max_sequences=max_sequences,
                precision=self.precision, device=self.device, stop=lambda: stop() is not None, score=self.score,
            )  # fmt: skip

        return halve_on_out_of_memory(at, micro_batch_size)

    def epoch(self, tokens: int) -> float:
        """Passes over the training data after ``tokens`` target tokens."""
        return round(tokens / max(self.corpus.train.tokens, 1), 4)

    def sample(self, step: int) -> None:
        """A sample of text, into ``samples.jsonl``; its random numbers follow from seed and step alone."""
        config = self.config
        try:
            ids = generate(
                self.model,
                self.tokenizer.encode(config.sample_prompt).tolist(),
                max_tokens=config.sample_tokens,
                sampling=config.sampling(),
                generator=torch.Generator(self.device).manual_seed(self.seed + step),
                dtype=self.precision.dtype,
                end_of_text=self.tokenizer.end_of_text,
            )
            with self.precision.autocast():
                text = self.tokenizer.decode(list(ids))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            row = {"event": "no_sample", "step": step, "message": str(error).splitlines()[0]}
            self.metrics.row(row)
            self.display.event(row)
            self.sampled_step = step  # it would not fit another time either
            return
        self.sampled_step = step
        row = {"step": step, "prompt": config.sample_prompt, "text": text}
        self.samples.append(json.dumps(row, ensure_ascii=False) + "\n")
        self.display.sample(step, config.sample_prompt, text)

    # --- what was seen ----------------------------------------------------------------------------------------------

    def note(self, row: dict[str, Any], state: TrainState) -> None:
        """Take account of a validation row, of this session or of one before."""
        self.evaluated_step = row["step"]
        self.last_val_loss, self.last_train_loss = row["val_loss"], row.get("train_loss")
        self.last_measures = {key: row[key] for key in MEASURES if key in row}
        self.standings[row["step"]] = validation_score(row)
        best = state.best_val_step
        if best is None or state.best_val_loss is None:
            is_best = True
        elif best in self.standings:
            is_best = validation_score(row) < self.standings[best]
        else:  # its own row is not read yet, or lost
            is_best = row["step"] > best and row["val_loss"] < state.best_val_loss
        if is_best:
            state.best_val_loss, state.best_val_step = row["val_loss"], row["step"]

    def forget_after(self, state: TrainState) -> None:
        """Drop what was seen after the step of ``state``, which the run went back to: it will be seen again."""
        step = state.step
        self.samples.rewrite(lambda: drop_rows(self.samples.path, lambda row: row["step"] > step))
        self.standings = {at: found for at, found in self.standings.items() if at <= step}
        self.evaluated_step = step if step in self.standings else None
        self.sampled_step = step
        self.last_val_loss = self.last_train_loss = None
        self.last_measures = {}
        best = min(self.standings, key=self.standings.__getitem__, default=None)
        state.best_val_step, state.best_val_loss = best, None if best is None else self.standings[best][1]
