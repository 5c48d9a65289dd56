"""The forecast of a run on several devices, in the terminal and as figures."""

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmtrain.base.format import duration, memory_size, rate, significant, size
from llmtrain.plan.cluster import MeshPlan
from llmtrain.plan.costs import Costs
from llmtrain.plan.tables import bars, table
from llmtrain.run.cluster_forecast import DEGREES, ClusterForecast
from llmtrain.run.forecast import PlannedRun

MAX_ROWS = 10  # of the meshes that fit
COMMUNICATION = {
    "shards": "weights gathered and gradients scattered, while nothing is computed",
    "replicas": "gradients of replicas, while nothing is computed",
    "tensor": "hidden states within blocks",
    "context": "keys and values of other positions",
    "pipeline": "hidden states between stages",
    "bubble": "stages without a micro-batch",
    "contention": "communication beside computation slows it down",
    "waiting": "for the slowest rank",
}


def show_cluster(console: Console, forecast: ClusterForecast) -> None:
    """Print meshes, memory, time, costs and the verdict."""
    console.print(hardware(forecast))
    console.print()
    if forecast.note:
        console.print(Text(forecast.note, style="yellow"), soft_wrap=True)
        console.print()
    best = forecast.best
    if best is None or forecast.costs is None:
        console.print(Text("no mesh fits; more devices, larger ones or a smaller model would", style="bold red"))
        return
    if len(forecast.plans) > 1:
        console.print(meshes(forecast.plans))
        for override in best.changes:
            console.print(Text(f"  nothing fits without {override}"), soft_wrap=True)
        console.print()
    title = f"memory of a rank, {forecast.precision.name}, {mesh_text(best)}"
    console.print(bars(title, best.whole, size))
    work = best.work
    console.print(
        Text(
            f"  estimated, {work.micro_batches} × {work.micro_batch} sequences of {work.sequence_length} tokens a rank"
        ),
        soft_wrap=True,
    )
    console.print()
    console.print(step(best))
    seconds = best.time.seconds
    console.print(
        Text(
            f"  {best.tokens_per_second:,.0f} tokens a second, {best.tokens_per_second / best.mesh.devices:,.0f} a "
            f"device, {best.mfu:.1%} MFU; {duration(best.time.hidden)} of communication beside computation"
        ),
        soft_wrap=True,
    )
    console.print()
    console.print(bars("time", forecast.costs.seconds, duration))
    console.print(Text(f"  {forecast.counts.steps:,} steps of {duration(seconds)}"), soft_wrap=True)
    console.print()
    console.print(totals(forecast, forecast.costs))
    verdict(console, best)


def hardware(forecast: ClusterForecast) -> Table:
    """The table of devices and links."""
    cluster, rows = forecast.cluster, table("cluster")
    peak = rate(cluster.spec.peak_flops(forecast.precision), "FLOP/s")
    limited = "" if cluster.power == 1 else f", {cluster.power:.0%} of its power"
    rows.add_row(
        "devices", f"{cluster.devices:,}", f"{cluster.spec.title}, {peak} in {forecast.precision.name}{limited}"
    )
    rows.add_row("hosts", f"{cluster.hosts:,}", f"of {min(cluster.devices, cluster.links.gpus_per_host)}")
    rows.add_row("within a host", rate(cluster.links.host, "B/s"), "one way, of each device")
    rows.add_row("between hosts", rate(cluster.links.network, "B/s"), "one way, of each device")
    return rows


def meshes(plans: list[MeshPlan]) -> Table:
    """The table of the meshes that fit, the fastest first."""
    rows = Table(title=f"{len(plans)} meshes fit", title_justify="left", title_style="bold", box=None, pad_edge=False)
    for heading in ("step", "tokens/s a device", "MFU", "memory", "overrides"):
        rows.add_column(heading, justify="left" if heading == "overrides" else "right", overflow="fold")
    for plan in plans[:MAX_ROWS]:
        rows.add_row(
            duration(plan.time.seconds), f"{plan.tokens_per_second / plan.mesh.devices:,.0f}", f"{plan.mfu:.1%}",
            size(plan.needed), " ".join((*plan.mesh.overrides(DEGREES), *plan.changes)),
        )  # fmt: skip
    return rows


def step(plan: MeshPlan) -> Table:
    """The table of a step's time by part."""
    rows = table("step")
    total = plan.time.seconds
    for name, seconds in plan.time.parts.items():
        if seconds:
            share = plan.time.bubble_share
            remark = COMMUNICATION.get(name, "") + (f": {share:.1%} of the passes" if name == "bubble" else "")
            rows.add_row(name, duration(seconds), f"{seconds / total:5.1%}  {remark}")
    rows.add_row(Text("total", style="bold"), Text(duration(total), style="bold"), "")
    return rows


def totals(forecast: ClusterForecast, costs: Costs) -> Table:
    """The table of disk, energy and price, of all devices."""
    rows, devices = table("costs"), forecast.cluster.devices
    rows.add_row("checkpoint", size(costs.checkpoint_bytes), f"{forecast.counts.saves:,} of them are written")
    rows.add_row("disk", size(costs.disk_bytes), "at most, of checkpoints")
    rows.add_row("device hours", significant(devices * costs.total_seconds / 3600), "")
    if costs.kilowatt_hours is not None and costs.watts is not None:
        remark = f"at {costs.watts / devices:g} W of a device"
        rows.add_row("energy", f"{significant(costs.kilowatt_hours)} kWh", remark)
    if costs.price is not None and costs.price_per_hour is not None:
        rows.add_row("price", f"{costs.price:,.2f}", f"at {costs.price_per_hour / devices:g} an hour of a device")
    return rows


def verdict(console: Console, plan: MeshPlan) -> None:
    """Print whether each rank has room."""
    if plan.room is None:
        console.print(Text("fits: not known"))
    elif plan.fits:
        console.print(
            Text(f"fits: a rank needs {size(plan.needed)} of {memory_size(plan.room)}", style="bold green")
        )  # fmt: skip
        console.print(Text(f"  {' '.join((*plan.mesh.overrides(DEGREES), *plan.changes))}"), soft_wrap=True)
    else:
        has = f"a device has {memory_size(plan.room)}"
        console.print(Text(f"does not fit: a rank needs {size(plan.needed)}, {has}", style="bold red"))
        console.print(Text("distributed=auto ranks the meshes that would"))


def mesh_text(plan: MeshPlan) -> str:
    """The degrees of a mesh that are more than 1."""
    return " × ".join(f"{name} {degree}" for name, degree in plan.mesh.degrees.items() if degree > 1) or "one device"


def cluster_figures(planned: PlannedRun, forecast: ClusterForecast) -> dict[str, Any]:
    """Every figure, for ``json=FILE``; bytes, seconds, FLOPs."""
    cluster, costs, model = forecast.cluster, forecast.costs, planned.unit.model
    return {
        "name": planned.settings.name,
        "device": cluster.spec.title,
        "devices": cluster.devices,
        "hosts": cluster.hosts,
        "precision": forecast.precision.name,
        "host_bytes_per_second": cluster.links.host,
        "network_bytes_per_second": cluster.links.network,
        "parameters": {**model.parameters_by_part(), "total": model.num_parameters()},
        "steps": forecast.counts.steps,
        "note": forecast.note or None,
        "available_bytes": cluster.spec.memory_bytes,
        "meshes": [mesh_figures(plan) for plan in forecast.plans],
        "seconds": None if costs is None else dict(costs.seconds),
        "checkpoint_bytes": None if costs is None else costs.checkpoint_bytes,
        "disk_bytes": None if costs is None else costs.disk_bytes,
        "kilowatt_hours": None if costs is None else costs.kilowatt_hours,
        "price": None if costs is None else costs.price,
    }


def mesh_figures(plan: MeshPlan) -> dict[str, Any]:
    """The figures of a mesh."""
    return {
        **plan.mesh.degrees,
        "overrides": [*plan.mesh.overrides(DEGREES), *plan.changes],
        "micro_batch_size": plan.work.micro_batch,
        "micro_batches": plan.work.micro_batches,
        "memory_bytes": plan.whole,
        "needed_bytes": plan.needed,
        "fits": plan.fits,
        "step_seconds": plan.time.seconds,
        "step_parts_seconds": dict(plan.time.parts),
        "hidden_seconds": plan.time.hidden,
        "tokens_per_second": plan.tokens_per_second,
        "tokens_per_second_per_device": plan.tokens_per_second / plan.mesh.devices,
        "mfu": plan.mfu,
    }
