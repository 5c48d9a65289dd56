"""One optimizer composed of several."""

from collections.abc import Sequence
from typing import Any

import torch

from llmtrain.optimizer import update


class CompositeOptimizer(torch.optim.Optimizer):
    """One optimizer made of ``parts`` with disjoint parameters.

    ``param_groups`` holds the parts' own group dictionaries, so a value set on a group (its learning rate) reaches the
    part, and all parts keep their state in the one dictionary ``state``.
    """

    # each part skips a step, on the device if it can
    _step_supports_amp_scaling = True

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = parts
        for part in parts:
            self.state.update(part.state)
        self._share()

    def _share(self) -> None:
        """Give every part its groups and the common state."""
        groups = iter(self.param_groups)
        for part in self.parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state

    def step(self) -> None:  # type: ignore[override]  # no closures
        """Step every part; the attributes ``found_inf`` and ``grad_scale`` are those of all parts."""
        for part in self.parts:
            if hasattr(self, "found_inf"):
                update(part, self.found_inf, getattr(self, "grad_scale", None))
            else:
                part.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()
