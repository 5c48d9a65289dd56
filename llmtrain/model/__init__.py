"""Language models: single-device modules, built without data and initialised in place."""

import dataclasses
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmtrain.base.named_generators import NamedGenerators
from llmtrain.base.options import Option
from llmtrain.model.layers.attention import segment_starts
from llmtrain.model.layers.kv_cache import KVCache
from llmtrain.model.layers.norms import autocast_dtype, lower_norms
from llmtrain.model.layers.sequence_part import SequencePart
from llmtrain.model.layers.skip_init import SkipInitMode

MAX_VARIANTS = 64  # of a compiled block: one for each shape, with and without gradients


class LanguageModel(nn.Module, ABC):
    """A language model: the contract with the rest of the program.

    The vocabulary is padded inside to a multiple of 64 for the matrix kernels.  The padding is not visible outside: the
    state dict holds ``vocab_size`` rows, :meth:`num_parameters` does not count the rest, and padded
    logits are ``-inf``, so that they have no probability and no gradient.
    """

    vocab_size: int
    padded_vocab_size: int
    padded_weights: tuple[str, ...] = ()  # the parameters whose first dimension is the padded vocabulary
    context_length: int
    num_layers: int
    blocks: nn.ModuleList  # alike, one after the other; recomputed in backward one at a time
    # run in place of ``blocks`` where there is no cache, once they have been compiled: one by one, or in one graph
    compiled_blocks: Sequence[Callable[..., Tensor]] | None = None
    compiled_stack: Callable[[Tensor, Sequence[tuple[Any, ...]]], Tensor] | None = None
    logit_bias: Tensor | None  # a buffer, see :attr:`head_bias`
    logit_softcap: float | None  # logits are capped smoothly to within this: cap * tanh(logits / cap)
    has_low_residual = False  # see :meth:`lower_residual`
    takes_part: ClassVar[bool] = False  # True: :meth:`hidden` reads ``part``
    part: SequencePart | None = None  # the positions that ``ids`` without a cache are of; None: from 0 on

    @abstractmethod
    def hidden(self, ids: Tensor, cache: KVCache | None = None, segments: Tensor | None = None) -> Tensor:
        """Final hidden states ``(batch, sequence, hidden)`` of ``ids`` ``(batch, sequence)``, normed.

        With a ``cache``, ``ids`` continue the sequences that the cache holds.  ``segments``, the shape of ``ids``, are
        the numbers of examples that share a row, each one's tokens in one piece: attention stays within an example, and
        positions begin anew with each.  Padding, on the right, needs none: no earlier token attends to it.

        With a :attr:`part`, ``ids`` are those of its positions, and ``segments`` those of whole sequences.
        """

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """The input ``(batch, sequence, hidden)`` of the first block, for :meth:`hidden`.

        ``positions`` of the tokens ``ids``: ``(sequence,)``, or ``(batch, sequence)`` where examples share a row.  A
        model that has this can be cut between its blocks: a later stage takes what an earlier one gives in its place.
        """
        raise NotImplementedError

    def token_positions(
        self, ids: Tensor, cache: KVCache | None, segments: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The positions ``(sequence,)`` of ``ids``, and those where each token's segment begins, for :meth:`hidden`."""
        length, device = ids.shape[1], ids.device
        starts = None if segments is None else segment_starts(segments)
        if cache is not None:
            return cache.positions(length, device), starts
        if self.part is None:
            return torch.arange(length, device=device), starts
        positions = self.part.positions(length, device)
        return positions, None if starts is None else starts[:, positions]

    @property
    @abstractmethod
    def head_weight(self) -> Tensor:
        """The output layer's matrix ``(padded_vocab_size, hidden)``."""

    @property
    def head_bias(self) -> Tensor | None:
        """The output layer's bias ``(padded_vocab_size,)``: ``-inf`` for the padding; None where nothing is padded."""
        return self.logit_bias

    def lower_residual(self) -> None:
        """Compute the residual stream and the norms in autocast's dtype from now on; without autocast as before."""
        self.has_low_residual = True
        lower_norms(self.modules())

    def residual_stream(self, embedded: Tensor) -> Tensor:
        """Return the input of the first block: the embeddings ``(batch, sequence, hidden)`` in the stream's dtype."""
        low = autocast_dtype(embedded) if self.has_low_residual else None
        return embedded if low is None else embedded.to(low)

    def compile_blocks(self, *, as_one: bool = False) -> None:
        """Run the blocks compiled from now on, except with a cache and within :meth:`eager`.

        One compilation serves all: they are alike, so that the time does not depend on the depth.  With ``as_one`` they
        are compiled into one graph, whose kernels reach from a block into the next, in a time that grows with the
        depth; running it raises an error of torch's if a block cannot be traced as a whole.
        """
        allow_variants()
        if as_one:
            self.compiled_stack = torch.compile(self._run_uncompiled, dynamic=False, fullgraph=True)
        else:
            self.compiled_blocks = [torch.compile(block, dynamic=False) for block in self.blocks]

    def undo_compilation(self) -> None:
        """Run the blocks uncompiled from now on."""
        self.compiled_blocks = self.compiled_stack = None

    @contextmanager
    def eager(self) -> Iterator[None]:
        """Run the blocks uncompiled within the context."""
        compiled = self.compiled_blocks, self.compiled_stack
        self.undo_compilation()
        try:
            yield
        finally:
            self.compiled_blocks, self.compiled_stack = compiled

    def run_blocks(self, x: Tensor, arguments: Sequence[tuple[Any, ...]]) -> Tensor:
        """Run the blocks on ``x`` ``(batch, sequence, hidden)``, compiled where they have been; for :meth:`hidden`.

        ``arguments`` of each block: those after ``x``, without a cache.
        """
        if self.compiled_stack is not None:
            return self.compiled_stack(x, arguments)
        if self.compiled_blocks is None:
            return self._run_uncompiled(x, arguments)
        for block, more in zip(self.compiled_blocks, arguments, strict=True):
            x = block(x, *more)
        return x

    def _run_uncompiled(self, x: Tensor, arguments: Sequence[tuple[Any, ...]]) -> Tensor:
        for block, more in zip(self.blocks, arguments, strict=True):
            x = block(x, *more)
        return x

    def forward(self, ids: Tensor, cache: KVCache | None = None, segments: Tensor | None = None) -> Tensor:
        """Logits ``(batch, sequence, padded_vocab_size)`` for the token after each of ``ids`` ``(batch, sequence)``.

        ``cache`` and ``segments`` as for :meth:`hidden`.
        """
        return self.logits(self.hidden(ids, cache, segments))

    def logits(self, hidden: Tensor) -> Tensor:
        """The output layer, for a few tokens: ``(…, hidden)`` to ``(…, padded_vocab_size)``.

        A training loss comes from ``hidden`` without the logits of all tokens.
        """
        if self.logit_softcap is None:
            return F.linear(hidden, self.head_weight, self.head_bias)
        capped = self.logit_softcap * torch.tanh(F.linear(hidden, self.head_weight) / self.logit_softcap)
        return capped if self.head_bias is None else capped + self.head_bias

    @abstractmethod
    def fill(self, name: str, whole: Tensor, generator: torch.Generator) -> None:
        """Fill ``whole``, of the shape of the whole parameter ``name``, with its initial values: 0 for the padding.

        The model itself may be on the meta device, or hold parts of its parameters.
        """

    def set_buffers(self, device: torch.device) -> None:
        """Set the buffers, which follow from the configuration, on ``device``."""

    @torch.no_grad()
    def initialise(self, generators: NamedGenerators) -> None:
        """Fill every parameter in place with its initial values."""
        for name, parameter in self.named_parameters():
            self.fill(name, parameter, generators.of(name, parameter.device))

    @abstractmethod
    def new_cache(self, batch_size: int, dtype: torch.dtype) -> KVCache:
        """An empty key-value cache for ``context_length`` tokens."""

    def can_fix_shapes(self, length: int) -> bool:
        """Return whether a forward pass takes positions and mask from :attr:`KVCache.fixed`, up to ``length`` tokens.

        Then a GPU repeats the pass of one token without the host's work for each of its kernels.
        """
        return False

    def layer_index(self, name: str) -> int:
        """Depth of the parameter ``name``: 0 embeddings, i + 1 block i, ``num_layers + 1`` final norm and head."""
        if match := re.match(r"blocks\.(\d+)\.", name):
            return int(match[1]) + 1
        return 0 if "embedding" in name else self.num_layers + 1

    def num_parameters(self) -> int:
        """Parameters, shared ones once, vocabulary padding not counted."""
        return sum(self.parameters_by_part().values())

    @abstractmethod
    def parameters_by_part(self) -> dict[str, int]:
        """The same count split into named parts."""

    @abstractmethod
    def attention_flops(self, layer: int, sequence_length: int) -> int:
        """Floating-point operations of the two attention products of ``layer`` for one token, forward."""

    def flops_per_token(self, sequence_length: int, *, has_output: bool = True) -> int:
        """Floating-point operations of forward and backward for one token, with the weights that are trained now.

        Without ``has_output`` the output layer is not used: another head reads the hidden states.

        ``6 N + 12 layers hidden sequence`` where all are: N parameters in matrix products (2 forward, 4 backward each)
        and the two attention products (Kaplan et al. 2020; Chowdhery et al. 2022, appendix B).  A frozen matrix has no
        gradient of its own, which leaves 4, and layers before the first trained one have no backward pass: 2.
        """
        trained = [name for name, parameter in self.named_parameters() if parameter.requires_grad]
        top = self.num_layers + 1
        reached = min(map(self.layer_index, trained), default=top)  # the depth that gradients go back to
        parameters = dict(self.named_parameters())
        head = "head.weight" if "head.weight" in parameters else "token_embedding.weight"
        total = 0
        for name, parameter in parameters.items():
            is_head = has_output and name == head
            depth = top if is_head else self.layer_index(name)
            is_looked_up = depth == 0 and not name.endswith("lora_B")
            if is_looked_up or (name == "head.weight" and not has_output):
                continue
            rows = self.vocab_size if is_head else len(parameter)  # padding is not counted
            products = 2 + 2 * (depth >= reached) + 2 * parameter.requires_grad
            total += products * parameter.numel() // len(parameter) * rows
        for layer in range(self.num_layers):
            total += self.attention_flops(layer, sequence_length) * (3 if layer + 1 >= reached else 1)
        return total

    def outer_adapters(self) -> dict[str, int]:
        """The part of :meth:`parameters_by_part` that are adapters of embeddings and output layer, if there are any."""
        adapters = [p for name, p in self.named_parameters() if "lora_" in name and not name.startswith("blocks.")]
        return {"adapters of embeddings and head": sum(p.numel() for p in adapters)} if adapters else {}


class ModelConfig(Option, ABC):
    """Contract of ``model=...``."""

    context_length: int
    vocab_size: int | None  # None: the tokenizer's

    def check(self, *sizes: str) -> None:
        """Raise ValueError unless the keys ``sizes``, and those that all models of ours have, are in range."""
        values = vars(self)
        for key in sizes:
            if values[key] is not None and values[key] < 1:
                raise ValueError(f"{key}={values[key]}: must be at least 1")
        if self.vocab_size is not None and self.vocab_size < 1:
            raise ValueError(f"vocab_size={self.vocab_size}: must be at least 1, or null for the tokenizer's")
        if not 0.0 <= values["dropout"] < 1.0:
            raise ValueError(f"dropout={values['dropout']}: must be at least 0 and below 1")
        if values["logit_softcap"] is not None and not 0 < values["logit_softcap"] < math.inf:
            raise ValueError(f"logit_softcap={values['logit_softcap']}: must be above 0, or null for none")

    @abstractmethod
    def build(self, vocab_size: int) -> LanguageModel:
        """Construct the module for ``vocab_size`` tokens on torch's current default device."""

    def create(
        self, vocab_size: int, device: torch.device, generators: NamedGenerators | None, num_layers: int | None = None
    ) -> LanguageModel:
        """Allocate on ``device``, initialise there; nothing is filled twice.  ``num_layers``: blocks (None: all).

        Without ``generators`` the parameters have no values yet.
        """
        config: Any = self if num_layers is None else dataclasses.replace(self, num_layers=num_layers)  # type: ignore
        with torch.device(device), SkipInitMode():
            model: LanguageModel = config.build(vocab_size)
        if device.type != "meta":
            model.set_buffers(device)
            if generators is not None:
                model.initialise(generators)
        return model


def head_matrix(head: nn.Module) -> Tensor:
    """The matrix that an output layer multiplies by: its ``weight``, with an adapter its ``adapted_weight``."""
    name = "adapted_weight" if hasattr(type(head), "adapted_weight") else "weight"
    matrix: Tensor = getattr(head, name)
    return matrix


def allow_variants() -> None:
    """Have torch's compiler make a variant for each of the few shapes, where it would give up after eight."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_VARIANTS)


def nearest_divisor(number: int, wanted: int) -> int:
    return min((n for n in range(1, number + 1) if number % n == 0), key=lambda n: abs(n - wanted))
