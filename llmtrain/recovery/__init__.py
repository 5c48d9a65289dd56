"""Recovery from loss spikes and from steps that are not finite.

The protocol between the loop and a :class:`Recovery`:

1. Before step ``s`` (1-based) the loop multiplies the schedule's rate by ``rate_factor(s - 1)``.
2. After backward and clipping it calls ``judge(loss, norm)``, which stays on the device.  The optimizer reads
   ``"refused"``, the loss scaler ``"non_finite"`` (a spike is no overflow and must not change the scale), and all the
   scalars go through the readback with the step's other numbers.
3. When a step's numbers have arrived the loop calls ``record(Verdict.of(...))``: every step, once, in order.
4. After step ``s`` is launched and the verdicts that have arrived are recorded, the loop calls ``decide(s)``, before
   a save that may be due, and carries out the actions in their order.  ``decide`` considers only steps up to
   ``s - LAG``, which the readback must have delivered, so the run does not depend on how early numbers arrive.
5. A :class:`Rollback` is answered by ``rolled_back(to_step, stored)``, once model, optimizer and
   ``TrainState`` are those of the checkpoint and the readback is empty: pending records belong to steps that are
   undone, and are dropped, not recorded.  ``stored`` is the ``state_dict`` in that checkpoint.  The loop carries out
   the actions that the call returns as well.  The object itself is not reloaded: its past attempts must survive the
   rollback, and so must the position in the data, which only moves forward.
6. A checkpoint stores ``state_dict()`` after all of the above for its step, with every step up to it recorded; a
   resumed run gives it to ``load_state_dict`` and decides as the uninterrupted run would have.

``on`` and ``off`` are booleans to YAML: in a defaults list they are written ``- recovery: "on"``.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from llmtrain.base.options import Option

# Steps: step s is decided on when step s + LAG has been launched, on every device.  Equals the depth of the readback,
# which by then has waited for the numbers of step s anyway.
LAG = 2


@dataclass(frozen=True)
class Skip:
    """Leave out so many batches of data from the run's position on."""

    batches: int


@dataclass(frozen=True)
class Rollback:
    """Return to the newest intact checkpoint of at most ``before_step``, with other data.

    The data continues ``batches`` batches behind the furthest position that the run has reached.
    """

    before_step: int
    batches: int


@dataclass(frozen=True)
class RateReduction:
    """The schedule's rate is multiplied by ``factor`` for the next ``steps`` steps.

    The loop only records this: :meth:`Recovery.rate_factor` already includes it.
    """

    factor: float
    steps: int


@dataclass(frozen=True)
class Failure:
    """The end of a run that cannot recover.

    ``reason`` tells the user, in whole sentences, the step, the event, the attempts and the keys that could help; the
    loop adds how to resume, which needs the run's directory.
    """

    reason: str


Action = Skip | Rollback | RateReduction | Failure


@dataclass(frozen=True)
class Verdict:
    """The judgement of one step, in plain numbers on the host."""

    step: int  # 1-based
    position: int  # of the batch's first sequence in the data order
    batch_size: int  # sequences
    loss: float
    grad_norm: float
    refused: bool  # the update did not happen
    scaler_overflow: bool  # refused only because fp16's loss scale was too large, and is now lowered: harmless
    loss_limit: float  # of the loss; inf: none
    grad_norm_limit: float

    @classmethod
    def of(cls, step: int, position: int, batch_size: int, values: Mapping[str, float]) -> Self:
        """The verdict on a step from the numbers read back: ``loss``, ``grad_norm``, ``refused``, with a loss scaler
        ``loss_scale`` (that of the step), and the other results of :meth:`Recovery.judge`."""
        loss, grad_norm, refused = values["loss"], values["grad_norm"], bool(values["refused"])
        overflow = refused and math.isfinite(loss) and not math.isfinite(grad_norm) and values.get("loss_scale", 0) > 1
        limits = (values.get("loss_limit", math.inf), values.get("grad_norm_limit", math.inf))
        return cls(step, position, batch_size, loss, grad_norm, refused, overflow, *limits)

    @property
    def finite(self) -> bool:
        """True if loss and gradient norm are finite."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)

    @property
    def reason(self) -> str:
        """The reason for refusing the step, as "loss 9.1 (limit 4.2)"; empty if it was accepted."""
        if not self.refused:
            return ""
        if not self.finite:
            return f"loss {self.loss:.4g} and gradient norm {self.grad_norm:.4g}, not finite"
        parts = []
        if self.loss > self.loss_limit:
            parts.append(f"loss {self.loss:.4g} (limit {self.loss_limit:.4g})")
        if self.grad_norm > self.grad_norm_limit:
            parts.append(f"gradient norm {self.grad_norm:.4g} (limit {self.grad_norm_limit:.4g})")
        return " and ".join(parts)


class Recovery(ABC):
    """The state of a recovery during a run; the module's docstring describes its use by the loop."""

    @abstractmethod
    def judge(self, loss: Tensor, norm: Tensor) -> dict[str, Tensor]:
        """Judge a step by its loss and gradient norm, 0-dimensional on the device, without waiting for it.

        Returns 0-dimensional tensors: ``refused`` (fp32, 1.0: the update must not happen), ``non_finite`` (fp32, 1.0:
        loss or norm is not finite, so refused as well) and any other scalars to read back with the step.
        """

    @abstractmethod
    def record(self, verdict: Verdict) -> None:
        """Record a step whose numbers have arrived: each step once, in order."""

    @abstractmethod
    def decide(self, step: int) -> list[Action]:
        """The actions to take once ``step`` (1-based) is launched, decided from steps up to ``step - LAG`` only."""

    def rate_factor(self, step: int) -> float:
        """The factor on the learning rate of ``step`` (0-based), the next one to be launched."""
        return 1.0

    @abstractmethod
    def rolled_back(self, to_step: int | None, stored: Mapping[str, Any] | None) -> list[Action]:
        """Continue from the checkpoint of ``to_step``, with its ``stored`` :meth:`state_dict` (None: it has none).

        ``to_step`` None: no checkpoint was old enough and nothing changed; the actions are those of the next rung.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """The state that a resume needs, in JSON values without NaN; waits for the device."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the state of a checkpoint; values that it lacks, from another option, keep their initial value."""


class RecoveryConfig(Option, ABC):
    """Contract of ``recovery=...``."""

    examples: int  # worst sequences to find and decode for each event; 0: none

    @abstractmethod
    def build(self, device: torch.device, *, judges_spikes: bool = True) -> Recovery:
        """Build a new :class:`Recovery` that judges on ``device``.

        Without ``judges_spikes`` only steps that are not finite are refused: with one target a text, the loss of a
        step varies so much that no limit can tell a spike from a hard text.
        """
