"""The forecast of a run: its memory, time and costs, from its settings and, on this machine, a probe."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from llmtrain.checkpoint.model_state import saved_tensors
from llmtrain.config.assemble import outline
from llmtrain.data import Corpus
from llmtrain.objective import TrainingUnit
from llmtrain.plan.advice import Suggestion, largest_fitting, suggest
from llmtrain.plan.blueprint import Blueprint
from llmtrain.plan.costs import Costs, Counts, Speed, add_up, count_work, without_long_saves
from llmtrain.plan.devices import DeviceSpec, arithmetic, find_device, present_device
from llmtrain.plan.memory import Memory, TraceError, at_micro_batch, estimate
from llmtrain.precision import Precision
from llmtrain.run.run import Run
from llmtrain.run.time_steps import ProbeFailed, ProbeResult, probe
from llmtrain.tokenizer import Tokenizer
from llmtrain.train.length import TrainingLength


@dataclass(frozen=True)
class PlannedRun:
    """A run with those of its parts that a forecast needs."""

    settings: Run
    tokenizer: Tokenizer
    corpus: Corpus
    unit: TrainingUnit  # on the meta device
    length: TrainingLength

    @property
    def max_steps(self) -> int:
        """Optimizer steps of the run."""
        return self.length.max_steps

    @classmethod
    def of(cls, run: Run) -> "PlannedRun":
        """Build the parts; the data are prepared, the model has no memory."""
        tokenizer = run.build_tokenizer()
        corpus = run.data.build(tokenizer)
        unit = outline(run, run.vocab_size(tokenizer), corpus.labels)
        return cls(run, tokenizer, corpus, unit, run.length(corpus.train))


@dataclass(frozen=True)
class ForecastOptions:
    """The options of a forecast, as in ``conf/plan.yaml``."""

    probe: bool
    device: str | None
    price_per_hour: float | None
    watts: float | None


@dataclass(frozen=True)
class Forecast:
    """The memory, time and costs of a run."""

    spec: DeviceSpec
    precision: Precision
    micro_batch_size: int
    memory: Memory | None  # None: a step could not be traced
    note: str  # the reason why there is no memory or no probe; empty otherwise
    probed: ProbeResult | None
    counts: Counts
    costs: Costs
    suggestions: list[Suggestion]
    ran_out: bool  # of memory, in the probe

    @property
    def peak(self) -> int | None:
        """As ``memory_bytes`` in the metrics.  On a CPU the heap of a long run may grow beyond that of a probe."""
        if self.memory is None or self.probed is None:
            return None if self.memory is None else self.memory.peak
        if self.spec.is_gpu:
            return self.probed.peak_bytes
        return max(self.probed.peak_bytes + self.memory.parts.get("checkpoint copy", 0), self.memory.peak)

    @property
    def needed(self) -> int | None:
        """Bytes that the device must have; None if not known."""
        return None if self.peak is None or self.memory is None else self.peak + self.memory.outside

    @property
    def fits(self) -> bool | None:
        """True if the device has room; None if not known."""
        if self.ran_out:
            return False
        if self.needed is None or self.spec.memory_bytes is None:
            return None
        return self.needed <= self.spec.memory_bytes


def make_forecast(
    planned: PlannedRun, device: torch.device, options: ForecastOptions, report: Callable[[str], None]
) -> Forecast:
    """Forecast a run on ``options.device``, or on ``device`` of this machine.

    ``report`` is called with a line before each part of the work that may take a while.
    """
    run = planned.settings
    spec, precision = _device(run, device, options.device)
    steps, batch = planned.max_steps, run.accumulation.batch_size_at(0, 0)
    sequences, largest = planned.length.sequences, planned.length.largest_batch
    blueprint = Blueprint(run, run.vocab_size(planned.tokenizer), precision, largest, labels=planned.corpus.labels)
    validation = 0 if planned.corpus.validation is None else len(planned.corpus.validation)
    counts = count_work(run.loop, run.checkpoint, steps, sequences, batch, validation)
    is_copied = counts.copied_saves > 0 or (run.checkpoint.asynchronous and run.checkpoint.every_minutes > 0)
    memory, note = None, ""
    report("estimating the memory of a step")
    try:
        memory = estimate(blueprint, gpu=spec.is_gpu, copied=is_copied)
    except TraceError as error:
        note = f"memory: not known, a step cannot be traced without data ({error})"
    saved = sum(tensor.nbytes for tensor in saved_tensors(planned.unit).values())
    saved += memory.parts["optimizer"] if memory is not None else 0
    room, fits = spec.memory_bytes, None
    if memory is not None and room is not None:
        if run.accumulation.is_probed and memory.needed > room:  # the run will find a smaller micro-batch
            smallest = estimate(at_micro_batch(blueprint, 1), gpu=spec.is_gpu, copied=is_copied)
            micro, memory = largest_fitting(blueprint, smallest, memory, room, spec.is_gpu, is_copied)
            blueprint = at_micro_batch(blueprint, micro)
        fits = memory.needed <= room
    probed, ran_out = None, False
    if options.probe and options.device is None:
        if fits is False:
            note = "no probe: the steps would not fit; time is estimated"
        else:
            try:
                probed = probe(run, device, report)
            except ProbeFailed as error:
                note, fits, ran_out = f"no time from a probe: {error}", False, True
        if probed is not None and memory is not None and probed.micro_batch_size != blueprint.micro_batch_size:
            blueprint = at_micro_batch(blueprint, probed.micro_batch_size)
            memory = estimate(blueprint, gpu=spec.is_gpu, copied=is_copied)
    suggestions = []
    if fits is False and room is not None and memory is not None:
        room = min(room, round(0.95 * memory.needed))  # less than that where the probe ran out of it
        report("looking for settings that fit")
        can = spec.is_gpu and "bf16" in spec.flops and precision.name in ("fp32", "tf32")
        suggestions = suggest(blueprint, memory, gpu=spec.is_gpu, available=room, copied=is_copied, bf16=can)
    speed = speed_of(planned, spec, precision, probed)
    counts = without_long_saves(counts, speed, saved)
    watts = options.watts if options.watts is not None else spec.watts
    costs = add_up(
        speed, counts, run.loop, run.checkpoint, saved, watts=watts, price_per_hour=options.price_per_hour
    )  # fmt: skip
    return Forecast(
        spec, precision, blueprint.micro_batch_size, memory, note, probed, counts, costs, suggestions, ran_out
    )


def _device(run: Run, device: torch.device, name: str | None) -> tuple[DeviceSpec, Precision]:
    """The device ``name`` of the table (None: ``device``), and the arithmetic of the run on it, for a trace."""
    spec = present_device(device, run.precision.build(device)) if name is None else find_device(name)
    precision = arithmetic(run.precision, spec)
    spec.peak_flops(precision)  # refuses a precision that the device does not have
    return spec, precision


def speed_of(planned: PlannedRun, spec: DeviceSpec, precision: Precision, probed: ProbeResult | None) -> Speed:
    """The speed of the work: from the probe, or from the device's rate."""
    if probed is not None:
        sequence = probed.step_seconds / probed.batch_size
        before = probed.first_seconds + (probed.compile_seconds or 0.0)
        return Speed(sequence, probed.evaluated_seconds, probed.sampled_seconds, before)
    unit, train = planned.unit, planned.corpus.train
    at = spec.peak_flops(precision) * spec.utilisation(precision)
    weights = unit.model.num_parameters() * precision.dtype.itemsize
    flops_per_token = unit.flops_per_token(train.attended_length)
    return Speed.of_flops(flops_per_token, train.mean_length, at, weights, spec.bandwidth)
