"""``llmtrain plan``: the size, memory, time and costs of a run, without training it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmtrain.base.checks import non_negative, positive
from llmtrain.base.format import count, duration, memory_size, rate, significant, size
from llmtrain.base.gpus import GPUS
from llmtrain.base.invocation import FINISHED, USAGE_ERROR, Invocation
from llmtrain.base.outputs import check_output, is_stdout, open_output
from llmtrain.config.overrides import overrides_of
from llmtrain.display import lines
from llmtrain.distributed.auto import Auto
from llmtrain.lint import Case, lint
from llmtrain.objective import TrainingUnit
from llmtrain.plan.chart import draw
from llmtrain.plan.devices import find_device
from llmtrain.plan.links import Network
from llmtrain.plan.tables import bars, table
from llmtrain.plan.trace import Phase
from llmtrain.run.cluster_forecast import ClusterOptions, check_cluster, make_cluster_forecast
from llmtrain.run.cluster_tables import cluster_figures, show_cluster
from llmtrain.run.forecast import Forecast, ForecastOptions, PlannedRun, make_forecast
from llmtrain.run.run import Run

LIST = "list"  # in place of a device: show the table

WHEN = {Phase.held: "between two steps", Phase.forward: "in forward", Phase.backward: "in backward",
        Phase.update: "in the optimizer's step"}  # fmt: skip


@dataclass(frozen=True)
class Plan(Run):
    """A run and the settings of ``conf/plan.yaml``."""

    probe: bool
    device: str | None
    devices: int | None
    gpus_per_host: int
    network: Network
    network_gigabits: float | None
    host_gigabytes: float | None
    price_per_hour: float | None
    watts: float | None
    chart: str | None
    json: str | None

    def __post_init__(self) -> None:
        super().__post_init__()
        non_negative(price_per_hour=self.price_per_hour)
        positive(
            watts=self.watts, devices=self.devices, gpus_per_host=self.gpus_per_host,
            host_gigabytes=self.host_gigabytes, network_gigabits=self.network_gigabits,
        )  # fmt: skip
        if self.device not in (None, LIST):
            find_device(self.device)
        for key, path in (("chart", self.chart), ("json", self.json)):
            if path is not None:
                check_output(key, path)
            if path is not None and self.device == LIST:
                raise ValueError(f"{key}={path}: device=list plans no run; leave one of them out")
        if self.is_cluster and self.device != LIST:
            check_cluster(self.devices, self.device)
        if self.chart is not None and not self.chart.endswith(".png"):
            raise ValueError(f"chart={self.chart}: must be a .png file")

    @property
    def is_cluster(self) -> bool:
        """Return whether the plan is for several processes."""
        return self.devices is not None or self.distributed.is_parallel

    @property
    def run(self) -> Run:
        """The run without the settings of the plan."""
        return Run(**{field.name: getattr(self, field.name) for field in fields(Run) if field.init})


def main(plan: Plan, invocation: Invocation) -> int:
    """Print the forecast of the run and the linter's findings; return 2 if training would be refused."""
    if plan.device == LIST:
        Console(highlight=False).print(known_devices())
        return FINISHED
    run = plan.run
    planned = PlannedRun.of(run)
    console = Console(highlight=False, stderr=is_stdout(plan.json))  # standard output is then for the figures alone
    console.print(parameters(planned.unit))
    console.print()
    console.print(work(planned))
    console.print()
    if plan.is_cluster:
        document, parts, seconds, room = cluster(console, plan, planned)
    else:
        document, parts, seconds, room = single(console, plan, planned)
    if plan.chart is not None:
        draw(Path(plan.chart), run.name, parts, room, seconds)
    if plan.json is not None:
        with open_output("json", plan.json) as file:
            file.write(json.dumps(document, indent=1) + "\n")
    overrides = overrides_of(invocation.command)
    findings = lint(Case(run, planned.tokenizer, planned.corpus, planned.unit, planned.length, overrides=overrides))
    if findings:
        console.print()
    for finding in findings:
        format_line = lines.error if finding.level == "error" else lines.warning
        console.print(format_line(finding.message), soft_wrap=True)
    return USAGE_ERROR if any(finding.level == "error" for finding in findings) else FINISHED


Figures = tuple[dict[str, Any], Mapping[str, float], Mapping[str, float], float | None]


def single(console: Console, plan: Plan, planned: PlannedRun) -> Figures:
    """Print the forecast for one process; return the figures, memory and time by part, and the memory there is."""
    errors = Console(stderr=True, highlight=False)  # the plan alone goes to standard output
    options = ForecastOptions(plan.probe, plan.device, plan.price_per_hour, plan.watts)
    with plan.run.runtime.session() as device:
        forecast = make_forecast(planned, device, options, lambda text: errors.print(Text(text, style="dim")))
    show(console, planned, forecast, named=plan.device is not None)
    parts = forecast.memory.whole if forecast.memory else {}
    return figures(planned, forecast), parts, forecast.costs.seconds, forecast.spec.memory_bytes


def cluster(console: Console, plan: Plan, planned: PlannedRun) -> Figures:
    """Print the forecast for several devices; return as :func:`single` does."""
    assert plan.devices is not None
    assert plan.device is not None
    options = ClusterOptions(
        plan.devices, plan.device, plan.gpus_per_host, plan.network, plan.host_gigabytes, plan.network_gigabits,
        plan.price_per_hour, plan.watts,
    )  # fmt: skip
    forecast = make_cluster_forecast(planned, options, ranks_all=isinstance(plan.distributed, Auto))
    show_cluster(console, forecast)
    best = forecast.best
    parts = {} if best is None else best.whole
    seconds = {} if forecast.costs is None else forecast.costs.seconds
    return cluster_figures(planned, forecast), parts, seconds, forecast.cluster.spec.memory_bytes


# --- printing --------------------------------------------------------------------------------------------------------


def known_devices() -> Table:
    """The table of devices that ``device=`` takes."""
    rows = Table(box=None, pad_edge=False)
    for heading in ("device", "memory", "bf16 peak", "name"):
        rows.add_column(heading, justify="right" if heading in ("memory", "bf16 peak") else "left")
    for gpu in GPUS.values():
        peak = rate(gpu.flops["bf16"], "FLOP/s") if "bf16" in gpu.flops else "none"
        rows.add_row(gpu.name, memory_size(gpu.memory_bytes), peak, gpu.title)
    return rows


def parameters(unit: TrainingUnit) -> Table:
    """The table of parameters by part."""
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


def work(planned: PlannedRun) -> Table:
    """The table of tokens, steps and FLOPs."""
    run, unit, corpus, steps = planned.settings, planned.unit, planned.corpus, planned.max_steps
    model = unit.model
    sequence, batch = run.data.sequence_length, run.accumulation.batch_size_at(0, 0)
    mean = corpus.train.mean_length
    sequences, tokens = planned.length.sequences, planned.length.tokens
    flops_per_token = unit.flops_per_token(corpus.train.attended_length)
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


def show(console: Console, planned: PlannedRun, forecast: Forecast, *, named: bool) -> None:
    """Print memory, time, costs and the verdict; ``named``: for a device of the table, not this machine's."""
    spec, precision, probed = forecast.spec, forecast.precision, forecast.probed
    if forecast.memory is not None:
        console.print(bars(f"memory, {precision.name}, {spec.title}", forecast.memory.whole, size))
        tensors = f"; {size(forecast.memory.peak)} of it are tensors" if forecast.memory.outside else ""
        when, size_of_part = WHEN[forecast.memory.phase], forecast.micro_batch_size
        console.print(Text(f"  estimated, the most {when}, micro-batches of {size_of_part}{tensors}"), soft_wrap=True)
        if probed is not None:
            console.print(Text(f"  measured {size(probed.peak_bytes)} after {probed.steps} steps of a probe"))
        if forecast.memory.host:
            console.print(Text(f"  besides {size(forecast.memory.host)} of host memory"))
        console.print()
    console.print(bars("time", forecast.costs.seconds, duration))
    length = planned.corpus.train.mean_length
    speed = forecast.costs.seconds["training"] / max(forecast.counts.sequences * length, 1)
    if probed is not None:
        how = f"measured: {duration(probed.step_seconds)} a step, the median of {probed.steps}"
        if probed.compile_seconds is not None:
            how += f"; compiled before, in {duration(probed.compile_seconds)}"
    else:
        peak, share = spec.peak_flops(precision), spec.utilisation(precision)
        how = f"estimated: {share:.0%} of {rate(peak, 'FLOP/s')}"
    console.print(Text(f"  {1 / max(speed, 1e-12):,.0f} tokens a second, {how}"))
    console.print()
    console.print(totals(forecast))
    if forecast.note:
        console.print(Text(forecast.note), soft_wrap=True)
    verdict(console, forecast, named=named)


def totals(forecast: Forecast) -> Table:
    """The table of disk, energy and price."""
    costs, rows = forecast.costs, table("costs")
    rows.add_row("checkpoint", size(costs.checkpoint_bytes), f"{forecast.counts.saves:,} of them are written")
    rows.add_row("disk", size(costs.disk_bytes), "at most, of checkpoints")
    if costs.kilowatt_hours is not None:
        rows.add_row("energy", f"{significant(costs.kilowatt_hours)} kWh", f"at {costs.watts:g} W of the device")
    else:
        rows.add_row("energy", "not known", "watts=… says what the device draws")
    if costs.price is not None:
        rows.add_row("price", f"{costs.price:,.2f}", f"at {costs.price_per_hour:g} an hour")
    return rows


def verdict(console: Console, forecast: Forecast, *, named: bool) -> None:
    """Print whether the run fits, and overrides under which it would."""
    room = forecast.spec.memory_bytes
    if forecast.fits is None or room is None or forecast.needed is None:
        console.print(Text("fits: not known"))
        return
    if forecast.fits:
        console.print(Text(f"fits: needs {size(forecast.needed)} of {memory_size(room)}", style="bold green"))
        return
    has = f"the device has {memory_size(room)}" if named else f"{memory_size(room)} are free"
    console.print(Text(f"does not fit: needs {size(forecast.needed)}, {has}", style="bold red"))
    if not forecast.suggestions:
        console.print(Text("nothing that was tried makes it fit; a smaller model or a larger device would"))
    for suggestion in forecast.suggestions:
        slower = f"{suggestion.slower:.2f} × the time" + (", trains otherwise" if suggestion.changes_training else "")
        text = f"  {' '.join(suggestion.overrides)}"
        console.print(Text(f"{text}   {size(suggestion.memory.needed)}, {slower}"), soft_wrap=True)


def figures(planned: PlannedRun, forecast: Forecast) -> dict[str, Any]:
    """Every figure, for ``json=FILE``; bytes, seconds, FLOPs."""
    memory, probed, costs = forecast.memory, forecast.probed, forecast.costs
    run, unit = planned.settings, planned.unit
    flops_per_token = unit.flops_per_token(planned.corpus.train.attended_length)
    model = unit.model
    return {
        "name": run.name,
        "device": forecast.spec.title,
        "precision": forecast.precision.name,
        "micro_batch_size": forecast.micro_batch_size,
        "parameters": {**model.parameters_by_part(), "total": model.num_parameters()},
        "flops_per_token": flops_per_token,
        "flops": flops_per_token * planned.length.tokens,
        "steps": forecast.counts.steps,
        "tokens": planned.length.tokens,
        "memory_bytes": None if memory is None else dict(memory.parts),
        "estimated_peak_bytes": None if memory is None else memory.peak,
        "measured_peak_bytes": None if probed is None else probed.peak_bytes,
        "outside_bytes": None if memory is None else memory.outside,
        "host_bytes": None if memory is None else memory.host,
        "peak_bytes": forecast.peak,
        "needed_bytes": forecast.needed,
        "available_bytes": forecast.spec.memory_bytes,
        "fits": forecast.fits,
        "step_seconds": costs.seconds["training"] / max(forecast.counts.steps, 1),
        "phase_seconds": None if probed is None else probed.phase_seconds,
        "seconds": dict(costs.seconds),
        "checkpoint_bytes": costs.checkpoint_bytes,
        "disk_bytes": costs.disk_bytes,
        "kilowatt_hours": costs.kilowatt_hours,
        "price": costs.price,
        "note": forecast.note or None,
        "suggestions": [
            {"overrides": s.overrides, "needed_bytes": s.memory.needed, "slower": s.slower}
            for s in forecast.suggestions
        ],
    }
