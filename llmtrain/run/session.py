"""Training: from the parts of a run, a state and a directory to the end of the loop."""

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from llmtrain.base.device import available_memory, peak_flops, peak_memory
from llmtrain.base.files import AppendedFile, write_atomically
from llmtrain.checkpoint.optimizer_state import state_tensors
from llmtrain.checkpoint.writer import Saver
from llmtrain.config.run_config import Parts, RunConfig
from llmtrain.data import Corpus
from llmtrain.data.loader import Loader
from llmtrain.display import Display, open_display
from llmtrain.lint import Finding
from llmtrain.metrics import Metrics
from llmtrain.model import LanguageModel
from llmtrain.model.layers.attention import slow_attention_reason
from llmtrain.plan.blueprint import Blueprint
from llmtrain.plan.memory import estimate
from llmtrain.run.autotune import Rehearsal, compile_loss, fit_micro_batch
from llmtrain.run.directory import RunDirectory
from llmtrain.run.resume import Resumption, has_optimizer_of
from llmtrain.run.summary import header, summarise
from llmtrain.train.evaluation import Looks
from llmtrain.train.loop import Loop
from llmtrain.train.profiler import Profiler, StepProfiler
from llmtrain.train.signals import stop_on_signals
from llmtrain.train.state import TrainState


@dataclass(frozen=True)
class Result:
    """What a run came to."""

    run_dir: Path
    summary: dict[str, Any]  # as summary.json
    model: LanguageModel

    @property
    def exit_reason(self) -> str:
        """``"finished"`` or ``"interrupted"``."""
        return self.summary["exit_reason"]


def execute(
    run: RunConfig,
    parts: Parts,
    directory: RunDirectory,
    state: TrainState,
    *,
    resumption: Resumption | None = None,
    findings: Sequence[Finding] = (),
) -> Result:
    """Train ``parts`` from ``state`` in ``directory``, and leave its plot and summary."""
    start = state.step
    resume_step = None if resumption is None else start
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(stop_on_signals())
        stack.enter_context(parts.precision.arithmetic())
        metrics = stack.enter_context(run.metrics.build(directory.path, resume_step=resume_step))
        display = stack.enter_context(open_display(directory.path))
        saver = stack.enter_context(Saver(run.checkpoint, directory, parts.device))
        peak = peak_flops(parts.device, parts.precision.dtype)
        display.header(list(header(run.name, run, parts, directory.path, state, peak)))
        for note in parts.corpus.notes:
            display.warn(note)
            metrics.row({"event": "warning", "step": start, "key": "data", "message": note})
        for finding in findings if resumption is None else resumption.findings:
            display.warn(finding.message)
            metrics.row({"event": "warning", "step": start, "key": finding.key, "message": finding.message})
        display.start(start, parts.max_steps)
        for row in () if resumption is None else resumption.events():
            metrics.row(row)
            display.event(row)
        parts, found = tune(run, parts, state, peak)
        for row in found:
            metrics.row(row)
            display.event(row)
        if warning := saver.check_memory(run.checkpoint_bytes(parts)):
            display.warn(warning)
        loop = make_loop(
            run, parts, directory, state, metrics=metrics, display=display, saver=saver, peak_flops=peak,
            stop=lambda: stop.signal_name, profiler=make_profiler(run, parts, directory, state),
        )  # fmt: skip
        stack.enter_context(contextlib.closing(loop))
        if resumption is not None:
            remember(loop, resumption)
        reason = "failed"
        try:
            reason = loop.run()
            if reason == "interrupted":
                loop.event("stop", loop.state.step, reason=loop.stop_reason())
        except Exception as error:
            if "llmtrain resume" not in str(error):
                error.add_note(f"what was saved is whole; go on with: llmtrain resume {directory.path}")
            raise
        finally:
            conclude(run, loop, directory, display, reason)
    return Result(directory.path, summarise(run.name, run.objective.verb, loop, reason), parts.model)


def tune(run: RunConfig, parts: Parts, state: TrainState, peak_flops: float) -> tuple[Parts, list[dict[str, Any]]]:
    """Find out what a run finds out at its start, into ``state``; what it had found before stays so.

    Returns the parts to train with, and the events that tell of it.
    """
    rehearsal = Rehearsal(
        parts.model, parts.plain_loss_sum, parts.precision, parts.device, run.data.sequence_length,
        run.data.packs,
    )  # fmt: skip
    events = []
    if run.accumulation.is_probed and state.micro_batch_size is None:
        batch = run.accumulation.micro_batch_size
        events.append(fit_micro_batch(rehearsal, batch, state, partial(fits, run, parts)))
    batch = run.accumulation.batch_size_at(state.step, state.tokens)
    flops = (
        (parts.max_steps - state.step)
        * batch
        * run.data.sequence_length
        * parts.model.flops_per_token(run.data.sequence_length)
    )
    size = min(state.micro_batch_size or run.accumulation.micro_batch_size, batch)
    loss_sum, event = compile_loss(
        rehearsal, run.runtime.compile, state, flops / peak_flops, size,
        evaluates=run.loop.eval_every > 0 and parts.corpus.validation is not None,
        cuda_graphs=run.runtime.cuda_graphs,
    )  # fmt: skip
    if loss_sum is not None:
        parts = replace(parts, loss_sum=loss_sum)
    if reason := slow_attention_reason(parts.device, parts.precision.dtype):
        message = f"torch's kernel: {reason}; training is slower with it on this CPU"
        events.append({"event": "attention", "step": state.step, "message": message})
    return parts, [*events, *([] if event is None else [event])]


def fits(run: RunConfig, parts: Parts, micro_batch_size: int) -> bool:
    """Whether host memory has room to train with such micro-batches, by what a traced step takes."""
    batch, vocab_size = run.accumulation.micro_batch_size, run.vocab_size(parts.tokenizer)
    blueprint = Blueprint(run, vocab_size, parts.precision, batch, micro_batch_size, parts.corpus.labels)
    available = available_memory()
    taken = estimate(blueprint, gpu=False, copied=run.checkpoint.asynchronous).needed - peak_memory(parts.device)
    return available is None or taken < available


def make_loop(
    run: RunConfig,
    parts: Parts,
    directory: RunDirectory,
    state: TrainState,
    *,
    metrics: Metrics,
    display: Display,
    saver: Saver,
    peak_flops: float,
    stop: Callable[[], str | None],
    log_every: int | None = None,
    profiler: Profiler | None = None,
) -> Loop:
    """The loop over ``parts`` from ``state`` on."""
    labels = parts.corpus.labels
    recovery = run.recovery.build(parts.device, judges_spikes=not labels)
    recovery.load_state_dict(state.recovery)
    looks = Looks(
        config=run.loop, corpus=parts.corpus, tokenizer=parts.tokenizer, model=parts.model,
        loss_sum=parts.loss_sum, plain_loss_sum=parts.plain_loss_sum, precision=parts.precision,
        device=parts.device, seed=run.runtime.seed, batch_size=run.accumulation.batch_size_at(0, 0),
        metrics=metrics, display=display, samples=AppendedFile(directory.samples),
        score=partial(run.objective.score, parts.model) if run.objective.scores else None,
        measures=partial(run.objective.measures, labels=labels), generates=run.objective.generates,
    )  # fmt: skip
    return Loop(
        config=run.loop, state=state, max_steps=parts.max_steps, device=parts.device, model=parts.model,
        loss_sum=parts.loss_sum, optimizer=parts.optimizer, schedule=run.schedule, peak_lr=run.optimizer.lr,
        precision=parts.precision, clipping=run.clipping, accumulation=run.accumulation, recovery=recovery,
        examples=run.recovery.examples, open_loader=partial(open_loader, run, parts),
        sequences_at=partial(sequences_at, run, parts.corpus), looks=looks, checkpoint=run.checkpoint,
        saver=saver, directory=directory, config_text=directory.config.read_text(encoding="utf-8"),
        metrics=metrics, log_every=log_every or run.metrics.log_every, display=display, stop=stop,
        flops_per_token=parts.model.flops_per_token(run.data.sequence_length), peak_flops=peak_flops,
        can_restore=partial(has_optimizer_of, run=run), profiler=profiler or Profiler(),
        name_target=partial(run.objective.name_target, labels=labels) if labels else None,
    )  # fmt: skip


def make_profiler(run: RunConfig, parts: Parts, directory: RunDirectory, state: TrainState) -> Profiler:
    """What ``runtime.profile`` asks for."""
    if not run.runtime.profile:
        return Profiler()
    state_bytes = sum(tensor.nbytes for tensor in state_tensors(parts.optimizer).values())
    return StepProfiler(directory.path, parts.device, state.step, list(parts.model.parameters()), state_bytes)


def conclude(run: RunConfig, loop: Loop, directory: RunDirectory, display: Display, reason: str) -> None:
    """Leave the run's summary and plot, however it ended."""
    summary = summarise(run.name, run.objective.verb, loop, reason)
    try:
        write_atomically(directory.summary, json.dumps(summary, indent=1) + "\n")
        if reason != "failed":
            from llmtrain.report.curves import draw_run  # matplotlib takes a while to import

            draw_run(directory.path)
    except OSError as error:  # a full disk; why the run ended must not be lost over it
        display.warn(f"the run's summary and plot could not be written: {error}")
    display.summary(summary)


def sequences_at(run: RunConfig, corpus: Corpus, position: int, count: int) -> np.ndarray:
    """Numbers of the training sequences at ``count`` positions from ``position`` on."""
    return corpus.train.order(np.arange(position, position + count), run.runtime.seed, run.data.shuffle)


def open_loader(run: RunConfig, parts: Parts, state: TrainState) -> Loader:
    """The training batches from ``state`` on."""
    return Loader(
        parts.corpus.train,
        seed=run.runtime.seed,
        shuffle=run.data.shuffle,
        batch_size=run.accumulation.batch_size_at,
        device=parts.device,
        position=state.position,
        step=state.step,
        tokens=state.tokens,
    )


def remember(loop: Loop, resumption: Resumption) -> None:
    """Tell a resumed loop what was evaluated and sampled before, and which checkpoints are known not to be whole."""
    for row in resumption.seen.validations:
        loop.looks.note(row, loop.state)
    loop.looks.sampled_step, loop.last_loss = resumption.seen.sampled_step, resumption.seen.loss
    if resumption.parent is None:
        loop.saver.damaged.update(path for path, _ in resumption.origin.passed_over)
