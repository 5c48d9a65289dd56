"""The log of a run: rows and events, for the metrics and the display."""

import functools
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llmtrain.base.device import peak_memory
from llmtrain.display import Display
from llmtrain.metrics import Metrics
from llmtrain.train.readback import StepRecord
from llmtrain.train.step_timer import StepTimer


@dataclass
class RunLog:
    """The log of one run: its metrics, its display, and the counts that rows are computed from.

    ``clock`` gives seconds; the time between :meth:`restart` and :meth:`account` counts as training.
    """

    run_dir: Path
    metrics: Metrics
    display: Display
    device: torch.device
    timer: StepTimer
    sequences_per_epoch: int
    flops_per_token: Callable[[int], int]  # of a token that attends within so many
    peak_flops: float
    log_every: int
    clock: Callable[[], float] = time.perf_counter

    steps: int = field(default=0, init=False)  # since the last row, as the next three
    tokens: int = field(default=0, init=False)
    flops: int = field(default=0, init=False)
    seconds: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self._flops_at = functools.cache(self.flops_per_token)
        self.restart()

    def restart(self) -> None:
        """Mark the time: training continues from here, and the time before does not count as training."""
        self._mark = self.clock()

    def account(self) -> float:
        """Count the time since the mark as training; returns its seconds."""
        now = self.clock()
        passed = now - self._mark
        self.seconds += passed
        self._mark = now
        return passed

    def count(self, record: StepRecord) -> None:
        """Count a step whose numbers have arrived."""
        self.timer.read()
        if missed := round(record.values.get("missed_replicas", 0)):
            self.event("missed_round", record.step, replicas=missed)
        self.steps += 1
        self.tokens += record.tokens
        self.flops += record.flops

    def reset(self) -> None:
        """Drop the counts since the last row, after a roll-back."""
        self.steps, self.tokens, self.flops, self.seconds = 0, 0, 0, 0.0
        self.timer.forget()

    def epoch(self, position: int) -> float:
        """Passes over the training data at ``position`` of their order."""
        return round(position / max(self.sequences_per_epoch, 1), 4)

    def flops_of(self, spans: Iterable[int]) -> int:
        """Floating-point operations of a step, forward and backward, on ``spans`` of so many tokens each."""
        return sum(number * span * self._flops_at(span) for span, number in Counter(spans).items())

    def step_row(self, record: StepRecord) -> None:
        """Write the metrics row of a step; speeds are means since the last row."""
        steps, tokens, flops, seconds = max(self.steps, 1), self.tokens, self.flops, max(self.seconds, 1e-9)
        self.steps, self.tokens, self.flops, self.seconds = 0, 0, 0, 0.0
        rate = tokens / seconds
        values = record.values
        row = {
            "step": record.step,
            "tokens": record.total_tokens,
            "epoch": self.epoch(record.position + record.batch_size),
            "position": record.position,
            "loss": values["loss"],
            **{f"{name}_loss": values[f"{name}_loss"] for name in record.losses},
            "learning_rate": record.learning_rate,
            "grad_norm": values["grad_norm"],
            "grad_max": values["grad_max"],
            "clipped": bool(values["clipped"]),
            "refused": bool(values["refused"]),
            "batch_size": record.batch_size,
            "tokens_per_second": round(rate, 1),
            "mfu": round(flops / seconds / self.peak_flops, 4),
            "step_seconds": round(seconds / steps, 6),
            **{f"{phase}_seconds": round(value / steps, 6) for phase, value in self.timer.take(seconds).items()},
            "memory_bytes": peak_memory(self.device),
        }
        row |= {key: values[key] for key in ("loss_scale", "outer_norm") if key in values}
        self.metrics.row(row)
        self.display.row(row)

    def event(self, name: str, step: int, **details: Any) -> None:
        """Record an unusual event in the metrics, and show it to the user."""
        row = {"event": name, "step": step, **details}
        self.metrics.row(row)
        self.display.event(row)

    def write_profile(self, step: int) -> None:
        """Have the profile of some steps written, and report its path; the time does not count as training."""
        profile = self.timer.profiler.write()
        path = None if profile.path is None else str(profile.path.relative_to(self.run_dir))
        self.event("profile", step, path=path, message=profile.message)
        self.restart()
