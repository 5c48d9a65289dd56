"""Timing of a few real steps of a run: by the run's own loop, in a temporary directory."""

import contextlib
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from llmtrain.base.device import peak_memory
from llmtrain.base.format import duration
from llmtrain.base.run_files import METRICS
from llmtrain.config import stored_config
from llmtrain.config.assemble import Parts, assemble, first_state
from llmtrain.evaluation.loss import evaluate
from llmtrain.inference.generate import generate
from llmtrain.metrics import read_metrics
from llmtrain.run.directory import RunDirectory
from llmtrain.run.run import Run
from llmtrain.run.session import quiet_loop
from llmtrain.train.out_of_memory import is_out_of_memory

WARM_UP = 2  # steps not counted: they touch memory for the first time
LEAST, MOST = 3, 20  # timed steps
ENOUGH_SECONDS = 3.0  # of timed steps
LONG_SECONDS = 30.0  # of timed steps: the most
SAMPLED = 4  # tokens
REPORT_SECONDS = 5.0  # between two lines of progress


@dataclass(frozen=True)
class ProbeResult:
    """The time and memory of a few steps."""

    steps: int  # timed
    step_seconds: float  # median
    batch_size: int  # sequences of such a step
    micro_batch_size: int  # as configured, or as accumulation=auto has found
    first_seconds: float  # the first step's time beyond the median: the first touch of memory
    compile_seconds: float | None  # None: nothing is compiled
    phase_seconds: dict[str, float]  # of a step: forward, backward, …; empty where the loop does not log them
    evaluated_seconds: float  # for a sequence of evaluation
    sampled_seconds: float  # for a token of a sample
    peak_bytes: int  # as ``memory_bytes`` in the metrics


class ProbeFailed(RuntimeError):
    """An error of a probe whose steps could not be done; the message says why."""


def probe(run: Run, device: torch.device, report: Callable[[str], None] = lambda line: None) -> ProbeResult:
    """Train some steps of ``run`` from its start and time them.  Raises :class:`ProbeFailed` and ValueError.

    ``report`` is called with a line of progress every few seconds.
    """
    with tempfile.TemporaryDirectory(prefix="llmtrain-probe-") as folder, contextlib.ExitStack() as stack:
        directory = RunDirectory(Path(folder))
        directory.config.write_text(stored_config.dump(run), encoding="utf-8")
        run.runtime.seed_everything()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        try:
            report("building the model, to time some steps of the run (probe=false plans without)")
            return _time(run, assemble(run, device), directory, stack, report)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise ProbeFailed(f"out of memory: {str(error).splitlines()[0]}") from error


def _time(
    run: Run, parts: Parts, directory: RunDirectory, stack: contextlib.ExitStack, report: Callable[[str], None]
) -> ProbeResult:
    state = first_state(run, parts)
    parts = replace(parts, length=parts.length.at_least(WARM_UP + MOST))
    loop, events = stack.enter_context(quiet_loop(run, parts, directory, state))
    compile_seconds = next((event["seconds"] for event in events if event["event"] == "compiled"), None)
    seconds: list[float] = []
    peaks: list[int] = []
    reported = time.perf_counter()
    report(f"training {WARM_UP + LEAST} to {WARM_UP + MOST} steps")
    while len(seconds) < WARM_UP + MOST and not _is_enough(seconds[WARM_UP:], peaks):
        start = time.perf_counter()
        loop.advance()
        if parts.device.type == "cuda":
            torch.cuda.synchronize(parts.device)
        seconds.append(time.perf_counter() - start)
        peaks.append(peak_memory(parts.device))
        if time.perf_counter() - reported > REPORT_SECONDS:
            reported = time.perf_counter()
            report(f"step {len(seconds)}, {duration(seconds[-1])}")
    batch = run.accumulation.batch_size_at(0, 0)
    micro = min(loop.step.micro_batch_size, batch)
    if micro < min(run.accumulation.micro_batch_size, batch) and not run.accumulation.is_probed:
        raise ProbeFailed(f"out of memory: only micro-batches of {micro} fit")
    timed = sorted(seconds[WARM_UP:])
    median = timed[len(timed) // 2]
    rows = [row for row in read_metrics(directory.path / METRICS) if "loss" in row and "event" not in row][WARM_UP:]
    phases = {key.removesuffix("_seconds"): sorted(row[key] for row in rows)[len(rows) // 2]
              for key in (rows[0] if rows else {}) if key.endswith("_seconds") and key != "step_seconds"}  # fmt: skip
    return ProbeResult(
        steps=len(timed),
        step_seconds=median,
        batch_size=batch,
        micro_batch_size=micro,
        first_seconds=max(seconds[0] - median, 0.0),
        compile_seconds=compile_seconds,
        phase_seconds=phases,
        evaluated_seconds=_evaluated(run, parts),
        sampled_seconds=_sampled(run, parts),
        peak_bytes=peaks[-1],
    )


def _is_enough(timed: list[float], peaks: list[int]) -> bool:
    """True if the time is known well enough and memory no longer grows, or after LONG_SECONDS."""
    if sum(timed) > LONG_SECONDS:
        return True
    settled = len(peaks) > LEAST and peaks[-1] == peaks[-1 - LEAST]
    return len(timed) >= LEAST and sum(timed) >= ENOUGH_SECONDS and settled


def _evaluated(run: Run, parts: Parts) -> float:
    """Seconds for a sequence of evaluation; 0 where there is none."""
    if parts.corpus.validation is None or run.loop.eval_every == 0:
        return 0.0
    size = min(run.accumulation.micro_batch_size, run.accumulation.batch_size_at(0, 0), len(parts.corpus.validation))
    best = float("inf")
    for _ in range(2):
        start = time.perf_counter()
        evaluate(
            parts.unit, parts.corpus.validation, run.objective.collator(parts.corpus.class_weights), batch_size=size,
            max_sequences=size,
            precision=parts.precision, device=parts.device,
        )  # fmt: skip
        best = min(best, time.perf_counter() - start)
    return best / size


def _sampled(run: Run, parts: Parts) -> float:
    """Seconds for a token of a sample; 0 where there are none."""
    if run.loop.sample_every == 0 or run.loop.sample_tokens == 0:
        return 0.0
    start = time.perf_counter()
    with parts.precision.autocast():
        ids = list(generate(
            parts.unit.model, parts.tokenizer.encode_prompt(run.loop.sample_prompt),
            max_tokens=min(SAMPLED, run.loop.sample_tokens), sampling=run.loop.sampling(),
            generator=torch.Generator(parts.device).manual_seed(run.runtime.seed), dtype=parts.precision.dtype,
            end_of_text=parts.tokenizer.end_of_text,
        ))  # fmt: skip
    return (time.perf_counter() - start) / max(len(ids), 1)
