"""The settings of a training program that a cluster plan depends on: ours, or those of a published run."""

from dataclasses import dataclass
from enum import Enum


class Recomputation(Enum):
    """The part of a block's forward pass that is computed again in backward."""

    none = "none"
    selective = "selective"  # the cheap operations; the results of products and attention are kept
    alternate = "alternate"  # besides the cheap operations every second product, as torchtitan's "op"
    full = "full"  # of a block its input alone is kept


@dataclass(frozen=True)
class Program:
    """The types in which a program keeps and exchanges numbers, in bytes, and its order of work."""

    weight_bytes: float = 4  # of a parameter between two steps
    state_bytes: float = 8  # of optimizer state a parameter of a block
    outer_state_bytes: float | None = None  # of one outside of the blocks; None: the same
    gather_bytes: float = 2  # of a parameter as ranks exchange it
    cast_bytes: float = 0  # of a parameter as products read it, where it is a copy
    reduce_bytes: float = 4  # of a gradient as ranks exchange it
    gradient_bytes: float = 4  # of a gradient as the optimizer sees it
    residual_bytes: float = 2  # of an element of the stream between the blocks
    logit_bytes: float = 8  # of all tensors with a row of the vocabulary for each token, a logit, at their peak
    logit_chunk: int | None = None  # tokens whose logits exist at the same time; None: those of the micro-batch
    is_compiled: bool = True
    recomputation: Recomputation = Recomputation.none
    recomputed_share: float = 1.0  # of the blocks, to which ``recomputation`` applies
    reshards: bool = True  # blocks are gathered again for the backward pass
    reduces_every_micro_batch: bool = True  # False: whole gradients are added up until the last one
    holds_new_gradients: bool = False  # backward is one compiled graph, whose gradients are new tensors until its end
    block_gathers: int = 2  # of the hidden states in a block's forward pass under tensor parallelism
    gathers_logits: bool = False  # tensor parallelism: every rank computes the loss over the whole vocabulary
    splits_embedding: bool = True  # tensor parallelism: the embedding is divided too
    exchange_every: int | None = None  # steps between exchanges of replicas' weights; None: gradients, at every step
    optimizer_traffic: float = 32  # bytes that clipping and update read and write a parameter
    schedule: str = "1f1b"  # of the pipeline
    stages_per_rank: int = 1  # of the pipeline: more than 1 for interleaved schedules
    in_flight: int | None = None  # micro-batches whose activations the first stage holds; None: 1F1B, one a stage


@dataclass(frozen=True)
class Work:
    """The work of a step on one of the ranks that train on different sequences."""

    sequence_length: int
    micro_batch: int  # sequences of a forward pass
    micro_batches: int  # of a step
    context: int = 1  # ranks that share the positions of these sequences

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch whose positions this rank has."""
        return self.seen_tokens // self.context

    @property
    def seen_tokens(self) -> int:
        """Tokens of a micro-batch whose keys this rank sees: those of all ranks that share its positions."""
        return self.sequence_length * self.micro_batch
