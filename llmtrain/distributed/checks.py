"""Settings of a run that do not go with several ranks, refused before anything starts."""

from collections.abc import Iterator
from dataclasses import dataclass

from llmtrain.activation_checkpointing import ActivationCheckpointing
from llmtrain.base.options import option_name
from llmtrain.clipping import Clipping
from llmtrain.distributed.options import Mesh
from llmtrain.distributed.pipeline_options import PipelineSettings, pipeline_problems
from llmtrain.lora import Lora
from llmtrain.objective import Objective
from llmtrain.optimizer import OptimizerConfig
from llmtrain.precision import PrecisionConfig


@dataclass(frozen=True)
class ParallelSettings:
    """The settings of a run that ranks which share it depend on."""

    processes: int
    is_sharded: bool  # a rank holds a part of each parameter: FSDP, HSDP
    optimizer: OptimizerConfig
    clipping: Clipping
    precision: PrecisionConfig
    lora: Lora
    activation_checkpointing: ActivationCheckpointing
    cuda_graphs: bool
    pipeline: PipelineSettings | None = None  # None: every rank has all layers
    zero_stage: int | None = None  # of DeepSpeed, where it divides what ranks hold
    compile: bool | str = "auto"


def check_parallel(settings: ParallelSettings) -> None:
    """Raise ValueError for the first setting that does not go with several ranks, naming what does."""
    for problem in problems(settings):
        raise ValueError(problem)


def problems(settings: ParallelSettings) -> Iterator[str]:
    """Yield a message for each setting that does not go with the ranks of ``settings``."""
    if settings.processes > 1 and settings.cuda_graphs:
        yield (
            "runtime.cuda_graphs=True: a graph of the whole step cannot hold the exchanges between "
            f"{settings.processes} processes; take runtime.cuda_graphs=false"
        )
    if settings.pipeline is not None:
        yield from pipeline_problems(settings.pipeline)
        yield from _stage_problems(settings)
    if not settings.is_sharded:
        return
    if settings.zero_stage is not None:
        yield from zero_problems(settings, settings.zero_stage)
    unsharded = "or distributed=ddp, where each rank has whole weights"
    packed = unsharded if settings.zero_stage is None else "or distributed.zero_stage=2, where each rank has them whole"
    if not settings.optimizer.takes_shards:
        name = option_name(settings.optimizer)
        remedy = {"adamw_8bit": "adamw_bf16", "adafactor": "adamw_bf16, whose state is divided over the ranks"}
        yield (
            f"optimizer={name}: needs whole parameters, and with sharding a rank has a part of each; take optimizer="
            f"{remedy.get(name, 'adamw')}, {unsharded}"
        )
    if not settings.clipping.takes_shards:
        yield (
            f"clipping={option_name(settings.clipping)}: needs whole parameters, and with sharding a rank has a part "
            f"of each; take clipping=norm, {unsharded}"
        )
    if option_name(settings.precision) == "fp8":
        yield (
            "precision=fp8: keeps whole 8-bit weights on each rank, which sharding is to avoid; take precision=bf16, "
            f"{unsharded}"
        )
    quantization = getattr(getattr(settings.lora, "quantization", None), "value", "none")
    if quantization != "none" and settings.zero_stage not in (1, 2):  # those leave frozen weights whole
        yield (
            f"lora.quantization={quantization}: packed weights cannot be divided by rows; take "
            f"lora.quantization=none, {packed}"
        )
    if getattr(settings.activation_checkpointing, "offload", False):
        yield (
            "activation_checkpointing.offload=True: would move gathered weights to the host, too; take "
            f"activation_checkpointing.offload=false, {unsharded}"
        )


def _stage_problems(settings: ParallelSettings) -> Iterator[str]:
    """Yield a message for each setting of other groups that a stage of a pipeline cannot have."""
    unstaged = "or distributed=ddp, where each rank has all layers"
    if option_name(settings.precision) == "fp8":
        yield (
            "precision=fp8: quantises the weights of all micro-batches at once, whose passes a pipeline mixes; take "
            f"precision=bf16, {unstaged}"
        )
    quantization = getattr(getattr(settings.lora, "quantization", None), "value", "none")
    if quantization != "none":
        yield (
            f"lora.quantization={quantization}: packed weights are not sent between stages; take "
            f"lora.quantization=none, {unstaged}"
        )
    if getattr(settings.activation_checkpointing, "offload", False):
        yield (
            "activation_checkpointing.offload=True: expects a backward pass right after its forward pass; take "
            f"activation_checkpointing.offload=false, {unstaged}"
        )


def check_context(mesh: Mesh, objective: Objective, sequence_length: int) -> None:
    """Raise ValueError for the first setting that does not go with ranks which share the positions of sequences."""
    for problem in context_problems(mesh, objective, sequence_length):
        raise ValueError(problem)


def context_problems(mesh: Mesh, objective: Objective, sequence_length: int) -> Iterator[str]:
    """Yield a message for each setting that does not go with the degree ``context`` of ``mesh``."""
    if mesh.context == 1:
        return
    own = f"distributed.context={mesh.context}"
    if not objective.sums_positions:
        yield (
            f"objective={option_name(objective)}: its loss is not a sum over the positions of a text, which {own} "
            "divides among processes; take distributed.context=1, as in distributed=fsdp"
        )
    if mesh.pipeline > 1:
        yield (
            f"{own}: does not go with distributed.pipeline={mesh.pipeline}, whose stages pass on whole sequences; take "
            "distributed.pipeline=1, and divide the weights by distributed.shard"
        )
    if sequence_length % (2 * mesh.context):
        yield chunks_problem(mesh.context, sequence_length)


def check_chunks(context: int, sequence_length: int) -> None:
    """Raise ValueError unless ``context`` ranks can share sequences of that length."""
    if context > 1 and sequence_length % (2 * context):
        raise ValueError(chunks_problem(context, sequence_length))


def chunks_problem(context: int, sequence_length: int) -> str:
    """The message for sequences that cannot be cut into two chunks for each of ``context`` ranks."""
    chunks = 2 * context
    nearest = max(1, sequence_length // chunks) * chunks
    return (
        f"data.sequence_length={sequence_length}: distributed.context={context} cuts sequences into {chunks} chunks of "
        f"one length; take data.sequence_length={nearest}, or another distributed.context"
    )


def zero_problems(settings: ParallelSettings, stage: int) -> Iterator[str]:
    """Yield a message for each setting that goes with sharding, and does not go with DeepSpeed."""
    if settings.optimizer.takes_shards and not settings.optimizer.is_elementwise:
        yield (
            f"optimizer={option_name(settings.optimizer)}: needs matrices, and with DeepSpeed a rank has a stretch of "
            "flattened ones; take optimizer=adamw, or distributed=fsdp"
        )
    if stage == 3 and settings.compile is True:
        yield (
            "runtime.compile=true: ZeRO 3 gathers weights module by module, between compiled code; take "
            "runtime.compile=auto or false, distributed.zero_stage=2, or distributed=fsdp"
        )
