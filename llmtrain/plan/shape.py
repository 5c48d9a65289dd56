"""The sizes of a transformer that time and memory follow from, without building it."""

from dataclasses import dataclass
from enum import Enum

from llmtrain.model import ModelConfig
from llmtrain.model.gpt import GPTConfig
from llmtrain.model.llama import LlamaConfig


class Split(Enum):
    """The side of a matrix that tensor parallelism divides."""

    outputs = "outputs"  # column-wise: each rank computes some of the results
    inputs = "inputs"  # row-wise: the ranks' results are added up


@dataclass(frozen=True)
class Matrix:
    """A weight matrix of a block."""

    inputs: int
    outputs: int
    split: Split

    @property
    def parameters(self) -> int:
        """The number of its elements."""
        return self.inputs * self.outputs

    def on_rank(self, tensor: int) -> tuple[int, int]:
        """The inputs and outputs of the part that one of ``tensor`` ranks holds."""
        if self.split is Split.inputs:
            return self.inputs // tensor, self.outputs
        return self.inputs, self.outputs // tensor


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder with equal blocks."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    intermediate_size: int
    is_gated: bool  # three matrices in the feed-forward network, not two
    vocab_size: int
    is_tied: bool  # one matrix for embedding and output layer
    block_vectors: int  # elements of norms and biases in a block
    outer_vectors: int  # the same outside of the blocks, and position embeddings

    @property
    def query_size(self) -> int:
        """Channels of all queries."""
        return self.num_heads * self.head_size

    @property
    def key_size(self) -> int:
        """Channels of all keys, and of all values."""
        return self.num_kv_heads * self.head_size

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """The matrices of a block in the order of their products."""
        hidden, inner = self.hidden_size, self.intermediate_size
        attention = (
            Matrix(hidden, self.query_size, Split.outputs), Matrix(hidden, self.key_size, Split.outputs),
            Matrix(hidden, self.key_size, Split.outputs), Matrix(self.query_size, hidden, Split.inputs),
        )  # fmt: skip
        into = (Matrix(hidden, inner, Split.outputs),) * (2 if self.is_gated else 1)
        return (*attention, *into, Matrix(inner, hidden, Split.inputs))

    @property
    def block_matrix_parameters(self) -> int:
        """Elements of the matrices of a block."""
        return sum(matrix.parameters for matrix in self.matrices)

    @property
    def block_parameters(self) -> int:
        """Parameters of a block."""
        return self.block_matrix_parameters + self.block_vectors

    @property
    def embedding_parameters(self) -> int:
        """Elements of the token embedding, and of the output layer."""
        return self.vocab_size * self.hidden_size

    @property
    def outer_parameters(self) -> int:
        """Parameters outside of the blocks."""
        return self.embedding_parameters * (1 if self.is_tied else 2) + self.outer_vectors

    @property
    def num_parameters(self) -> int:
        """All parameters."""
        return self.num_layers * self.block_parameters + self.outer_parameters

    def flops_per_token(self, sequence_length: int) -> int:
        """Operations of forward and backward a token as MFU counts them: 6 N, and attention over the whole sequence."""
        products = self.num_layers * self.block_matrix_parameters + self.embedding_parameters
        return 6 * products + 12 * self.num_layers * self.query_size * sequence_length


def shape_of(config: ModelConfig, vocab_size: int) -> Shape:
    """Read the sizes off the config of a model.  Raises ValueError for a model without equal blocks of known parts."""
    if isinstance(config, GPTConfig):
        hidden = config.hidden_size
        biases = 3 * hidden * config.qkv_bias + hidden + 4 * hidden + hidden
        return Shape(
            config.num_layers, hidden, config.num_heads, config.num_heads, hidden // config.num_heads, 4 * hidden,
            False, vocab_size, config.tie_embeddings, 4 * hidden + biases, (config.context_length + 2) * hidden,
        )  # fmt: skip
    if isinstance(config, LlamaConfig):
        hidden, inner, head = config.hidden_size, config.intermediate_size, config.size_of_head
        queries, keys = config.num_heads * head, config.num_kv_heads * head
        biases = (queries + 2 * keys) * config.qkv_bias + hidden * config.output_bias
        biases += (2 * inner + hidden) * config.mlp_bias + 2 * head * config.qk_norm
        return Shape(
            config.num_layers, hidden, config.num_heads, config.num_kv_heads, head, inner,
            True, vocab_size, config.tie_embeddings, 2 * hidden + biases, hidden,
        )  # fmt: skip
    name = type(config).__name__
    raise ValueError(f"model: a plan for several devices knows GPT and Llama, not {name}; plan it for one device")
