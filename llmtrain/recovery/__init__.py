"""Spikes and steps that are not finite: how they are noticed, and what is done about them.

The protocol, step by step, between the loop and a :class:`Recovery`:

1. Before step ``s`` (1-based) the loop multiplies the schedule's rate by ``rate_factor(s - 1)``.
2. After backward and clipping it calls ``judge(loss, norm)``, which stays on the device.  The optimizer is told
   ``"refused"``, the loss scaler ``"non_finite"`` (a spike is no overflow: it must not change the scale), and all the
   scalars go through the readback with the step's other numbers.
3. When a step's numbers have come back the loop calls ``record(Verdict.of(...))``: every step, once, in order.
4. After step ``s`` was launched and the notes made that have come in, the loop calls ``decide(s)``, before a save
   that may be due, and carries out the actions in their order.  Only steps up to ``s - LAG`` are decided upon, so the
   run does not depend on how early their numbers happened to arrive; the readback must have delivered those.
5. A :class:`Rollback` is answered by ``rolled_back(to_step, stored)``, once model, optimizer and
   ``TrainState`` are those of the checkpoint and the readback is empty: the records under way belong to steps that are
   undone, and are dropped, not noted.  ``stored`` is what ``state_dict`` had given to that checkpoint.  The
   actions that it returns are carried out as well.  The object itself is not reloaded: what it has tried so far must
   survive the rollback, and so must the position in the data, which only moves on.
6. A checkpoint stores ``state_dict()`` after all of the above for its step, with every step up to it noted; a
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

# Steps: the decision about step s is taken when step s + LAG has been launched, on every device.  Equals the depth of
# the readback, which by then has waited for the numbers of step s anyway.
LAG = 2


@dataclass(frozen=True)
class Skip:
    """Leave out so many batches of data from where the run is."""

    batches: int


@dataclass(frozen=True)
class Rollback:
    """Go back to the newest whole checkpoint of at most ``before_step``, with other data.

    The data goes on ``batches`` batches behind the furthest position that the run has reached.
    """

    before_step: int
    batches: int
    first_refused_step: int


@dataclass(frozen=True)
class RateReduction:
    """The schedule's rate is multiplied by ``factor`` for the coming ``steps`` steps.

    To be recorded only: :meth:`Recovery.rate_factor` knows already.
    """

    factor: float
    steps: int


@dataclass(frozen=True)
class Failure:
    """Stop the run as failed.

    ``reason`` explains to the user, in whole sentences, at which step what happened, what was tried and which keys
    could help; how to resume, which needs the run's directory, is the loop's to add.
    """

    reason: str


Action = Skip | Rollback | RateReduction | Failure


@dataclass(frozen=True)
class Verdict:
    """One step as it was judged, in plain numbers of the host."""

    step: int  # 1-based
    position: int  # of the batch's first sequence in the data order
    batch_size: int  # sequences
    loss: float
    grad_norm: float
    refused: bool  # the update did not happen
    scaler_overflow: bool  # refused only since the loss scale was too large for fp16, which lowers it: harmless
    loss_limit: float  # what the loss was compared with; inf: with nothing
    grad_norm_limit: float

    @classmethod
    def of(cls, step: int, position: int, batch_size: int, values: Mapping[str, float]) -> Self:
        """The verdict on a step whose numbers have come back: ``loss``, ``grad_norm``, ``refused``, where there is a
        loss scaler ``loss_scale`` (that of the step), and what else :meth:`Recovery.judge` gave."""
        loss, grad_norm, refused = values["loss"], values["grad_norm"], bool(values["refused"])
        overflow = refused and math.isfinite(loss) and not math.isfinite(grad_norm) and values.get("loss_scale", 0) > 1
        limits = (values.get("loss_limit", math.inf), values.get("grad_norm_limit", math.inf))
        return cls(step, position, batch_size, loss, grad_norm, refused, overflow, *limits)

    @property
    def finite(self) -> bool:
        """Whether loss and gradient norm are numbers."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)

    @property
    def reason(self) -> str:
        """Why the step was refused, as in "loss 9.1 (limit 4.2)"; empty if it was not."""
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
    """What ``recovery=...`` builds; the module's docstring tells how the loop uses it."""

    @abstractmethod
    def judge(self, loss: Tensor, norm: Tensor) -> dict[str, Tensor]:
        """Judge a step by its loss and gradient norm, 0-dimensional on the device, without waiting for it.

        Returns 0-dimensional tensors: ``refused`` (fp32, 1.0: the update must not happen), ``non_finite`` (fp32, 1.0:
        loss or norm is not finite, so refused as well) and what else is to be read back with the step.
        """

    @abstractmethod
    def record(self, verdict: Verdict) -> None:
        """Take note of a step whose numbers have come back: each step once, in order."""

    @abstractmethod
    def decide(self, step: int) -> list[Action]:
        """What to do, now that ``step`` (1-based) has been launched; by the steps up to ``step - LAG`` alone."""

    def rate_factor(self, step: int) -> float:
        """By how much to multiply the learning rate of ``step`` (0-based), the next one to be launched."""
        return 1.0

    @abstractmethod
    def rolled_back(self, to_step: int | None, stored: Mapping[str, Any] | None) -> list[Action]:
        """Go on from the checkpoint of ``to_step``, with its ``stored`` :meth:`state_dict` (None: it has none).

        ``to_step`` None: no checkpoint was old enough, the run is where it was; the actions are those of the next rung.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What resuming needs, in JSON's values without NaN; waits for the device."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint; what the option that wrote it did not know stays as new."""


class RecoveryConfig(Option, ABC):
    """Contract of ``recovery=...``."""

    examples: int  # offending sequences to find and decode for each event; 0: none

    @abstractmethod
    def build(self, device: torch.device, *, judges_spikes: bool = True) -> Recovery:
        """A fresh :class:`Recovery` that judges on ``device``.

        Without ``judges_spikes`` only what is not finite is refused: the loss of a handful of targets, one a text,
        scatters so far that no limit tells a spike from a hard text.
        """
