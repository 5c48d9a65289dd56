"""Building the parts of a run from its settings, in one order."""

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llmtrain.activation_checkpointing.selective import By
from llmtrain.base.format import size
from llmtrain.base.named_generators import NamedGenerators
from llmtrain.base.places import Places
from llmtrain.base.world import ALONE, World
from llmtrain.checkpoint.model_state import saved_tensors, stored_places
from llmtrain.checkpoint.optimizer_state import state_tensors
from llmtrain.checkpoint.parts import whole_bytes
from llmtrain.config.build import naming
from llmtrain.config.own_values import builds_parts, fill_own_parts, knows_values
from llmtrain.config.run_config import RunConfig
from llmtrain.data import Corpus
from llmtrain.distributed.checks import ParallelSettings, check_context, check_parallel
from llmtrain.distributed.deepspeed import DeepSpeed, check_installed
from llmtrain.distributed.deepspeed_agreement import RunValues, check_agreement
from llmtrain.distributed.local_sgd import LocalSgd
from llmtrain.distributed.options import Mesh
from llmtrain.distributed.parallel import Parallel
from llmtrain.distributed.pipeline_options import PipelineSettings
from llmtrain.distributed.share import share_unit
from llmtrain.lora.low_rank import LowRankAdaptation
from llmtrain.objective import TrainingUnit
from llmtrain.precision import Precision
from llmtrain.tokenizer import Tokenizer, TokenizerConfig
from llmtrain.train.compilation import why_not_compile
from llmtrain.train.length import TrainingLength
from llmtrain.train.state import TrainState
from llmtrain.weights.adapters import start_from

MOVED_BASE = (
    "the weights that adapters were trained on are needed too; if they were moved, name their place: weights.path=DIR"
)


@dataclass(frozen=True)
class Parts:
    """The parts of a run, built before its directory is made."""

    device: torch.device
    tokenizer: Tokenizer
    corpus: Corpus
    unit: TrainingUnit
    optimizer: torch.optim.Optimizer
    precision: Precision
    length: TrainingLength
    parallel: Parallel  # the way in which ranks share the unit; one process trains it alone

    @property
    def max_steps(self) -> int:
        """Optimizer steps of the run."""
        return self.length.max_steps

    def checkpoint_bytes(self) -> int:
        """The size of a checkpoint on disk; of what other ranks hold alone, by the share that is here."""
        here = whole_bytes(self.saved_tensors(), state_tensors(self.optimizer), self.places)
        places = self.places
        weights = [(name, weight.numel()) for name, weight in self.unit.named_weights()]
        elsewhere = sum(elements for name, elements in weights if places.get(name) == ())
        if not elsewhere:
            return here
        return here + here * elsewhere // (sum(elements for _, elements in weights) - elsewhere)

    def saved_tensors(self) -> dict[str, Tensor]:
        """The tensors of the model that a checkpoint has, as this rank holds them."""
        return saved_tensors(self.unit, self.parallel.held(), self.parallel.places())

    @property
    def places(self) -> Places:
        """The places of the parameters that this rank holds parts of, as checkpoints have them."""
        return stored_places(self.unit, self.parallel.places())


def assemble(
    run: RunConfig,
    device: torch.device,
    *,
    tokenizer: TokenizerConfig | None = None,
    from_start: bool = True,
    verify_data: bool = False,
    world: World = ALONE,
) -> Parts:
    """Build everything that training needs, on ``device``; writes nothing but the data cache.

    ``world``: the ranks that share the unit.

    ``tokenizer``: the copy of a stored run's tokenizer, in place of the config's.
    Without ``from_start`` a checkpoint is restored later, and only weights that no checkpoint holds are loaded.
    With ``verify_data`` every byte of the data is read and checked again, even where an earlier check is on record.
    """
    check_ranks(run, world.size)
    precision = run.precision.build(device)
    built = run.build_tokenizer(tokenizer)
    vocab_size = run.vocab_size(built)
    if run.objective.generates:
        run.loop.check_prompt(built)
    corpus = run.data.verify(built) if verify_data else run.data.build(built)
    generators = NamedGenerators(run.runtime.seed)

    def build(*, has_memory: bool) -> TrainingUnit:
        return build_unit(
            run, vocab_size, corpus.labels, device, generators, load_weights=from_start,
            class_weights=corpus.class_weights, precision=precision, has_memory=has_memory,
        )  # fmt: skip

    by_parts = builds_parts(run, world)
    unit = build(has_memory=not by_parts)
    if by_parts and not knows_values(unit):
        by_parts, unit = False, build(has_memory=True)
    parallel = share_unit(run.distributed, unit, world, device)
    if by_parts:
        with contextlib.nullcontext() if from_start else adding_remedy(MOVED_BASE):
            fill_own_parts(run, parallel, generators, load_weights=from_start)
    with naming("optimizer"):
        optimizer = run.optimizer.build(parallel.trainable)
    parallel.adopt(optimizer)
    with naming("clipping"):
        run.clipping.check_parameters([name for name, _ in unit.trained_weights()])
    if run.runtime.compile is True and (reason := why_not_compile(device)):
        raise ValueError(f"runtime.compile=true: {reason}; take auto or false")
    if run.runtime.cuda_graphs and device.type != "cuda":
        raise ValueError("runtime.cuda_graphs=true: there is no GPU here; take false")
    return Parts(device, built, corpus, unit, optimizer, precision, run.length(corpus.train), parallel)


def check_ranks(run: RunConfig, processes: int) -> None:
    """Raise ValueError for a setting that does not go with so many ranks."""
    if isinstance(run.distributed, LocalSgd) and run.runtime.cuda_graphs:
        raise ValueError(
            "runtime.cuda_graphs=True: a graph keeps the places of weights, and distributed=local_sgd changes them for "
            "an evaluation; take runtime.cuda_graphs=false"
        )
    if processes == 1:
        return
    mesh = run.distributed.mesh(processes)
    zero = run.distributed if isinstance(run.distributed, DeepSpeed) else None
    holds_parts = run.distributed.is_sharded(mesh) or mesh.tensor > 1
    settings = ParallelSettings(
        processes, holds_parts, run.optimizer, run.clipping, run.precision, run.lora,
        run.activation_checkpointing, run.runtime.cuda_graphs, pipeline_settings(run, mesh),
        None if zero is None else zero.stage, run.runtime.compile,
    )  # fmt: skip
    check_parallel(settings)
    check_context(mesh, run.objective, run.data.sequence_length)
    if zero is not None:
        check_installed()
        values = RunValues(
            processes, run.accumulation, run.clipping, run.optimizer, run.schedule, run.precision,
            run.metrics.log_every, run.loop.max_steps,
        )  # fmt: skip
        check_agreement(zero.given, values)


def pipeline_settings(run: RunConfig, mesh: Mesh) -> PipelineSettings | None:
    """The settings that a pipeline depends on; None where the mesh has none."""
    if mesh.pipeline == 1:
        return None
    sequences = -(-run.accumulation.batch_size_at(0, 0) // (mesh.replicate * mesh.shard))
    return PipelineSettings(
        mesh.pipeline, run.distributed.pipeline_schedule, run.distributed.stages_per_process,
        getattr(run.model, "num_layers", None), mesh.shard, mesh.tensor, mesh.context, sequences,
        run.accumulation.micro_batch_size, run.accumulation.is_probed, run.runtime.compile is True,
        getattr(run.activation_checkpointing, "by", None) is By.operation,
    )  # fmt: skip


def build_unit(
    run: RunConfig,
    vocab_size: int,
    labels: Sequence[str],
    device: torch.device,
    generators: NamedGenerators,
    *,
    load_weights: bool,
    class_weights: Sequence[float] = (),
    precision: Precision | None = None,
    num_layers: int | None = None,
    has_memory: bool = True,
) -> TrainingUnit:
    """Build the training unit, with its transformations in the order below; it is compiled when the run starts.

    Without ``load_weights`` a checkpoint is restored later: initial values are neither drawn nor loaded, but for
    frozen weights that no checkpoint holds; on the meta device and on tensors without data (a plan), none.  Without a
    ``precision`` the unit is not trained: layers compute as they are, and keep no more than they need.  ``num_layers``:
    blocks of the model (None: all).

    Without ``has_memory`` parameters are on the meta device, and buffers on ``device``: the ranks divide the unit
    first (:func:`share_unit`), and each fills its parts (:mod:`llmtrain.config.own_values`).
    """
    place = device if has_memory else torch.device("meta")
    has_data = place.type != "meta" and not torch._guards.detect_fake_mode()
    draws = generators if has_data and (load_weights or run.lora.adapts) else None
    # 1. the model, allocated once on the device and initialised there
    model = run.model.create(vocab_size, place, draws, num_layers)
    if run.precision.has_low_residual:
        model.lower_residual()
    # 2. weights from elsewhere
    if has_data and (load_weights or run.lora.adapts):
        with contextlib.nullcontext() if load_weights else adding_remedy(MOVED_BASE):
            run.weights.load(model)
    # 3. heads, and frozen weights
    with naming("objective"):
        unit = run.objective.build(model, labels, draws, class_weights)
    # 4. adapters, whose initial values depend on the weights
    with naming("lora"):
        run.lora.apply(model, draws)
        if has_data and load_weights and isinstance(run.lora, LowRankAdaptation) and run.lora.path is not None:
            start_from(unit, run.lora, Path(run.lora.path))
    unit.has_base = run.lora.adapts
    if not has_memory:
        unit.set_buffers(device)
    if precision is not None:
        # 5. the matrix products of layers
        precision.apply(model.blocks)
        # 6. the activations that are kept for the backward pass
        with naming("activation_checkpointing"):
            run.activation_checkpointing.apply(model)
    return unit


def outline(run: RunConfig, vocab_size: int, labels: Sequence[str]) -> TrainingUnit:
    """The unit on the meta device: sizes without memory."""
    return build_unit(run, vocab_size, labels, torch.device("meta"), NamedGenerators(0), load_weights=False)


def first_state(run: RunConfig, parts: Parts) -> TrainState:
    """The state of a run at step 0."""
    base = run.weights.fingerprint() if run.lora.adapts else ""
    return TrainState(data=parts.corpus.fingerprint, labels=list(parts.corpus.labels), base=base)


def check_base(run: RunConfig, state: TrainState) -> None:
    """Raise ValueError if the adapters were trained on other weights."""
    if not run.lora.adapts:
        return
    with adding_remedy(MOVED_BASE):
        if state.base != run.weights.fingerprint():
            path = getattr(run.weights, "path", "")
            raise ValueError(f"weights.path={path}: not the weights that the adapters were trained on")


def check_data(run: RunConfig, state: TrainState, parts: Parts) -> None:
    """Raise ValueError if the data, or the frozen weights, are not those of ``state``."""
    if state.data != parts.corpus.fingerprint:
        raise ValueError(
            f"data: not what this run was started on ({parts.corpus.description}); it was edited, moved or "
            "prepared otherwise, so that step and position have no meaning in it; restore it, name the place that it "
            "was moved to, data.path=…, or start a new run from these weights: weights=checkpoint "
            "weights.path=RUN_DIR"
        )
    check_base(run, state)


def check_space(run: RunConfig, parts: Parts) -> None:
    """Raise ValueError for a run whose checkpoints do not fit on the disk."""
    place = Path(run.run_dir or run.output_dir).absolute()
    while not place.exists():
        place = place.parent
    needed = parts.checkpoint_bytes() * (run.checkpoint.kept() + 1)  # one more, while it is written
    free = shutil.disk_usage(place).free
    if free < needed:
        raise ValueError(
            f"{place}: {size(free)} free, the checkpoints of this run need {size(needed)}; "
            "make room, or name another place: output_dir=DIR"
        )


@contextlib.contextmanager
def adding_remedy(remedy: str) -> Iterator[None]:
    """Add ``remedy`` to the message of a user's mistake."""
    try:
        yield
    except ValueError as error:
        error.add_note(remedy)
        raise
