"""Periodic evaluation and text samples during training.  They change nothing that training depends on."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from llmtrain.base.files import AppendedFile
from llmtrain.data import Corpus
from llmtrain.data.loader import TrainingStream
from llmtrain.data.sequences import Sequences
from llmtrain.distributed.parallel import Parallel
from llmtrain.evaluation.bits_per_byte import bits_per_byte, mean_target_bytes
from llmtrain.evaluation.loss import EvalResult, evaluate
from llmtrain.inference.generate import SamplingFailed, generate
from llmtrain.metrics import ValidationScore, validation_score
from llmtrain.metrics.jsonl import drop_rows
from llmtrain.objective import Objective, TrainingUnit
from llmtrain.precision import Precision
from llmtrain.tokenizer import Tokenizer
from llmtrain.train.config import LoopConfig
from llmtrain.train.log import RunLog
from llmtrain.train.out_of_memory import halve_on_out_of_memory, is_out_of_memory
from llmtrain.train.state import TrainState
from llmtrain.train.worst_sequences import find_worst_sequences

MEASURES = ("bits_per_byte", "accuracy", "macro_f1", "confusion", "labels")  # of a validation row, beside the loss
Stop = Callable[[], str | None]  # returns the reason to stop, once there is one


@dataclass
class Evaluator:
    """Evaluation and samples of a run: the settings, and the latest results."""

    config: LoopConfig
    unit: TrainingUnit
    objective: Objective
    corpus: Corpus
    tokenizer: Tokenizer
    precision: Precision
    batch_size: int  # sequences in one of ``eval_batches``
    seed: int
    log: RunLog
    samples_file: AppendedFile
    worst: int  # sequences that the event of a skipped step shows; 0: none
    parallel: Parallel  # the way in which the ranks share the unit

    validation_scores: dict[int, ValidationScore] = field(
        default_factory=dict, init=False
    )  # by step; the best is the least
    last_val_loss: float | None = field(default=None, init=False)
    last_train_loss: float | None = field(default=None, init=False)  # evaluated as the validation loss is
    last_measures: dict[str, Any] = field(default_factory=dict, init=False)  # accuracy and so on
    evaluated_step: int | None = field(default=None, init=False)
    sampled_step: int | None = field(default=None, init=False)

    @cached_property
    def validation_digest(self) -> str:
        """A digest of the validation data, by which a report knows the runs whose losses can be compared."""
        assert self.corpus.validation is not None
        return self.corpus.validation.digest()

    def close(self) -> None:
        """Close the file of samples."""
        self.samples_file.close()

    def evaluates(self, step: int, *, at_end: bool) -> bool:
        """Return whether to evaluate after ``step`` steps."""
        every = self.config.eval_every
        if self.corpus.validation is None or every == 0 or step == self.evaluated_step:
            return False
        return at_end or step % every == 0

    def samples(self, step: int, *, at_end: bool) -> bool:
        """Return whether to sample after ``step`` steps."""
        every = self.config.sample_every
        if not self.objective.generates or every == 0 or step in (0, self.sampled_step):
            return False
        return at_end or step % every == 0

    def run(self, state: TrainState, *, at_end: bool, micro_batch_size: int, stop: Stop) -> None:
        """Evaluate and sample if due; stop when ``stop`` gives a reason."""
        with self.precision.autocast() if self.parallel.keeps_casts else nullcontext():
            if self.evaluates(state.step, at_end=at_end):
                self.evaluate(state, min(micro_batch_size, self.batch_size), stop)
            if self.samples(state.step, at_end=at_end) and not stop():
                with self.parallel.whole_weights():
                    if self.parallel.world.is_first:
                        self.sample(state.step)
                self.sampled_step = state.step

    def evaluate(self, state: TrainState, micro_batch_size: int, stop: Stop) -> None:
        """Evaluate the validation data, and training data if configured; write the losses into metrics and state."""
        assert self.corpus.validation is not None
        parts = {"val_loss": (self.corpus.validation, self.config.eval_batches)}
        if self.config.eval_train_batches:
            parts["train_loss"] = (self.corpus.train, self.config.eval_train_batches)
        row: dict[str, Any] = {
            "step": state.step,
            "tokens": state.tokens,
            "epoch": self.log.epoch(state.position),
            "val_data": self.validation_digest,
        }
        for name, (sequences, batches) in parts.items():
            result = self._evaluate_on(sequences, batches, micro_batch_size, stop)
            if result is None:
                return
            row[name] = result.loss
            if name == "val_loss":
                if len(result.losses) > 1:
                    row |= {f"val_{loss}_loss": value for loss, value in result.losses.items()}
                if self.objective.is_likelihood:
                    row["bits_per_byte"] = bits_per_byte(result.loss, self._target_bytes)
                if result.counted is not None:
                    row |= self.objective.measures(result.counted, self.corpus.labels)
        self.record(row, state)
        self.log.metrics.row(row)
        self.log.display.validation(row)

    @cached_property
    def _target_bytes(self) -> float:
        """Bytes of text that a target of the evaluated validation data stands for, on average."""
        assert self.corpus.validation is not None
        return mean_target_bytes(self.corpus.validation, self.tokenizer, self._max_sequences(self.config.eval_batches))

    def _max_sequences(self, batches: int | None) -> int | None:
        return None if batches is None else batches * self.batch_size

    def _evaluate_on(
        self, sequences: Sequences, batches: int | None, micro_batch_size: int, stop: Stop
    ) -> EvalResult | None:
        """The result on ``batches`` batches (None: all); None if ``stop`` gave a reason."""
        max_sequences, parallel = self._max_sequences(batches), self.parallel

        def with_size(size: int) -> EvalResult | None:
            return evaluate(
                self.unit, sequences, self.objective.collator(self.corpus.class_weights), batch_size=size,
                max_sequences=max_sequences,
                precision=self.precision, device=self.log.device, seed=self.seed, stop=lambda: stop() is not None,
                part=(parallel.data_rank, parallel.data_size),
                summed=parallel.sum_over_data if parallel.world.size > 1 else None, casts_once=parallel.keeps_casts,
            )  # fmt: skip

        if parallel.world.size > 1:  # a rank cannot begin again alone
            with parallel.scoring():
                return with_size(micro_batch_size)
        return halve_on_out_of_memory(with_size, micro_batch_size)

    def sample(self, step: int) -> None:
        """Write a sample of text into ``samples.jsonl``; its random numbers follow from seed and step alone."""
        config = self.config
        try:
            ids = generate(
                self.unit.model,
                self.tokenizer.encode_prompt(config.sample_prompt),
                max_tokens=config.sample_tokens,
                sampling=config.sampling(),
                generator=torch.Generator(self.log.device).manual_seed(self.seed + step),
                dtype=self.precision.dtype,
                end_of_text=self.tokenizer.end_of_text,
                report=lambda message: self.log.event("decoding", step, message=message),
            )
            with self.precision.autocast():
                text = self.tokenizer.decode(list(ids))
        except (RuntimeError, ValueError) as error:
            if (
                isinstance(error, RuntimeError)
                and not isinstance(error, SamplingFailed)
                and not is_out_of_memory(error)
            ):
                raise
            self.log.event("no_sample", step, message=str(error).splitlines()[0])
            self.sampled_step = step  # another try would fail, too
            return
        self.sampled_step = step
        row = {"step": step, "prompt": config.sample_prompt, "text": text}
        self.samples_file.append(json.dumps(row, ensure_ascii=False) + "\n")
        self.log.display.sample(step, config.sample_prompt, text)

    def worst_sequences(
        self, stream: TrainingStream, position: int, count: int, micro_batch_size: int
    ) -> list[dict[str, Any]]:
        """The sequences of a skipped step with the largest losses: ``count`` from ``position`` on were trained on."""
        if not self.worst:
            return []
        labels = self.corpus.labels
        with self.parallel.scoring(), self.precision.autocast():
            return find_worst_sequences(
                self.unit, self.tokenizer, stream, position, stream.sequences_at(position, count), self.worst,
                name_target=(lambda target: self.objective.name_target(target, labels)) if labels else None,
                micro_batch_size=micro_batch_size,
            )  # fmt: skip

    # --- results ----------------------------------------------------------------------------------------------------

    def record(self, row: dict[str, Any], state: TrainState) -> None:
        """Add a validation row, of this session or an earlier one, to the results."""
        self.evaluated_step = row["step"]
        self.last_val_loss, self.last_train_loss = row["val_loss"], row.get("train_loss")
        self.last_measures = {key: row[key] for key in MEASURES if key in row}
        self.validation_scores[row["step"]] = validation_score(row)
        best = state.best_val_step
        if best is None or state.best_val_loss is None:
            is_best = True
        elif best in self.validation_scores:
            is_best = validation_score(row) < self.validation_scores[best]
        else:  # the best row is not read yet, or lost
            is_best = row["step"] > best and row["val_loss"] < state.best_val_loss
        if is_best:
            state.best_val_loss, state.best_val_step = row["val_loss"], row["step"]

    def forget_after(self, state: TrainState) -> None:
        """Drop the results after the step of ``state``, to which the run was rolled back."""
        step = state.step
        if self.parallel.world.is_first:
            self.samples_file.rewrite(lambda: drop_rows(self.samples_file.path, lambda row: row["step"] > step))
        self.validation_scores = {at: score for at, score in self.validation_scores.items() if at <= step}
        self.evaluated_step = step if step in self.validation_scores else None
        self.sampled_step = step
        self.last_val_loss = self.last_train_loss = None
        self.last_measures = {}
        best = min(self.validation_scores, key=self.validation_scores.__getitem__, default=None)
        state.best_val_step = best
        state.best_val_loss = None if best is None else self.validation_scores[best][1]
