"""Gradient clipping on the device; the host never waits for it."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple, Protocol

from torch import Tensor, nn

from llmtrain.base.options import Option


class ClipResult(NamedTuple):
    """Measurements of one clipping: 0-dimensional tensors on the gradients' device."""

    norm: Tensor  # fp32, global L2 norm of all gradients before clipping
    largest: Tensor | None  # fp32, largest absolute value of a single gradient element before clipping
    clipped: Tensor  # bool, whether any gradient was changed
    divisor: Tensor | None = None  # fp32, of all gradients in the update; None: they are clipped already


class Shares(Protocol):
    """The ranks that hold the parts of parameters: numbers about a part become numbers about the whole."""

    def sum_of_squares(self, squares: Tensor, names: Sequence[str]) -> Tensor:
        """Sum ``squares`` ``(parameters,)``, of this rank's elements of each parameter, over the whole tensors."""
        ...

    def total_norm(self, norms: Tensor, names: Sequence[str]) -> Tensor:
        """The norm of all parameters together from the ``norms`` ``(parameters,)`` of those that this rank holds."""
        ...

    def largest(self, value: Tensor) -> Tensor:
        """The largest ``value``, 0-dimensional, of all ranks; NaN if one of them is."""
        ...


class Clipping(Option, ABC):
    """Contract of ``clipping=...``: called once a step, after accumulation and unscaling."""

    takes_shards: ClassVar[bool] = False  # True: the rule is right where a rank holds a part of each parameter

    start_step: int  # steps before this one (0-based) are measured, not clipped

    @abstractmethod
    def __call__(
        self,
        parameters: Sequence[tuple[str, nn.Parameter]],
        step: int,
        *,
        largest: bool = True,
        over: Shares | None = None,
    ) -> ClipResult:
        """Clip the gradients of the named ``parameters``; parameters without a gradient are ignored.

        They are clipped in place, or by the ``divisor`` of the result, which the update must apply.  Without
        ``largest`` the largest element, another pass over the gradients, need not be measured.  A gradient that is not
        finite gives a norm that is not finite; the loop then refuses the step.

        With ``over`` the gradients are this rank's parts of them.  Results are about the whole gradients, the same bits
        on every rank, and every rank makes this call.
        """

    def check_parameters(self, names: Sequence[str]) -> None:
        """Raise ValueError before training if the option names parameters that do not exist."""
