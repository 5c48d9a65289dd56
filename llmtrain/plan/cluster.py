"""The plan of a run on several devices: memory and time on a mesh, and the meshes that fit, the fastest first."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from llmtrain.base.options import option_name
from llmtrain.config.run_config import RunConfig
from llmtrain.distributed.checks import check_chunks
from llmtrain.kernels.linear_cross_entropy import default_chunk
from llmtrain.plan.blueprint import Blueprint
from llmtrain.plan.devices import DeviceSpec
from llmtrain.plan.links import Links
from llmtrain.plan.memory import GPU_CONTEXT, GPU_SLACK, GPU_WORKSPACE
from llmtrain.plan.mesh import KEYS, Mesh, divisors, possible_meshes
from llmtrain.plan.program import Program, Recomputation, Work
from llmtrain.plan.rank_memory import RankMemory, rank_memory
from llmtrain.plan.rates import attention_share, matmul_share
from llmtrain.plan.shape import Shape
from llmtrain.plan.step_time import Engine, StepTime, step_time
from llmtrain.plan.trace import fake_tensors, tensors_in
from llmtrain.precision import Precision

ALL = 1 << 30  # micro-batches in flight: those of a step
UPDATE_TRAFFIC = 16  # bytes that clipping and update read and write a parameter, besides its state read and written


@dataclass(frozen=True)
class Cluster:
    """Equal GPUs on equal hosts."""

    spec: DeviceSpec
    devices: int
    links: Links
    power: float = 1.0  # power limit of a device, relative to its full power

    @property
    def hosts(self) -> int:
        """The number of hosts."""
        return -(-self.devices // self.links.gpus_per_host)


@dataclass(frozen=True)
class ClusterRun:
    """The sizes of a run that a cluster plan depends on."""

    shape: Shape
    program: Program
    sequence_length: int
    batch_size: int  # sequences of a step, of all ranks
    micro_batch_size: int  # sequences of a forward pass, at most

    def work(self, mesh: Mesh) -> Work:
        """The work of a rank of ``mesh``: micro-batches as large as allowed, all of one size."""
        local = self.batch_size // mesh.data
        micro_batch = max(size for size in divisors(local) if size <= self.micro_batch_size)
        return Work(self.sequence_length, micro_batch, local // micro_batch, mesh.context)


@dataclass(frozen=True)
class MeshPlan:
    """The memory and time of a run on a mesh."""

    mesh: Mesh
    work: Work
    memory: RankMemory
    time: StepTime
    tokens: int  # of a step, of all ranks
    mfu: float
    room: int | None  # bytes of a device
    changes: tuple[str, ...] = ()  # overrides besides those of the mesh

    @property
    def whole(self) -> dict[str, int]:
        """Everything that a device must have free, by part, as for one device."""
        outside = GPU_CONTEXT + round(GPU_SLACK * self.memory.peak)
        return {**self.memory.parts, "libraries": GPU_WORKSPACE, "CUDA context, gaps": outside}

    @property
    def needed(self) -> int:
        """Bytes that a device must have free."""
        return sum(self.whole.values())

    @property
    def fits(self) -> bool:
        """True if each rank has room."""
        return self.room is None or self.needed <= self.room

    @property
    def tokens_per_second(self) -> float:
        """The speed of all devices together."""
        return self.tokens / self.time.seconds


def plan_mesh(run: ClusterRun, cluster: Cluster, precision: Precision, mesh: Mesh) -> MeshPlan:
    """Estimate memory and time of a run on ``mesh``.  Raises ValueError if it cannot be divided over it."""
    mesh.check(run.shape, run.batch_size)
    check_chunks(mesh.context, run.sequence_length)
    work = run.work(mesh)
    spec = cluster.spec
    peak = spec.peak_flops(precision)
    engine = Engine(
        peak * matmul_share(spec.name), spec.flops.get("bf16", peak) * attention_share(spec.name),
        spec.bandwidth or 1e12, cluster.power,
    )  # fmt: skip
    time = step_time(run.shape, mesh, work, run.program, engine, cluster.links)
    tokens = run.batch_size * run.sequence_length
    flops = run.shape.flops_per_token(run.sequence_length) * tokens
    mfu = flops / (time.seconds * cluster.devices * peak)
    memory = rank_memory(run.shape, mesh, work, run.program)
    return MeshPlan(mesh, work, memory, time, tokens, mfu, spec.memory_bytes)


def rank_meshes(
    run: ClusterRun, cluster: Cluster, precision: Precision, degrees: Collection[str] = KEYS
) -> list[MeshPlan]:
    """Return the meshes that fit, the fastest first; where none does, with the changes of a run under which some do.

    ``degrees``: those that may be more than 1.
    """
    full = replace(run.program, recomputation=Recomputation.full, recomputed_share=1.0)
    option = "activation_checkpointing=full"
    smallest, micro = replace(run, micro_batch_size=1), "accumulation.micro_batch_size=1"
    variants: dict[tuple[str, ...], ClusterRun] = {
        (): run,
        (micro,): smallest,
        (option,): replace(run, program=full),
        (micro, option): replace(smallest, program=full),
    }
    meshes = list(possible_meshes(cluster.devices, run.shape, run.batch_size, cluster.links.gpus_per_host, degrees))
    found: list[MeshPlan] = []
    for changes, changed in variants.items():
        if found and len(changes) != len(found[0].changes):
            break
        plans = (replace(plan_mesh(changed, cluster, precision, mesh), changes=changes) for mesh in meshes)
        found += [plan for plan in plans if plan.fits and has_pipeline(plan, changed.program)]
    return sorted(found, key=lambda plan: plan.time.seconds)


def has_pipeline(plan: MeshPlan, program: Program) -> bool:
    """True if the pipeline of a mesh can be trained: see :func:`llmtrain.distributed.checks.pipeline_problems`."""
    mesh = plan.mesh
    if mesh.pipeline == 1:
        return True
    too_few = program.schedule != "gpipe" and plan.work.micro_batches < mesh.pipeline
    is_cut = mesh.tensor > 1 or mesh.context > 1
    return not (too_few or is_cut or (program.schedule == "zero_bubble" and mesh.shard > 1))


def divisible_batch(batch_size: int, ranks: int) -> int:
    """The smallest batch, at least ``batch_size``, that ``ranks`` can share evenly."""
    return -(-batch_size // ranks) * ranks


def program_of(blueprint: Blueprint, shape: Shape, *, reshards: bool) -> Program:
    """Describe this program with the settings of a run.  Raises ValueError for one that the model does not know."""
    settings, precision = blueprint.settings, blueprint.precision
    if getattr(settings.lora, "adapts", False):
        raise ValueError(
            f"lora={option_name(settings.lora)}: a plan for several devices does not know adapters; take lora=none, or "
            "plan it for one device"
        )
    recomputation, share = recomputation_of(settings)
    in_blocks, outside = state_bytes(blueprint, shape)
    chunk = getattr(settings.objective, "chunk_tokens", None)
    is_low = precision.name in ("bf16", "fp16", "fp8")
    return Program(
        state_bytes=in_blocks,
        outer_state_bytes=outside,
        gather_bytes=4,  # weights are gathered in fp32 and cast by autocast
        cast_bytes=2 if is_low else 0,
        residual_bytes=4,
        logit_bytes=precision.dtype.itemsize,
        logit_chunk=chunk or default_chunk(shape.vocab_size, precision.dtype, "cuda"),
        is_compiled=settings.runtime.compile is not False,
        recomputation=recomputation,
        recomputed_share=share,
        reshards=reshards,
        schedule=settings.distributed.pipeline_schedule,
        stages_per_rank=settings.distributed.stages_per_process,
        in_flight=ALL if settings.distributed.pipeline_schedule == "gpipe" else None,
        optimizer_traffic=UPDATE_TRAFFIC + 2 * in_blocks,
    )


def state_bytes(blueprint: Blueprint, shape: Shape) -> tuple[float, float]:
    """Return the bytes of optimizer state a parameter, in the blocks and outside of them.

    The optimizers of two small models, one of which has twice the blocks, are built on tensors without data.
    """
    found, few = [], blueprint.period
    with fake_tensors():
        for num_layers in (few, 2 * few):
            step = blueprint.build(num_layers)
            weights = {id(parameter) for parameter in step.unit.parameters()}
            state = tensors_in(step.optimizer.state.values())
            found.append(sum(tensor.nbytes for tensor in state if id(tensor) not in weights))
    blocks = found[1] - found[0]
    return blocks / few / shape.block_parameters, max(0, found[0] - blocks) / shape.outer_parameters


def recomputation_of(settings: RunConfig) -> tuple[Recomputation, float]:
    """The part of the forward pass that a run computes again, and of what share of the blocks."""
    option = settings.activation_checkpointing
    if getattr(option, "offload", False):
        raise ValueError(
            "activation_checkpointing.offload=true: a plan for several devices does not know it; take false, or plan "
            "it for one device"
        )
    name = option_name(option)
    by = getattr(getattr(option, "by", None), "name", None)
    if name == "selective" and by == "block":
        return Recomputation.full, 1 / getattr(option, "every", 1)
    known: Mapping[str, Recomputation] = {kind.value: kind for kind in Recomputation}
    if name not in known:
        raise ValueError(f"activation_checkpointing={name}: a plan for several devices does not know it")
    return known[name], 1.0
