"""The arithmetic of forward and backward.  Master weights and optimizer state stay fp32."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from llmtrain.base.options import Option


class PrecisionConfig(Option, ABC):
    """Contract of ``precision=...``."""

    @abstractmethod
    def build(self, device: torch.device) -> "Precision":
        """The arithmetic on ``device``.  Raises ValueError where the device does not have it."""

    def inference(self, device: torch.device) -> "Precision":
        """The arithmetic of a trained model's text, which may be wanted on a device that could not train it."""
        return self.build(device)


class LossScaler:
    """Dynamic loss scaling for fp16 (Micikevicius et al. 2018, section 3.2), all of it on the device.

    The loss is multiplied by ``scale`` before backward.  A step whose gradients overflow is refused and halves the
    scale; ``growth_interval`` good steps in a row double it.
    """

    def __init__(self, device: torch.device, initial_scale: float, growth_interval: int) -> None:
        self.scale = torch.full((), initial_scale, dtype=torch.float32, device=device)
        self.good_steps = torch.zeros((), dtype=torch.int32, device=device)
        self.growth_interval = growth_interval

    def update(self, found_inf: Tensor) -> None:
        """Account for a step; ``found_inf`` is 1.0 where it was refused, else 0.0."""
        refused = found_inf > 0
        good_steps = torch.where(refused, 0, self.good_steps + 1)
        grow = good_steps >= self.growth_interval
        factor = torch.where(refused, 0.5, torch.where(grow, 2.0, 1.0))
        self.scale = (self.scale * factor).clamp(max=2.0**24)
        self.good_steps = torch.where(grow, 0, good_steps).to(torch.int32)


class Precision:
    """Arithmetic in use: ``dtype`` of matrix products, and a ``scaler`` where the dtype needs one."""

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
        self.notice = ""  # what there is to say about it at the start of a run

    def apply(self, blocks: torch.nn.Module) -> None:
        """Change in place how the layers in ``blocks`` compute while gradients are recorded; names and weights stay.

        Raises ValueError where none of them can.
        """

    @contextmanager
    def arithmetic(self) -> Iterator[None]:
        """Set how fp32 matrix products are done, for the duration of the run."""
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(self.matmul)
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)

    def autocast(self) -> AbstractContextManager:
        """Matrix products in ``dtype``; layer norms, softmax, the residual stream and the loss in fp32."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def scale(self, loss: Tensor) -> Tensor:
        """The loss to call ``backward`` on."""
        return loss if self.scaler is None else loss * self.scaler.scale

    def unscale(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Divide the gradients by the loss scale, in place; before clipping."""
        if self.scaler is not None:
            gradients = [p.grad for p in parameters if p.grad is not None]
            torch._foreach_mul_(gradients, self.scaler.scale.reciprocal())

    def state_dict(self) -> dict[str, float]:
        """What resuming needs; waits for the device."""
        if self.scaler is None:
            return {}
        return {"scale": self.scaler.scale.item(), "good_steps": self.scaler.good_steps.item()}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue with the scale of a checkpoint."""
        if self.scaler is not None and state:
            self.scaler.scale.fill_(state["scale"])
            self.scaler.good_steps.fill_(int(state["good_steps"]))
