"""Building modules without filling their parameters."""

from collections.abc import Mapping
from typing import Any

from torch.overrides import TorchFunctionMode

RANDOM = {"normal_", "uniform_", "kaiming_uniform_", "trunc_normal_"}  # what torch's modules and ours are filled by


class SkipInitMode(TorchFunctionMode):
    """Within it random numbers are not drawn: for modules that have no data, or get it later.

    Torch would do it even for tensors of the meta device, in Python, and import its compiler for that.
    """

    def __torch_function__(
        self,
        function: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__name__", "") in RANDOM:
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)
