"""A training session: the parts of a run, a state and a directory, trained to the end of the loop."""

import contextlib
import io
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llmtrain.activation_checkpointing.none import KeepAll
from llmtrain.base.device import PeakRate, available_memory, peak_memory, peak_rate, unused_gpu_reason
from llmtrain.base.files import AppendedFile, write_atomically
from llmtrain.base.run_files import CONFIG
from llmtrain.base.threads import busy_reason, default_threads
from llmtrain.checkpoint.optimizer_state import state_tensors
from llmtrain.checkpoint.writer import RunDirectoryGone, Saver
from llmtrain.config import stored_config
from llmtrain.config.assemble import Parts
from llmtrain.config.run_config import RunConfig
from llmtrain.data.loader import TrainingStream
from llmtrain.data.sources.search import LeftOut
from llmtrain.display import Display, PlainDisplay, open_display
from llmtrain.display.silent import SilentDisplay
from llmtrain.distributed.supervision import is_supervised
from llmtrain.lint import Finding
from llmtrain.metrics import Metrics
from llmtrain.metrics.local import Local
from llmtrain.metrics.nothing import NoMetrics
from llmtrain.model import LanguageModel
from llmtrain.model.layers.attention import slow_attention_reason
from llmtrain.model.layers.sdpa_order import training_order
from llmtrain.plan.blueprint import Blueprint
from llmtrain.plan.memory import estimate
from llmtrain.run.autotune import fit_micro_batch
from llmtrain.run.directory import RunDirectory
from llmtrain.run.resume import ResumePlan
from llmtrain.run.summary import header, summarise
from llmtrain.train.compilation import CompileSettings, compile_unit
from llmtrain.train.evaluation import Evaluator
from llmtrain.train.length import Place
from llmtrain.train.log import RunLog
from llmtrain.train.loop import Loop
from llmtrain.train.profiler import Profiler, StepProfiler
from llmtrain.train.rehearsal import Rehearsal
from llmtrain.train.signals import stop_on_signals
from llmtrain.train.state import TrainState
from llmtrain.train.step import Step
from llmtrain.train.step_timer import StepTimer

Row = dict[str, Any]


@dataclass(frozen=True)
class RunResult:
    """The result of a run."""

    run_dir: Path
    summary: Row  # as summary.json
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
    findings: Sequence[Finding],
    resumed: ResumePlan | None = None,
) -> RunResult:
    """Train ``parts`` from ``state`` in ``directory``, and leave its plot and summary."""
    start = state.step
    world = parts.parallel.world
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(stop_on_signals(doubled_seconds=1.0 if is_supervised() else 0.0))
        stack.enter_context(parts.precision.arithmetic())
        stack.enter_context(training_order(parts.device))
        metrics: Metrics = NoMetrics()
        display: Display = SilentDisplay(directory.path)
        if world.is_first:
            metrics = run.metrics.build(directory.path, resume_step=None if resumed is None else start)
            display = open_display(directory.path)
        stack.enter_context(metrics)
        stack.enter_context(display)
        peak = peak_rate(parts.device, parts.precision.name, parts.precision.dtype)
        peak = PeakRate(*world.share([peak.flops, peak.source]))  # it decides about compiling: the same on each rank
        log = make_log(
            run, parts, directory, metrics, display, peak_flops=peak.flops * world.size,
            log_every=run.metrics.log_every,
            profiler=make_profiler(run, parts, directory, state),
        )  # fmt: skip
        stop.show = display.notify
        world.show_with(display.notify)
        parent = None if resumed is None or resumed.parent is None else resumed.parent.path
        again = resumed is not None  # also in a sweep: what the data are was said before
        display.header(list(header(run, parts, directory.path, state, peak, parent, brief=again)))
        show_left_out(parts.corpus.left_out, display, brief=again)
        left_out = [("data", note) for part in parts.corpus.left_out for note in part.notes()]
        notes = [("data", note) for note in parts.corpus.notes] + [(f.key, f.message) for f in findings]
        for _, message in (notes := [*device_notes(run, parts), *notes]):
            display.warn(message)
        for key, message in [*left_out, *notes]:
            metrics.row({"event": "warning", "step": start, "key": key, "message": message})
        display.start(start, parts.max_steps)
        step = make_step(run, parts, state, log)
        for row in [*(() if resumed is None else resumed.events()), *tune(run, parts, step, state, peak.flops)]:
            metrics.row(row)
            display.event(row)
        saver = stack.enter_context(make_saver(run, directory, parts))
        tensors = parts.saved_tensors(), state_tensors(parts.optimizer)
        if warning := saver.prepare(*tensors, is_copied=run.checkpoint.copies_between(start, parts.max_steps)):
            display.warn(warning)
        loop = make_loop(run, parts, directory, state, step, log, saver, stop=lambda: stop.signal_name)
        stack.enter_context(contextlib.closing(loop))
        if resumed is not None:
            restore_results(loop, resumed)
        reason = "failed"
        try:
            reason = loop.run()
            if reason == "interrupted":
                log.event("stop", loop.state.step, reason=loop.stop_reason())
        except Exception as error:
            if "llmtrain resume" not in str(error) and directory.config.exists():
                error.add_note(f"the saved checkpoints are intact; continue with: llmtrain resume {directory.path}")
            raise
        finally:
            if world.is_first:
                conclude(run, loop, directory, reason)
    return RunResult(directory.path, summarise(run, loop, reason), parts.unit.model)


def show_left_out(left_out: Sequence[LeftOut], display: Display, *, brief: bool) -> None:
    """Show what is not read of the data: a warning only where it may be text; ``brief``: in a line."""
    for part in left_out:
        if brief:
            display.note(part.brief())
            continue
        for message in part.notes(like_text=True):
            display.warn(message)
        for message in part.notes(like_text=False):
            display.note(message)


def device_notes(run: RunConfig, parts: Parts) -> Iterator[tuple[str, str]]:
    """Remarks on a run on a CPU: a GPU that is not used, fewer threads than there are cores for, or busy cores."""
    threads = torch.get_num_threads()
    if parts.device.type != "cpu":
        return
    if run.runtime.device == "auto" and (reason := unused_gpu_reason()) is not None:
        yield "runtime.device", reason
    if run.runtime.num_threads is None and threads < (possible := default_threads()):
        yield (
            "runtime.num_threads",
            (
                f"{threads} thread{'s' * (threads > 1)}, as before: another number changes the last bits of results; "
                f"runtime.num_threads={possible} uses all cores"
            ),
        )
    if (reason := busy_reason(threads)) is not None:
        yield "runtime.num_threads", reason


@contextlib.contextmanager
def quiet_loop(
    run: RunConfig, parts: Parts, directory: RunDirectory, state: TrainState
) -> Iterator[tuple[Loop, list[Row]]]:
    """A loop that writes into ``directory`` alone, logs every step and shows nothing; and the events of its tuning.

    For steps that are timed or replayed.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(parts.precision.arithmetic())
        stack.enter_context(training_order(parts.device))
        metrics = stack.enter_context(Local(log_every=1).build(directory.path, resume_step=None))
        display = PlainDisplay(directory.path, io.StringIO())
        log = make_log(run, parts, directory, metrics, display, peak_flops=1.0, log_every=1, profiler=Profiler())
        step = make_step(run, parts, state, log)
        peak = peak_rate(parts.device, parts.precision.name, parts.precision.dtype)
        events = tune(run, parts, step, state, peak.flops)
        saver = stack.enter_context(make_saver(run, directory, parts))
        loop = make_loop(run, parts, directory, state, step, log, saver, stop=lambda: None)
        stack.enter_context(contextlib.closing(loop))
        parts.unit.train()
        yield loop, events


# --- the loop and its parts -----------------------------------------------------------------------------------------


def make_log(
    run: RunConfig,
    parts: Parts,
    directory: RunDirectory,
    metrics: Metrics,
    display: Display,
    *,
    peak_flops: float,
    log_every: int,
    profiler: Profiler,
) -> RunLog:
    """The log of the run."""
    clock = time.perf_counter
    return RunLog(
        directory.path, metrics, display, parts.device, StepTimer(parts.device, clock, profiler),
        sequences_per_epoch=len(parts.corpus.train), flops_per_token=parts.unit.flops_per_token, peak_flops=peak_flops,
        log_every=log_every, clock=clock,
    )  # fmt: skip


def make_profiler(run: RunConfig, parts: Parts, directory: RunDirectory, state: TrainState) -> Profiler:
    """The profiler that ``runtime.profile`` asks for."""
    if not run.runtime.profile:
        return Profiler()
    state_bytes = sum(tensor.nbytes for tensor in state_tensors(parts.optimizer).values())
    return StepProfiler(directory.path, parts.device, state.step, list(parts.unit.parameters()), state_bytes)


def make_step(run: RunConfig, parts: Parts, state: TrainState, log: RunLog) -> Step:
    """The step, with the size of micro-batch that the state holds, if any."""
    size = state.micro_batch_of(run.accumulation.micro_batch_size)
    graphs = run.runtime.cuda_graphs
    return Step(
        parts.unit, parts.optimizer, parts.precision, size, timer=log.timer, keeps_gradients=graphs,
        parallel=parts.parallel,
    )  # fmt: skip


def make_saver(run: RunConfig, directory: RunDirectory, parts: Parts) -> Saver:
    """The writer of the run's checkpoints; ``config.yaml`` has been written."""
    return Saver(
        run.checkpoint, directory.path, parts.device, config_text=directory.config.read_text(encoding="utf-8"),
        can_restore=partial(has_optimizer_of, run=run), world=parts.parallel.world.separate(),
        places=parts.places,
    )  # fmt: skip


def has_optimizer_of(checkpoint: Path, run: RunConfig) -> bool:
    """True if the optimizer state of a checkpoint is of the kind of optimizer that ``run`` has.

    True also where the checkpoint's config cannot be read: the check of the checkpoint reports the damage.
    """
    try:
        stored = stored_config.load(checkpoint / CONFIG)
    except stored_config.ConfigError:
        return True
    return stored.get("optimizer", {}).get("_target_") == stored_config.to_plain(run.optimizer)["_target_"]


def make_loop(
    run: RunConfig,
    parts: Parts,
    directory: RunDirectory,
    state: TrainState,
    step: Step,
    log: RunLog,
    saver: Saver,
    *,
    stop: Callable[[], str | None],
) -> Loop:
    """The loop over ``parts`` from ``state`` on."""
    recovery = run.recovery.build(parts.device, judges_spikes=not parts.corpus.labels)
    recovery.load_state_dict(state.recovery)
    evaluator = Evaluator(
        config=run.loop, unit=parts.unit, objective=run.objective, corpus=parts.corpus, tokenizer=parts.tokenizer,
        precision=parts.precision, batch_size=run.accumulation.batch_size_at(0, 0), seed=run.runtime.seed, log=log,
        samples_file=AppendedFile(directory.samples), worst=run.recovery.examples, parallel=parts.parallel,
    )  # fmt: skip
    stream = TrainingStream(
        parts.corpus.train, run.objective.collator(parts.corpus.class_weights), run.runtime.seed, run.data.shuffle,
        parts.length.batch_size_at, parts.device, (parts.parallel.data_rank, parts.parallel.data_size),
        partial(run.objective.count, class_weights=parts.corpus.class_weights),
    )  # fmt: skip
    learning_rate = partial(run.schedule, peak=run.optimizer.lr, total=parts.max_steps)
    return Loop(
        run.loop, state, parts.length, step, stream, learning_rate, run.clipping, recovery, evaluator, saver, log,
        stop,
    )  # fmt: skip


# --- tuning ---------------------------------------------------------------------------------------------------------


def tune(run: RunConfig, parts: Parts, step: Step, state: TrainState, peak_flops: float) -> list[Row]:
    """Choose micro-batch size and compilation, and record both in ``state``; returns the events that report them.

    Choices restored from a checkpoint are kept.
    """
    compiles = run.runtime.compile if parts.parallel.is_compilable else False
    if compiles is not False:  # in short runs as well: the kernel takes seconds to compile
        parts.unit.compile_loss()
    evaluates = run.loop.eval_every > 0 and parts.corpus.validation is not None
    rehearsal = Rehearsal(
        step, run.objective, run.clipping, parts.device, run.data.sequence_length, run.data.packs, evaluates
    )
    events = []
    if parts.device.type == "cuda":
        rehearsal.evaluate()  # FlexAttention is tried at its first use: before anything is compiled or measured
    if run.accumulation.is_probed and state.micro_batch_size is None:
        if parts.parallel.world.size > 1 and parts.device.type == "cuda":
            raise ValueError(
                "accumulation=auto: sizes are tried until memory runs out, which several processes cannot do together; "
                "find the size with one, then name it: accumulation.micro_batch_size=N"
            )

        def fits_on_host(size: int) -> bool:
            return not parts.parallel.world.any(not fits(run, parts, size))

        events.append(fit_micro_batch(rehearsal, run.accumulation.micro_batch_size, state, fits_on_host))
        step.micro_batch_size = state.micro_batch_of(run.accumulation.micro_batch_size)
    batch = parts.length.batch_size_at(state.step, state.tokens)
    tokens = parts.length.place_from(Place(state.step, state.position, state.tokens)).tokens - state.tokens
    flops = tokens * parts.unit.flops_per_token(parts.corpus.train.attended_length)
    batch = -(-batch // parts.parallel.data_size)  # of a rank
    settings = CompileSettings(
        compiles, run.runtime.cuda_graphs, flops / peak_flops,
        pads=parts.corpus.train.mean_length < run.data.sequence_length,
        recomputes=not isinstance(run.activation_checkpointing, KeepAll), is_sharded=parts.parallel.holds_parts,
    )  # fmt: skip
    compiled = compile_unit(rehearsal, settings, state, min(step.micro_batch_size, batch), batch)
    if parts.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(parts.device)  # the run's peak, not that of trials, which may have failed
    if reason := slow_attention_reason(parts.device, parts.precision.dtype):
        events.append({"event": "attention", "step": state.step, "message": reason})
    return [*events, *([] if compiled is None else [compiled])]


def fits(run: RunConfig, parts: Parts, micro_batch_size: int) -> bool:
    """True if host memory has room for such micro-batches, by the estimate of a traced step."""
    batch, vocab_size = run.accumulation.micro_batch_size, run.vocab_size(parts.tokenizer)
    blueprint = Blueprint(run, vocab_size, parts.precision, batch, micro_batch_size, parts.corpus.labels)
    available = available_memory()
    taken = estimate(blueprint, gpu=False, copied=run.checkpoint.asynchronous).needed - peak_memory(parts.device)
    return available is None or taken < available


# --- the ends -------------------------------------------------------------------------------------------------------


def restore_results(loop: Loop, resumed: ResumePlan) -> None:
    """Give a resumed loop its earlier results, and the checkpoints that are known to be damaged."""
    for row in resumed.results.validations:
        loop.evaluator.record(row, loop.state)
    loop.evaluator.sampled_step, loop.last_loss = resumed.results.sampled_step, resumed.results.loss
    if resumed.parent is None:
        loop.saver.damaged.update(path for path, _ in resumed.origin.passed_over)


def conclude(run: RunConfig, loop: Loop, directory: RunDirectory, reason: str) -> None:
    """Write the run's summary and plot, however the run ended."""
    summary = summarise(run, loop, reason)
    try:
        loop.saver.check_place()
        write_atomically(directory.summary, json.dumps(summary, indent=1) + "\n")
        if reason != "failed":
            from llmtrain.report.curves import draw_run  # matplotlib takes a while to import

            draw_run(directory.path)
    except (OSError, RunDirectoryGone) as error:  # a full disk; it must not hide the reason why the run ended
        loop.log.display.warn(f"the run's summary and plot could not be written: {error}")
    loop.log.display.summary(summary)
