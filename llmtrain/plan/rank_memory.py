"""The memory of a rank of a cluster by category."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from llmtrain.plan.mesh import Mesh
from llmtrain.plan.program import Program, Recomputation, Work
from llmtrain.plan.shape import Shape

LOW = 2  # bytes of an element in bf16
GATHERED_BLOCKS = 2  # the block that is computed and the one that is gathered ahead


@dataclass(frozen=True)
class RankMemory:
    """The bytes of the rank that needs most, by category."""

    parts: Mapping[str, int]

    @property
    def peak(self) -> int:
        """Bytes of tensors at the peak."""
        return sum(self.parts.values())


def rank_memory(shape: Shape, mesh: Mesh, work: Work, program: Program) -> RankMemory:
    """Estimate the memory of the rank that needs most: one of the first stage, or of the last with the logits."""
    stages = range(mesh.pipeline) if mesh.pipeline <= 2 else (0, 1, mesh.pipeline - 1)
    return max((_of_stage(shape, mesh, work, program, stage) for stage in stages), key=lambda memory: memory.peak)


def _of_stage(shape: Shape, mesh: Mesh, work: Work, program: Program, stage: int) -> RankMemory:
    layers = math.ceil(shape.num_layers / mesh.pipeline)
    is_first, is_last = stage == 0, stage == mesh.pipeline - 1
    outer = outer_on_rank(shape, mesh, program, is_first=is_first, is_last=is_last)
    block = shape.block_matrix_parameters / mesh.tensor + shape.block_vectors
    held = layers * block + outer  # parameters, of all ranks that share them
    own = held / mesh.weight_parts
    outer_state = program.state_bytes if program.outer_state_bytes is None else program.outer_state_bytes
    adds_up = work.micro_batches > 1 and not program.reduces_every_micro_batch and mesh.weight_parts > 1
    # FSDP2 adds up whole gradients in the type of their exchange (``to_accumulated_grad_if_needed`` in torch).
    gradients = held * program.reduce_bytes if adds_up else own * program.gradient_bytes
    if mesh.weight_parts == 1 and program.holds_new_gradients:
        gradients += held * program.gradient_bytes
    gathered = 0.0
    if mesh.weight_parts > 1:
        at_once = min(GATHERED_BLOCKS, layers) if program.reshards else layers
        gathered = (at_once * block + outer) * program.gather_bytes
        gathered += block * (program.gather_bytes + program.reduce_bytes)  # a gradient, and as it is sent
    # Casts live as long as the weights that they are of: where those are not gathered again, for the whole step; else
    # products keep them for backward, unless the block is computed again.
    casts = held if mesh.weight_parts == 1 else min(layers, 1 + layers * _share_kept(program)) * block + outer
    in_flight = min(work.micro_batches, program.in_flight or mesh.pipeline - stage)
    kept = kept_bytes(shape, program) / mesh.tensor * work.tokens
    working = working_bytes(shape, program) / mesh.tensor * work.tokens
    if work.context > 1:  # keys and values of the other positions, which attention keeps
        gathered_keys = 2 * shape.key_size * LOW / mesh.tensor * (work.seen_tokens - work.tokens)
        kept += gathered_keys * _share_kept(program)
        working += gathered_keys
    logits = 0.0
    if is_last:
        rows = shape.vocab_size if program.gathers_logits else shape.vocab_size / mesh.tensor
        logits = min(work.tokens, program.logit_chunk or work.tokens) * rows * program.logit_bytes
    parts = {
        "weights": own * program.weight_bytes,
        "optimizer": (layers * block * program.state_bytes + outer * outer_state) / mesh.weight_parts,
        "gradients": gradients,
        "gathered": gathered,
        "casts": casts * program.cast_bytes,
        "activations": in_flight * layers * kept,
        "logits": logits,
        "temporary": max(0.0, working - logits),  # a block computed again; the logits have been freed by then
    }
    return RankMemory({name: round(value) for name, value in parts.items()})


def _share_kept(program: Program) -> float:
    """The share of the blocks that are not computed again."""
    is_kept = program.recomputation is Recomputation.none
    return 1.0 if is_kept else 1.0 - program.recomputed_share


def outer_on_rank(shape: Shape, mesh: Mesh, program: Program, *, is_first: bool, is_last: bool) -> float:
    """Parameters outside of the blocks that a stage holds, before sharding."""
    embedding = shape.embedding_parameters
    result = 0.0
    if is_first:
        result += embedding / (mesh.tensor if program.splits_embedding else 1) + shape.outer_vectors
    if is_last and (not shape.is_tied or not is_first):
        result += embedding / mesh.tensor
    return result


def kept_bytes(shape: Shape, program: Program) -> float:
    """Bytes of a block that forward keeps for backward, for a token."""
    low = LOW * kept_elements(shape, program.recomputation)
    stream = program.residual_bytes * shape.hidden_size
    if program.recomputation is Recomputation.none:
        recomputed = low + 2 * stream
    elif program.recomputation is Recomputation.full:
        recomputed = stream
    else:
        recomputed = low + stream
    if program.recomputed_share == 1.0:
        return recomputed
    everything = LOW * kept_elements(shape, Recomputation.none) + 2 * stream
    return program.recomputed_share * recomputed + (1 - program.recomputed_share) * everything


def kept_elements(shape: Shape, recomputation: Recomputation) -> int:
    """Elements in bf16 of a block that forward keeps, for a token, without the stream between the blocks."""
    inner = shape.intermediate_size
    projected = [shape.query_size, shape.key_size, shape.key_size, shape.hidden_size]
    projected += [inner] * (2 if shape.is_gated else 1) + [shape.hidden_size]
    if recomputation is Recomputation.full:
        return 0
    if recomputation is Recomputation.alternate:
        return sum(projected[::2]) + shape.query_size
    if recomputation is Recomputation.selective:
        return sum(projected) + shape.query_size
    # Two normalised inputs, queries, keys and values, attention's result, and around the activation its input(s), the
    # factor that it makes, and its result.
    around = 4 if shape.is_gated else 2
    return 2 * shape.hidden_size + 2 * shape.query_size + 2 * shape.key_size + around * inner


def working_bytes(shape: Shape, program: Program) -> float:
    """Bytes of a block that exist while it is computed again and its gradients are computed, for a token."""
    everything = LOW * kept_elements(shape, Recomputation.none) + 2 * program.residual_bytes * shape.hidden_size
    kept = kept_bytes(shape, program)
    gradients = LOW * (2 * shape.intermediate_size + shape.hidden_size)
    return max(0.0, everything - kept) + gradients
