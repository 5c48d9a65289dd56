"""Arithmetic of the forward and backward pass.  Master weights and optimizer state stay fp32."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from enum import Enum

import torch
from torch import Tensor

from llmtrain.base.options import Option
from llmtrain.base.stored_files import COUNT, NUMBER, check_kinds, refuse


class Residual(Enum):
    """The type of the residual stream and the norms; a norm computes its statistics in fp32 in both."""

    fp32 = "fp32"
    bf16 = "bf16"


class PrecisionConfig(Option, ABC):
    """Contract of ``precision=...``."""

    @property
    def has_low_residual(self) -> bool:
        """True if the residual stream and the norms have the dtype of matrix products."""
        return False

    @abstractmethod
    def build(self, device: torch.device) -> "Precision":
        """Build the arithmetic for ``device``.  Raises ValueError if the device does not support it."""

    def inference(self, device: torch.device) -> "Precision":
        """Build the arithmetic for generation and evaluation, also on devices that cannot train in this precision."""
        return self.build(device)


class LossScaler:
    """Dynamic loss scaling for fp16 (Micikevicius et al. 2018, section 3.2), all of it on the device.

    The loss is multiplied by ``scale`` before backward.  A step whose gradients overflow is skipped and halves the
    scale; ``growth_interval`` good steps in a row double it.
    """

    def __init__(self, device: torch.device, initial_scale: float, growth_interval: int) -> None:
        self.scale = torch.full((), initial_scale, dtype=torch.float32, device=device)
        self.good_steps = torch.zeros((), dtype=torch.int32, device=device)
        self.growth_interval = growth_interval

    def update(self, found_inf: Tensor) -> None:
        """Update the scale after a step; ``found_inf`` is 1.0 if the step was skipped, else 0.0."""
        skipped = found_inf > 0
        good_steps = torch.where(skipped, 0, self.good_steps + 1)
        grow = good_steps >= self.growth_interval
        factor = torch.where(skipped, 0.5, torch.where(grow, 2.0, 1.0))
        self.scale = (self.scale * factor).clamp(max=2.0**24)
        self.good_steps = torch.where(grow, 0, good_steps).to(torch.int32)


class Precision:
    """Arithmetic in use: the ``dtype`` of matrix products, and a ``scaler`` if the dtype needs one."""

    def __init__(
        self,
        name: str,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        *,
        matmul: str = "highest",
        scaler: LossScaler | None = None,
    ) -> None:
        self.name = name
        self.device = device
        self.dtype = dtype
        self.matmul = matmul
        self.scaler = scaler
        self.notice = ""  # a message for the start of a run
        self.is_compiled = False  # the layers that :meth:`apply` has changed run compiled

    def apply(self, blocks: torch.nn.Module) -> None:
        """Change in place how the layers in ``blocks`` compute while gradients are recorded; names and weights stay.

        Raises ValueError if no layer can be changed.
        """

    @contextmanager
    def arithmetic(self) -> Iterator[None]:
        """Set the algorithm of fp32 matrix products for the duration of the run."""
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(self.matmul)
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)

    def autocast(self) -> AbstractContextManager:
        """Context: matrix products in ``dtype``; norms, softmax, the residual stream and the loss in fp32.

        Two exceptions: :func:`llmtrain.kernels.dropout.attend_with_dropout`, on a CPU, and
        :attr:`PrecisionConfig.has_low_residual`.
        """
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    @contextmanager
    def constant_weights(self, passes: int) -> Iterator[None]:
        """Context of ``passes`` forward and backward passes without an update: each weight is cast once for all.

        autocast keeps casts until its outermost context ends.  That is this one, and it is disabled: backward, which
        runs outside of :meth:`autocast`, computes as it does without it.
        """
        shares = passes > 1 and self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype, enabled=False) if shares else nullcontext():
            yield

    def scale(self, loss: Tensor) -> Tensor:
        return loss if self.scaler is None else loss * self.scaler.scale

    def unscale(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Divide the gradients by the loss scale, in place; before clipping."""
        if self.scaler is not None:
            gradients = [p.grad for p in parameters if p.grad is not None]
            torch._foreach_mul_(gradients, self.scaler.scale.reciprocal())

    def state_dict(self) -> dict[str, float]:
        """State to resume from; waits for the device."""
        if self.scaler is None:
            return {}
        return {"scale": self.scaler.scale.item(), "good_steps": self.scaler.good_steps.item()}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue with the scale of a checkpoint.  Raises StoredFileError if it holds none."""
        if self.scaler is not None and state:
            check_kinds(state, {"scale": NUMBER, "good_steps": COUNT}, "scaler")
            if not {"scale", "good_steps"} <= state.keys():
                refuse("scaler", "has no scale and good_steps")
            self.scaler.scale.fill_(state["scale"])
            self.scaler.good_steps.fill_(int(state["good_steps"]))
