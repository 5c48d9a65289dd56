"""The forecast of a run on several devices: its mesh, or the meshes that fit, with memory, time and costs."""

from dataclasses import dataclass, replace

from llmtrain.checkpoint.model_state import saved_tensors
from llmtrain.config.assemble import pipeline_settings
from llmtrain.config.run_config import RunConfig
from llmtrain.distributed.deepspeed import DeepSpeed
from llmtrain.distributed.local_sgd import LocalSgd
from llmtrain.distributed.options import Mesh as Degrees
from llmtrain.distributed.pipeline_options import pipeline_problems
from llmtrain.plan.blueprint import Blueprint
from llmtrain.plan.cluster import Cluster, ClusterRun, MeshPlan, divisible_batch, plan_mesh, program_of, rank_meshes
from llmtrain.plan.costs import Costs, Counts, Speed, add_up, count_work, without_long_saves
from llmtrain.plan.devices import arithmetic, find_device
from llmtrain.plan.links import Network, links_of
from llmtrain.plan.mesh import Mesh, mesh_of
from llmtrain.plan.program import Program
from llmtrain.plan.shape import shape_of
from llmtrain.precision import Precision
from llmtrain.run.forecast import PlannedRun

DEGREES = tuple(Degrees().degrees)  # those that the group ``distributed`` has


@dataclass(frozen=True)
class ClusterOptions:
    """The options of a plan for several devices, as in ``conf/plan.yaml``."""

    devices: int
    device: str
    gpus_per_host: int
    network: Network
    host_gigabytes: float | None
    network_gigabits: float | None
    price_per_hour: float | None  # of a device
    watts: float | None  # of a device


@dataclass(frozen=True)
class ClusterForecast:
    """The memory, time and costs of a run on a cluster."""

    cluster: Cluster
    precision: Precision
    plans: list[MeshPlan]  # the one of the run's mesh, or those that fit, the fastest first
    note: str
    counts: Counts
    costs: Costs | None  # of the first plan; None: there is none

    @property
    def best(self) -> MeshPlan | None:
        """The plan of the run's mesh, or the fastest that fits."""
        return self.plans[0] if self.plans else None


def make_cluster_forecast(planned: PlannedRun, options: ClusterOptions, *, ranks_all: bool) -> ClusterForecast:
    """Forecast a run on its mesh, or with ``ranks_all`` on all that fit.

    Raises ValueError for a mesh that is not of the devices or that the model cannot be divided over.
    """
    run = planned.settings
    if isinstance(run.distributed, DeepSpeed) and run.distributed.stage != 3:
        raise ValueError(
            f"distributed.zero_stage={run.distributed.stage}: the forecast knows whole or divided weights; plan "
            "distributed=ddp, which takes more memory, or distributed.zero_stage=3"
        )
    spec = find_device(options.device)
    precision = arithmetic(run.precision, spec)
    shape = shape_of(run.model, run.vocab_size(planned.tokenizer))
    links = links_of(
        spec.name, options.gpus_per_host, options.network, options.host_gigabytes, options.network_gigabits
    )  # fmt: skip
    power = 1.0 if options.watts is None or spec.watts is None else min(1.0, options.watts / spec.watts)
    cluster = Cluster(spec, options.devices, links, power)
    blueprint = Blueprint(run, shape.vocab_size, precision, run.accumulation.batch_size_at(0, 0))
    program = program_of(blueprint, shape, reshards=run.distributed.reshard_after_forward)
    mesh = None if ranks_all else checked_mesh(run, options.devices)
    if mesh is not None and isinstance(run.distributed, LocalSgd):
        program, mesh = of_replicas(run.distributed, program), replace(mesh, named="local_sgd")
    wanted = planned.length.largest_batch
    batch = divisible_batch(wanted, options.devices if mesh is None else mesh.data)
    work = ClusterRun(shape, program, run.data.sequence_length, batch, run.accumulation.micro_batch_size)
    if mesh is None:
        plans = rank_meshes(work, cluster, precision, DEGREES)
    else:
        plans = [plan_mesh(work, cluster, precision, mesh)]
    note = ""
    if batch != wanted:
        ranks = options.devices if mesh is None else mesh.data
        note = (
            f"accumulation.batch_size={wanted}: cannot be divided among {ranks} ranks, planned with {batch}; "
            f"train needs accumulation.batch_size={batch}, or fewer devices"
        )
    counts, costs = _costs(planned, options, cluster, plans[0] if plans else None, batch)
    return ClusterForecast(cluster, precision, plans, note, counts, costs)


def checked_mesh(run: RunConfig, devices: int) -> Mesh:
    """The mesh that a run names.  Raises ValueError if it is not of ``devices``, or its pipeline cannot be trained."""
    mesh = mesh_of(devices, run.distributed.degrees)
    settings = pipeline_settings(run, run.distributed.mesh(devices))
    for problem in () if settings is None else pipeline_problems(settings):
        raise ValueError(problem)
    return mesh


def of_replicas(options: LocalSgd, program: Program) -> Program:
    """``program`` with replicas that exchange now and then, and hold common weights and an outer momentum in fp32."""
    outside = program.state_bytes if program.outer_state_bytes is None else program.outer_state_bytes
    return replace(
        program, exchange_every=options.sync_every, reduce_bytes=options.exchange.bytes_per_weight,
        state_bytes=program.state_bytes + 8, outer_state_bytes=outside + 8,
    )  # fmt: skip


def _costs(
    planned: PlannedRun, options: ClusterOptions, cluster: Cluster, plan: MeshPlan | None, batch: int
) -> tuple[Counts, Costs | None]:
    """Count the work of the whole run, and add up the costs of it by ``plan``."""
    run, steps = planned.settings, planned.max_steps
    validation = 0 if planned.corpus.validation is None else len(planned.corpus.validation)
    counts = count_work(run.loop, run.checkpoint, steps, steps * batch, batch, validation)
    if plan is None:
        return counts, None
    sequence = plan.time.seconds / batch
    # A sampled token reads all weights, which the ranks gather once for it.
    memory = 2 * planned.unit.model.num_parameters() / plan.mesh.tensor / plan.mesh.pipeline
    token = memory / (cluster.spec.bandwidth or 1e12) + cluster.links.scatter_seconds(memory, plan.mesh.shard_group)
    speed = Speed(sequence, sequence / 3, max(token, 0.002))
    saved = sum(tensor.nbytes for tensor in saved_tensors(planned.unit).values())
    saved += round(plan.memory.parts["optimizer"] * plan.mesh.weight_parts * plan.mesh.tensor * plan.mesh.pipeline)
    counts = without_long_saves(counts, speed, saved // cluster.hosts)
    watts = options.watts if options.watts is not None else cluster.spec.watts
    costs = add_up(
        speed, counts, run.loop, run.checkpoint, saved, watts=None if watts is None else watts * options.devices,
        price_per_hour=None if options.price_per_hour is None else options.price_per_hour * options.devices,
    )  # fmt: skip
    # Each host writes the part of its ranks.
    return counts, replace(costs, seconds={**costs.seconds, "saving": costs.seconds["saving"] / cluster.hosts})


def check_cluster(devices: int | None, device: str | None) -> None:
    """Raise ValueError unless the keys of a plan name what a plan for several devices needs."""
    if devices is None:
        raise ValueError("devices=null: the run is for several processes; say for how many GPUs, as in devices=8")
    if device is None:
        raise ValueError(
            f"devices={devices}: a plan for several GPUs is for a kind of the table; say which, as in device=h100-80gb "
            "(device=list shows them)"
        )
