"""The settings that determine a step, and building its parts on tensors without data."""

from collections.abc import Sequence
from dataclasses import dataclass

from llmtrain.activation_checkpointing import ActivationCheckpointing
from llmtrain.base.named_generators import NamedGenerators
from llmtrain.config.assemble import build_unit
from llmtrain.config.run_config import RunConfig
from llmtrain.precision import Precision
from llmtrain.train.step import Step, Timer


@dataclass(frozen=True)
class Blueprint:
    """The settings that determine one optimizer step.

    ``precision`` is the arithmetic of the device planned for, on the device that the step is traced on.
    """

    settings: RunConfig
    vocab_size: int
    precision: Precision
    batch_size: int  # sequences of the largest optimizer step
    micro_batch: int | None = None  # sequences of a forward pass; None: as in the settings
    labels: Sequence[str] = ()  # classes of the data

    @property
    def sequence_length(self) -> int:
        """Tokens of a sequence."""
        return self.settings.data.sequence_length

    @property
    def micro_batch_size(self) -> int:
        """Sequences of a forward pass."""
        return min(self.micro_batch or self.settings.accumulation.micro_batch_size, self.batch_size)

    @property
    def checkpointing(self) -> ActivationCheckpointing:
        """The option that decides which activations are kept for the backward pass."""
        return self.settings.activation_checkpointing

    @property
    def period(self) -> int:
        """The number of blocks after which their activation checkpointing repeats."""
        is_by_block = getattr(getattr(self.checkpointing, "by", None), "name", None) == "block"
        return getattr(self.checkpointing, "every", 1) if is_by_block else 1

    @property
    def num_layers(self) -> int | None:
        """Blocks of the model; None where its config has no such key."""
        return getattr(self.settings.model, "num_layers", None)

    def build(self, num_layers: int | None = None, *, timer: Timer | None = None) -> Step:
        """Build the step on the device of the precision, with ``num_layers`` blocks (None: all); within a fake mode."""
        device = self.precision.device
        unit = build_unit(
            self.settings, self.vocab_size, self.labels, device, NamedGenerators(0), load_weights=False,
            precision=self.precision, num_layers=num_layers,
        )  # fmt: skip
        if self.settings.runtime.compile is not False:
            unit.compile_loss()
        unit.train()
        return Step(
            unit, self.settings.optimizer.build(unit), self.precision, self.micro_batch_size, timer=timer,
            keeps_gradients=self.settings.runtime.cuda_graphs,
        )  # fmt: skip
