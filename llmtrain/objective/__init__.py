"""Training objectives: the batches made of sequences, and the losses that a model is trained on.

An objective makes two things.  ``collate`` turns sequences into a :class:`Batch`, in the loader's thread.  ``build``
puts the model and the modules that the objective adds (such as a head) into one :class:`TrainingUnit`, whose call gives
the sums of the losses by name.  The step, the evaluation, the search for the worst sequences, the rehearsal and the
plan all call that unit and nothing else.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from llmtrain.base.named_generators import NamedGenerators
from llmtrain.base.options import Option
from llmtrain.data import IGNORE, Batch, Collate, Outline, Rows
from llmtrain.kernels.row_losses import VocabularyShare
from llmtrain.model import LanguageModel, allow_variants
from llmtrain.model.initial_values import InitialValues

MODEL = "model."  # prefix of the model's own parameters in a unit


class TrainingUnit(nn.Module, ABC):
    """A model with its heads: the module that is trained, evaluated, probed and planned.

    The children beside ``model`` are the modules that the objective adds.  In checkpoints, optimizer rules and messages
    a parameter has the name that :meth:`named_weights` gives: the model's own without a prefix.
    """

    model: LanguageModel
    has_base: bool  # True: frozen weights come from elsewhere; checkpoints hold the trained ones alone
    loss_weights: Mapping[str, float] = {}  # by the name of the loss; 1 for those that are not named
    uses_output_layer: ClassVar[bool] = True  # False: a forward pass does not use the model's output layer
    has_stages: ClassVar[bool] = False  # True: calls ``model.hidden`` of inputs and segments, and goes on from there

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model
        self.has_base = False
        self._graphed = False
        self._longest: int | None = None  # tokens of a row at most, where rows are padded for the compiler

    @abstractmethod
    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The **sum** of each loss over its valid targets, by name; fp32 (float64 for float64), 0-dimensional.

        The names are the same at every call: those of ``batch.counts``, by which the sums are divided.
        """

    def score(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor | None]:
        """The losses, as by a call, and a tensor of counts that an evaluation adds up over batches; None: no counts."""
        return self(batch), None

    def sequence_losses(self, batch: Batch) -> dict[str, Tensor]:
        """The sum of each loss over each sequence of ``batch`` alone, by name: ``(sequences,)``.

        This default calls the unit once a sequence; one that knows its losses by row does better.
        """
        alone = [self(batch.rows(number, number + 1)) for number in range(batch.sequences)]
        return {name: torch.stack([losses[name] for losses in alone]) for name in alone[0]}

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        if not self._graphed:
            return super().__call__(batch)
        torch.compiler.cudagraph_mark_step_begin()
        return {name: total.clone() for name, total in super().__call__(batch).items()}  # the graph reuses its memory

    # --- parameters -------------------------------------------------------------------------------------------------

    def named_weights(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every parameter once, by the name that it has in checkpoints."""
        for name, parameter in self.named_parameters():
            yield name.removeprefix(MODEL), parameter

    def trained_weights(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters that are trained."""
        return [(name, parameter) for name, parameter in self.named_weights() if parameter.requires_grad]

    @property
    def trained_names(self) -> list[str]:
        """The names of the parameters that are trained."""
        return [name for name, _ in self.trained_weights()]

    def weights_state(self) -> dict[str, Tensor]:
        """The state dict under the names that checkpoints have; vocabulary padding is left out."""
        return {name.removeprefix(MODEL): tensor for name, tensor in self.state_dict().items()}

    def saved_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """The buffers that checkpoints hold, by the names that they have there."""
        for prefix, module in self.named_modules():
            for name, buffer in module.named_buffers(prefix, recurse=False):
                if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                    yield name.removeprefix(MODEL), buffer

    def load_weights(self, tensors: Mapping[str, Tensor], *, strict: bool) -> None:
        """The inverse of :meth:`weights_state`; without ``strict`` tensors may be missing."""
        heads = self.heads
        state = {name if name.partition(".")[0] in heads else MODEL + name: value for name, value in tensors.items()}
        self.load_state_dict(state, strict=strict)

    @property
    def heads(self) -> dict[str, nn.Module]:
        """The modules that the objective adds, by name."""
        return {name: module for name, module in self.named_children() if name != MODEL.removesuffix(".")}

    def weight_module(self, name: str) -> nn.Module:
        """The module of that name, as :meth:`named_weights` names its parameters."""
        return self.get_submodule(name if name.partition(".")[0] in self.heads else MODEL + name)

    def source_of(self, name: str) -> InitialValues | LanguageModel | None:
        """The module that knows the initial values of the parameter ``name``; None: no module does."""
        path, _, key = name.rpartition(".")
        owner = self.weight_module(path) if path else self
        if isinstance(owner, InitialValues) and key in owner.filled:
            return owner
        return None if name.partition(".")[0] in self.heads or name in self._parameters else self.model

    def set_buffers(self, device: torch.device) -> None:
        """Set the buffers of the model and of the heads, which follow from the configuration, on ``device``."""
        self.model.set_buffers(device)
        for head in self.heads.values():
            for module in head.modules():
                if isinstance(module, InitialValues):
                    module.set_buffers(device)

    def count_parameters(self) -> tuple[int, int]:
        """The numbers of trained and of all parameters, with adapters and without vocabulary padding."""
        padding = self.model.padded_vocab_size - self.model.vocab_size
        sizes = {
            name: math.prod(parameter.shape[1:]) * (len(parameter) - padding * (name in self.model.padded_weights))
            for name, parameter in self.named_weights()
        }  # shared ones once
        return sum(sizes[name] for name, _ in self.trained_weights()), sum(sizes.values())

    @property
    def num_layers(self) -> int:
        """Blocks of the model."""
        return self.model.num_layers

    def layer_index(self, name: str) -> int:
        """Depth of a weight, see :meth:`LanguageModel.layer_index`; heads are on top."""
        return self.model.layer_index(name)

    def flops_per_token(self, sequence_length: int) -> int:
        """Floating-point operations for one token, see :meth:`LanguageModel.flops_per_token`."""
        return self.model.flops_per_token(sequence_length, has_output=self.uses_output_layer)

    # --- transformations --------------------------------------------------------------------------------------------

    def compile_blocks(self, *, as_one: bool = False, longest: int | None = None) -> None:
        """Compile the model's blocks, see :meth:`LanguageModel.compile_blocks`.

        ``longest``: tokens of a row at most, for data whose rows are of different lengths; None: all have the same.
        """
        self.model.compile_blocks(as_one=as_one)
        self._longest = longest

    def compile_whole(self, *, longest: int | None = None) -> None:
        """Compile the whole unit and launch its kernels as CUDA graphs, one for each shape."""
        allow_variants()
        self._graphed, self._longest = True, longest
        self.compile(dynamic=False, mode="reduce-overhead")

    def compile_loss(self) -> None:
        """On a GPU compute the loss with a compiled kernel from now on, where it can be compiled."""

    def share_vocabulary(self, share: VocabularyShare | None) -> None:
        """Compute the losses together with the processes of ``share`` from now on: the model holds rows of its head.

        None: alone again.  Called if the unit uses the output layer.  Raises ValueError if that is not supported.
        """
        raise ValueError(
            f"objective: {type(self).__name__} does not compute its losses from a part of the vocabulary, as tensor "
            "parallelism needs it; take distributed=fsdp"
        )

    def undo_compilation(self) -> None:
        """Run the model uncompiled from now on."""
        self.model.undo_compilation()
        self._graphed, self._compiled_call_impl, self._longest = False, None, None

    @contextmanager
    def eager(self) -> Iterator[None]:
        """Run uncompiled within the context, for batches with shapes that come once."""
        before = self._graphed, self._compiled_call_impl, self._longest
        self._graphed, self._compiled_call_impl, self._longest = False, None, None
        try:
            with self.model.eager():
                yield
        finally:
            self._graphed, self._compiled_call_impl, self._longest = before

    def forget_graphs(self) -> None:
        """Drop the CUDA graphs and their memory, for batches of another shape; a failed recording is not reused."""
        if self._graphed:
            torch.compiler.reset()

    def fit_shape(self, batch: Batch) -> Batch:
        """Pad the rows of ``batch`` to one of few lengths if the unit is compiled, once for each shape."""
        return batch if self._longest is None else batch.widen(self._longest)


def mean_losses(
    unit: TrainingUnit, batch: Batch, forward: Callable[[Batch], dict[str, Tensor]] | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The share of ``batch`` in the step's loss, and in each loss by name: sums divided by the step's counts.

    The shares of a step, however it is split, add up to the mean over its valid targets; without any, to 0.  A filler
    has shares of 0.  ``forward`` is called in place of ``unit``, where ranks share it.
    """
    parts = {name: total / (batch.counts[name] or 1) for name, total in (forward or unit)(batch).items()}
    if batch.is_filler:
        parts = {name: 0 * part for name, part in parts.items()}
    return weighted(parts, unit.loss_weights), parts


def weighted(parts: Mapping[str, Any], weights: Mapping[str, float]) -> Any:
    """The weighted sum of the losses ``parts``, which are numbers or tensors."""
    total = None
    for name, part in parts.items():
        weight = weights.get(name, 1.0)
        term = part if weight == 1.0 else weight * part
        total = term if total is None else total + term
    return total


class Objective(Option, ABC):
    """Contract of ``objective=...``."""

    takes: ClassVar[tuple[str, ...]] = ("text", "responses")  # the kinds of data (``DataConfig.gives``) that fit
    loss: ClassVar[str] = "next_token"  # the name of the loss that :meth:`collate` counts targets for
    generates: ClassVar[bool] = True  # True: the model is trained to write text, and is sampled
    sums_positions: ClassVar[bool] = False  # True: the loss is a sum over positions, each with inputs up to its own
    verb: ClassVar[str] = "generate"  # the command that uses the trained model

    def __init_subclass__(cls, **keywords: Any) -> None:
        """Refuse the methods of earlier versions, which nothing would call."""
        super().__init_subclass__(**keywords)
        for name in ("__call__", "attach", "score"):
            if name in cls.__dict__:
                raise ValueError(
                    f"{cls.__module__}.{cls.__qualname__}.{name}: is of an earlier version and would never be called; "
                    "an objective builds a training unit: def build(self, model, labels, generators, class_weights=())"
                )

    def collate(self, rows: Rows, positions: np.ndarray, seed: int) -> Batch:
        """Make a batch of ``rows``, the sequences at ``positions`` ``(rows,)`` of the training order.

        Pure, and called in the loader's thread.  Positions count over all epochs: draws from ``(seed, position)``
        differ from epoch to epoch and are repeated when a run is resumed.  This default takes the targets of the data.
        """
        tensors = {"inputs": torch.from_numpy(rows.inputs), "targets": torch.from_numpy(rows.targets)}
        if rows.segments is not None:
            tensors["segments"] = torch.from_numpy(rows.segments)
        counts = {self.loss: int(np.count_nonzero(rows.targets != IGNORE))}
        return Batch(tensors, counts, rows.tokens, rows.lengths_of(tensors))

    def count(self, outline: Outline, class_weights: Sequence[float] = ()) -> Mapping[str, float] | None:
        """The ``counts`` that :meth:`collate` finds in sequences with this ``outline``; None: only collating does.

        With them each of several ranks collates the sequences that it trains on alone.  So an objective that has a
        ``collate`` of its own, and counts here, promises that a row's tensors follow from the row and its position.
        """
        own = type(self)
        is_default = own.collate is Objective.collate and own.collator is Objective.collator
        return {self.loss: outline.targets} if is_default else None

    @property
    def is_likelihood(self) -> bool:
        """True if the loss is the mean of -log p of its targets, tokens of text: bits per byte follow from it."""
        return False

    def collator(self, class_weights: Sequence[float]) -> Collate:
        """:meth:`collate` for data whose classes have weights; (): all the same."""
        return self.collate

    @abstractmethod
    def build(
        self,
        model: LanguageModel,
        labels: Sequence[str],
        generators: NamedGenerators | None,
        class_weights: Sequence[float] = (),
    ) -> TrainingUnit:
        """Put ``model`` and the modules that the objective adds into a unit, and freeze weights that are not trained.

        Called after the weights are loaded, and before adapters are added.  ``labels`` are the data's classes,
        ``class_weights`` the weight of an example of each; (): all the same.  ``generators`` draw the initial values of
        what is added (:func:`llmtrain.model.initial_values.initialise_own`); None: it has no values yet.
        """

    def measures(self, counted: Tensor, labels: Sequence[str]) -> dict[str, Any]:
        """Entries of a metrics row that follow from the counts of :meth:`TrainingUnit.score`."""
        return {}

    def name_target(self, target: int, labels: Sequence[str]) -> str:
        """The class, or classes, of a target of a classifier."""
        return labels[target]
