"""The time of a training step on a cluster: computation, communication, how much of it is hidden, the bubble.

Pure functions of sizes and rates.  A step is a sum over micro-batches, blocks and the parts below; communication of
sharded data parallelism runs beside the computation of a block and shows where it takes longer.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from llmtrain.plan.links import Links
from llmtrain.plan.mesh import Mesh
from llmtrain.plan.program import Program, Recomputation, Work
from llmtrain.plan.rates import ATTENTION_BACKWARD, RATES, Rates
from llmtrain.plan.shape import Shape

ACTIVATION_BYTES = 2  # of an element between two products: bf16
# Reads and writes of the operations between the products of a block in its forward pass, in tensors of the size named.
# Two norms read the stream between the blocks and write their result; two additions read the stream and a result, and
# write the stream; one of the two is joined with the norm behind it.  Then rotation of queries and keys, and the
# activation.
STREAM_PASSES, HIDDEN_PASSES = 5, 3
ROTATION_PASSES = 2
GATED_PASSES, PLAIN_PASSES = 3, 2
BACKWARD_PASSES = 2  # of the backward pass, relative to forward
LOGIT_PASSES = 8  # over the logits in bf16: written, read for the largest, the sum and the gradient, and read twice


@dataclass(frozen=True)
class Engine:
    """The rates of one GPU."""

    products: float  # FLOP/s of large matrix products, reached
    attention: float  # FLOP/s of attention, reached
    bandwidth: float  # bytes a second of the memory
    power: float = 1.0  # power limit relative to full power


@dataclass(frozen=True)
class StepTime:
    """The time of a step, in seconds, by part; the parts add up to the whole."""

    parts: Mapping[str, float]
    hidden: float  # communication beside computation, not part of the sum
    bubble_share: float  # of the time of forward and backward passes

    @property
    def seconds(self) -> float:
        """The whole step."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Passes:
    """The seconds of a forward pass, of what is computed again, and of a backward pass."""

    forward: float
    again: float
    backward: float

    @property
    def total(self) -> float:
        """All three."""
        return self.forward + self.again + self.backward

    def __add__(self, other: "Passes") -> "Passes":
        return Passes(self.forward + other.forward, self.again + other.again, self.backward + other.backward)


def step_time(
    shape: Shape, mesh: Mesh, work: Work, program: Program, engine: Engine, links: Links, rates: Rates = RATES
) -> StepTime:
    """Estimate the time of a step of ``work`` on the slowest rank."""
    layers = math.ceil(shape.num_layers / mesh.pipeline)
    block = block_seconds(shape, mesh.tensor, work, program, engine, rates)
    head = head_seconds(shape, mesh.tensor, work, program, engine, rates)
    tensor = tensor_seconds(shape, mesh, work, program, links)
    context = context_seconds(shape, mesh, work, program, links)
    gather, reduce = gather_seconds(shape.block_parameters, mesh, program, links), 0.0
    sharded = mesh.weight_parts > 1
    if sharded:
        reduce = links.scatter_seconds(shape.block_parameters / mesh.tensor * program.reduce_bytes, mesh.shard_group)
    reductions = work.micro_batches if program.reduces_every_micro_batch else 1
    # Communication of a block beside its computation, forward and backward.
    computing = block + tensor + context
    regathers = gather if program.reshards else 0.0
    backward = computing.again + computing.backward
    forward_shown = max(0.0, gather - computing.forward)
    plain = max(0.0, regathers - backward)
    reducing = max(0.0, regathers + reduce - backward)
    shown = layers * (
        work.micro_batches * forward_shown + (work.micro_batches - reductions) * plain + reductions * reducing
    )
    moved = layers * (work.micro_batches * (gather + regathers) + reductions * reduce)
    # Before the first block and behind the last one nothing is computed.
    outer = shape.outer_parameters / max(1, min(2, mesh.pipeline))
    edges = 0.0
    if sharded:
        outer_bytes = outer / mesh.tensor
        edges = work.micro_batches * (
            gather + links.scatter_seconds(outer_bytes * program.gather_bytes, mesh.shard_group)
        )
        edges += reductions * (reduce + links.scatter_seconds(outer_bytes * program.reduce_bytes, mesh.shard_group))
    # Gradients of replicas: beside the last backward pass.
    held = (layers * shape.block_parameters + outer) / mesh.tensor / mesh.weight_parts
    replicas = links.reduce_seconds(held * program.reduce_bytes, mesh.replicate_group)
    beside = layers * backward
    replicas_shown = max(0.0, replicas - max(0.0, beside - layers * (regathers + reduce)))
    if program.exchange_every is not None:  # of weights, on average: nothing is computed meanwhile
        replicas_shown = replicas = replicas / program.exchange_every
    hidden = max(0.0, moved - shown) + replicas - replicas_shown

    stage = layers * computing.total + head.total
    passes = work.micro_batches * stage
    share = bubble_share(mesh.pipeline, work.micro_batches, program.stages_per_rank, program.schedule)
    bubble = passes * share / (1 - share)
    sent = work.tokens * shape.hidden_size * program.residual_bytes / mesh.tensor
    crossings = 2 * program.stages_per_rank * (work.micro_batches + mesh.pipeline - 1) if mesh.pipeline > 1 else 0
    pipeline = crossings * links.send_seconds(sent, mesh.pipeline_group)
    parts = {
        "forward": work.micro_batches * (layers * block.forward + head.forward),
        "recomputation": work.micro_batches * layers * block.again,
        "backward": work.micro_batches * (layers * block.backward + head.backward),
        "optimizer": held * program.optimizer_traffic / (engine.bandwidth * rates.bandwidth_share),
        "shards": shown + edges,
        "replicas": replicas_shown,
        "tensor": work.micro_batches * layers * tensor.total,
        "context": work.micro_batches * layers * context.total,
        "pipeline": pipeline,
        "bubble": bubble,
        "contention": rates.contention * hidden,
    }
    if program.gathers_logits and mesh.tensor > 1:
        gathered = work.tokens * shape.vocab_size * ACTIVATION_BYTES
        parts["tensor"] += work.micro_batches * links.scatter_seconds(gathered, mesh.tensor_group)
    hosts = math.ceil(mesh.devices / links.gpus_per_host)
    parts["waiting"] = rates.jitter * math.log2(hosts) * sum(parts.values())
    return StepTime(parts, hidden, share)


def bubble_share(stages: int, micro_batches: int, stages_per_rank: int = 1, schedule: str = "1f1b") -> float:
    """The share of a step's passes in which a rank of a pipeline waits (Narayanan et al. 2021, section 2.2).

    With ``zero_bubble`` the half of the backward pass that nobody waits for fills two thirds of it (Qi et al. 2023,
    https://arxiv.org/abs/2401.10241, ZB-H1).
    """
    idle = (stages - 1) / stages_per_rank * (1 / 3 if schedule == "zero_bubble" else 1)
    return idle / (micro_batches + idle)


def block_seconds(shape: Shape, tensor: int, work: Work, program: Program, engine: Engine, rates: Rates) -> Passes:
    """The computation of a block on one of ``tensor`` ranks for a micro-batch."""
    power = engine.power**rates.power_exponent
    products = [
        product_seconds(work.tokens, *matrix.on_rank(tensor), engine.products * power, rates)
        for matrix in shape.matrices
    ]
    # A query sees half of the keys on average, and the kernels leave out the rest.
    attention = 2 * work.tokens * work.sequence_length * shape.query_size / tensor / (engine.attention * power)
    moved = (
        elementwise_bytes(shape, program.residual_bytes)
        / tensor
        * work.tokens
        * (1.0 if program.is_compiled else rates.eager_traffic)
    )
    between = moved / (engine.bandwidth * rates.bandwidth_share)
    forward = sum(products) + attention + between
    again = {
        Recomputation.none: 0.0,
        Recomputation.selective: between,
        Recomputation.alternate: between + sum(products[1::2]),
        Recomputation.full: forward,
    }[program.recomputation]
    backward = 2 * sum(products) + ATTENTION_BACKWARD * attention + BACKWARD_PASSES * between
    return Passes(forward, program.recomputed_share * again, backward)


def head_seconds(shape: Shape, tensor: int, work: Work, program: Program, engine: Engine, rates: Rates) -> Passes:
    """The computation of the output layer and the loss for a micro-batch."""
    power = engine.power**rates.power_exponent
    rows = shape.vocab_size // tensor
    product = product_seconds(work.tokens, shape.hidden_size, rows, engine.products * power, rates)
    rows = shape.vocab_size if program.gathers_logits else rows
    moved = work.tokens * rows * LOGIT_PASSES * ACTIVATION_BYTES * (1.0 if program.is_compiled else rates.eager_traffic)
    between = moved / (engine.bandwidth * rates.bandwidth_share)
    return Passes(product + between / 2, 0.0, 2 * product + between / 2)


def product_seconds(rows: int, inputs: int, outputs: int, rate: float, rates: Rates) -> float:
    """The time of a matrix product; one of its two backward products takes as long, as it has the same dimensions."""
    size = rates.product_size
    share = math.prod(dimension / (dimension + size) for dimension in (rows, inputs, outputs))
    return 2 * rows * inputs * outputs / (rate * share)


def elementwise_bytes(shape: Shape, residual_bytes: float) -> float:
    """Bytes that the operations between the products of a block read and write for a token, forward."""
    stream = STREAM_PASSES * shape.hidden_size * residual_bytes
    inner = (GATED_PASSES if shape.is_gated else PLAIN_PASSES) * shape.intermediate_size
    rotated = ROTATION_PASSES * (shape.query_size + shape.key_size)
    return stream + ACTIVATION_BYTES * (HIDDEN_PASSES * shape.hidden_size + rotated + inner)


def gather_seconds(parameters: int, mesh: Mesh, program: Program, links: Links) -> float:
    """The time to gather the weights of a block from the ranks that share them."""
    return links.scatter_seconds(parameters / mesh.tensor * program.gather_bytes, mesh.shard_group)


def tensor_bytes(shape: Shape, work: Work) -> int:
    """Bytes of the hidden states of a micro-batch, which tensor parallelism gathers and scatters."""
    return work.tokens * shape.hidden_size * ACTIVATION_BYTES


def tensor_seconds(shape: Shape, mesh: Mesh, work: Work, program: Program, links: Links) -> Passes:
    """The communication of tensor parallelism in a block for a micro-batch; computation waits for it.

    The two halves of a block gather their input and scatter their output (Korthikanti et al. 2022, section 4.2.2); in
    backward each is the other.
    """
    once = links.scatter_seconds(tensor_bytes(shape, work), mesh.tensor_group)
    forward = (program.block_gathers + 2) * once
    again = forward if program.recomputation is Recomputation.full else 0.0
    return Passes(forward, program.recomputed_share * again, forward)


def context_seconds(shape: Shape, mesh: Mesh, work: Work, program: Program, links: Links) -> Passes:
    """The communication of ranks that share positions in a block for a micro-batch; attention waits for it.

    Keys and values are gathered, and their gradients reduced and scattered (Llama Team 2024, section 3.3.2).
    """
    keys = 2 * work.seen_tokens * shape.key_size / mesh.tensor * ACTIVATION_BYTES
    once = links.scatter_seconds(keys, mesh.context_group)
    again = 0.0 if program.recomputation is Recomputation.none else once
    return Passes(once, program.recomputed_share * again, once)
