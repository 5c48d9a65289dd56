"""Building the parts of a run from its settings, in one order."""

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llmtrain.base.format import size
from llmtrain.base.places import Places
from llmtrain.base.world import ALONE, World
from llmtrain.checkpoint.model_state import saved_tensors, stored_places
from llmtrain.checkpoint.optimizer_state import state_tensors
from llmtrain.checkpoint.parts import whole_bytes
from llmtrain.config.build import naming
from llmtrain.config.run_config import RunConfig
from llmtrain.data import Corpus
from llmtrain.distributed.checks import ParallelSettings, check_parallel
from llmtrain.distributed.deepspeed import DeepSpeed, check_installed
from llmtrain.distributed.deepspeed_agreement import RunValues, check_agreement
from llmtrain.distributed.parallel import Parallel
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
        """The size of a checkpoint on disk."""
        return whole_bytes(self.saved_tensors(), state_tensors(self.optimizer), self.places)

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
    generator = torch.Generator(device).manual_seed(run.runtime.seed)
    unit = build_unit(
        run, vocab_size, corpus.labels, device, generator, load_weights=from_start, class_weights=corpus.class_weights,
        precision=precision,
    )  # fmt: skip
    parallel = share_unit(run.distributed, unit, world, device)
    with naming("optimizer"):
        optimizer = run.optimizer.build(parallel.trainable)
    with naming("clipping"):
        run.clipping.check_parameters([name for name, _ in unit.trained_weights()])
    if run.runtime.compile is True and (reason := why_not_compile(device)):
        raise ValueError(f"runtime.compile=true: {reason}; take auto or false")
    if run.runtime.cuda_graphs and device.type != "cuda":
        raise ValueError("runtime.cuda_graphs=true: there is no GPU here; take false")
    return Parts(device, built, corpus, unit, optimizer, precision, run.length(corpus.train), parallel)


def check_ranks(run: RunConfig, processes: int) -> None:
    """Raise ValueError for a setting that does not go with so many ranks."""
    if processes == 1:
        return
    mesh = run.distributed.mesh(processes)
    zero = run.distributed if isinstance(run.distributed, DeepSpeed) else None
    settings = ParallelSettings(
        processes, mesh.shard > 1 or mesh.tensor > 1, run.optimizer, run.clipping, run.precision, run.lora,
        run.activation_checkpointing, run.runtime.cuda_graphs, None if zero is None else zero.stage,
        run.runtime.compile,
    )  # fmt: skip
    check_parallel(settings)
    if zero is not None:
        check_installed()
        values = RunValues(
            processes, run.accumulation, run.clipping, run.optimizer, run.schedule, run.precision,
            run.metrics.log_every, run.loop.max_steps,
        )  # fmt: skip
        check_agreement(zero.given, values)


def build_unit(
    run: RunConfig,
    vocab_size: int,
    labels: Sequence[str],
    device: torch.device,
    generator: torch.Generator,
    *,
    load_weights: bool,
    class_weights: Sequence[float] = (),
    precision: Precision | None = None,
    num_layers: int | None = None,
) -> TrainingUnit:
    """Build the training unit, with its transformations in the order below; it is compiled when the run starts.

    Without ``load_weights`` a checkpoint is restored later: only frozen weights that no checkpoint holds are loaded; on
    the meta device and on tensors without data (a plan), none.  Without a ``precision`` the unit is not trained: layers
    compute as they are, and keep no more than they need.  ``num_layers``: blocks of the model (None: all).
    """
    has_data = device.type != "meta" and not torch._guards.detect_fake_mode()
    # 1. the model, allocated once on the device and initialised there
    model = run.model.create(vocab_size, device, generator, num_layers)
    if run.precision.has_low_residual:
        model.lower_residual()
    # 2. weights from elsewhere
    if has_data and (load_weights or run.lora.adapts):
        with contextlib.nullcontext() if load_weights else adding_remedy(MOVED_BASE):
            run.weights.load(model)
    # 3. heads, and frozen weights
    with naming("objective"):
        unit = run.objective.build(model, labels, generator, class_weights)
    # 4. adapters, whose initial values depend on the weights
    with naming("lora"):
        run.lora.apply(model, generator)
        if has_data and load_weights and isinstance(run.lora, LowRankAdaptation) and run.lora.path is not None:
            start_from(unit, run.lora, Path(run.lora.path))
    unit.has_base = run.lora.adapts
    if precision is not None:
        # 5. the matrix products of layers
        precision.apply(model.blocks)
        # 6. the activations that are kept for the backward pass
        with naming("activation_checkpointing"):
            run.activation_checkpointing.apply(model)
    return unit


def outline(run: RunConfig, vocab_size: int, labels: Sequence[str]) -> TrainingUnit:
    """The unit on the meta device: sizes without memory."""
    return build_unit(run, vocab_size, labels, torch.device("meta"), torch.Generator("cpu"), load_weights=False)


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
