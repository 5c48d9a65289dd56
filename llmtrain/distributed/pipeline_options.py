"""Settings of a pipeline that do not go together, with what would work.

Importing this module does not import torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass

INTERLEAVED = ("interleaved", "zero_bubble")  # schedules that can have several stages on each process


def passes_needed(name: str, processes: int, passes: int) -> int:
    """The number of micro-batches, at least ``passes``, that the schedule ``name`` can run."""
    if name == "1f1b":
        return max(passes, processes)
    if name in INTERLEAVED:  # in rounds of as many as there are processes, or a few more
        while passes % max(1, passes // processes):
            passes += 1
    return passes


@dataclass(frozen=True)
class PipelineSettings:
    """The settings that a pipeline depends on."""

    degree: int
    schedule: str
    stages_per_process: int
    num_layers: int | None  # None: known when the model is built
    shard: int
    tensor: int
    context: int
    sequences: int  # of a step, on the ranks that train on the same sequences
    micro_batch_size: int
    is_probed: bool  # the size of the micro-batch is found at the start
    compiles: bool  # runtime.compile=true
    keeps_operations: bool  # recomputation keeps the results of some operations

    @property
    def stages(self) -> int:
        """Stages of the whole pipeline."""
        return self.degree * self.stages_per_process

    @property
    def passes(self) -> int:
        """Micro-batches of a step."""
        return -(-self.sequences // self.micro_batch_size)


def pipeline_problems(settings: PipelineSettings) -> Iterator[str]:
    """Yield a message for each setting that a pipeline cannot have."""
    for key in ("tensor", "context"):
        if (degree := getattr(settings, key)) > 1:
            yield (
                f"distributed.{key}={degree}: not together with distributed.pipeline={settings.degree}; take "
                f"distributed.shard={degree}, which divides the weights of each stage further"
            )
    if settings.stages_per_process > 1 and settings.schedule not in INTERLEAVED:
        yield (
            f"distributed.stages_per_process={settings.stages_per_process}: pipeline_schedule={settings.schedule} has "
            f"one stage on each process; take pipeline_schedule={' or '.join(INTERLEAVED)}, or stages_per_process=1"
        )
    if settings.num_layers is not None and settings.stages > settings.num_layers:
        yield (
            f"distributed.pipeline={settings.degree}: {settings.stages} stages for a model of {settings.num_layers} "
            f"layers; each needs one; take a pipeline of at most {settings.num_layers // settings.stages_per_process}"
        )
    if settings.is_probed:
        yield (
            "accumulation=auto: a micro-batch as large as memory allows leaves the processes of a pipeline waiting for "
            "one another; name its size: accumulation=fixed accumulation.micro_batch_size=N, for as many micro-batches "
            f"as distributed.pipeline={settings.degree} or a few times more"
        )
    elif settings.passes < settings.degree and settings.schedule != "gpipe":
        largest = settings.sequences // settings.degree
        remedy = f"take accumulation.micro_batch_size={largest} or less" if largest else "take larger steps"
        yield (
            f"accumulation.micro_batch_size={settings.micro_batch_size}: makes {settings.passes} micro-batch"
            f"{'es' if settings.passes > 1 else ''} of a step's {settings.sequences} sequences on a process, and "
            f"pipeline_schedule={settings.schedule} needs {settings.degree} at least, as many as distributed.pipeline; "
            f"{remedy}, or distributed.pipeline_schedule=gpipe"
        )
    if settings.schedule == "zero_bubble":
        halves = "pipeline_schedule=zero_bubble runs the two halves of a backward pass apart"
        if settings.shard > 1:
            yield (
                f"distributed.shard={settings.shard}: {halves}, and FSDP loses gradients in between; take "
                f"pipeline_schedule=interleaved, or replicate={settings.shard} in place of shard"
            )
        if settings.compiles:
            yield (
                f"runtime.compile=True: {halves}, which compiled code does not allow; take runtime.compile=false, or "
                "pipeline_schedule=interleaved"
            )
        if settings.keeps_operations:
            yield (
                f"activation_checkpointing.by=operation: {halves}, and the results that it keeps serve one of them; "
                "take activation_checkpointing.by=block, which is computed again for each, or "
                "pipeline_schedule=interleaved"
            )
