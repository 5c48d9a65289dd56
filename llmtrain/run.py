"""A run: one field a config group.  The only module that knows how the groups fit together.

run = Run.compose("model=tiny", "tokenizer=byte", "loop.max_steps=10")
result = run.train()
"""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from llmtrain import config
from llmtrain.accumulation import Accumulation
from llmtrain.activation_checkpointing import ActivationCheckpointing
from llmtrain.checkpoint import Checkpoint
from llmtrain.clipping import Clipping
from llmtrain.data import Corpus, DataConfig
from llmtrain.data.loader import Loader
from llmtrain.display import Display, open_display
from llmtrain.evaluate import LossSum
from llmtrain.format import size
from llmtrain.hf.peft import start_from
from llmtrain.lint import Finding, lint, lint_changes, option, overrides_of, refuse, search_path
from llmtrain.looks import Looks
from llmtrain.loop import Loop
from llmtrain.loop_config import LoopConfig
from llmtrain.lora import Lora
from llmtrain.lora.low_rank import LowRank
from llmtrain.metrics import Metrics, MetricsConfig
from llmtrain.metrics.jsonl import drop_rows
from llmtrain.model import LanguageModel, ModelConfig
from llmtrain.objective import Objective
from llmtrain.optimizer import OptimizerConfig
from llmtrain.optimizer.state import state_tensors
from llmtrain.planning.blueprint import Blueprint
from llmtrain.planning.memory import estimate
from llmtrain.precision import Precision, PrecisionConfig
from llmtrain.profiling import Profiler, StepProfiler
from llmtrain.recovery import RecoveryConfig
from llmtrain.resumption import (
    Origin,
    Resumption,
    Seen,
    changes,
    check_changes,
    check_length,
    come_back,
    find_origin,
    has_optimizer_of,
    make_child,
    rates,
    since_older_version,
)
from llmtrain.run_directory import RunDirectory
from llmtrain.runtime import Runtime, available_memory, describe_environment, peak_flops, peak_memory
from llmtrain.saver import Saver
from llmtrain.schedule import Schedule
from llmtrain.signals import stop_on_signals
from llmtrain.state import TrainState
from llmtrain.storage import (
    CONFIG,
    MODEL,
    AppendedFile,
    read_state,
    sweep_leftovers,
    verify_checkpoint,
    write_atomically,
)
from llmtrain.summary import header, summarise
from llmtrain.tokenizer import Tokenizer, TokenizerConfig
from llmtrain.tuning import Rehearsal, compile_loss, fit_micro_batch, why_not_compile
from llmtrain.weights import Weights
from llmtrain.weights.checkpoint import load_model, saved_tensors
from llmtrain.weights.scratch import Scratch

MOVED_BASE = (
    "the weights that adapters were trained on have to be there; if they were moved, say where to: base=DIR (generate, "
    "chat, predict, export), weights.path=DIR (resume)"
)
TARGETS = {  # of the kinds of data, in words
    "text": "every next token of a text",
    "responses": "the tokens of responses",
    "labels": "classes",
}


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


@dataclass(frozen=True)
class Parts:
    """What a run is put together from, before any directory is made."""

    device: torch.device
    tokenizer: Tokenizer
    corpus: Corpus
    model: LanguageModel
    loss_sum: LossSum  # as tuned: compiled, maybe
    plain_loss_sum: LossSum  # the same, not compiled
    optimizer: torch.optim.Optimizer
    precision: Precision
    max_steps: int


@dataclass(frozen=True)
class Trained:
    """The model of a checkpoint, with what it takes to use it."""

    run: "Run"
    tokenizer: Tokenizer
    model: LanguageModel  # in evaluation mode, adapters and the weights that they were trained on put together
    state: TrainState
    device: torch.device
    precision: Precision  # for inference


@dataclass(frozen=True)
class Run:
    """A composed, checked run."""

    name: str
    output_dir: str
    run_dir: str | None
    plugins: list[str]
    model: ModelConfig
    tokenizer: TokenizerConfig
    data: DataConfig
    objective: Objective
    weights: Weights
    lora: Lora
    optimizer: OptimizerConfig
    schedule: Schedule
    precision: PrecisionConfig
    activation_checkpointing: ActivationCheckpointing
    clipping: Clipping
    accumulation: Accumulation
    checkpoint: Checkpoint
    recovery: RecoveryConfig
    metrics: MetricsConfig
    runtime: Runtime
    loop: LoopConfig
    overrides: tuple[str, ...] = field(default=(), init=False, compare=False, repr=False)  # what ``compose`` was given

    def __post_init__(self) -> None:
        if self.data.sequence_length > self.model.context_length:
            raise ValueError(
                f"data.sequence_length={self.data.sequence_length}: longer than model.context_length="
                f"{self.model.context_length}; data.sequence_length={self.model.context_length}"
                + (", or a longer model.context_length" if isinstance(self.weights, Scratch) else " or less")
            )
        if self.runtime.cuda_graphs and getattr(self.activation_checkpointing, "offload", False):
            raise ValueError(
                "runtime.cuda_graphs=true: does not go with activation_checkpointing.offload=true, whose copies no "
                "graph can hold; take one of them"
            )
        if self.data.gives not in self.objective.takes:
            raise ValueError(
                f"objective={option(self.objective)}: does not go with data={option(self.data)}, whose targets are "
                f"{TARGETS[self.data.gives]}; it takes data whose targets are "
                f"{' or '.join(TARGETS[kind] for kind in self.objective.takes)}"
            )
        if self.lora.adapts and isinstance(self.weights, Scratch):
            raise ValueError(
                f"lora={option(self.lora)}: adapters on random weights learn nothing; name the weights to adapt, "
                "weights=huggingface weights.path=DIR, or weights=checkpoint weights.path=RUN_DIR; or train all of "
                "them: lora=none"
            )
        with config.naming("schedule"):
            self.schedule.check_peak(self.optimizer.lr)
        if (step := self.checkpoint.step) is not None:
            raise ValueError(
                f"checkpoint.step={step}: a new run has no checkpoint; go on from one with: llmtrain resume RUN_DIR "
                f"checkpoint.step={step}; or take its weights alone: weights=checkpoint "
                f"weights.path=RUN_DIR/checkpoints/step-{step:08d}"
            )

    # --- making one ---------------------------------------------------------------------------------------------

    @classmethod
    def compose(cls, *overrides: str, config_dir: str | Path | None = None) -> Self:
        """Compose a run from Hydra overrides, as ``llmtrain train`` does.  Raises ValueError for a bad one."""
        run = cls.from_config(config.compose("train", overrides, config_dir))
        given = overrides if config_dir is None else (*overrides, search_path(config_dir))
        object.__setattr__(run, "overrides", given)  # frozen, but this is no part of the config
        return run

    @classmethod
    def from_config(cls, values: dict[str, Any]) -> Self:
        """Build and check a run from a plain, resolved config."""
        return config.build(values, cls, plugins=values.get("plugins") or ())

    # --- training -----------------------------------------------------------------------------------------------

    def train(self, *, command: Sequence[str] = ()) -> Result:
        """Train from step 0 in a new run directory.

        Everything is checked, the data prepared and the model built before the directory is made.  Raises
        ValueError for what the user can mend, :class:`llmtrain.loop.TrainingFailed` and OSError for a failed run.
        """
        with self.runtime.session() as device:
            self.runtime.seed_everything()
            parts = self.assemble(device)
            self.metrics.check()
            self.check_space(parts)
            findings = lint(self, parts, overrides_of(command) or self.overrides)
            refuse(findings)
            directory = self.create_directory()
            with directory.lock():
                self.describe(directory, device, command)
                return self.execute(parts, directory, self.first_state(parts), findings=findings)

    def resume(self, directory: RunDirectory, *, step: int | None = None, command: Sequence[str] = ()) -> Result:
        """Continue the run in ``directory`` from its newest whole checkpoint, or start it if it has none yet.

        What differs from the stored config is told and recorded.  With ``step`` the newest checkpoint must be that of
        this step, and whole.  Until all is checked nothing is written: raises ValueError for what cannot go on.
        """
        if directory.is_older(step):
            raise ValueError(f"checkpoint.step={step}: not the newest of {directory.path}; branch off from it instead")
        with self.runtime.session() as device, directory.lock():
            for folder in (directory.path, directory.checkpoints):
                sweep_leftovers(folder)
            parts, state, resumption = self.come_back(find_origin(directory, step), device, command)
            now = describe_environment(device, config.redact_arguments(command))
            history = resumption.history(directory.read_environment(), now)
            drop_rows(directory.samples, lambda row: row["step"] > state.step)
            directory.write_environment(history)
            if resumption.changes:
                made = config.load(directory.config)
                run = replace(self, run_dir=made.get("run_dir"), output_dir=made.get("output_dir", self.output_dir))
                write_atomically(directory.config, config.dump(run))
            return self.execute(parts, directory, state, resumption=resumption)

    def branch(self, parent: RunDirectory, *, step: int | None = None, command: Sequence[str] = ()) -> Result:
        """Go on from the checkpoint of ``step`` (None: the newest) of ``parent`` in a new run directory.

        Of the parent, which may be at work, everything is read and nothing written.  The child has the parent's
        checkpoint and, up to it, metrics and samples.  Raises as :meth:`train` and :meth:`resume` do.
        """
        with self.runtime.session() as device:
            origin = find_origin(parent, step)
            if origin.checkpoint is None:
                raise ValueError(f"{parent.path}: has no checkpoint yet to branch off from")
            parts, state, resumption = self.come_back(origin, device, command, parent=parent)
            self.check_space(parts)
            child = self.create_directory()
            with child.lock():
                now = describe_environment(device, config.redact_arguments(command))
                make_child(child, resumption, now, config.dump(self))
                return self.execute(parts, child, state, resumption=resumption)

    def come_back(
        self, origin: Origin, device: torch.device, command: Sequence[str], *, parent: RunDirectory | None = None
    ) -> tuple[Parts, TrainState, Resumption]:
        """Everything as it was at ``origin``, and what differs from then; ``parent``: the run that a branch leaves.

        Writes nothing.  Raises ValueError for changes that cannot go on.
        """
        stored = config.untrusted(config.load(origin.config), self.plugins)
        completed = config.complete(stored)
        check_changes(changes(completed, self), branching=parent is not None, has_base=self.lora.adapts)
        before = type(self).from_config(completed)
        self.metrics.check()
        self.runtime.seed_everything()
        parts = self.assemble(device, from_start=origin.checkpoint is None)
        seen = Seen.of(origin.directory, origin.step)
        reset = None
        if origin.checkpoint is None:
            state = self.first_state(parts)
        else:
            state, reset = self.restore(origin.checkpoint, parts)
        self.check_data(state, parts)
        steps = before.loop.total_steps(before.accumulation, len(parts.corpus.train), before.data.sequence_length)
        check_length(before, self, parts.max_steps, state, len(parts.corpus.train))
        all_changes = since_older_version(changes(stored, self), stored)
        findings: list[Finding] = []
        if not origin.directory.environment.exists():  # a job of a sweep starts by being resumed
            findings = lint(self, parts, origin.directory.read_overrides())
        elif all_changes:
            findings = lint_changes(before, replace(parts, max_steps=steps), self, parts, overrides_of(command))
        refuse(findings)
        learning_rate = rates(before, steps, self, parts.max_steps, state.step)
        return parts, state, Resumption(origin, parent, all_changes, learning_rate, reset, seen, findings)

    def restore(self, checkpoint: Path, parts: Parts) -> tuple[TrainState, tuple[str, str] | None]:
        """Bring ``parts`` and every random number generator to where they were at ``checkpoint``.

        Returns the state, and, if the checkpoint's optimizer is of another kind than this run's, which then starts
        afresh, the names of both.
        """
        state, reset = come_back(checkpoint, self, parts.model, parts.optimizer)
        parts.precision.load_state_dict(state.scaler)
        state.restore_rng(parts.device)
        return state, reset

    def check_data(self, state: TrainState, parts: Parts) -> None:
        """Raise ValueError if the data are not those that ``state`` counts in."""
        if state.data != parts.corpus.fingerprint:
            raise ValueError(
                f"data: not what this run was started on ({parts.corpus.description}); it was edited, moved or "
                "prepared otherwise, and step and position mean nothing in it; restore it, or start a new run"
            )
        self.check_base(state)

    def check_base(self, state: TrainState) -> None:
        """Raise ValueError if the weights that adapters stand on are not those that they were trained on."""
        if not self.lora.adapts:
            return
        with noting(MOVED_BASE):
            if state.base != self.weights.fingerprint():
                path = getattr(self.weights, "path", "")
                raise ValueError(f"weights.path={path}: not the weights that the adapters were trained on")

    def first_state(self, parts: Parts) -> TrainState:
        """The state of a run at step 0."""
        base = self.weights.fingerprint() if self.lora.adapts else ""
        return TrainState(data=parts.corpus.fingerprint, labels=list(parts.corpus.labels), base=base)

    def create_directory(self) -> RunDirectory:
        """The new run's directory."""
        if self.run_dir is not None:
            return RunDirectory.create_at(Path(self.run_dir))
        return RunDirectory.create(Path(self.output_dir), self.name)

    def describe(self, directory: RunDirectory, device: torch.device, command: Sequence[str]) -> None:
        """Write ``environment.json`` and ``config.yaml`` of a new run."""
        directory.write_environment(describe_environment(device, config.redact_arguments(command)))
        write_atomically(directory.config, config.dump(self))

    # --- assembling ---------------------------------------------------------------------------------------------

    def assemble(self, device: torch.device, *, from_start: bool = True, verify_data: bool = False) -> Parts:
        """Build everything that training needs, on ``device``; writes nothing but the data cache.

        Without ``from_start`` a checkpoint is to follow, and of ``weights`` only what no checkpoint holds is loaded.
        With ``verify_data`` every byte of the data is read and checked again, whatever is remembered of it.
        """
        precision = self.precision.build(device)
        tokenizer = self.tokenizer.build()
        vocab_size = self.vocab_size(tokenizer)
        corpus = self.data.verify(tokenizer) if verify_data else self.data.build(tokenizer)
        generator = torch.Generator(device).manual_seed(self.runtime.seed)
        model = self.make_model(
            vocab_size, corpus.labels, device, generator, load_weights=from_start, class_weights=corpus.class_weights
        )
        precision.apply(model.blocks)
        with config.naming("activation_checkpointing"):
            self.activation_checkpointing.apply(model)
        with config.naming("optimizer"):
            optimizer = self.optimizer.build(model)
        with config.naming("clipping"):
            self.clipping.check_parameters([name for name, p in model.named_parameters() if p.requires_grad])
        plain_loss_sum: LossSum = partial(self.objective, model)
        if self.runtime.compile is True and (reason := why_not_compile(device)):
            raise ValueError(f"runtime.compile=true: {reason}; take auto or false")
        if self.runtime.cuda_graphs and device.type != "cuda":
            raise ValueError("runtime.cuda_graphs=true: there is no GPU here; take false")
        max_steps = self.loop.total_steps(self.accumulation, len(corpus.train), self.data.sequence_length)
        return Parts(device, tokenizer, corpus, model, plain_loss_sum, plain_loss_sum, optimizer, precision, max_steps)

    def make_model(
        self,
        vocab_size: int,
        labels: Sequence[str],
        device: torch.device,
        generator: torch.Generator,
        *,
        load_weights: bool,
        class_weights: Sequence[float] = (),
    ) -> LanguageModel:
        """The model with what objective and adapters add to it; frozen weights that no checkpoint holds are loaded."""
        model = self.model.create(vocab_size, device, generator)
        if load_weights or self.lora.adapts:
            with contextlib.nullcontext() if load_weights else noting(MOVED_BASE):
                self.weights.load(model)
        with config.naming("objective"):
            self.objective.attach(model, labels, generator, class_weights)
        with config.naming("lora"):
            self.lora.apply(model, generator)
            if load_weights and isinstance(self.lora, LowRank) and self.lora.path is not None:
                start_from(model, self.lora, Path(self.lora.path))
        model.has_base = self.lora.adapts
        return model

    @classmethod
    def load_trained(
        cls, checkpoint: Path, runtime: Runtime, *, base: str | None = None, plugins: Sequence[str] = ()
    ) -> AbstractContextManager[Trained]:
        """The model of ``checkpoint``, for the length of a context.

        ``base``: where the weights are now that its adapters stand on; None: where they were.  Raises ValueError
        naming what does not fit, and :class:`CheckpointError` for a damaged checkpoint.
        """
        verify_checkpoint(checkpoint)
        values = config.complete(config.untrusted(config.load(checkpoint / CONFIG), plugins))
        if base is not None:
            if not TrainState.from_json(read_state(checkpoint)).base:
                raise ValueError(f"base={base}: {checkpoint} holds a whole model, no adapters; leave it out")
            values["weights"] = {**values["weights"], "path": base}
        return cls.from_config(values)._loaded(checkpoint, runtime)

    @contextlib.contextmanager
    def _loaded(self, checkpoint: Path, runtime: Runtime) -> Iterator[Trained]:
        with runtime.session() as device:
            precision = self.precision.inference(device)
            state = TrainState.from_json(read_state(checkpoint))
            tokenizer = self.tokenizer.build()
            self.check_base(state)
            generator = torch.Generator(device).manual_seed(0)
            model = self.make_model(self.vocab_size(tokenizer), state.labels, device, generator, load_weights=False)
            load_model(model, checkpoint / MODEL)
            with precision.arithmetic():
                yield Trained(self, tokenizer, model.eval(), state, device, precision)

    def vocab_size(self, tokenizer: Tokenizer) -> int:
        """The model's vocabulary.  Raises ValueError if the tokenizer has ids beyond it."""
        if self.model.vocab_size is None:
            return tokenizer.vocab_size
        if self.model.vocab_size < tokenizer.vocab_size:
            raise ValueError(
                f"model.vocab_size={self.model.vocab_size}: the tokenizer has {tokenizer.vocab_size} ids; "
                f"take null for the tokenizer's, or at least {tokenizer.vocab_size}"
            )
        return self.model.vocab_size

    def check_space(self, parts: Parts) -> None:
        """Refuse a run whose checkpoints cannot fit on the disk."""
        place = Path(self.run_dir or self.output_dir).absolute()
        while not place.exists():
            place = place.parent
        needed = self.checkpoint_bytes(parts) * (self.checkpoint.kept() + 1)  # one more, while it is written
        free = shutil.disk_usage(place).free
        if free < needed:
            raise ValueError(
                f"{place}: {size(free)} free, the checkpoints of this run need {size(needed)}; "
                "make room, or name another place: output_dir=DIR"
            )

    def checkpoint_bytes(self, parts: Parts) -> int:
        """What a checkpoint takes, of disk and of host memory while it is written."""
        tensors = [*saved_tensors(parts.model).values(), *state_tensors(parts.optimizer).values()]
        return sum(tensor.nbytes for tensor in tensors)

    # --- running ------------------------------------------------------------------------------------------------

    def execute(
        self,
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
            metrics = stack.enter_context(self.metrics.build(directory.path, resume_step=resume_step))
            display = stack.enter_context(open_display(directory.path))
            saver = stack.enter_context(Saver(self.checkpoint, directory, parts.device))
            peak = peak_flops(parts.device, parts.precision.dtype)
            display.header(list(header(self.name, self, parts, directory.path, state, peak)))
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
            parts, found = self.tune(parts, state, peak)
            for row in found:
                metrics.row(row)
                display.event(row)
            if warning := saver.check_memory(self.checkpoint_bytes(parts)):
                display.warn(warning)
            loop = self.make_loop(
                parts, directory, state, metrics=metrics, display=display, saver=saver, peak_flops=peak,
                stop=lambda: stop.signal_name, profiler=self.make_profiler(parts, directory, state),
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
                self.conclude(loop, directory, display, reason)
        return Result(directory.path, summarise(self.name, self.objective.verb, loop, reason), parts.model)

    def tune(self, parts: Parts, state: TrainState, peak_flops: float) -> tuple[Parts, list[dict[str, Any]]]:
        """Find out what a run finds out at its start, into ``state``; what it had found before stays so.

        Returns the parts to train with, and the events that tell of it.
        """
        rehearsal = Rehearsal(
            parts.model, parts.plain_loss_sum, parts.precision, parts.device, self.data.sequence_length,
            self.data.packs,
        )  # fmt: skip
        events = []
        if self.accumulation.is_probed and state.micro_batch_size is None:
            batch = self.accumulation.micro_batch_size
            events.append(fit_micro_batch(rehearsal, batch, state, partial(self.fits, parts)))
        batch = self.accumulation.batch_size_at(state.step, state.tokens)
        flops = (
            (parts.max_steps - state.step)
            * batch
            * self.data.sequence_length
            * parts.model.flops_per_token(self.data.sequence_length)
        )
        size = min(state.micro_batch_size or self.accumulation.micro_batch_size, batch)
        loss_sum, event = compile_loss(
            rehearsal, self.runtime.compile, state, flops / peak_flops, size,
            evaluates=self.loop.eval_every > 0 and parts.corpus.validation is not None,
            cuda_graphs=self.runtime.cuda_graphs,
        )  # fmt: skip
        if loss_sum is not None:
            parts = replace(parts, loss_sum=loss_sum)
        return parts, [*events, *([] if event is None else [event])]

    def fits(self, parts: Parts, micro_batch_size: int) -> bool:
        """Whether host memory has room to train with such micro-batches, by what a traced step takes."""
        batch, vocab_size = self.accumulation.micro_batch_size, self.vocab_size(parts.tokenizer)
        blueprint = Blueprint(self, vocab_size, parts.precision, batch, micro_batch_size, parts.corpus.labels)
        available = available_memory()
        taken = estimate(blueprint, gpu=False, copied=self.checkpoint.asynchronous).needed - peak_memory(parts.device)
        return available is None or taken < available

    def make_loop(
        self,
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
        recovery = self.recovery.build(parts.device, judges_spikes=not labels)
        recovery.load_state_dict(state.recovery)
        looks = Looks(
            config=self.loop, corpus=parts.corpus, tokenizer=parts.tokenizer, model=parts.model,
            loss_sum=parts.loss_sum, plain_loss_sum=parts.plain_loss_sum, precision=parts.precision,
            device=parts.device, seed=self.runtime.seed, batch_size=self.accumulation.batch_size_at(0, 0),
            metrics=metrics, display=display, samples=AppendedFile(directory.samples),
            score=partial(self.objective.score, parts.model) if self.objective.scores else None,
            measures=partial(self.objective.measures, labels=labels), generates=self.objective.generates,
        )  # fmt: skip
        return Loop(
            config=self.loop, state=state, max_steps=parts.max_steps, device=parts.device, model=parts.model,
            loss_sum=parts.loss_sum, optimizer=parts.optimizer, schedule=self.schedule, peak_lr=self.optimizer.lr,
            precision=parts.precision, clipping=self.clipping, accumulation=self.accumulation, recovery=recovery,
            examples=self.recovery.examples, open_loader=partial(self.open_loader, parts),
            sequences_at=partial(self.sequences_at, parts.corpus), looks=looks, checkpoint=self.checkpoint,
            saver=saver, directory=directory, config_text=directory.config.read_text(encoding="utf-8"),
            metrics=metrics, log_every=log_every or self.metrics.log_every, display=display, stop=stop,
            flops_per_token=parts.model.flops_per_token(self.data.sequence_length), peak_flops=peak_flops,
            can_restore=partial(has_optimizer_of, run=self), profiler=profiler or Profiler(),
            name_target=partial(self.objective.name_target, labels=labels) if labels else None,
        )  # fmt: skip

    def make_profiler(self, parts: Parts, directory: RunDirectory, state: TrainState) -> Profiler:
        """What ``runtime.profile`` asks for."""
        if not self.runtime.profile:
            return Profiler()
        state_bytes = sum(tensor.nbytes for tensor in state_tensors(parts.optimizer).values())
        return StepProfiler(directory.path, parts.device, state.step, list(parts.model.parameters()), state_bytes)

    def conclude(self, loop: Loop, directory: RunDirectory, display: Display, reason: str) -> None:
        """Leave the run's summary and plot, however it ended."""
        summary = summarise(self.name, self.objective.verb, loop, reason)
        try:
            write_atomically(directory.summary, json.dumps(summary, indent=1) + "\n")
            if reason != "failed":
                from llmtrain.report.curves import draw_run  # matplotlib takes a while to import

                draw_run(directory.path)
        except OSError as error:  # a full disk; why the run ended must not be lost over it
            display.warn(f"the run's summary and plot could not be written: {error}")
        display.summary(summary)

    def sequences_at(self, corpus: Corpus, position: int, count: int) -> np.ndarray:
        """Numbers of the training sequences at ``count`` positions from ``position`` on."""
        return corpus.train.order(np.arange(position, position + count), self.runtime.seed, self.data.shuffle)

    def open_loader(self, parts: Parts, state: TrainState) -> Loader:
        """The training batches from ``state`` on."""
        return Loader(
            parts.corpus.train,
            seed=self.runtime.seed,
            shuffle=self.data.shuffle,
            batch_size=self.accumulation.batch_size_at,
            device=parts.device,
            position=state.position,
            step=state.step,
            tokens=state.tokens,
        )


@contextlib.contextmanager
def noting(remedy: str) -> Iterator[None]:
    """Add ``remedy`` to the message of a user's mistake."""
    try:
        yield
    except ValueError as error:
        error.add_note(remedy)
        raise


def remember(loop: Loop, resumption: Resumption) -> None:
    """Tell a resumed loop what was evaluated and sampled before, and which checkpoints are known not to be whole."""
    for row in resumption.seen.validations:
        loop.looks.note(row, loop.state)
    loop.looks.sampled_step, loop.last_loss = resumption.seen.sampled_step, resumption.seen.loss
    if resumption.parent is None:
        loop.saver.damaged.update(path for path, _ in resumption.origin.passed_over)
