"""Construction of modules without initialising their parameters."""

from collections.abc import Mapping
from typing import Any

from torch.overrides import TorchFunctionMode

RANDOM = {"normal_", "uniform_", "kaiming_uniform_", "trunc_normal_"}  # the initialisers of torch's modules and ours


class SkipInitMode(TorchFunctionMode):
    """A mode without random initialisation, for modules that have no data or get it later.

    torch would initialise even tensors of the meta device, in Python, and import its compiler for that.
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
