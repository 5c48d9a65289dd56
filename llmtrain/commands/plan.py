"""``llmtrain plan``: what a run would be and take, without training it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmtrain.base.checks import non_negative, positive
from llmtrain.base.files import write_atomically
from llmtrain.base.format import count, duration, rate, significant, size
from llmtrain.base.invocation import FINISHED, USAGE_ERROR, Invocation
from llmtrain.checkpoint.model_state import saved_tensors
from llmtrain.config.assemble import outline
from llmtrain.config.overrides import overrides_of
from llmtrain.data import Corpus
from llmtrain.display import lines
from llmtrain.lint import Case, lint
from llmtrain.objective import TrainingUnit
from llmtrain.plan.advice import Suggestion, largest_fitting, suggest
from llmtrain.plan.blueprint import Blueprint
from llmtrain.plan.chart import bar, draw
from llmtrain.plan.costs import Costs, Counts, Speed, add_up, count_work, without_long_saves
from llmtrain.plan.devices import DeviceSpec, arithmetic, find_device, present_device
from llmtrain.plan.memory import Memory, Untraceable, at_micro_batch, estimate
from llmtrain.plan.trace import Phase
from llmtrain.precision import Precision
from llmtrain.run.run import Run
from llmtrain.run.time_steps import ProbeFailed, ProbeResult, probe
from llmtrain.tokenizer import Tokenizer

WHEN = {Phase.held: "between two steps", Phase.forward: "in forward", Phase.backward: "in backward",
        Phase.update: "in the optimizer's step"}  # fmt: skip


@dataclass(frozen=True)
class Plan(Run):
    """A run and what ``conf/plan.yaml`` asks of it."""

    probe: bool
    device: str | None
    price_per_hour: float | None
    watts: float | None
    chart: str | None
    json: str | None

    def __post_init__(self) -> None:
        super().__post_init__()
        non_negative(price_per_hour=self.price_per_hour)
        positive(watts=self.watts)
        if self.device is not None:
            find_device(self.device)
        for key, path in (("chart", self.chart), ("json", self.json)):
            if path is not None and not Path(path).absolute().parent.is_dir():
                raise ValueError(f"{key}={path}: there is no folder {Path(path).absolute().parent}")
        if self.chart is not None and not self.chart.endswith(".png"):
            raise ValueError(f"chart={self.chart}: must be a .png file")

    @property
    def run(self) -> Run:
        """The run alone."""
        return Run(**{field.name: getattr(self, field.name) for field in fields(Run) if field.init})


@dataclass(frozen=True)
class Planned:
    """As much of a run's parts as a plan builds."""

    tokenizer: Tokenizer
    corpus: Corpus
    unit: TrainingUnit  # on the meta device
    max_steps: int


@dataclass(frozen=True)
class Outlook:
    """What was found out of memory and time."""

    spec: DeviceSpec
    precision: Precision
    micro_batch_size: int
    memory: Memory | None  # None: a step could not be traced
    note: str  # why there is no memory or no probe; empty otherwise
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
        """Bytes that the device has to have."""
        return None if self.peak is None or self.memory is None else self.peak + self.memory.outside

    @property
    def fits(self) -> bool | None:
        """Whether the device has room; None where that is not known."""
        if self.ran_out:
            return False
        if self.needed is None or self.spec.memory_bytes is None:
            return None
        return self.needed <= self.spec.memory_bytes


def main(plan: Plan, invocation: Invocation) -> int:
    """Print what the run would be, take, and what looks wrong; 2 if training would be refused."""
    run = plan.run
    tokenizer = run.tokenizer.build()
    corpus = run.data.build(tokenizer)
    unit = outline(run, run.vocab_size(tokenizer), corpus.labels)
    steps = run.loop.total_steps(run.accumulation, len(corpus.train), run.data.sequence_length)
    planned = Planned(tokenizer, corpus, unit, steps)

    console = Console(highlight=False)
    console.print(parameters(unit))
    console.print()
    console.print(work(run, planned))
    console.print()
    with run.runtime.session() as device:
        outlook = look_ahead(plan, run, planned, device)
    show(console, run, planned, outlook)
    if plan.chart is not None:
        parts = outlook.memory.parts if outlook.memory else {}
        draw(Path(plan.chart), run.name, parts, outlook.spec.memory_bytes, outlook.costs.seconds)
    if plan.json is not None:
        write_atomically(Path(plan.json), json.dumps(figures(run, planned, outlook), indent=1) + "\n")
    findings = lint(Case(run, tokenizer, corpus, unit, steps, overrides=overrides_of(invocation.command)))
    if findings:
        console.print()
    for finding in findings:
        tell = lines.error if finding.level == "error" else lines.warning
        console.print(tell(finding.message), soft_wrap=True)
    return USAGE_ERROR if any(finding.level == "error" for finding in findings) else FINISHED


# --- finding out -------------------------------------------------------------------------------------------------


def look_ahead(plan: Plan, run: Run, planned: Planned, device: torch.device) -> Outlook:
    """Memory, time and what would make it fit."""
    if plan.device is not None:
        spec = find_device(plan.device)
        precision = arithmetic(run.precision, spec)
        spec.peak_flops(precision)  # refuses a precision that the device does not have
    else:
        built = run.precision.build(device)
        spec = present_device(device, built)
        precision = arithmetic(run.precision, spec)
        if built.name != precision.name:  # auto
            precision = Precision(built.name, torch.device("cpu"), built.dtype)
    steps, batch = planned.max_steps, run.accumulation.batch_size_at(0, 0)
    sequences = run.accumulation.position_after(steps, run.data.sequence_length)
    largest = run.accumulation.largest_batch(steps, run.data.sequence_length)
    blueprint = Blueprint(run, run.vocab_size(planned.tokenizer), precision, largest, labels=planned.corpus.labels)
    validation = 0 if planned.corpus.validation is None else len(planned.corpus.validation)
    counts = count_work(run.loop, run.checkpoint, steps, sequences, batch, validation)
    is_copied = counts.copied_saves > 0 or (run.checkpoint.asynchronous and run.checkpoint.every_minutes > 0)
    memory, note = None, ""
    try:
        memory = estimate(blueprint, gpu=spec.is_gpu, copied=is_copied)
    except Untraceable as error:
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
    if plan.probe and plan.device is None:
        if fits is False:
            note = "no probe: the steps would not fit; time is estimated"
        else:
            try:
                probed = probe(run, device)
            except ProbeFailed as error:
                note, fits, ran_out = f"no time from a probe: {error}", False, True
        if probed is not None and memory is not None and probed.micro_batch_size != blueprint.micro_batch_size:
            blueprint = at_micro_batch(blueprint, probed.micro_batch_size)
            memory = estimate(blueprint, gpu=spec.is_gpu, copied=is_copied)
    suggestions = []
    if fits is False and room is not None and memory is not None:
        room = min(room, round(0.95 * memory.needed))  # less than that where the probe ran out of it
        can = spec.is_gpu and "bf16" in spec.flops and precision.name in ("fp32", "tf32")
        suggestions = suggest(blueprint, memory, gpu=spec.is_gpu, available=room, copied=is_copied, bf16=can)
    speed = speed_of(run, planned.unit, spec, precision, probed)
    counts = without_long_saves(counts, speed, saved)
    watts = plan.watts if plan.watts is not None else spec.watts
    costs = add_up(
        speed, counts, run.loop, run.checkpoint, saved, watts=watts, price_per_hour=plan.price_per_hour
    )  # fmt: skip
    return Outlook(
        spec, precision, blueprint.micro_batch_size, memory, note, probed, counts, costs, suggestions, ran_out
    )


def speed_of(run: Run, unit: TrainingUnit, spec: DeviceSpec, precision: Precision, probed: ProbeResult | None) -> Speed:
    """From the probe, or from the device's rate."""
    if probed is not None:
        sequence = probed.step_seconds / probed.batch_size
        before = probed.first_seconds + (probed.compile_seconds or 0.0)
        return Speed(sequence, probed.evaluated_seconds, probed.sampled_seconds, before)
    length = run.data.sequence_length
    at = spec.peak_flops(precision) * spec.utilisation(precision)
    weights = unit.model.num_parameters() * precision.dtype.itemsize
    return Speed.of_flops(unit.flops_per_token(length), length, at, weights, spec.bandwidth)


# --- telling -----------------------------------------------------------------------------------------------------


def table(title: str) -> Table:
    """A borderless table: name, number, remark."""
    result = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=False, pad_edge=False)
    result.add_column()
    result.add_column(justify="right", overflow="fold")
    result.add_column(style="dim")
    return result


def parameters(unit: TrainingUnit) -> Table:
    """Parameters by part."""
    trainable = sum(p.numel() for _, p in unit.trained_weights())
    model = unit.model
    total = model.num_parameters()
    parts = table("parameters")
    for part, number in model.parameters_by_part().items():
        parts.add_row(part, f"{number:,}", f"{number / total:.1%}")
    parts.add_row(Text("total", style="bold"), Text(f"{total:,}", style="bold"), "")
    if trainable < total:
        parts.add_row("trainable", f"{trainable:,}", f"{trainable / total:.1%}")
    return parts


def work(run: Run, planned: Planned) -> Table:
    """Tokens, steps, FLOPs."""
    unit, corpus, steps = planned.unit, planned.corpus, planned.max_steps
    model = unit.model
    sequence, batch = run.data.sequence_length, run.accumulation.batch_size_at(0, 0)
    sequences = run.accumulation.position_after(steps, sequence)
    mean = corpus.train.mean_length
    tokens = round(sequences * mean)
    flops_per_token = unit.flops_per_token(sequence)
    attention = flops_per_token - unit.flops_per_token(0)
    rows = table("work")
    at_first = " at first" if sequences != batch * steps else ""
    rows.add_row("data", "", Text(corpus.description))
    length = f"{sequence}" if mean == sequence else f"{mean:.0f} on average"
    rows.add_row("tokens a step", f"{round(batch * mean):,}", f"{batch} × {length}{at_first}")
    rows.add_row("steps", f"{steps:,}", f"{run.schedule.warmup(steps):,} of them warm-up")
    epochs = sequences / len(corpus.train)
    rows.add_row("tokens", f"{tokens:,}", f"{epochs:.2f} epochs, {tokens / model.num_parameters():.2f} a parameter")
    is_whole = all(parameter.requires_grad for parameter in unit.parameters())
    products = "6 N" if is_whole else "6 N, 4 or 2 N of what is frozen"
    formula = f"{products}: {count(unit.flops_per_token(0))}, attention: {count(attention)}"
    rows.add_row("FLOPs per token", f"{flops_per_token:,}", f"{formula}; N: parameters in matrix products")
    rows.add_row("FLOPs", f"{flops_per_token * tokens:.3e}", "")
    return rows


def show(console: Console, run: Run, planned: Planned, outlook: Outlook) -> None:
    """Memory, time and costs, whether it fits and what would make it fit."""
    spec, precision, probed = outlook.spec, outlook.precision, outlook.probed
    if outlook.memory is not None:
        console.print(bars(f"memory, {precision.name}, {spec.title}", outlook.memory.parts, size))
        console.print(Text(
            f"  the most {WHEN[outlook.memory.phase]}, micro-batches of {outlook.micro_batch_size}; "
            f"estimated peak {size(outlook.memory.peak)}"
        ))  # fmt: skip
        if probed is not None:
            console.print(Text(f"  measured peak {size(probed.peak_bytes)} after {probed.steps} steps of a probe"))
        if outlook.memory.host:
            console.print(Text(f"  besides {size(outlook.memory.host)} of host memory"))
        console.print()
    console.print(bars("time", outlook.costs.seconds, duration))
    length = planned.corpus.train.mean_length
    speed = outlook.costs.seconds["training"] / max(outlook.counts.sequences * length, 1)
    if probed is not None:
        how = f"measured: {duration(probed.step_seconds)} a step, the median of {probed.steps}"
        if probed.compile_seconds is not None:
            how += f"; compiled before, in {duration(probed.compile_seconds)}"
    else:
        peak, share = spec.peak_flops(precision), spec.utilisation(precision)
        how = f"estimated: {share:.0%} of {rate(peak, 'FLOP/s')}"
    console.print(Text(f"  {1 / max(speed, 1e-12):,.0f} tokens a second, {how}"))
    console.print()
    console.print(totals(outlook))
    if outlook.note:
        console.print(Text(outlook.note), soft_wrap=True)
    verdict(console, outlook)


def bars(title: str, values: Mapping[str, float], shown: Any) -> Table:
    """Numbers with bars beside them."""
    rows = table(title)
    most, total = max(values.values(), default=0), sum(values.values())
    for name, value in values.items():
        if value:
            rows.add_row(name, shown(value), bar(value / most))
    rows.add_row(Text("total", style="bold"), Text(shown(total), style="bold"), "")
    return rows


def totals(outlook: Outlook) -> Table:
    """Disk, energy and price."""
    costs, rows = outlook.costs, table("costs")
    rows.add_row("checkpoint", size(costs.checkpoint_bytes), f"{outlook.counts.saves:,} of them are written")
    rows.add_row("disk", size(costs.disk_bytes), "at most, of checkpoints")
    if costs.kilowatt_hours is not None:
        rows.add_row("energy", f"{significant(costs.kilowatt_hours)} kWh", f"at {costs.watts:g} W of the device")
    else:
        rows.add_row("energy", "not known", "watts=… says what the device draws")
    if costs.price is not None:
        rows.add_row("price", f"{costs.price:,.2f}", f"at {costs.price_per_hour:g} an hour")
    return rows


def verdict(console: Console, outlook: Outlook) -> None:
    """Whether it fits, and what would make it."""
    room = outlook.spec.memory_bytes
    if outlook.fits is None or room is None or outlook.needed is None:
        console.print(Text("fits: not known"))
        return
    if outlook.fits:
        console.print(Text(f"fits: {size(outlook.needed)} of {size(room)}", style="bold green"))
        return
    console.print(Text(f"does not fit: {size(outlook.needed)} of {size(room)}", style="bold red"))
    if not outlook.suggestions:
        console.print(Text("nothing that was tried makes it fit; a smaller model or a larger device would"))
    for suggestion in outlook.suggestions:
        slower = f"{suggestion.slower:.2f} × the time" + (", trains otherwise" if suggestion.changes_training else "")
        text = f"  {' '.join(suggestion.overrides)}"
        console.print(Text(f"{text}   {size(suggestion.memory.needed)}, {slower}"), soft_wrap=True)


def figures(run: Run, planned: Planned, outlook: Outlook) -> dict[str, Any]:
    """Every figure, for a machine to read; bytes, seconds, FLOPs."""
    memory, probed, costs = outlook.memory, outlook.probed, outlook.costs
    unit, length = planned.unit, run.data.sequence_length
    model = unit.model
    return {
        "name": run.name,
        "device": outlook.spec.title,
        "precision": outlook.precision.name,
        "micro_batch_size": outlook.micro_batch_size,
        "parameters": {**model.parameters_by_part(), "total": model.num_parameters()},
        "flops_per_token": unit.flops_per_token(length),
        "flops": unit.flops_per_token(length) * outlook.counts.sequences * length,
        "steps": outlook.counts.steps,
        "tokens": outlook.counts.sequences * length,
        "memory_bytes": None if memory is None else dict(memory.parts),
        "estimated_peak_bytes": None if memory is None else memory.peak,
        "measured_peak_bytes": None if probed is None else probed.peak_bytes,
        "host_bytes": None if memory is None else memory.host,
        "peak_bytes": outlook.peak,
        "needed_bytes": outlook.needed,
        "available_bytes": outlook.spec.memory_bytes,
        "fits": outlook.fits,
        "step_seconds": costs.seconds["training"] / max(outlook.counts.steps, 1),
        "phase_seconds": None if probed is None else probed.phase_seconds,
        "seconds": dict(costs.seconds),
        "checkpoint_bytes": costs.checkpoint_bytes,
        "disk_bytes": costs.disk_bytes,
        "kilowatt_hours": costs.kilowatt_hours,
        "price": costs.price,
        "note": outlook.note or None,
        "suggestions": [
            {"overrides": s.overrides, "needed_bytes": s.memory.needed, "slower": s.slower} for s in outlook.suggestions
        ],
    }
