"""Steps of a small unit that ranks share, beside the same steps of one process."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from llmtrain.base.named_generators import NamedGenerators
from llmtrain.base.world import World
from llmtrain.data import IGNORE, Batch, Rows
from llmtrain.distributed.data_parallel import Replicated, Sharded
from llmtrain.distributed.parallel import Parallel
from llmtrain.model import LanguageModel
from llmtrain.objective import TrainingUnit
from llmtrain.objective.causal import Causal
from llmtrain.optimizer import ShardedTrainable
from llmtrain.precision import Precision
from llmtrain.train.step import Step, StepLoss
from tests.helpers.options import make_option

CPU = torch.device("cpu")
VOCABULARY = 101  # 128 rows with the padding
LENGTH = 12
OBJECTIVE = Causal(z_loss=0.0, chunk_tokens=None)
# Sizes that two ranks cannot divide: 33 channels, 81 in between.  No bias of keys: its gradient is 0 but for rounding,
# which Adam makes as large as any other.
GPT = {
    "num_layers": 2, "hidden_size": 33, "num_heads": 3, "context_length": 16, "qkv_bias": False,
    "initialisation": "torch",
}  # fmt: skip
LLAMA = {
    "num_layers": 2, "hidden_size": 48, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 81,
    "context_length": 16, "vocab_size": None, "tie_embeddings": False,
}  # fmt: skip
# one row in A: the second rank has none of it
LORA = {"rank": 1, "alpha": 8.0, "targets": ["all-linear"], "dropout": 0.0}


def make_model(kind: str, dropout: float = 0.0) -> LanguageModel:
    """A model by name: gpt, gpt untied, llama, gpt lora, or gpt lora bf16 (packed)."""
    generators, generator = NamedGenerators(3), torch.Generator().manual_seed(3)
    if kind == "llama":
        config = make_option("model", "llama3_8b", {}, **LLAMA, dropout=dropout)
    else:
        config = make_option("model", "gpt124m", {}, **GPT, dropout=dropout, tie_embeddings=kind != "gpt untied")
    model: LanguageModel = config.create(VOCABULARY, CPU, generators)
    if kind.startswith("gpt lora"):
        quantization = "bf16" if kind.endswith("bf16") else "none"
        make_option("lora", "lora", {}, **LORA, quantization=quantization).apply(model, generators)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.02, generator=generator)
    return model


def make_unit(kind: str, *, recomputation: str = "none", dropout: float = 0.0) -> TrainingUnit:
    """The unit of next-token prediction around :func:`make_model`."""
    model = make_model(kind, dropout)
    if recomputation != "none":
        make_option("activation_checkpointing", recomputation, {}).apply(model)
    return OBJECTIVE.build(model, (), NamedGenerators(0)).train()


def make_batch(sequences: int, number: int, *, targets: str = "all") -> Batch:
    """A batch of random tokens; ``targets``: all, uneven (fewer in later rows), or first (in the first row alone)."""
    ids = np.random.default_rng(number).integers(0, VOCABULARY, (sequences, LENGTH + 1))
    goals = ids[:, 1:].copy()
    for row in range(sequences):
        if targets == "uneven":
            goals[row, : (3 * row) % LENGTH] = IGNORE
        elif targets == "first" and row:
            goals[row] = IGNORE
    return OBJECTIVE.collate(Rows(ids[:, :-1].copy(), goals), np.arange(sequences), 0)


def make_precision(name: str) -> Precision:
    return Precision(name, CPU, torch.bfloat16 if name == "bf16" else torch.float32)


def share(unit: TrainingUnit, world: World, mode: str, **options: Any) -> Parallel:
    """Have the ranks share ``unit``: alone, ddp, fsdp, hsdp (2 × 2), or zero1, zero2, zero3."""
    if mode == "alone":
        return Parallel(unit)
    if mode.startswith("zero"):
        from llmtrain.distributed.zero import Zero

        stage = {"stage": int(mode[-1]), "stage3_param_persistence_threshold": 40} | options
        settings = {"train_micro_batch_size_per_gpu": 2, "zero_allow_untested_optimizer": True}
        mesh = init_device_mesh("cpu", (world.size,), mesh_dim_names=("shard",))
        os.environ["LOCAL_RANK"] = str(world.rank)
        return Zero(unit, world, mesh, settings | {"zero_optimization": stage})
    if mode == "ddp":
        return Replicated(unit, world, init_device_mesh("cpu", (world.size,), mesh_dim_names=("replicate",)))
    shape, names = ((2, world.size // 2), ("replicate", "shard")) if mode == "hsdp" else ((world.size,), ("shard",))
    return Sharded(unit, world, init_device_mesh("cpu", shape, mesh_dim_names=names), **options)


@dataclass
class Setting:
    """A run of a few steps."""

    kind: str = "gpt"
    optimizer: str = "adamw"
    clipping: str = "norm"
    sequences: int = 5
    micro_batch_size: int = 2
    targets: str = "uneven"
    precision: str = "fp32"
    steps: int = 3
    recomputation: str = "none"


@dataclass
class Result:
    """The numbers of a run."""

    losses: list[float]
    norms: list[float]
    largest: list[float]
    clipped: list[bool]
    gradients: dict[str, Tensor]  # whole, of the first step, clipped
    weights: dict[str, Tensor]  # whole, after the last


def whole(parallel: Parallel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The whole tensors of this rank's parts."""
    view = parallel.trainable
    if isinstance(view, ShardedTrainable):
        tensors = {name: view.gather(name, tensor.contiguous()) for name, tensor in tensors.items()}
    return {name: tensor.clone() for name, tensor in tensors.items()}


def make_step(parallel: Parallel, setting: Setting) -> Step:
    common = {"lr": 0.01, "weight_decay": 0.1, "adamw_lr": 0.002, "min_elements": 64}
    optimizer = make_option("optimizer", setting.optimizer, common).build(parallel.trainable)
    parallel.adopt(optimizer)
    return Step(
        parallel.unit, optimizer, make_precision(setting.precision), setting.micro_batch_size, parallel=parallel
    )


def run(parallel: Parallel, setting: Setting, *, on_step: Callable[[Step], None] = lambda step: None) -> Result:
    """Train a few steps."""
    step = make_step(parallel, setting)
    common = {"start_step": 0, "max_norm": 0.3, "max_value": 0.01, "thresholds": {"norm": 0.01}}
    clipping = make_option("clipping", setting.clipping, common)
    result = Result([], [], [], [], {}, {})
    for number in range(setting.steps):
        batch = make_batch(setting.sequences, number, targets=setting.targets)
        if parallel.world.size > 1:
            batch = batch.shard(parallel.data_rank, parallel.data_size)
        loss: StepLoss = step.gradients(batch)
        clip = step.clip(clipping, number)
        if number == 0:
            gradients = {name: weight.grad for name, weight in step.weights if weight.grad is not None}
            result.gradients = whole(parallel, gradients)
        step.update(0.01 * (number + 1), torch.zeros(()), clip.divisor)
        on_step(step)
        assert clip.largest is not None
        result.losses.append(loss.total.item())
        result.norms.append(clip.norm.item())
        result.largest.append(clip.largest.item())
        result.clipped.append(bool(clip.clipped))
    result.weights = whole(parallel, {name: weight.detach() for name, weight in parallel.weights()})
    return result


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference, relative to the largest element of its tensor."""
    assert found.keys() == expected.keys()
    return max(
        float((found[name] - tensor).abs().max() / tensor.abs().max().clamp(min=1e-8))
        for name, tensor in expected.items()
    )


def worst_norm(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest norm of a difference, relative to that of its tensor.

    Adam makes a single gradient that is nearly 0, its rounding included, as large as any other.
    """
    assert found.keys() == expected.keys()
    return max(float((found[name] - tensor).norm() / tensor.norm()) for name, tensor in expected.items())


def share_apart(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The share of elements that differ by more than 1e-5 of the largest of their tensor."""
    apart = [(found[name] - tensor).abs() > 1e-5 * tensor.abs().max() for name, tensor in expected.items()]
    return float(torch.cat([each.flatten() for each in apart]).float().mean())


def compare(
    world: World, mode: str, values: dict[str, Any], options: dict[str, Any] | None = None
) -> dict[str, float | bool]:
    """The differences of a run of these ranks from the same run of one process, relative."""
    setting = Setting(**values)

    one, unit = (make_unit(setting.kind, recomputation=setting.recomputation) for _ in range(2))
    alone = run(Parallel(one), setting)
    shared = run(share(unit, world, mode, **(options or {})), setting)
    numbers = {
        name: max(abs(a - b) / max(abs(b), 1e-8) for a, b in zip(found, expected, strict=True))
        for name, found, expected in (
            ("loss", shared.losses, alone.losses), ("norm", shared.norms, alone.norms),
            ("largest", shared.largest, alone.largest),
        )
    }  # fmt: skip
    own = [*shared.losses, *shared.norms, *shared.largest, *(float(w.sum()) for w in shared.weights.values())]
    return {
        **numbers,
        "clipped": shared.clipped == alone.clipped,
        "gradients": worst(shared.gradients, alone.gradients),
        "weights": worst_norm(shared.weights, alone.weights),
        "apart": share_apart(shared.weights, alone.weights),
        "same": all(other == own for other in world.gather(own)),
    }
